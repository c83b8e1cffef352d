"""Where an object's centre lies: points, polygons and several of them, as GeoJSON (RFC 7946) writes them.

Coordinates are pixels. A geometry without a usable centre raises a UserError that says why.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UserError

if TYPE_CHECKING:
    import shapely

FAR = 1e9  # pixels: beyond any slide
LARGEST = 1000  # pixels of level 0 from side to side: a mitotic figure has about 60 at 0.25 um/px
CORNERS = 2000  # of a figure's ring; a traced nucleus has about 100
NEAR = 32  # pixels between the parts of one figure: 8 µm at 0.25 µm/px
WIDE = 200  # pixels: 50 µm, more than any mitotic figure


def point(pair: Any) -> tuple[float, float]:
    """x and y of a GeoJSON position."""
    if not isinstance(pair, list | tuple) or len(pair) < 2:
        raise UserError(f"its position is {pair!r:.60}; expected x and y")
    return number("x", pair[0]), number("y", pair[1])


def number(name: str, value: Any) -> float:
    """A coordinate. UserError where it is not a finite number of pixels."""
    if type(value) is float and -FAR < value < FAR:
        return value  # as nearly all are
    try:
        parsed = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        parsed = math.nan
    if not abs(parsed) < FAR:
        raise UserError(f"{name} is {value!r:.40}; expected a finite number")
    return parsed


def ring(corners: Any, figure: bool) -> np.ndarray:
    """The corners (N, 2) of a closed ring: the first one is also the last."""
    if not isinstance(corners, list) or len(corners) < 3:
        raise UserError("its polygon has fewer than 3 corners; expected an outline")
    if figure and len(corners) > CORNERS:
        raise UserError(f"its polygon has {len(corners):,} corners; expected the outline of one mitotic figure")
    return np.array([point(corner) for corner in [*corners, corners[0]]])


def closed(geometry: Any) -> Any:
    """A line that ends where it begins as the Polygon that it draws: HALO exports all its outlines so."""
    line = geometry.get("coordinates") if isinstance(geometry, dict) and geometry.get("type") == "LineString" else None
    if isinstance(line, list) and len(line) > 3 and line[0] == line[-1]:
        return geometry | {"type": "Polygon", "coordinates": [line]}
    return geometry


def outline(geometry: Any, figure: bool = True) -> shapely.Geometry:
    """A Polygon or MultiPolygon, made valid: all that its outer rings go around is inside, holes are not.

    Lines drawn by hand, and traced nuclei with a spur or a loop, cross themselves; where they go around twice it is
    inside, as for QuPath (PolygonROI.contains). figure: of one mitotic figure, which has few corners and may be a line
    """
    import shapely  # here and below, so that `slides` can say that it is missing

    geometry = closed(geometry)
    if not isinstance(geometry, dict) or geometry.get("type") not in ("Polygon", "MultiPolygon"):
        raise UserError("it has no outline; expected a Polygon or MultiPolygon")
    parts = geometry.get("coordinates")
    parts = [parts] if geometry["type"] == "Polygon" else parts
    if not isinstance(parts, list) or not parts or not all(isinstance(part, list) and part for part in parts):
        raise UserError(f"its {geometry['type']} has no corners; expected an outline")
    polygons = [[ring(corners, figure) for corners in part] for part in parts]
    shape = shapely.MultiPolygon([(rings[0], rings[1:]) for rings in polygons])
    if not shape.is_valid:
        shape = shapely.make_valid(shape, method="structure", keep_collapsed=figure)
    if shape.is_empty:
        raise UserError("its polygon has no area; expected an outline with an inside")
    return shape


def figures(geometry: dict[str, Any]) -> list[dict[str, Any]]:
    """A MultiPolygon as one geometry for each figure: some programs write all cells of a class as one object.

    Parts closer than NEAR are one figure, as the two plates of an anaphase or telophase are, unless so many are close
    that together they are larger than WIDE: then each part is a figure.
    """
    import shapely

    parts = geometry.get("coordinates")
    if not isinstance(parts, list) or len(parts) < 2:
        return [geometry]
    try:
        shapes = [outline({"type": "Polygon", "coordinates": part}) for part in parts]
    except UserError:
        return [geometry]  # `centre` says why
    groups = list(range(len(parts)))  # of each part, the number of the first part of its figure
    pairs = shapely.STRtree(shapes).query(shapes, "dwithin", distance=NEAR).T
    for first, second in sorted(tuple(pair) for pair in pairs.tolist()):
        if groups[first] != groups[second]:
            low, high = sorted((groups[first], groups[second]))
            groups = [low if group == high else group for group in groups]
    result: list[dict[str, Any]] = []
    for group in dict.fromkeys(groups):
        numbers = [n for n, of in enumerate(groups) if of == group]
        left, top, right, bottom = shapely.total_bounds([shapes[n] for n in numbers])
        together = [numbers] if max(right - left, bottom - top) <= WIDE else [[n] for n in numbers]
        result += [geometry | {"coordinates": [parts[n] for n in some]} for some in together]
    return result


def centre(geometry: Any) -> tuple[float, float]:
    """The centre of a figure, in pixels. UserError where it has none, or cannot be a mitotic figure."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind == "Point":
        return point(geometry.get("coordinates"))
    if kind == "LineString":
        geometry = closed(geometry)
        kind = geometry["type"]
    if kind not in ("Polygon", "MultiPolygon"):
        raise UserError(f"its geometry is {kind!r:.40}; expected Point, MultiPoint, Polygon or MultiPolygon")
    figure = outline(geometry)
    left, top, right, bottom = figure.bounds
    extent = max(right - left, bottom - top)
    if extent > LARGEST:
        raise UserError(
            f"it is {extent:,.0f} pixels across; expected a mitotic figure of up to {LARGEST:,}; choose with --class"
        )
    return figure.centroid.x, figure.centroid.y


def polygon(corners: list[list[float]]) -> dict[str, Any]:
    """The outline through `corners`, whose first and last may be the same. UserError where three do not differ."""
    if len({tuple(corner) for corner in corners}) < 3:
        raise UserError(f"its outline has {len(corners)} corners; expected three that differ, or more")
    return {"type": "Polygon", "coordinates": [corners if corners[0] == corners[-1] else [*corners, corners[0]]]}


def box(left: float, top: float, right: float, bottom: float) -> dict[str, Any]:
    """A rectangle as a Polygon."""
    return polygon([[left, top], [right, top], [right, bottom], [left, bottom]])
