"""Files with detections: what other programs write, each recognised by its content and read into GeoJSON features.

Each has an entry in FORMATS: a name, how it is recognised, and a function that reads it. Every object becomes a GeoJSON
feature, which keeps all that the file says about it; the features of QuPath's own files are kept unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import NAMESPACE_OID, uuid5
from xml.etree.ElementTree import Element

from ...errors import UserError
from . import boxes, databases, detectors, viewers
from .documents import CellTable, Unreadable, documents
from .geometry import centre, figures
from .json_text import Features
from .objects import DOUBT, SCAN, Feature, Frame, SlideObject, attempt, made
from .table import EXPECTED, cell_number, find_columns


@dataclass(frozen=True)
class Format:
    """known_by: for the message about an unknown format; read(document) is called only where fits(document).

    has_boxes: read takes how boxes are written, too ("xyxy", "xywh", or None to tell by the boxes)
    own_geometry: its geometry is QuPath's, and is given back to QuPath as it is
    """

    name: str
    known_by: str
    fits: Callable[[Any], bool]
    read: Callable[..., Iterator[SlideObject]]
    has_boxes: bool = False
    own_geometry: bool = False


# QuPath: PathIO.readObjectsFromGeoJSON takes a FeatureCollection, a Feature, or an array of them. TIAToolbox's
# `output_type="qupath"` (save_detection_arrays_to_qupath_json) is a FeatureCollection of points with a probability.
SEVERAL = "MultiPoint", "MultiPolygon"
QUPATHS, UNKNOWN = Frame(origin=SCAN), Frame(origin=DOUBT)


def fits_geojson(document: Any) -> bool:
    if isinstance(document, dict):
        return document.get("type") in ("FeatureCollection", "Feature")
    return isinstance(document, Features)


def read_geojson(document: Any) -> Iterator[SlideObject]:
    features = document if isinstance(document, Features) else document.get("features", [document])
    if not isinstance(features, list | Features):
        raise UserError(f"its features are {type(features).__name__}; expected a list of them; export it again")
    for n, feature in enumerate(features, 1):
        where = f"feature {n:,}"
        if not isinstance(feature, dict) or feature.get("type") != "Feature":
            yield SlideObject(where, UserError(f"it is {feature!r:.60}; expected a GeoJSON Feature"))
            continue
        frame = QUPATHS if is_qupaths(feature) else UNKNOWN
        nucleus = feature.get("nucleusGeometry")  # of QuPath's cells, which have another outline for the whole cell
        if isinstance(nucleus, dict):
            yield attempt(where, partial(with_centre, where, feature, nucleus, frame))
            continue
        geometry = feature.get("geometry")
        if not isinstance(geometry, dict) or geometry.get("type") not in SEVERAL:
            yield SlideObject(where, feature, frame=frame)
            continue
        try:
            parts = parts_of(geometry)
        except UserError as error:
            yield SlideObject(where, error)
            continue
        if len(parts) == 1:
            yield attempt(where, partial(with_centre, where, feature, parts[0], frame))
            continue
        for m, geometry in enumerate(parts, 1):
            part = feature | {"geometry": geometry}
            if "id" in feature:
                part["id"] = str(uuid5(NAMESPACE_OID, f"{feature['id']} point {m}"))
            yield SlideObject(f"{where}, part {m:,}", part, frame=frame)


def with_centre(where: str, feature: Feature, geometry: Any, frame: Frame) -> SlideObject:
    """The feature with the centre of `geometry`, which its own may contain."""
    return SlideObject(where, feature, centre=centre(geometry), frame=frame)


def is_qupaths(feature: Feature) -> bool:
    """Whether QuPath wrote the feature: since 0.3 with an objectType, before with isLocked and its kind as its id."""
    properties = feature.get("properties")
    marks = properties.keys() & {"objectType", "isLocked"} if isinstance(properties, dict) else ()
    return bool(marks) or str(feature.get("id", "")).startswith("Path")


def parts_of(geometry: Feature) -> list[Feature]:
    """A geometry for each figure, because each gets its own class: of QuPath's Points tool, or of a MultiPolygon."""
    if geometry["type"] == "MultiPolygon":
        return figures(geometry)
    points = geometry.get("coordinates")
    if not isinstance(points, list) or not points:
        raise UserError("its MultiPoint has no points; expected one or more")
    return [geometry | {"type": "Point", "coordinates": position} for position in points]


# this project's own table, QuPath's measurement tables, and those of the challenges
def fits_table(document: Any) -> bool:
    return isinstance(document, CellTable) and find_columns(document) is not None


