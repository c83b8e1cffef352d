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
CORNERS = 2000  # of a ring; a traced nucleus has about 100


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


def ring(corners: Any, figure: bool = True) -> np.ndarray:
    """The corners (N, 2) of a closed ring, the first one not repeated. UserError where it crosses itself.

    figure: the ring is a mitotic figure's; a region's may have more than CORNERS corners, and cross itself
    """
    if not isinstance(corners, list) or len(corners) < 3:
        raise UserError("its polygon has fewer than 3 corners; expected an outline")
    if figure and len(corners) > CORNERS:
        raise UserError(f"its polygon has {len(corners):,} corners; expected the outline of one mitotic figure")
    found = np.array([point(corner) for corner in corners])
    if len(found) > 3 and (found[0] == found[-1]).all():
        found = found[:-1]
    if figure and crosses_itself(found):
        raise UserError("its polygon crosses itself; expected an outline with an inside")
    return found


def crosses_itself(corners: np.ndarray) -> bool:
    """Whether any two edges of a ring (N, 2) cross; edges that only touch do not, as traced pixels often do."""
    a, b = corners, np.roll(corners, -1, 0)

    def side(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        cross = (q - p)[:, None, 0] * (r[None, :, 1] - p[:, None, 1])
        sides: np.ndarray = np.sign(cross - (q - p)[:, None, 1] * (r[None, :, 0] - p[:, None, 0]))
        return sides

    starts, ends = side(a, b, a), side(a, b, b)  # (N, N): on which side of edge i the corners of edge j lie
    apart = starts * ends < 0
    return bool((apart & apart.T).any())


def polygons(geometry: dict[str, Any], figure: bool = True) -> list[list[np.ndarray]]:
    """The rings of each polygon of a Polygon or MultiPolygon, the outer one first."""
    if not isinstance(geometry, dict) or geometry.get("type") not in ("Polygon", "MultiPolygon"):
        raise UserError("it has no outline; expected a Polygon or MultiPolygon")
    several = geometry.get("coordinates")
    several = [several] if geometry["type"] == "Polygon" else several
    if not isinstance(several, list) or not several or not all(isinstance(one, list) and one for one in several):
        raise UserError(f"its {geometry['type']} has no corners; expected an outline")
    return [[ring(corners, figure) for corners in one] for one in several]


def outline(geometry: Any, figure: bool = True) -> shapely.Geometry:
    """A Polygon or MultiPolygon, made valid: its inside is what QuPath fills, even where edges touch or cross."""
    import shapely  # here, so that `slides` can say that it is missing

    rings = polygons(geometry, figure)
    return shapely.make_valid(shapely.MultiPolygon([(one[0], one[1:]) for one in rings]))


def centre(geometry: Any) -> tuple[float, float]:
    """The centre of a figure, in pixels. UserError where it has none, or cannot be a mitotic figure."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind == "Point":
        return point(geometry.get("coordinates"))
    if kind not in ("Polygon", "MultiPolygon"):
        raise UserError(f"its geometry is {kind!r:.40}; expected Point, MultiPoint, Polygon or MultiPolygon")
    figure = outline(geometry)
    left, top, right, bottom = figure.bounds
    if max(right - left, bottom - top) > LARGEST:
        raise UserError(
            f"it is {max(right - left, bottom - top):,.0f} pixels across; expected a mitotic figure of up to "
            f"{LARGEST:,}; choose with --class"
        )
    middle = figure.centroid
    return middle.x, middle.y


def box(left: float, top: float, right: float, bottom: float) -> dict[str, Any]:
    """A rectangle as a Polygon."""
    corners = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    return {"type": "Polygon", "coordinates": [corners]}
