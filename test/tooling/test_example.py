"""`example DIR`: drawn data that every command takes, whole or not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from openslide import OpenSlide

from inference.__main__ import main
from inference.imageio.stack import read_stack
from training.__main__ import main as training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("example") / "data"
    assert main(["example", str(made)]) == 0
    return made


def test_the_slide_is_read_by_others(folder: Path) -> None:
    slide = OpenSlide(folder / "slide.tif")
    assert slide.dimensions == (1024, 1024)
    assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
    pixels = tifffile.imread(folder / "slide.tif")
    assert np.array_equal(pixels, np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")))


def test_commands_take_what_it_wrote(folder: Path, miniature: Path, tmp_path: Path, capsys) -> None:
    assert len(read_stack(folder / "stack.tiff")) == 16
    weights = ["--weights", str(miniature), "--device", "cpu"]
    crops = [str(folder / "crops"), "--labels", "@folder", "--csv", str(tmp_path / "scores.csv")]
    assert main(["score", *crops, *weights]) == 0
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 19
    slide = ["slides", str(folder / "detections.geojson"), "--slide", str(folder / "slide.tif")]
    assert main([*slide, "--csv", str(tmp_path / "objects.csv"), *weights]) == 0
    assert len((tmp_path / "objects.csv").read_text().splitlines()) == 17
    assert main(["crops", str(folder / "detections.csv"), "--output", str(tmp_path / "crops")]) == 0
    cut = {file.name: np.asarray(read_stack(file)[0]) for file in (tmp_path / "crops").rglob("*.png")}
    assert len(cut) == 16 and np.array_equal(cut["128_128.png"], read_stack(folder / "stack.tiff")[0])
    capsys.readouterr()
    assert training(["datasets", str(folder / "crops.csv")]) == 0
    assert "18" in capsys.readouterr().out


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path, capsys) -> None:
    (tmp_path / "mine.txt").touch()
    assert main(["example", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
