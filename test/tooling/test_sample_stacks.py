"""Stacks: page order, resolution tags, the bundled sample, labelled folders in both layouts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from test.harness.layout import count_pages
from test.support import stacks

SAMPLE = Path(__file__).resolve().parents[1] / "sample"


def pages_of(path: Path) -> list[np.ndarray]:
    with Image.open(path) as image:
        return [np.asarray(page.convert("RGB")) for page in ImageSequence.Iterator(image)]


def write_crops(folder: Path, names: list[str], rng: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    for name in names:
        Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(folder / name)


def test_the_bundled_sample_is_what_the_generator_draws(tmp_path: Path) -> None:
    path = stacks.write_sample(tmp_path, seed=7)
    got, want = pages_of(path), pages_of(SAMPLE / "stack_0.tiff")
    assert len(want) == 16
    assert all(page.shape == (128, 128, 3) for page in want)
    # the FFT may round differently on another processor
    assert max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(got, want, strict=True)) <= 2
    assert json.loads((tmp_path / "ground_truth.json").read_text()) == json.loads(
        (SAMPLE / "ground_truth.json").read_text()
    )
    assert (SAMPLE / "stack_0.tiff").stat().st_size < 600_000


def test_stacks_carry_the_tags_that_an_upload_needs() -> None:
    with Image.open(SAMPLE / "stack_0.tiff") as image:
        tags = image.tag_v2  # type: ignore[attr-defined]
        assert tags[282] == tags[283] == 101600  # XResolution, YResolution: 0.25 um a pixel
        assert tags[296] == 2  # per inch
        assert tags[262] == 2  # RGB
        assert tags[259] == 8  # deflate


def test_labelled_folder_of_two_classes(tmp_path: Path) -> None:
    """AMi-Br: every crop appears once, with its label and its scanner, in a shuffled and repeatable order."""
    rng = np.random.default_rng(0)
    names = {"Atypical": [f"MIDOG21_{k}.png" for k in range(5)], "Normal": [f"TUPAC16_{k}.png" for k in range(15)]}
    for folder, files in names.items():
        write_crops(tmp_path / "data" / folder, files, rng)
    with (tmp_path / "data/split.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["slide", "dataset", "dataset_uid"])
        writer.writerows([f"{60 + k:03}.tiff", "MIDOG21", name] for k, name in enumerate(names["Atypical"]))
        writer.writerows([f"{k + 10}", "TUPAC16", name] for k, name in enumerate(names["Normal"]))
    assert stacks.main(["labelled", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--pages", "8"]) == 0
    truth = json.loads((tmp_path / "out/ground_truth.json").read_text())
    assert [entry["image"] for entry in truth] == ["stack_0.tiff", "stack_1.tiff", "stack_2.tiff"]
    assert [count_pages(tmp_path / "out" / entry["image"]) for entry in truth] == [8, 8, 4]
    crops = [name for entry in truth for name in entry["crops"]]
    assert sorted(crops) == sorted(names["Atypical"] + names["Normal"])
    assert crops != sorted(crops)
    domains = json.loads((tmp_path / "out/domains.json").read_text())
    assert domains == {"0": "MIDOG21, Hamamatsu S360", "1": "TUPAC16, Aperio ScanScope XT"} | {
        "2": "TUPAC16, Leica SCN400"
    }
    for entry in truth:
        for page, (name, label) in enumerate(zip(entry["crops"], entry["labels"], strict=True)):
            assert label == ("atypical" if name in names["Atypical"] else "normal")
            source = np.asarray(Image.open(tmp_path / "data" / label.capitalize() / name))
            assert np.array_equal(pages_of(tmp_path / "out" / entry["image"])[page], source)
    again = stacks.write_stacks(stacks.read_labelled(tmp_path / "data"), tmp_path / "again", pages=8, seed=0)
    assert [path.read_bytes() for path in again] == [(tmp_path / "out" / path.name).read_bytes() for path in again]


def test_labelled_folder_with_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MIDOG25: one folder of numbered crops, a csv beside it; misspelt scanners are one domain."""
    folder = tmp_path / "MIDOG25_Binary_Classification_Train_Set"
    write_crops(folder, ["1.png", "2.png", "3.png"], np.random.default_rng(0))
    with (tmp_path / "MIDOG25_Atypical_Classification_Train_Set.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image_id", "Tumor", "Scanner", "majority"])
        writer.writerow(["1.png", "human melanoma", "Hamamatsu XR", "AMF"])
        writer.writerow(["2.png", "human melanoma", "Hamammatsu XR", "NMF"])
        writer.writerow(["3.png", "canine lymphoma", "3D Histech", "NMF"])
    crops = stacks.read_labelled(folder)
    assert [crop.label for crop in crops] == ["atypical", "normal", "normal"]
    assert len({crop.domain for crop in crops}) == 2
    (folder / "2.png").unlink()
    assert stacks.main(["labelled", str(folder), "--output", str(tmp_path / "out")]) == 1
    assert "lacks 1 images" in capsys.readouterr().err


def test_a_folder_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected sub-folders Atypical/ and Normal/"):
        stacks.read_labelled(tmp_path)
