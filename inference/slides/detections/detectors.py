"""Files of detectors of cells and mitoses: CellViT, HistoPLUS, HoVer-Net, and the detections on TCGA."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from ...errors import UserError
from .geometry import number, point, polygon
from .objects import DOUBT, Feature, Frame, SlideObject, attempt, made


# CellViT: inference/cell_detection.py writes cells.json and cell_detection.json: wsi_metadata, type_map and cells. Its
# tiles may have been cut with `limit_bounds`, which the file does not say
def fits_cellvit(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("cells"), list) and "wsi_metadata" in document


def read_cellvit(document: Any) -> Iterator[SlideObject]:
    scale = (document["wsi_metadata"] or {}).get("downsampling", 1)
    if scale != 1:
        raise UserError(
            f"it was made at a downsampling of {scale!r:.20}, where CellViT's coordinates mix two magnifications; "
            "expected 1; run CellViT on level 0"
        )
    names: dict[str, str] = {}  # by number, whichever of the two is the key
    for key, value in (document.get("type_map") or {}).items():
        names |= {str(key): value} if isinstance(value, str) else {str(value): str(key)}
    for n, cell in enumerate(document["cells"], 1):
        yield attempt(f"cell {n:,}", partial(read_cell, f"cell {n:,}", cell, n, names, Frame(origin=DOUBT)))


# HistoPLUS: SlideSegmentationData writes cell_masks: tiles of a level of openslide's DeepZoomGenerator, without overlap
# and with limit_bounds=False. The masks' coordinates are that level's pixels from the corner of their tile
def fits_histoplus(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("cell_masks"), list)


def read_histoplus(document: Any) -> Iterator[SlideObject]:
    frames: dict[int, Frame] = {}  # one for all tiles of a level

    def read(where: str, tile: Any, mask: Any) -> SlideObject:
        column, row, level, width, height = (whole(name, tile[name]) for name in ("x", "y", "level", "width", "height"))

        def moved(position: Any) -> list[float]:
            x, y = point(position)
            return [column * width + x, row * height + y]

        x, y = point(mask["centroid"])
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(
                f"its centroid {x:g}, {y:g} is outside its tile of {width} x {height}; expected pixels from the tile's "
                "corner"
            )
        geometry = polygon([moved(corner) for corner in mask["coordinates"]])
        identity = f"{level}_{column}_{row}_{mask['cell_id']}"  # cells are counted anew in each tile
        feature = made(geometry, identity, str(mask.get("cell_type") or ""), confidence=mask.get("confidence"))
        x, y = moved((x, y))
        return SlideObject(where, feature, centre=(x, y), frame=frames.setdefault(level, Frame(deepzoom=level)))

    for n, tile in enumerate(document["cell_masks"], 1):
        masks = tile.get("masks") if isinstance(tile, dict) else None
        if not isinstance(masks, list):
            yield SlideObject(f"tile {n:,}", UserError("it has no list of masks; expected one"))
            continue
        for m, mask in enumerate(masks, 1):
            where = f"tile {n:,}, mask {m:,}"
            kind = mask.get("cell_type") if isinstance(mask, dict) else None
            yield attempt(where, partial(read, where, tile, mask), str(kind or ""))


def whole(name: str, value: Any) -> int:
    """A tile's column, row, level or side; HistoPLUS has fractions where spots of Visium take the place of tiles."""
    parsed = number(name, value)
    if parsed % 1 or parsed < 0:
        raise UserError(f"its tile's {name} is {value!r:.20}; expected a whole number, of a tile in DeepZoom's grid")
    return int(parsed)


# HoVer-Net: infer/base.py writes {"mag": ..., "nuc": {id: {bbox, centroid, contour, type_prob, type}}}
def fits_hovernet(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("nuc"), dict)


def read_hovernet(document: Any) -> Iterator[SlideObject]:
    for identity, cell in document["nuc"].items():
        where = f"nucleus {identity:.20}"

        def read(where: str = where, cell: Any = cell, identity: str = identity) -> SlideObject:
            magnification = document.get("mag")
            frame = Frame(None if magnification is None else number("mag", magnification))
            return read_cell(where, cell, identity, {}, frame)

        yield attempt(where, read)


def read_cell(where: str, cell: Any, identity: Any, names: dict[str, str], frame: Frame) -> SlideObject:
    """A cell of CellViT or HoVer-Net: centroid [x, y], contour [[x, y], ...], type (a number) and its probability."""
    middle, contour = point(cell["centroid"]), cell.get("contour")
    geometry: Feature = {"type": "Point", "coordinates": list(middle)}
    if isinstance(contour, list) and len(contour) >= 3:
        geometry = polygon([list(point(corner)) for corner in contour])
    kind = cell.get("type")
    name = names.get(str(kind), "" if kind is None else str(kind))
    feature = made(geometry, cell.get("cell_id", identity), name, type_prob=cell.get("type_prob"))
    return SlideObject(where, feature, centre=middle, frame=frame)


# Detections on TCGA (Zenodo 14548480): a network of mitoses a slide, written by feature_extraction/feature_bank.py
# (`sna_features_concise`) of mostafajahanifar/pacman: coordinates [[x, y], ...] of level 0, edge_index, feat_names, and
# feats, a row of numbers for each mitosis. The first feature is its type: 1 typical, 2 atypical.
def fits_tcga(document: Any) -> bool:
    if not isinstance(document, dict):
        return False
    lists = [document.get(key) for key in ("coordinates", "feats", "feat_names")]
    return all(isinstance(values, list) for values in lists) and "type" in document["feat_names"]


TCGA = {1: "typical", 2: "atypical"}


def read_tcga(document: Any) -> Iterator[SlideObject]:
    positions, rows, names = document["coordinates"], document["feats"], document["feat_names"]
    if len(positions) != len(rows):
        raise UserError(f"it has {len(positions):,} coordinates and {len(rows):,} feats; expected one for each")

    def read(where: str, n: int) -> SlideObject:
        features = dict(zip(map(str, names), rows[n], strict=True))
        kind = features.pop("type")
        geometry = {"type": "Point", "coordinates": list(point(positions[n]))}
        return SlideObject(where, made(geometry, n + 1, TCGA.get(kind, str(kind)), **features))

    for n in range(len(positions)):
        where = f"mitosis {n + 1:,}"
        yield attempt(where, partial(read, where, n))
