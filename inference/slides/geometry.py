"""Where an object's centre lies: points, polygons and several of them, as GeoJSON (RFC 7946) writes them.

Coordinates are pixels. A geometry without a usable centre raises a UserError that says why.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    import shapely

FAR = 1e9  # pixels: beyond any slide
LARGEST = 1000  # pixels of level 0 from side to side: a mitotic figure has about 60 at 0.25 um/px
CORNERS = 2000  # of a figure's ring; a traced nucleus has about 100


def point(pair: Any) -> tuple[float, float]:
    """x and y of a GeoJSON position."""
    if not isinstance(pair, list | tuple) or len(pair) < 2:
        raise UserError(f"its position is {pair!r:.60}; expected x and y")
    return number("x", pair[0]), number("y", pair[1])


def number(name: str, value: Any) -> float:
    """A coordinate. UserError where it is not a finite number of pixels."""
    try:
        found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not abs(found) < FAR:
        raise UserError(f"{name} is {value!r:.40}; expected a number of level-0 pixels")
    return found


def ring(corners: Any, figure: bool) -> np.ndarray:
    """The corners (N, 2) of a closed ring: the first one is also the last."""
    if not isinstance(corners, list) or len(corners) < 3:
        raise UserError("its polygon has fewer than 3 corners; expected an outline")
    if figure and len(corners) > CORNERS:
        raise UserError(f"its polygon has {len(corners):,} corners; expected the outline of one mitotic figure")
    return np.array([point(corner) for corner in [*corners, corners[0]]])


def crosses_itself(corners: np.ndarray) -> bool:
    """Whether any two edges of a closed ring (N, 2) cross; edges that only touch do not, as traced pixels often do.

    shapely's `is_valid_reason` has one name for edges that cross and for edges that run along each other.
    """
    import shapely  # here and below, so that `slides` can say that it is missing

    edges = shapely.linestrings(np.stack([corners[:-1], corners[1:]], 1))
    return bool(shapely.STRtree(edges).query(edges, "crosses").size)


def outline(geometry: Any, figure: bool = True) -> shapely.Geometry:
    """A Polygon or MultiPolygon, made valid: all that its outer rings go around is inside, holes are not.

    figure: a mitotic figure that crosses itself is refused, because its centre would be a guess. A region may cross
    itself, as lines drawn by hand do; where they go around twice it is inside, as for QuPath (PolygonROI.contains).
    """
    import shapely

    if not isinstance(geometry, dict) or geometry.get("type") not in ("Polygon", "MultiPolygon"):
        raise UserError("it has no outline; expected a Polygon or MultiPolygon")
    several = geometry.get("coordinates")
    several = [several] if geometry["type"] == "Polygon" else several
    if not isinstance(several, list) or not several or not all(isinstance(one, list) and one for one in several):
        raise UserError(f"its {geometry['type']} has no corners; expected an outline")
    polygons = [[ring(corners, figure) for corners in one] for one in several]
    found = shapely.MultiPolygon([(one[0], one[1:]) for one in polygons])
    if not found.is_valid:
        if figure and any(crosses_itself(one) for rings in polygons for one in rings):
            raise UserError("its polygon crosses itself; expected an outline with an inside")
        found = shapely.make_valid(found, method="structure", keep_collapsed=figure)  # a figure may be a line
    if found.is_empty:
        raise UserError("its polygon has no area; expected an outline with an inside")
    return found


def centre(geometry: Any) -> tuple[float, float]:
    """The centre of a figure, in pixels. UserError where it has none, or cannot be a mitotic figure."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind == "Point":
        return point(geometry.get("coordinates"))
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


def box(left: float, top: float, right: float, bottom: float) -> dict[str, Any]:
    """A rectangle as a Polygon."""
    corners = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    return {"type": "Polygon", "coordinates": [corners]}
