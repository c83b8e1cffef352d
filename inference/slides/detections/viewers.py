"""Files of slide viewers and of the challenge: ASAP, Aperio, NDPA, HistomicsUI, wholeslidedata, points of Track 1.

Sources: ASAP's XmlRepository, Aperio ImageScope's XML, NDPA files that programs for NDP.view write, large_image's
annotation schema, wholeslidedata's WholeSlideAnnotation, and Grand Challenge's "Multiple points".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from xml.etree.ElementTree import Element

from ...errors import UserError
from .geometry import box, number, point, polygon
from .objects import GLASS, Feature, Frame, SlideObject, attempt, made


def is_xml(tag: str) -> Callable[[Any], bool]:
    return lambda document: isinstance(document, Element) and document.tag == tag


def shape(corners: list[list[float]]) -> Feature:
    """A point, or the outline through the corners."""
    if len(corners) == 1:
        return {"type": "Point", "coordinates": corners[0]}
    if len(corners) < 3:
        raise UserError(f"it has {len(corners)} points; expected one, or an outline")
    return polygon(corners)


def positions(elements: list[Element]) -> list[list[float]]:
    return [[number("X", element.get("X")), number("Y", element.get("Y"))] for element in elements]


def read_asap(document: Element) -> Iterator[SlideObject]:
    """ASAP_Annotations/Annotations/Annotation: a Dot, PointSet, Polygon, Rectangle or Spline of its group."""

    def read(where: str, annotation: Element, coordinates: list[Element]) -> SlideObject:
        group = annotation.get("PartOfGroup", "")
        kind = "" if group == "None" else group
        return SlideObject(where, made(shape(positions(coordinates)), annotation.get("Name") or where, kind))

    for n, annotation in enumerate(document.iterfind("Annotations/Annotation"), 1):
        where, coordinates = f"annotation {n:,}", annotation.findall("Coordinates/Coordinate")
        coordinates.sort(key=lambda coordinate: float(coordinate.get("Order") or 0))
        if annotation.get("Type") in ("Dot", "PointSet"):
            for m, coordinate in enumerate(coordinates, 1):
                point = f"{where}, point {m:,}" if len(coordinates) > 1 else where
                yield attempt(point, partial(read, point, annotation, [coordinate]))
        else:
            yield attempt(where, partial(read, where, annotation, coordinates))


def read_aperio(document: Element) -> Iterator[SlideObject]:
    """Annotations/Annotation/Regions/Region: outlines, and rectangles and ellipses by two corners."""

    def read(where: str, layer: Element, region: Element) -> SlideObject:
        corners = positions(region.findall("Vertices/Vertex"))
        if region.get("NegativeROA") == "1":
            raise UserError("it is cut out of another region; expected the outline of a figure")
        if region.get("Type") in ("1", "2") and len(corners) == 2:
            (ax, ay), (bx, by) = corners
            geometry = box(min(ax, bx), min(ay, by), max(ax, bx), max(ay, by))
        else:
            geometry = shape(corners)
        kind = region.get("Text") or layer.get("Name") or ""
        return SlideObject(where, made(geometry, region.get("Id") or where, kind))

    for n, layer in enumerate(document.iterfind("Annotation"), 1):
        for m, region in enumerate(layer.iterfind("Regions/Region"), 1):
            where = f"layer {n}, region {m:,}"
            yield attempt(where, partial(read, where, layer, region))


PIXEL = 0.25  # µm, in which the size of a figure is judged
ON_GLASS = Frame(microns=PIXEL, origin=GLASS)
ROUND = [(math.cos(angle), math.sin(angle)) for angle in (2 * math.pi * n / 64 for n in range(64))]


def fits_ndpa(document: Any) -> bool:
    """Other programs have a root of the same name."""
    return is_xml("annotations")(document) and (not len(document) or document.find("ndpviewstate") is not None)


def read_ndpa(document: Element) -> Iterator[SlideObject]:
    """annotations/ndpviewstate with its annotations: pins, circles and closed outlines; their class is the title."""

    def position(element: Element) -> list[float]:
        return [number(name, element.findtext(name)) / 1000 / PIXEL for name in ("x", "y")]

    def read(where: str, state: Element, annotation: Element) -> SlideObject:
        unit, tool = state.findtext("coordformat", "").strip(), annotation.get("type", "")
        if unit != "nanometers":
            raise UserError(f"its coordinates are {unit!r:.40}; expected 'nanometers'")
        if annotation.find("pointlist") is not None and annotation.findtext("closed", "1").strip() != "0":
            geometry = shape([position(corner) for corner in annotation.iterfind("pointlist/point")])
        elif annotation.find("pointlist") is not None or annotation.find("x") is None:
            raise UserError(f"it is an open line, or a {tool!r:.40}; expected a pin, a circle or a closed outline")
        else:
            x, y = position(annotation)
            geometry = {"type": "Point", "coordinates": [x, y]}
            if annotation.find("radius") is not None:
                radius = number("radius", annotation.findtext("radius")) / 1000 / PIXEL
                geometry = polygon([[x + radius * a, y + radius * b] for a, b in ROUND])
        title, details = (state.findtext(name, "").strip() for name in ("title", "details"))
        return SlideObject(where, made(geometry, state.get("id") or where, title, details=details), frame=ON_GLASS)

    for n, state in enumerate(document.iterfind("ndpviewstate"), 1):
        title = state.findtext("title", "").strip()
        for m, annotation in enumerate(state.iterfind("annotation"), 1):
            where = f"annotation {n:,}" if m == 1 else f"annotation {n:,}, part {m:,}"
            yield attempt(where, partial(read, where, state, annotation), title)


def elements_of(document: Any) -> list[Any] | None:
    """The elements of a HistomicsUI annotation, by itself or as the server returns it."""
    inner = document.get("annotation", document) if isinstance(document, dict) else None
    elements = inner.get("elements") if isinstance(inner, dict) else None
    return elements if isinstance(elements, list) else None


def fits_histomics(document: Any) -> bool:
    return elements_of(document) is not None


def read_histomics(document: Any) -> Iterator[SlideObject]:
    def read(where: str, element: Any) -> SlideObject:
        label = element.get("label")
        kind = element.get("group") or (label.get("value") if isinstance(label, dict) else "") or ""
        if element["type"] == "polyline":
            geometry = shape([list(point(position)) for position in element["points"]])
        elif element["type"] in ("point", "rectangle", "circle", "ellipse"):
            geometry = {"type": "Point", "coordinates": list(point(element["center"]))}
            if element["type"] == "rectangle" and not element.get("rotation"):
                (x, y), half = point(element["center"]), (element["width"] / 2, element["height"] / 2)
                geometry = box(x - half[0], y - half[1], x + half[0], y + half[1])
        else:
            raise UserError(
                f"it is a {element['type']!r:.40}; expected a point, polyline, rectangle, circle or ellipse"
            )
        return SlideObject(where, made(geometry, element.get("id") or where, str(kind)))

    for n, element in enumerate(elements_of(document) or [], 1):
        yield attempt(f"element {n:,}", partial(read, f"element {n:,}", element))


def fits_wholeslidedata(document: Any) -> bool:
    return (
        isinstance(document, list)
        and bool(document)
        and all(isinstance(row, dict) and {"coordinates", "label"} <= row.keys() for row in document[:10])
    )


def read_wholeslidedata(document: list[Any]) -> Iterator[SlideObject]:
    def read(where: str, row: Any) -> SlideObject:
        label, corners = row["label"], row["coordinates"]
        corners = corners if isinstance(corners[0], list) else [corners]
        name = label.get("name") if isinstance(label, dict) else label
        geometry = shape([list(point(corner)) for corner in corners])
        return SlideObject(where, made(geometry, row.get("index", where), str(name or "")))

    for n, row in enumerate(document, 1):
        yield attempt(f"annotation {n:,}", partial(read, f"annotation {n:,}", row))


def fits_points(document: Any) -> bool:
    points = document.get("points") if isinstance(document, dict) else None
    return isinstance(points, list) and all(isinstance(row, dict) and "point" in row for row in points[:10])


def read_points(document: dict[str, Any]) -> Iterator[SlideObject]:
    """Track 1's mitotic-figures.json: positions in mm, and the class in `name`; `type` differs from entry to entry."""

    def read(where: str, row: Any) -> SlideObject:
        geometry = {"type": "Point", "coordinates": list(point(row["point"]))}
        feature = made(geometry, where, str(row.get("name") or ""), probability=row.get("probability"))
        return SlideObject(where, feature, frame=Frame(microns=1000))

    for n, row in enumerate(document["points"], 1):
        yield attempt(f"point {n:,}", partial(read, f"point {n:,}", row))
