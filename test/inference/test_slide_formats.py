"""Slides of several formats, written by tifffile, pydicom and Pillow: the same crops of each, or a line that helps."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from inference.errors import UserError
from inference.example.figures import draw
from inference.slides.detections.pairing import slides_called
from inference.slides.pyramid import open_slide
from inference.slides.reader import Slide
from test.support import detection_files as files
from test.support import slide_formats as formats
from test.support.commands import inference
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


def test_a_dicom_slide_is_also_its_folder(drawn, miniature, tmp_path) -> None:
    """Named with --slide, or found by its folder's name; with an annotation's file beside the slide's."""
    formats.dicom(tmp_path / "case-7/2.dcm", drawn)
    (tmp_path / "case-7/1.dcm").write_bytes(bytes(128) + b"DICM" + bytes(300))
    (tmp_path / "case-7/readme.txt").write_text("no slide")
    detections = files.qupath(tmp_path / "case-7.geojson", list(FIGURES))
    tables = []
    for named in (["--slide", tmp_path / "case-7"], ["--slides", tmp_path], ["--slide", tmp_path / "case-7/2.dcm"]):
        table = tmp_path / f"{len(tables)}.csv"
        assert inference("slides", detections, *named, "--weights", miniature, "--csv", table) == 0
        with table.open(newline="") as stream:
            tables.append([{**row, "slide": ""} for row in csv.DictReader(stream)])
    assert tables[0] == tables[1] == tables[2] and len(tables[0]) == len(FIGURES)
    crops = tmp_path / "crops"
    (tmp_path / "table.csv").write_text("slide,x,y\n" + "".join(f"case-7,{x},{y}\n" for x, y in FIGURES))
    assert inference("crops", tmp_path / "table.csv", "--output", crops, "--origin", "slide") == 0
    assert len(list(crops.rglob("*.png"))) == len(FIGURES)


def test_a_folder_without_one_dicom_slide_says_so(drawn, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is a folder without a DICOM slide .*; expected a slide; name its file"):
        Slide(tmp_path / "empty", 0.25, None)
    for n in range(2):
        formats.dicom(tmp_path / f"two/{n}.dcm", drawn)
    with pytest.raises(UserError, match="is a folder with 2 DICOM slides; expected one; name one of its files"):
        Slide(tmp_path / "two", 0.25, None)


def test_a_flat_image_of_many_pixels_leaves_stderr_empty(tmp_path) -> None:
    """90 megapixels are enough for Pillow's warning of a decompression bomb, which Python would print with its line."""
    from PIL import Image

    Image.new("L", (10_000, 9_000), 128).save(tmp_path / "a.png")
    program = (
        "import sys; from inference.slides.reader import Slide; print(Slide(__import__('pathlib').Path(sys.argv[1])"
    )
    command = [sys.executable, "-c", program + ", 0.25, 0.25).size)", str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(10000, 9000)\n", "")


@pytest.mark.parametrize("name", ["case-7.geojson", "case-7.ome.geojson", "case-7.ome.tif.geojson"])
def test_detections_beside_an_ome_tiff_find_it(name, tmp_path) -> None:
    (tmp_path / "case-7.ome.tif").touch()
    assert slides_called(tmp_path, name) == [tmp_path / "case-7.ome.tif"]
