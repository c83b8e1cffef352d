"""Files that only the slide can place: NDPA counts from the middle of the glass, HistoPLUS in tiles of DeepZoom."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.errors import UserError
from inference.slides.detections.objects import Frame
from inference.slides.detections.targets import Selection, collect
from inference.slides.frames import placement
from inference.slides.reader import Slide
from test.support import detection_files as files
from test.support.commands import rows_of
from test.support.commands import slides as run
from test.support.pyramids import FIGURES
from test.support.slide_formats import ndpi

PLACES = [(float(x), float(y)) for x, y in FIGURES]
AWAY = 1_234_500, -987_250  # nm from the middle of the glass to that of the scan


@pytest.fixture(scope="module")
def scan(drawn, tmp_path_factory) -> Path:
    return ndpi(tmp_path_factory.mktemp("ndpi") / "case 1.ndpi", drawn, AWAY)


def on_glass(scan: Path, x: float, y: float) -> tuple[float, float]:
    """nm from the middle of the glass, by the slide's size as OpenSlide states it and 0.25 um/px."""
    import openslide

    with openslide.OpenSlide(scan) as opened:
        width, height = opened.dimensions
    return (x - width / 2) * 250 + AWAY[0], (y - height / 2) * 250 + AWAY[1]


def answers(folder: Path, name: str) -> list[tuple[float, float, str]]:
    return [(float(row["x"]), float(row["y"]), row["p_atypical"]) for row in rows_of(folder / name)]


def test_ndpa_lies_where_it_was_drawn(scan, miniature, tmp_path, capsys) -> None:
    """The answers are those at the same places from a table; an outline is an area; GeoJSON is in pixels."""
    same = files.qupath(tmp_path / "same.geojson", PLACES)
    run(miniature, same, "--slide", scan, "--csv", tmp_path / "table.csv")
    area = [on_glass(scan, *corner) for corner in ((100, 100), (1100, 100), (1100, 900), (100, 900))]
    marks = files.ndpa(scan.with_name("case 1.ndpi.ndpa"), [on_glass(scan, *place) for place in PLACES], [area])
    options = ["--csv", tmp_path / "ndpa.csv", "--output", tmp_path / "out.geojson", "--summary", tmp_path / "s.csv"]
    run(miniature, marks, "--class", "mitosis", "--region", "Tumor", *options)
    assert sorted(answers(tmp_path, "ndpa.csv")) == sorted(answers(tmp_path, "table.csv"))
    assert float(rows_of(tmp_path / "s.csv")[0]["area_mm2"]) == pytest.approx(1000 * 800 / 16e6)
    features = json.loads((tmp_path / "out.geojson").read_text())["features"]
    for row, place in zip(features, PLACES, strict=True):
        assert row["geometry"]["coordinates"] == pytest.approx(place)


def test_ndpa_on_a_slide_that_does_not_know_its_glass_is_refused(slide, miniature, tmp_path, capsys) -> None:
    """In one line for all, before the network is loaded."""
    marks = files.ndpa(tmp_path / "a.ndpa", [(0, 0), (90_000, 0)])
    with pytest.raises(UserError):
        run(miniature, marks, "--slide", slide, "--csv", tmp_path / "a.csv")
    printed = capsys.readouterr().err
    assert "(2 detections): its file counts from the middle of the glass slide, and the slide does not" in printed
    assert printed.count("not scored") == 1 and [file.name for file in tmp_path.iterdir()] == ["a.ndpa"]


CIRCLE = '<annotation type="circle"><x>0</x><y>0</y><radius>{}</radius></annotation>'
RULER = '<annotation type="linearmeasure"><x1>0</x1><y1>0</y1><x2>900</x2><y2>0</y2></annotation>'
PIN = '<annotation type="pin" displayname="AnnotatePin"><x>0</x><y>0</y></annotation>'


def read(marks: Path, **choice: Any) -> tuple[list[str], list[str]]:
    """(names of the objects, complaints)"""
    complaints: list[str] = []
    collected = collect(
        [marks], Selection(slide=Path("case 1.ndpi"), **choice), lambda names, why, *_: complaints.append(why)
    )
    return [target.where for some in collected.slides.values() for target in some], complaints


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("nanometers", "pixels", "its coordinates are 'pixels'"),
        (PIN, RULER, "it is an open line, or a 'linearmeasure'; expected a pin, a circle or a closed outline"),
        ("<x>0</x>", "<x>far</x>", "x is 'far'; expected a finite number"),
        (PIN, CIRCLE.format(798_000), "it is 6,384 pixels across; expected a mitotic figure"),
    ],
)
def test_what_ndpa_does_not_place_is_named(old, new, why, tmp_path) -> None:
    marks = files.ndpa(tmp_path / "a.ndpa", [(0, 0)])
    marks.write_text(marks.read_text().replace(old, new))
    names, complaints = read(marks)
    assert not names and why in complaints[0]
    assert read(marks, classes=["mitosis"]) == (names, complaints)  # its class is known, though it cannot be read
    marks.write_text(marks.read_text().replace("mitosis", "ruler"))
    with pytest.raises(UserError, match="no object of class mitosis"):
        read(marks, classes=["mitosis"])


def test_what_is_of_another_class_is_not_missed(tmp_path) -> None:
    marks = files.ndpa(tmp_path / "a.ndpa", [(0, 0)], [[(0, 0), (5000, 0), (5000, 5000)]])
    marks.write_text(marks.read_text().replace("<closed>1", "<closed>0"))
    assert read(marks, classes=["mitosis"]) == (["annotation 1"], [])
    names, complaints = read(marks, classes=["mitosis"], region="Tumor")
    assert names == ["annotation 1"] and "it is an open line" in complaints[0]


