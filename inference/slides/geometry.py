"""Where an object's centre lies: points, polygons and several of them, as GeoJSON (RFC 7946) writes them.

Coordinates are pixels. A geometry without a usable centre raises a UserError that says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError

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

    figure: the ring is a mitotic figure's; a region may have more than CORNERS corners, and is then not checked
    """
    if not isinstance(corners, list) or len(corners) < 3:
        raise UserError("its polygon has fewer than 3 corners; expected an outline")
    if figure and len(corners) > CORNERS:
        raise UserError(f"its polygon has {len(corners):,} corners; expected the outline of one mitotic figure")
    found = np.array([point(corner) for corner in corners])
    if len(found) > 3 and (found[0] == found[-1]).all():
        found = found[:-1]
    if len(found) <= CORNERS and crosses_itself(found):
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


def area_and_centre(corners: np.ndarray) -> tuple[float, np.ndarray]:
    """Area in square pixels and centre (2,) of a ring (N, 2) that does not cross itself.

    The centre is the mean corner if the area is zero, or if the formula gives a point outside the ring's box.
    """
    origin = corners.mean(0)  # close to the ring, for precision
    p = corners - origin
    q = np.roll(p, -1, 0)
    cross = p[:, 0] * q[:, 1] - q[:, 0] * p[:, 1]
    area = float(cross.sum()) / 2
    if abs(area) < 1e-6:
        return 0.0, origin
    centre = ((p + q) * cross[:, None]).sum(0) / (6 * area)
    if (centre < p.min(0)).any() or (centre > p.max(0)).any():  # touching lobes of opposite orientation
        centre = np.zeros(2)
    return abs(area), origin + centre


def polygons(geometry: dict[str, Any], figure: bool = True) -> list[list[np.ndarray]]:
    """The rings of each polygon of a Polygon or MultiPolygon, the outer one first."""
    if not isinstance(geometry, dict) or geometry.get("type") not in ("Polygon", "MultiPolygon"):
        raise UserError("it has no outline; expected a Polygon or MultiPolygon")
    several = geometry.get("coordinates")
    several = [several] if geometry["type"] == "Polygon" else several
    if not isinstance(several, list) or not several or not all(isinstance(one, list) and one for one in several):
        raise UserError(f"its {geometry['type']} has no corners; expected an outline")
    return [[ring(corners, figure) for corners in one] for one in several]


def centre(geometry: Any) -> tuple[float, float]:
    """The centre of a figure, in pixels. UserError where it has none, or cannot be a mitotic figure."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind == "Point":
        return point(geometry.get("coordinates"))
    if kind not in ("Polygon", "MultiPolygon"):
        raise UserError(f"its geometry is {kind!r:.40}; expected Point, MultiPoint, Polygon or MultiPolygon")
    return centre_of(polygons(geometry))


def centre_of(shapes: Sequence[Sequence[np.ndarray]]) -> tuple[float, float]:
    """The centre of polygons' area, holes left out; of their corners if the area is zero."""
    outer = np.concatenate([rings[0] for rings in shapes])
    extent = float(np.ptp(outer, axis=0).max())
    if extent > LARGEST:
        raise UserError(
            f"it is {extent:,.0f} pixels across; expected a mitotic figure of up to {LARGEST:,}; choose with --class"
        )
    parts = [(sign, *area_and_centre(one)) for rings in shapes for sign, one in signed(rings)]
    total = sum(sign * area for sign, area, _ in parts)
    if total <= 0:
        x, y = outer.mean(0)
    else:
        x, y = sum((sign * area * where for sign, area, where in parts), np.zeros(2)) / total
    return float(x), float(y)


def signed(rings: Sequence[np.ndarray]) -> list[tuple[int, np.ndarray]]:
    return [(1 if n == 0 else -1, one) for n, one in enumerate(rings)]


def area(geometry: dict[str, Any]) -> float:
    """Square pixels of a Polygon or MultiPolygon of any size, holes left out."""
    return sum(sign * area_and_centre(one)[0] for rings in polygons(geometry, False) for sign, one in signed(rings))


def inside(geometry: dict[str, Any], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which of the points x, y (N,) lie in a Polygon or MultiPolygon: an odd number of edges to their right."""
    odd = np.zeros(len(x), bool)
    for corners in (one for rings in polygons(geometry, False) for one in rings):
        for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
            between = (ay > y) != (by > y)
            with np.errstate(divide="ignore", invalid="ignore"):
                odd ^= between & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return odd


def box(left: float, top: float, right: float, bottom: float) -> dict[str, Any]:
    """A rectangle as a Polygon."""
    corners = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    return {"type": "Polygon", "coordinates": [corners]}
