"""Files as people of the field have them, each with the right places; they lie beside the checkout, not in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from inference.errors import UserError
from inference.slides.detections.targets import Collected, Selection, collect
from inference.slides.frames import placement

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "field"
FIGURES = {(500, 400), (900, 1200), (1500, 700), (300, 1500)}
MPP = SimpleNamespace(mpp=(0.25, 0.25))
SLIDE: Any = SimpleNamespace(level=MPP, scanned_from=(0.0, 0.0), size=(2048, 1792), glass=None)

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the folder with files from the field")


def read(name: str, **choice: Any) -> tuple[Collected, list[str]]:
    complaints: list[str] = []
    options = {"slide": Path("case.tif")} | choice
    collected = collect([FOLDER / name], Selection(**options), lambda _, why, *__: complaints.append(why))
    return collected, complaints


def places(collected: Collected) -> set[tuple[float, float]]:
    return {
        cast(tuple[float, float], tuple(round(v, 6) for v in placement(t.frame, SLIDE, "slide").on_slide(t.x, t.y)))
        for some in collected.slides.values()
        for t in some
    }


ALL_FOUR: dict[str, dict[str, Any]] = {
    "d01_q02_ids.geojson": {},
    "d01b_q02_fc.geojson": {},
    "d03a_class_json_text.geojson": {"classes": ["Mitosis"]},
    "d04b_mitotic-figures.json": {},
    "d05_results.bbox.json": {},
    "d06a_cells_far.geojson": {},
    "d10_halo.geojson": {"classes": ["Mitosis"], "region": "Tumor"},
    "d12a_nan.geojson": {},
    "d14_aperio.xml": {},
    "d14b_asap.xml": {},
    "d15_qupath_measurements.csv": {},
    "d15_qupath_measurements.semi.csv": {},
    "d15_qupath_measurements.tsv": {},
    "d17_semicolon.csv": {},
    "d17b_tab.tsv": {},
    "d17c_utf16.csv": {},
    "d18_dsa.json": {},
    "d23_ndjson.geojson": {"classes": ["mitosis"]},
    "d24_props_type.geojson": {},
    "d26c_midog_floats.json": {},
    "d28_midog25.csv": {},
    "d31_case_id.csv": {},
    "d31b_coco_id0.json": {},
    "d16_wsd.json": {},
}


@pytest.mark.parametrize("name", ALL_FOUR)
def test_all_four_figures_are_where_they_are(name) -> None:
    collected, complaints = read(name, **ALL_FOUR[name])
    assert not complaints
    expected = {(x + 0.5, y) for x, y in FIGURES} if name.startswith("d17_") else FIGURES  # written with a half
    if name.startswith("d26c"):
        expected = {(x + 0.3, y + 0.1) for x, y in FIGURES}
    found = places(collected)
    assert len(found) == 4 and all(any(abs(x - a) <= 1 and abs(y - b) <= 1 for a, b in expected) for x, y in found)


def test_classes_of_the_challenges_points() -> None:
    collected, _ = read("d04b_mitotic-figures.json", classes=["mitotic figure"])
    assert places(collected) == FIGURES - {(300, 1500)} and collected.classes["non-mitotic figure"] == 1


def test_outlines_that_cross_themselves_have_the_centre_of_what_they_enclose() -> None:
    collected, complaints = read("d09_crossing.geojson")
    assert not complaints
    assert all(any(abs(x - a) <= 3 and abs(y - b) <= 3 for a, b in FIGURES) for x, y in places(collected))


def test_boxes_that_may_be_either_are_asked_about() -> None:
    with pytest.raises(UserError, match="give --boxes xywh or --boxes xyxy"):
        read("d26e_xyxy_small.json")
    assert places(read("d26e_xyxy_small.json", boxes="xyxy")[0]) == {(200, 300), (400, 350), (350, 450)}


def test_tiles_of_a_level_are_brought_to_the_slide() -> None:
    assert places(read("d20_histoplus.json")[0]) == {(500, 400)}


def test_nanometres_from_the_middle_of_the_glass_need_an_ndpi_file() -> None:
    with pytest.raises(UserError, match="the slide does not state where that is; expected the NDPI file"):
        places(read("d19_case.ndpa")[0])


def test_directories_of_a_database_tell_slides_apart(tmp_path) -> None:
    database = shutil.copy(FOLDER / "d30_sliderunner_directories.sqlite", tmp_path / "d.sqlite")
    (tmp_path / "25.tif").touch()
    with pytest.raises(UserError, match=r"would both be .*25\.tif"):
        collect([database], Selection(folder=tmp_path), lambda *_: None)
    for folder in ("01", "02"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "25.tif").touch()
    collected = collect([database], Selection(folder=tmp_path), lambda *_: None)
    assert {path.parent.name: len(some) for path, some in collected.slides.items()} == {"01": 1, "02": 1}


def test_the_output_of_numbers_that_are_not_finite_is_json(tmp_path) -> None:
    from inference.slides.qupath import strict_json

    collected, _ = read("d12a_nan.geojson")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for target in next(iter(collected.slides.values())):
        json.loads(strict_json(target.feature), parse_constant=refuse)
