"""Generated slides: pyramidal TIFFs as scanners' exports are, and the command that cuts crops from them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from test.support import commands
from test.support.tables import write_csv

FIGURES = {(700, 301): "bridge", (333, 900): "metaphase", (1101, 777): "multipolar"}  # by their centres


def halves(pixels: np.ndarray) -> np.ndarray:
    h, w = pixels.shape[0] // 2, pixels.shape[1] // 2
    return pixels[: 2 * h, : 2 * w].reshape(h, 2, w, 2, 3).mean((1, 3)).round().astype(np.uint8)


def write_slide(file: Path, levels: Sequence[np.ndarray], mpp: float | None = 0.25) -> Path:
    """A tiled, losslessly compressed TIFF with its levels as pages, as scanners' exports have; mpp in its tags."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(file) as tiff:
        for number, pixels in enumerate(levels):
            tiff.write(
                pixels,
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                metadata=None,
                subfiletype=int(number > 0),
                resolution=(1e4 / mpp, 1e4 / mpp) if mpp else None,
                resolutionunit="CENTIMETER" if mpp else None,
            )
    return file


def pyramid(pixels: np.ndarray, levels: int = 3) -> list[np.ndarray]:
    found = [pixels]
    while len(found) < levels:
        found.append(halves(found[-1]))
    return found


def detections(slide: Path | str, places: object = tuple(FIGURES)) -> list[list[object]]:
    return [[slide, x, y] for x, y in places]  # type: ignore[attr-defined]


def run(folder: Path, rows: Sequence[Sequence[object]], *options: object, header: str = "slide,x,y") -> int:
    """Writes rows as a table in `folder`, and cuts them into its folder `crops`."""
    table = write_csv(folder / "found.csv", header, rows)
    return commands.inference(*["crops", str(table), "--output", str(folder / "crops"), *map(str, options)])


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "crops" / "crops.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def crop(folder: Path, path: str) -> np.ndarray:
    with Image.open(folder / "crops" / path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


def pngs(folder: Path) -> list[Path]:
    return sorted((folder / "crops").rglob("*.png"))