def read_table(document: CellTable) -> Iterator[SlideObject]:
    columns = find_columns(document)
    assert columns is not None
    used = {columns.x, columns.y, columns.slide, columns.identity, columns.kind}

    def read(where: str, cells: list[str]) -> SlideObject:
        if len(cells) != len(document.columns):
            raise UserError(f"it has {len(cells)} fields; expected {len(document.columns)}, as the header has")
        slide, identity, kind = (
            "" if at is None else cells[at].strip() for at in (columns.slide, columns.identity, columns.kind)
        )
        if columns.slide is not None and not slide:
            raise UserError("slide is empty; expected a path")
        x, y = (cell_number(n, cells[at], document.delimiter) for n, at in (("x", columns.x), ("y", columns.y)))
        feature = made({"type": "Point", "coordinates": [x, y]}, identity or where, kind)
        kept = {name: cells[at] for at, name in enumerate(document.columns) if at not in used and cells[at]}
        if kept:
            feature["properties"]["metadata"] = kept
        return SlideObject(where, feature, slide, frame=columns.frame)

    for line, cells in document.rows:
        where = f"line {line:,}"
        yield attempt(where, partial(read, where, cells))


FORMATS = (
    Format(
        "QuPath GeoJSON",
        "a FeatureCollection, Feature or array of Features",
        fits_geojson,
        read_geojson,
        own_geometry=True,
    ),
    Format("CellViT JSON", "cells and wsi_metadata", detectors.fits_cellvit, detectors.read_cellvit),
    Format("HistoPLUS JSON", "cell_masks", detectors.fits_histoplus, detectors.read_histoplus),
    Format("HoVer-Net JSON", "nuc", detectors.fits_hovernet, detectors.read_hovernet),
    Format("COCO or MIDOG JSON", "images and annotations", boxes.fits_coco, boxes.read_coco, has_boxes=True),
    Format("COCO results", "a list with image_id and bbox", boxes.fits_results, boxes.read_results, has_boxes=True),
    Format("TCGA mitosis JSON", "coordinates, feats and feat_names", detectors.fits_tcga, detectors.read_tcga),
    Format("Grand Challenge points", "points with a point each", viewers.fits_points, viewers.read_points),
    Format("HistomicsUI JSON", "elements", viewers.fits_histomics, viewers.read_histomics),
    Format(
        "wholeslidedata JSON",
        "a list with coordinates and label",
        viewers.fits_wholeslidedata,
        viewers.read_wholeslidedata,
    ),
    Format("ASAP XML", "the element ASAP_Annotations", viewers.is_xml("ASAP_Annotations"), viewers.read_asap),
    Format("Aperio XML", "the element Annotations", viewers.is_xml("Annotations"), viewers.read_aperio),
    Format("NDPA", "the element annotations with ndpviewstate", viewers.fits_ndpa, viewers.read_ndpa),
    Format(
        "SlideRunner or EXACT SQLite",
        "the tables Annotations, Annotations_coordinates and Slides",
        databases.fits,
        databases.read,
    ),
    Format("a table", EXPECTED, fits_table, read_table),
)


class Contents(NamedTuple):
    """A document of a file. called: see Document; title: for messages."""

    called: tuple[str, ...]
    title: str
    format: Format
    objects: Iterator[SlideObject]


def read_file(file: Path, boxes: str | None = None) -> Iterator[Contents]:
    """Each document in `file` (a zip file may have several). boxes: see Format.

    UserError, there or from the objects, where its format is none, or where it cannot be read for certain.
    """
    for document, called, member in documents(file):
        title = f"{file}, {member}" if member else str(file)
        try:
            form = next((form for form in FORMATS if form.fits(document)), None)
        except UserError as error:
            raise UserError(f"{title}: {error}") from None
        if form is None:
            known = "; ".join(f"{form.name} ({form.known_by})" for form in FORMATS)
            raise UserError(f"{title} is {describe(document)}; expected one of: {known}")
        objects = form.read(document, boxes) if form.has_boxes else form.read(document)
        yield Contents(called, title, form, from_document(title, member, objects))


def from_document(title: str, member: str, objects: Iterator[SlideObject]) -> Iterator[SlideObject]:
    """The objects, with the member's name in messages about them, and the file's in those about the whole."""
    try:
        for item in objects:
            yield item._replace(where=f"{member}, {item.where}") if member else item
    except Unreadable:
        raise
    except UserError as error:
        raise UserError(f"{title}: {error}") from None


def describe(document: Any) -> str:
    if isinstance(document, dict):
        return f"JSON with the keys {', '.join(map(str, list(document)[:8]))[:200]}"
    if isinstance(document, CellTable):
        return f"a table with the columns {', '.join(document.columns[:8])[:200]}"
    if isinstance(document, Element):
        return f"XML with the element {document.tag:.60}"
    return "an SQLite file of another program" if isinstance(document, databases.Database) else "JSON of another kind"
