"""`python -m inference example DIR`: drawn data to try every command with: crops, a stack, and a slide with detections.

Nothing here is real tissue, and no score on it means anything.
"""

from __future__ import annotations

import argparse
import csv
import json
import struct
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    import numpy as np

PER_KIND, SIDE = 2, 128  # crops of each kind of figure, and their pixels a side
MPP = 0.25  # µm/px of all that is drawn
SLIDE, TILE = 1024, 256  # pixels a side
NEXT = """{folder}: {crops} labelled crops (crops.csv, crops/), stack.tiff, slide.tif, detections.geojson and .csv
  midog-lora score {folder}/crops --report report.html
  midog-lora slides {folder}/detections.geojson --slide {folder}/slide.tif --output classes.geojson --report slide.html
  midog-lora crops {folder}/detections.csv --output crops
  midog-lora datasets {folder}/crops.csv"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder")


def run(options: argparse.Namespace) -> None:
    """Write the folder, whole or not at all."""
    folder: Path = options.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; expected a new folder; name another, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    print("drawing, a minute at most", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".example-") as name:
        whole = Path(name, "example")
        whole.mkdir()
        crops = write_crops(whole)
        write_stack(whole / "stack.tiff", crops[:16])
        write_slide(whole, crops)
        whole.rename(folder)
    print(NEXT.format(folder=folder, crops=len(crops)))


def write_crops(folder: Path) -> list[np.ndarray]:
    """Draw `PER_KIND` crops of each kind of figure, uint8 (SIDE, SIDE, 3), and their table of labels and slides."""
    import numpy as np
    from PIL import Image

    from .figures import FIGURES, STAINS, draw

    rng = np.random.default_rng(0)
    rows, crops = [], []
    for label, kinds in FIGURES.items():
        (folder / "crops" / label).mkdir(parents=True)
        for number, kind in enumerate(kinds):
            for repeat in range(PER_KIND):
                stain = (number + repeat) % len(STAINS)
                crops.append(draw(kind, rng, SIDE, stain))
                path = f"crops/{label}/{kind}-{repeat}.png"
                Image.fromarray(crops[-1]).save(folder / path)
                rows.append((path, label, f"slide-{stain}", f"stain-{stain}"))
    with (folder / "crops.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("path", "label", "group", "domain"), *rows])
    return crops


def write_stack(file: Path, crops: list[np.ndarray]) -> None:
    """A multi-page TIFF as the platform delivers it, with the resolution that an upload needs."""
    from PIL import Image

    pages = [Image.fromarray(crop) for crop in crops]
    dpi = 25400 / MPP
    pages[0].save(file, save_all=True, append_images=pages[1:], compression="tiff_adobe_deflate", dpi=(dpi, dpi))


def write_slide(folder: Path, crops: list[np.ndarray]) -> None:
    """slide.tif: crops on pale ground, one in each tile; their centres in detections.geojson and .csv."""
    import numpy as np

    pixels = np.full((SLIDE, SLIDE, 3), (222, 178, 205), np.uint8)
    features = []
    centres = [(x, y) for y in range(TILE // 2, SLIDE, TILE) for x in range(TILE // 2, SLIDE, TILE)]
    for number, ((x, y), crop) in enumerate(zip(centres, crops, strict=False)):
        pixels[y - SIDE // 2 : y + SIDE // 2, x - SIDE // 2 : x + SIDE // 2] = crop
        features.append(
            {
                "type": "Feature",
                "id": f"00000000-0000-4000-8000-{number:012x}",
                "geometry": {"type": "Point", "coordinates": [x, y]},
                "properties": {"objectType": "detection", "classification": {"name": "Mitosis"}},
            }
        )
    (folder / "slide.tif").write_bytes(tiled_tiff(pixels))
    (folder / "detections.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    with (folder / "detections.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(
            [("slide", "x", "y"), *(("slide.tif", *centre) for centre in centres[: len(features)])]
        )


def tiled_tiff(pixels: np.ndarray) -> bytes:
    """A TIFF 6.0 of one level in deflated tiles, which Pillow cannot write; pixels: uint8 (H, W, 3), whole tiles."""
    high, wide = pixels.shape[:2]
    tiles = [
        zlib.compress(pixels[y : y + TILE, x : x + TILE].tobytes())
        for y in range(0, high, TILE)
        for x in range(0, wide, TILE)
    ]
    count, short, long, ratio = len(tiles), 3, 4, 5
    after = 8 + 2 + 14 * 12 + 4  # the header and a directory of 14 entries; then the values that do not fit in it
    bits, resolution, offsets = after, after + 6, after + 14
    sizes = offsets + 4 * count
    data = sizes + 4 * count
    starts = [data + sum(map(len, tiles[:number])) for number in range(count)]
    entries = [
        (256, long, 1, wide),
        (257, long, 1, high),
        (258, short, 3, bits),
        (259, short, 1, 8),  # deflate
        (262, short, 1, 2),  # RGB
        (277, short, 1, 3),
        (282, ratio, 1, resolution),
        (283, ratio, 1, resolution),
        (284, short, 1, 1),
        (296, short, 1, 3),  # per centimetre
        (322, long, 1, TILE),
        (323, long, 1, TILE),
        (324, long, count, offsets),
        (325, long, count, sizes),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    values = struct.pack("<3HII", 8, 8, 8, round(1e4 / MPP), 1)
    tables = struct.pack(f"<{count}I{count}I", *starts, *map(len, tiles))
    return b"".join([b"II*\0", struct.pack("<I", 8), directory, bytes(4), values, tables, *tiles])
