"""Files that only the slide can place: NDPA counts from the middle of the glass, HistoPLUS in tiles of DeepZoom."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.errors import UserError
from inference.slides.detections.objects import Frame
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
    marks = files.ndpa(tmp_path / "a.ndpa", [(0, 0)])
    with pytest.raises(UserError):
        run(miniature, marks, "--slide", slide, "--csv", tmp_path / "a.csv")
    assert "the slide does not state where that is; expected the NDPI file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("nanometers", "pixels", "its coordinates are 'pixels'"),
        ("<closed>1", "<closed>0", "it is an open line"),
        ("<x>0</x><y>0</y></annotation>", "</annotation>", "x is None"),
    ],
)
def test_what_ndpa_does_not_place_is_named(old, new, why, tmp_path) -> None:
    from inference.slides.detections.formats import read_file

    marks = files.ndpa(tmp_path / "a.ndpa", [(0, 0)], [[(0, 0), (5000, 0), (5000, 5000)]])
    marks.write_text(marks.read_text().replace(old, new))
    reasons = [
        str(item.feature)
        for contents in read_file(marks)
        for item in contents.objects
        if isinstance(item.feature, UserError)
    ]
    assert reasons and all(why in reason for reason in reasons)


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
