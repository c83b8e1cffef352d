"""Slides of several formats, written by tifffile, pydicom and Pillow: the same crops of each, or a line that helps."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from inference.errors import UserError
from inference.slides.pyramid import open_slide
from inference.slides.reader import Slide
from test.support import detection_files as files
from test.support import slide_formats as formats
from test.support.commands import inference
from test.support.figures import draw
from test.support.pyramids import FIGURES

WRITERS = {
    "plain.tif": formats.plain_tiff,
    "image.ome.tif": formats.ome_tiff,
    "slide.dcm": formats.dicom,
    "flat.png": formats.flat,
    "flat.tif": formats.flat,
}


@pytest.mark.parametrize("name", WRITERS)
def test_crops_are_the_drawn_pixels(name, drawn, tmp_path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    slide = Slide(WRITERS[name](tmp_path / name, drawn), 0.25, 0.25 if name.startswith("flat") else None)
    assert slide.size == (1300, 1000) and slide.level.mpp == pytest.approx((0.25, 0.25))
    with ThreadPoolExecutor(2) as pool:
        crops = list(slide.each(list(FIGURES), 128, lambda _, crop: np.asarray(crop), pool))
    for crop, (x, y) in zip(crops, FIGURES, strict=True):
        np.testing.assert_array_equal(crop, drawn[y - 64 : y + 64, x - 64 : x + 64])


def test_a_flat_image_needs_its_scale(drawn, tmp_path) -> None:
    with pytest.raises(UserError, match=r"no µm/px; expected .*; give --slide-mpp"):
        Slide(formats.flat(tmp_path / "flat.png", drawn), 0.25, None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.czi", r"cannot be read by OpenSlide .*; convert it with bfconvert"),
        ("a.vsi", r"cannot be read by OpenSlide .*; convert it with bfconvert"),
        ("a.svs", "cannot be read by OpenSlide"),
        ("a.png", "cannot be read by OpenSlide"),
    ],
)
def test_what_cannot_be_read_says_how_to_convert_it(name, reason, tmp_path) -> None:
    (tmp_path / name).write_bytes(b"ZISRAWFILE" + bytes(1000))
    with pytest.raises(UserError, match=reason):
        open_slide(tmp_path / name)


def test_forty_thousand_pixels_a_side(miniature, tmp_path: Path) -> None:
    """1.6 gigapixels, 100 figures all over it, duplicates and places outside: within a minute, and in little memory."""
    rng = np.random.default_rng(0)
    pictures = [draw(kind, rng) for kind in ("bridge", "metaphase", "multipolar")]
    places = [(int(x), int(y)) for y in range(1000, 40_000, 4000) for x in range(1000, 40_000, 4000)]
    slide = formats.huge(tmp_path / "s.tif", 40_000, {place: pictures[n % 3] for n, place in enumerate(places)})
    detections = files.qupath(tmp_path / "s.geojson", [*places, (40_000, 7), places[0]])
    options = ["--weights", miniature, "--device", "cpu", "--slide", slide, "--csv", tmp_path / "out.csv"]
    assert inference("slides", detections, *options, "--report", tmp_path / "report.html") == 3
    with (tmp_path / "out.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(int(row["x"]), int(row["y"])) for row in rows] == places
    by_picture = [{row["class"] for row in rows[n::3]} for n in range(3)]
    assert all(len(classes) == 1 for classes in by_picture)  # the same picture, the same answer, wherever it lies