def test_a_circle_is_a_figure_or_an_area(scan, miniature, tmp_path) -> None:
    x, y = on_glass(scan, *PLACES[0])
    circle = CIRCLE.format(50_000).replace("<x>0", f"<x>{x}").replace("<y>0", f"<y>{y}")
    marks = files.ndpa(tmp_path / "a.ndpa", [(x, y), (x, y)])
    text = marks.read_text().replace("mitosis", "Tumor", 1)
    marks.write_text(text.replace(text[text.index("<annotation ") : text.index("</ndpviewstate>")], circle, 1))
    options = ["--slide", scan, "--region", "Tumor", "--class", "mitosis", "--summary", tmp_path / "s.csv"]
    run(miniature, marks, *options)
    assert float(rows_of(tmp_path / "s.csv")[0]["area_mm2"]) == pytest.approx(math.pi * 0.0025, rel=0.01)


def test_a_file_of_another_program_is_not_taken_for_ndpa(tmp_path) -> None:
    (tmp_path / "a.xml").write_text("<annotations><image/></annotations>")
    with pytest.raises(UserError, match="is XML with the element annotations; expected one of"):
        read(tmp_path / "a.xml")


@pytest.mark.parametrize("member", ["case 9.ndpi.ndpa", "objects.ndpa"])
def test_a_zip_files_name_counts_only_where_its_member_names_no_slide(member, tmp_path) -> None:
    (tmp_path / "case 2.ndpi").touch()
    files.ndpa(tmp_path / member, [(0, 0)])
    with zipfile.ZipFile(tmp_path / "case 2.zip", "w") as archive:
        archive.write(tmp_path / member, member)
    complaints: list[str] = []
    collected = collect([tmp_path / "case 2.zip"], Selection(), lambda _, why, *__: complaints.append(why))
    if member == "objects.ndpa":
        assert [path.name for path in collected.slides] == ["case 2.ndpi"]
    else:
        assert not collected.slides and "no slide called case 9.ndpi" in complaints[0]


def test_what_lies_beside_a_slide_is_not_asked_about(tmp_path) -> None:
    for name in ("case 1.ndpi", "case 1.ndpi.tif", "case 1.ndpi.md5"):
        (tmp_path / name).touch()
    marks = files.ndpa(tmp_path / "case 1.ndpi.ndpa", [(0, 0)])
    collected = collect([marks], Selection(), lambda *_: None)
    assert [path.name for path in collected.slides] == ["case 1.ndpi"]


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(300, 70_000), st.integers(300, 70_000)),
    coarser=st.integers(0, 3),
    side=st.sampled_from([224, 256, 448]),
    data=st.data(),
)
def test_tiles_lie_where_openslide_cuts_them(size, coarser, side, data) -> None:
    """OpenSlide's own generator says where each tile begins; nothing of it reads pixels."""
    from openslide.deepzoom import DeepZoomGenerator

    image: Any = SimpleNamespace(dimensions=size, level_dimensions=[size], level_count=1, level_downsamples=[1.0])
    image.properties = {}
    image.get_best_level_for_downsample = lambda _: 0
    deep = DeepZoomGenerator(image, side, overlap=0, limit_bounds=False)
    level = deep.level_count - 1 - coarser
    columns, rows = deep.level_tiles[level]
    column, row = data.draw(st.integers(0, columns - 1)), data.draw(st.integers(0, rows - 1))
    (left, top), _, _ = deep.get_tile_coordinates(level, (column, row))
    slide: Any = SimpleNamespace(size=size, level=SimpleNamespace(mpp=(0.25, 0.25)), scanned_from=(0, 0), glass=None)
    where = placement(Frame(deepzoom=level), slide, None)
    assert where.on_slide(column * side, row * side) == (left, top)


@pytest.mark.parametrize("coarser", [0, 1])
def test_histoplus_lies_where_its_tiles_do(coarser, slide, miniature, tmp_path) -> None:
    level = (max(Slide(slide, 0.25, None).size) - 1).bit_length() - coarser
    table = files.table(tmp_path / "same.csv", PLACES)
    run(miniature, table, "--slide", slide, "--csv", tmp_path / "table.csv")
    cells = files.histoplus(tmp_path / "cells.json", PLACES, level, 2**coarser)
    run(miniature, cells, "--slide", slide, "--csv", tmp_path / "tiles.csv")
    assert sorted(answers(tmp_path, "tiles.csv")) == sorted(answers(tmp_path, "table.csv"))


@pytest.mark.parametrize(
    ("tile", "why"),
    [
        ({"level": 40}, "its file counts pixels of DeepZoom level 40, and the slide has levels 0 to 11"),
        ({"x": 1.5}, "its tile's x is 1.5; expected a whole number"),
        ({"width": 20}, "its centroid 28, 77 is outside its tile of 20 x 224"),
        ({"masks": None}, "it has no list of masks"),
    ],
)
def test_tiles_of_another_kind_are_named(tile, why, slide, miniature, tmp_path, capsys) -> None:
    content = json.loads(files.histoplus(tmp_path / "cells.json", PLACES[:1]).read_text())
    content["cell_masks"][0] |= tile
    with pytest.raises(UserError):
        run(
            miniature, files.write_json(tmp_path / "cells.json", content), "--slide", slide, "--csv", tmp_path / "a.csv"
        )
    assert why in capsys.readouterr().err
