"""Detections as other programs write them. Each maker names the writer whose layout it follows."""

from __future__ import annotations

import gzip
import json
import sqlite3
import zipfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

Place = tuple[float, float]


def uuid(n: int) -> str:
    return f"00000000-0000-4000-8000-{n:012}"


def features(places: Sequence[Place], kind: str = "Mitosis") -> list[dict[str, Any]]:
    """QuPath's PathObjectTypeAdapters: points, each an annotation with an id, a class and a measurement."""
    return [
        {
            "type": "Feature",
            "id": uuid(n),
            "geometry": {"type": "Point", "coordinates": [x, y]},
            "properties": {
                "objectType": "annotation",
                "classification": {"name": kind, "color": [250, 62, 62]},
                "measurements": {"Detection probability": 0.5 + n / 1000},
            },
        }
        for n, (x, y) in enumerate(places)
    ]


def square(x: float, y: float, half: float = 10) -> dict[str, Any]:
    low, high = [x - half, y - half], [x + half, y + half]
    corners = [low, [high[0], low[1]], high, [low[0], high[1]], low]
    return {"type": "Polygon", "coordinates": [corners]}


def write_json(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def qupath(file: Path, places: Sequence[Place]) -> Path:
    """PathIO.exportObjectsAsGeoJSON with FEATURE_COLLECTION."""
    return write_json(file, {"type": "FeatureCollection", "features": features(places)})


def qupath_array(file: Path, places: Sequence[Place]) -> Path:
    """The same without it: an array."""
    return write_json(file, features(places))


def qupath_polygons(file: Path, places: Sequence[Place]) -> Path:
    some = [one | {"geometry": square(*place)} for one, place in zip(features(places), places, strict=True)]
    return write_json(file, {"type": "FeatureCollection", "features": some})


def qupath_gzip(file: Path, places: Sequence[Place]) -> Path:
    file.write_bytes(gzip.compress(json.dumps({"type": "FeatureCollection", "features": features(places)}).encode()))
    return file


def qupath_zip(file: Path, places: Sequence[Place]) -> Path:
    """The same to a name that ends in .zip: one entry called .geojson."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{file.stem}.geojson", json.dumps(features(places)))
    return file


def tiatoolbox(file: Path, places: Sequence[Place]) -> Path:
    """save_detection_arrays_to_qupath_json of tiatoolbox 2.1.3 (nucleus_detector.py); its classes may be numbers."""
    some = [
        {
            "type": "Feature",
            "id": f"detection_{n}",
            "geometry": {"type": "Point", "coordinates": [float(x), float(y)]},
            "properties": {"classification": {"name": n % 2, "color": [0, 0, 255]}, "probability": 0.7},
            "objectType": "detection",
            "name": n % 2,
            "class_value": n % 2,
        }
        for n, (x, y) in enumerate(places)
    ]
    return write_json(file, {"type": "FeatureCollection", "features": some})


def cell(x: float, y: float) -> dict[str, Any]:
    contour = square(x, y)["coordinates"][0][:-1]
    box = [[y - 10, x - 10], [y + 10, x + 10]]  # rows first, in both programs
    return {"bbox": box, "centroid": [x, y], "contour": contour, "type_prob": 0.9, "type": 1}


def cellvit(file: Path, places: Sequence[Place]) -> Path:
    """CellViT, cell_detection.py: cells.json."""
    cells = [{"cell_id": n, **cell(x, y), "patch_coordinates": [0, 0]} for n, (x, y) in enumerate(places)]
    about = {"wsi_metadata": {"downsampling": 1, "patch_size": 1024}, "processed_patches": ["0_0"]}
    return write_json(file, about | {"type_map": {"Background": 0, "Neoplastic": 1}, "cells": cells})


def hovernet(file: Path, places: Sequence[Place], mag: float | None = None) -> Path:
    """hover_net, infer/base.py: ids as keys."""
    return write_json(file, {"mag": mag, "nuc": {str(n): cell(x, y) for n, (x, y) in enumerate(places, 1)}})


def coco(file: Path, places: Sequence[Place], slide: str = "case 1.tif", midog: bool = False) -> Path:
    """COCO's x, y, width, height, or MIDOG.json's two corners of 50 x 50 pixels."""
    rows = []
    for n, (x, y) in enumerate(places, 1):
        box = [x - 25, y - 25, x + 25, y + 25] if midog else [x - 20, y - 25, 40, 50]
        rows.append({"id": n, "image_id": 7, "category_id": 1, "bbox": box})
    images = [{"id": 7, "file_name": slide, "width": 1300, "height": 1000}]
    categories = [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "hard negative"}]
    return write_json(file, {"images": images, "annotations": rows, "categories": categories})


def midog(file: Path, places: Sequence[Place]) -> Path:
    return coco(file, places, midog=True)


def tcga(file: Path, places: Sequence[Place]) -> Path:
    """sna_features_concise of mostafajahanifar/pacman, which made the networks of Zenodo 14548480: types are floats."""
    feats = [[float(1 + n % 2), 1.0, 0.0, 0.5, 0.577] for n in range(len(places))]
    names = ["type", "Node_Degree", "Clustering_Coeff", "Harmonic_Cen", "Eigenvector_cen"]
    edges = [list(range(len(places))), list(range(len(places)))]
    content = {"edge_index": edges, "coordinates": [list(place) for place in places], "feats": feats}
    return write_json(file, content | {"feat_names": names})


def sliderunner(file: Path, places: Sequence[Place], slide: str = "case 1.tif") -> Path:
    """SlideRunner/dataAccess/database.py, create(): rectangles of 50 x 50, a spot, and one that was deleted."""
    with closing(sqlite3.connect(file)) as opened:
        opened.executescript(
            "CREATE TABLE Slides (uid INTEGER PRIMARY KEY, filename TEXT, width INTEGER, height INTEGER);"
            "CREATE TABLE Classes (uid INTEGER PRIMARY KEY, name TEXT, color TEXT);"
            "CREATE TABLE Annotations (uid INTEGER PRIMARY KEY, slide INTEGER, guid TEXT, lastModified REAL, "
            "deleted INTEGER DEFAULT 0, type INTEGER, agreedClass INTEGER, description TEXT);"
            "CREATE TABLE Annotations_coordinates (uid INTEGER PRIMARY KEY, coordinateX INTEGER, coordinateY INTEGER, "
            "coordinateZ INTEGER DEFAULT 0, slide INTEGER, annoId INTEGER, orderIdx INTEGER);"
            "INSERT INTO Classes VALUES (2, 'mitotic figure', '#ff0000');"
        )
        opened.execute("INSERT INTO Slides VALUES (1, ?, 1300, 1000)", [slide])
        for n, (x, y) in enumerate([*places, (500, 500)], 1):
            deleted, kind = int(n > len(places)), 1 if n == 1 else 2
            row = [n, f"guid-{n}", deleted, kind]
            opened.execute("INSERT INTO Annotations VALUES (?, 1, ?, 0, ?, ?, 2, '')", row)
            corners = [(x, y)] if kind == 1 else [(x - 25, y - 25), (x + 25, y + 25)]
            for order, corner in enumerate(corners):
                insert = "INSERT INTO Annotations_coordinates VALUES (NULL, ?, ?, 0, 1, ?, ?)"
                opened.execute(insert, [*corner, n, order])
        opened.commit()
    return file


def table(file: Path, places: Sequence[Place]) -> Path:
    lines = [f"{x},{y},case 1.tif,d{n},0.9" for n, (x, y) in enumerate(places)]
    file.write_text("\n".join(["x,y,slide,id,detector_score", *lines]) + "\n")
    return file


def coco_results(file: Path, places: Sequence[Place]) -> Path:
    """COCO's format of results, as loadRes of pycocotools takes it: no images, no names, and often the same id."""
    rows = [{"image_id": 7, "category_id": 1, "bbox": [x - 20, y - 25, 40, 50], "score": 0.9} for x, y in places]
    return write_json(file, rows)


def lines(file: Path, places: Sequence[Place]) -> Path:
    """GeoJSON, a feature on each line (GDAL's GeoJSONSeq)."""
    file.write_text("".join(f"{json.dumps(feature)}\n" for feature in features(places)))
    return file


def one_multipolygon(file: Path, places: Sequence[Place]) -> Path:
    """All cells of a class in one object, as dissolve of geopandas writes them."""
    parts = [square(x, y)["coordinates"] for x, y in places]
    geometry = {"type": "MultiPolygon", "coordinates": parts}
    return write_json(file, features(places[:1])[0] | {"geometry": geometry})


def asap(file: Path, places: Sequence[Place]) -> Path:
    dots = "".join(
        f'<Annotation Name="Annotation {n}" Type="Dot" PartOfGroup="mitosis"><Coordinates><Coordinate Order="0" '
        f'X="{x}" Y="{y}"/></Coordinates></Annotation>'
        for n, (x, y) in enumerate(places)
    )
    file.write_text(f'<?xml version="1.0"?><ASAP_Annotations><Annotations>{dots}</Annotations></ASAP_Annotations>')
    return file


def aperio(file: Path, places: Sequence[Place]) -> Path:
    """ImageScope: ellipses by the corners of their boxes."""
    regions = "".join(
        f'<Region Id="{n}" Type="2" Text="Mitosis"><Vertices><Vertex X="{x - 20}" Y="{y - 20}"/>'
        f'<Vertex X="{x + 20}" Y="{y + 20}"/></Vertices></Region>'
        for n, (x, y) in enumerate(places)
    )
    file.write_text(
        f'<Annotations MicronsPerPixel="0.25"><Annotation><Regions>{regions}</Regions></Annotation></Annotations>'
    )
    return file


def histomics(file: Path, places: Sequence[Place]) -> Path:
    """large_image's annotation schema: a point, and rectangles."""
    elements: list[dict[str, Any]] = [
        {
            "type": "rectangle",
            "center": [x, y, 0],
            "width": 50,
            "height": 50,
            "rotation": 0,
            "group": "m",
            "id": uuid(n),
        }
        for n, (x, y) in enumerate(places)
    ]
    elements[0] = {"type": "point", "center": [*places[0], 0], "group": "m", "id": uuid(0)}
    return write_json(file, {"name": "mitoses", "elements": elements})


def wholeslidedata(file: Path, places: Sequence[Place]) -> Path:
    rows = [
        {"index": n, "coordinates": square(x, y)["coordinates"][0][:-1], "label": {"name": "mitosis", "value": 1}}
        for n, (x, y) in enumerate(places)
    ]
    return write_json(file, rows)


def histoplus(file: Path, places: Sequence[Place], level: int = 11, scale: int = 1, side: int = 224) -> Path:
    """SlideSegmentationData: cells by tile of a DeepZoom level, whose pixels are `scale` of level 0."""
    tiles: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for x, y in places:
        x, y = x / scale, y / scale
        column, row = int(x // side), int(y // side)
        local = x - column * side, y - row * side
        masks = tiles.setdefault((column, row), [])
        outline = square(*local)["coordinates"][0]
        kind = {"cell_id": len(masks), "cell_type": "Mitotic Figures", "confidence": 0.9}
        masks.append(kind | {"coordinates": outline, "centroid": list(local)})
    cells = [
        {"level": level, "x": x, "y": y, "width": side, "height": side, "masks": masks}
        for (x, y), masks in tiles.items()
    ]
    return write_json(file, {"model_name": "histoplus", "inference_mpp": 0.25, "cell_masks": cells})


def ndpa(file: Path, places: Sequence[Place], outlines: Sequence[Sequence[Place]] = ()) -> Path:
    """NDP.view's annotations in nm from the middle of the glass: pins, then closed outlines of the title Tumor."""

    def state(n: int, title: str, annotation: str) -> str:
        view = "<lens>20</lens><x>5</x><y>7</y><z>0</z><showtitle>1</showtitle>"
        about = f"<title>{title}</title><details/><coordformat>nanometers</coordformat>{view}"
        return f'<ndpviewstate id="{n}">{about}{annotation}</ndpviewstate>'

    def position(x: float, y: float) -> str:
        return f"<x>{round(x)}</x><y>{round(y)}</y>"

    states = [
        state(n, "mitosis", f'<annotation type="pin" displayname="AnnotatePin">{position(*place)}</annotation>')
        for n, place in enumerate(places)
    ]
    for n, corners in enumerate(outlines, len(states)):
        points = "".join(f"<point>{position(*corner)}</point>" for corner in corners)
        inner = f"<measuretype>0</measuretype><closed>1</closed><pointlist>{points}</pointlist>"
        kind = 'type="freehand" displayname="AnnotateFreehand"'
        states.append(state(n, "Tumor", f"<annotation {kind}>{inner}</annotation>"))
    head = '<?xml version="1.0" encoding="utf-8" standalone="yes"?>'
    file.write_text(f"{head}<annotations>{''.join(states)}</annotations>")
    return file


def semicolons(file: Path, places: Sequence[Place]) -> Path:
    """A spreadsheet's CSV where the comma is the decimal sign, in UTF-16 as Excel's "Unicode text" is."""
    rows = [
        f"case 1.tif;{x:.1f};{y:.1f};d{n}".replace(".", ",").replace("1,tif", "1.tif")
        for n, (x, y) in enumerate(places)
    ]
    file.write_text("\n".join(["Slide;X;Y;ID", *rows]) + "\n", encoding="utf-16")
    return file


MAKERS = {
    "qupath.geojson": qupath,
    "array.geojson": qupath_array,
    "polygons.geojson": qupath_polygons,
    "packed.geojson.gz": qupath_gzip,
    "packed.zip": qupath_zip,
    "tiatoolbox.json": tiatoolbox,
    "cells.json": cellvit,
    "hovernet.json": hovernet,
    "coco.json": coco,
    "MIDOG.json": midog,
    "tcga.json": tcga,
    "annotations.sqlite": sliderunner,
    "detections.csv": table,
    "results.json": coco_results,
    "lines.geojson": lines,
    "cells.geojson": one_multipolygon,
    "asap.xml": asap,
    "aperio.xml": aperio,
    "histomics.json": histomics,
    "wholeslidedata.json": wholeslidedata,
    "semicolons.csv": semicolons,
}
