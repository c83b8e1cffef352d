"""Files with detections: what other programs write, each recognised by its content and read into GeoJSON features.

Each has an entry in FORMATS: a name, how it is recognised, and a function that reads it. Every object becomes a GeoJSON
feature, which keeps all that the file says about it; the features of QuPath's own files are kept unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from ..errors import UserError
from . import databases
from .documents import Rows, documents
from .found import Feature, Found, attempt, made
from .geometry import box, number, point


@dataclass(frozen=True)
class Format:
    """known_by: for the message about an unknown format; read(document) is called only where fits(document)."""

    name: str
    known_by: str
    fits: Callable[[Any], bool]
    read: Callable[[Any], Iterator[Found]]


# QuPath: PathIO.readObjectsFromGeoJSON takes a FeatureCollection, a Feature, or an array of them. TIAToolbox's
# `output_type="qupath"` (save_detection_arrays_to_qupath_json) is a FeatureCollection of points with a probability.
def fits_geojson(document: Any) -> bool:
    if isinstance(document, list):
        return bool(document) and all(isinstance(one, dict) and one.get("type") == "Feature" for one in document[:10])
    return isinstance(document, dict) and document.get("type") in ("FeatureCollection", "Feature")


def read_geojson(document: Any) -> Iterator[Found]:
    features = document if isinstance(document, list) else document.get("features", [document])
    if not isinstance(features, list):
        raise UserError(f"its features are {type(features).__name__}; expected a list of them; export it again")
    for number_, feature in enumerate(features, 1):
        where = f"feature {number_:,}"
        if not isinstance(feature, dict) or feature.get("type") != "Feature":
            yield Found(where, UserError(f"it is {feature!r:.60}; expected a GeoJSON Feature"))
            continue
        geometry = feature.get("geometry")
        if isinstance(geometry, dict) and geometry.get("type") == "MultiPoint":  # QuPath's Points tool: many figures
            yield from split_points(where, feature, geometry.get("coordinates"))
        else:
            yield Found(where, feature)


def split_points(where: str, feature: Feature, points: Any) -> Iterator[Found]:
    """Each point of a MultiPoint as its own feature, because each gets its own class."""
    if not isinstance(points, list) or not points:
        yield Found(where, UserError("its MultiPoint has no points; expected one or more"))
        return
    if len(points) == 1:
        yield attempt(where, lambda: Found(where, feature, centre=point(points[0])))
        return
    for n, one in enumerate(points, 1):
        part = feature | {"geometry": feature["geometry"] | {"type": "Point", "coordinates": one}}
        if "id" in feature:
            part["id"] = str(uuid5(NAMESPACE_OID, f"{feature['id']} point {n}"))
        yield Found(f"{where}, point {n:,}", part)


# CellViT: inference/cell_detection.py writes cells.json and cell_detection.json: wsi_metadata, type_map and cells
def fits_cellvit(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("cells"), list) and "wsi_metadata" in document


def read_cellvit(document: Any) -> Iterator[Found]:
    scale = (document["wsi_metadata"] or {}).get("downsampling", 1)
    if scale != 1:
        raise UserError(
            f"it was made at a downsampling of {scale!r:.20}, where CellViT's coordinates mix two magnifications; "
            "expected 1; run CellViT on level 0"
        )
    names = {value: key for key, value in (document.get("type_map") or {}).items()}
    for n, cell in enumerate(document["cells"], 1):
        yield attempt(f"cell {n:,}", partial(read_cell, f"cell {n:,}", cell, n, names))


# HoVer-Net: infer/base.py writes {"mag": ..., "nuc": {id: {bbox, centroid, contour, type_prob, type}}}
def fits_hovernet(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("nuc"), dict)


def read_hovernet(document: Any) -> Iterator[Found]:
    magnification = document.get("mag")
    for identity, cell in document["nuc"].items():
        where = f"nucleus {identity:.20}"
        yield attempt(where, partial(read_cell, where, cell, identity, {}, magnification))


def read_cell(where: str, cell: Any, identity: Any, names: dict[Any, str], magnification: Any = None) -> Found:
    """A cell of CellViT or HoVer-Net: centroid [x, y], contour [[x, y], ...], type (a number) and its probability."""
    centre, contour = point(cell["centroid"]), cell.get("contour")
    geometry: Feature = {"type": "Point", "coordinates": list(centre)}
    if isinstance(contour, list) and len(contour) >= 3:
        corners = [list(point(corner)) for corner in contour]
        geometry = {"type": "Polygon", "coordinates": [[*corners, corners[0]]]}
    kind = cell.get("type")
    name = names.get(kind, "" if kind is None else str(kind))
    feature = made(geometry, cell.get("cell_id", identity), name, type_prob=cell.get("type_prob"))
    magnification = None if magnification is None else number("mag", magnification)
    return Found(where, feature, centre=centre, magnification=magnification)


# COCO (cocodataset.org/#format-data): bbox is [x, y, width, height]. MIDOG.json has its layout, but corners in bbox:
# [x0, y0, x1, y1], each box 50 pixels wide and high (Zenodo 4643381 and 6362337).
def fits_coco(document: Any) -> bool:
    return isinstance(document, dict) and all(isinstance(document.get(k), list) for k in ("images", "annotations"))


def read_coco(document: Any) -> Iterator[Found]:
    slides = {
        image.get("id"): str(image.get("file_name", "")) for image in document["images"] if isinstance(image, dict)
    }
    rows = document.get("categories") or []
    names = {row.get("id"): str(row.get("name", "")) for row in rows if isinstance(row, dict)}
    boxes = [is_midog_box(row.get("bbox")) for row in document["annotations"] if isinstance(row, dict)]
    corners = bool(boxes) and all(boxes)
    if not corners and 2 * sum(boxes) >= len(boxes) > 1:
        raise UserError(
            f"{sum(boxes):,} of {len(boxes):,} boxes have corners 50 pixels apart, as all in MIDOG.json have; expected "
            "all (two corners) or few (x, y, width, height); correct the others"
        )

    def read(where: str, row: Any) -> Found:
        left, top, third, fourth = (number("bbox", value) for value in row["bbox"])
        right, bottom = (third, fourth) if corners else (left + third, top + fourth)
        if not (right >= left and bottom >= top):
            raise UserError(f"its box is {row['bbox']!r:.60}; expected x, y, width, height")
        if row["image_id"] not in slides:
            raise UserError(f"its image_id is {row['image_id']!r:.40}; expected one of the file's images")
        kind = names.get(row.get("category_id"), "")
        feature = made(box(left, top, right, bottom), row.get("id", where), kind, score=row.get("score"))
        return Found(where, feature, slides[row["image_id"]])

    for n, row in enumerate(document["annotations"], 1):
        where = f"annotation {n:,}"
        yield attempt(where, partial(read, where, row))


def is_midog_box(values: Any) -> bool:
    try:
        left, top, right, bottom = map(float, values)
    except (TypeError, ValueError):
        return False
    return right - left == 50 and bottom - top == 50


# Detections on TCGA (Zenodo 14548480): a network of mitoses a slide, written by feature_extraction/feature_bank.py
# (`sna_features_concise`) of mostafajahanifar/pacman: coordinates [[x, y], ...] of level 0, edge_index, feat_names, and
# feats, a row of numbers for each mitosis. The first feature is its type: 1 typical, 2 atypical.
def fits_tcga(document: Any) -> bool:
    if not isinstance(document, dict):
        return False
    lists = [document.get(key) for key in ("coordinates", "feats", "feat_names")]
    return all(isinstance(one, list) for one in lists) and "type" in document["feat_names"]


TCGA = {1: "typical", 2: "atypical"}


def read_tcga(document: Any) -> Iterator[Found]:
    places, rows, names = document["coordinates"], document["feats"], document["feat_names"]
    if len(places) != len(rows):
        raise UserError(f"it has {len(places):,} coordinates and {len(rows):,} feats; expected one for each")

    def read(where: str, n: int) -> Found:
        about = dict(zip(map(str, names), rows[n], strict=True))
        kind = about.pop("type")
        geometry = {"type": "Point", "coordinates": list(point(places[n]))}
        return Found(where, made(geometry, n + 1, TCGA.get(kind, str(kind)), **about))

    for n in range(len(places)):
        where = f"mitosis {n + 1:,}"
        yield attempt(where, partial(read, where, n))


# this project's own table
def fits_csv(document: Any) -> bool:
    return isinstance(document, Rows) and {"x", "y"} <= set(document.columns)


def read_csv(document: Rows) -> Iterator[Found]:
    columns = document.columns
    if len(set(columns)) < len(columns):
        raise UserError(f"its columns are {columns}; expected each once; rename them")
    others = [name for name in columns if name not in ("slide", "x", "y", "id", "class")]

    def read(where: str, cells: list[str]) -> Found:
        if len(cells) != len(columns):
            raise UserError(f"it has {len(cells)} fields; expected {len(columns)}, as the header has")
        row = dict(zip(columns, cells, strict=True))
        if "slide" in row and not row["slide"].strip():
            raise UserError("slide is empty; expected a path")
        place = number("x", row["x"].strip()), number("y", row["y"].strip())
        feature = made({"type": "Point", "coordinates": list(place)}, row.get("id") or where, row.get("class", ""))
        kept = {name: row[name] for name in others if row[name]}
        if kept:
            feature["properties"]["metadata"] = kept
        return Found(where, feature, row.get("slide", "").strip())

    for line, cells in document.rows:
        where = f"line {line:,}"
        yield attempt(where, partial(read, where, cells))


FORMATS = (
    Format("QuPath GeoJSON", "a FeatureCollection, Feature or array of Features", fits_geojson, read_geojson),
    Format("CellViT JSON", "cells and wsi_metadata", fits_cellvit, read_cellvit),
    Format("HoVer-Net JSON", "nuc", fits_hovernet, read_hovernet),
    Format("COCO or MIDOG JSON", "images and annotations", fits_coco, read_coco),
    Format("TCGA mitosis JSON", "coordinates, feats and feat_names", fits_tcga, read_tcga),
    Format(
        "SlideRunner or EXACT SQLite",
        "the tables Annotations, Annotations_coordinates and Slides",
        databases.fits,
        databases.read,
    ),
    Format("CSV", "the columns x and y", fits_csv, read_csv),
)


def read_file(file: Path) -> Iterator[tuple[Format, Iterator[Found]]]:
    """Each document in `file` (a zip file may have several), with its objects. UserError where its format is none."""
    for document in documents(file):
        form = next((form for form in FORMATS if form.fits(document)), None)
        if form is None:
            known = "; ".join(f"{form.name} ({form.known_by})" for form in FORMATS)
            raise UserError(f"{file} is {describe(document)}; expected one of: {known}")
        yield form, form.read(document)


def describe(document: Any) -> str:
    if isinstance(document, dict):
        return f"JSON with the keys {', '.join(map(str, list(document)[:8]))[:200]}"
    if isinstance(document, Rows):
        return f"a table with the columns {', '.join(document.columns[:8])[:200]}"
    return "an SQLite file of another program" if isinstance(document, databases.Database) else "JSON of another kind"
