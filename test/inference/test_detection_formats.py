"""Files with detections: each format is recognised and read as the same objects, the rest says why not."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inference.answers import Answer
from inference.errors import UserError
from inference.manifest import Manifest, load_manifest
from inference.slides.formats import FORMATS, read_file
from inference.slides.found import Found, class_of
from inference.slides.geometry import centre
from inference.slides.qupath import BEFORE, collection, with_answer
from inference.slides.targets import Target, collect
from test.support import detection_files as files

PLACES = [(700.0, 301.0), (333.0, 900.0), (1101.0, 777.0)]


@pytest.fixture(scope="module")
def manifest(miniature: Path) -> Manifest:
    return load_manifest(miniature)


def answer(p: float = 0.75) -> Answer:
    return Answer("s/1_2", 0, p, (p - 0.1, p + 0.1))


def objects(file: Path) -> list[Found]:
    return [one for _, some in read_file(file) for one in some]


def targets(file: Path, **options: Any) -> list[Target]:
    complaints: list[str] = []
    chosen = {"classes": (), "region": None, "slide": Path("case 1.tif"), "folder": None} | options
    found = collect([file], complain=lambda name, why: complaints.append(f"{name}: {why}"), **chosen)
    assert not complaints
    return [one for some in found.slides.values() for one in some]


@pytest.mark.parametrize("name", files.MAKERS)
def test_each_format_is_recognised_and_its_objects_are_where_it_says(name, tmp_path) -> None:
    found = targets(files.MAKERS[name](tmp_path / name, PLACES))
    assert [(one.x, one.y) for one in found] == PLACES
    assert len({one.id for one in found}) == len(PLACES)


@pytest.mark.parametrize("name", files.MAKERS)
def test_out_and_in_again_the_objects_are_the_same(name, manifest, tmp_path) -> None:
    found = targets(files.MAKERS[name](tmp_path / name, PLACES))
    first = "".join(collection([with_answer(one.feature, answer(), manifest) for one in found], manifest))
    (tmp_path / "out.geojson").write_text(first)
    again = targets(tmp_path / "out.geojson")
    assert [(one.id, one.x, one.y, one.feature["geometry"]) for one in again] == [
        (one.id, one.x, one.y, one.feature["geometry"]) for one in found
    ]
    for old, new in zip(found, again, strict=True):
        properties = new.feature["properties"]
        assert properties["classification"] == {"name": "Atypical mitosis", "color": [213, 94, 0]}
        assert properties["measurements"]["P(atypical)"] == 0.75
        assert properties["metadata"].get(BEFORE, "") == class_of(old.feature)
    second = "".join(collection([with_answer(one.feature, answer(), manifest) for one in again], manifest))
    assert second == first  # nothing piles up


def test_classes_are_those_of_the_file(tmp_path) -> None:
    expected = {
        "qupath.geojson": {"Mitosis"},
        "cells.json": {"Neoplastic"},
        "hovernet.json": {"1"},
        "tiatoolbox.json": {"0", "1"},
        "coco.json": {"mitotic figure"},
        "annotations.sqlite": {"mitotic figure"},
        "tcga.json": {"typical", "atypical"},
        "detections.csv": {""},
    }
    for name, classes in expected.items():
        assert {class_of(one.feature) for one in targets(files.MAKERS[name](tmp_path / name, PLACES))} == classes


def test_geojson_of_another_library_is_read(tmp_path) -> None:
    geojson = pytest.importorskip("geojson")
    some = [geojson.Feature(id=str(n), geometry=geojson.Point(place)) for n, place in enumerate(PLACES)]
    (tmp_path / "a.geojson").write_text(geojson.dumps(geojson.FeatureCollection(some)))
    assert [(one.x, one.y) for one in targets(tmp_path / "a.geojson")] == PLACES


def test_what_is_written_is_valid_geojson_for_another_library(manifest, tmp_path) -> None:
    geojson = pytest.importorskip("geojson")
    some = [
        with_answer(one.feature, answer(), manifest) for one in targets(files.qupath_polygons(tmp_path / "a", PLACES))
    ]
    loaded = geojson.loads("".join(collection(some, manifest)))
    assert isinstance(loaded, geojson.FeatureCollection) and loaded.is_valid and len(loaded.features) == 3


def test_coco_is_as_pycocotools_reads_it(tmp_path) -> None:
    pycocotools = pytest.importorskip("pycocotools.coco")
    loaded = pycocotools.COCO(str(files.coco(tmp_path / "coco.json", PLACES)))
    boxes = np.array([row["bbox"] for row in loaded.loadAnns(loaded.getAnnIds())])
    np.testing.assert_array_equal(boxes[:, :2] + boxes[:, 2:] / 2, PLACES)


def test_points_of_one_annotation_become_objects_with_ids_that_stay(tmp_path) -> None:
    one = files.features(PLACES[:1])[0] | {"geometry": {"type": "MultiPoint", "coordinates": PLACES}}
    found = targets(files.write_json(tmp_path / "a.geojson", one))
    assert [(t.x, t.y) for t in found] == PLACES and len({t.id for t in found}) == 3
    assert [t.id for t in targets(tmp_path / "a.geojson")] == [t.id for t in found]


def test_classes_choose_and_what_is_not_there_is_said(tmp_path) -> None:
    rows = files.features(PLACES) + files.features([(1.0, 2.0)], "Tumor")
    rows[-1]["id"] = "other"
    file = files.write_json(tmp_path / "a.geojson", rows)
    assert len(targets(file, classes=["mitosis"])) == 3
    assert len(targets(file, region="Tumor")) == 3
    with pytest.raises(UserError, match=r"of class Mitoses in .*; expected some, found Mitosis \(3\), Tumor \(1\)"):
        targets(file, classes=["Mitoses"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"{", "cannot be read"),
        (b'{"a": 1, "b": 2}', "is JSON with the keys a, b; expected one of: QuPath GeoJSON"),
        (b"[1, 2]", "is JSON of another kind"),
        (b"a,b\n1,2\n", "is a table with the columns a, b"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"\x1f\x8b\x08cut off", "cannot be read"),
        (b"PK\x03\x04 no archive", "cannot be read"),
        (b"SQLite format 3\0 and no more", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"type": "FeatureCollection", "features": 7}', "expected a list"),
        (b'{"wsi_metadata": {"downsampling": 2}, "cells": [{}]}', "downsampling of 2"),
        (b'{"coordinates": [[1, 2]], "feats": [[1], [2]], "feat_names": ["type"]}', "1 coordinates and 2 feats"),
    ],
)
def test_what_is_no_file_with_detections_is_refused_in_one_line(content, reason, tmp_path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=reason) as refused:
        objects(file)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 900
    assert file.read_bytes() == content


def star(corners: int, step: int) -> list[list[float]]:
    angles = [2 * math.pi * step * n / corners for n in range(corners)]
    return [[100 + 50 * math.cos(a), 100 + 50 * math.sin(a)] for a in angles]


HOSTILE = {
    "NaN": ({"type": "Point", "coordinates": [math.nan, 1]}, "x is nan"),
    "infinity": ({"type": "Point", "coordinates": [1, math.inf]}, "y is inf"),
    "far": ({"type": "Point", "coordinates": [1, 10**400]}, "y is 1000"),
    "text": ({"type": "Point", "coordinates": ["a", 1]}, "x is 'a'"),
    "true": ({"type": "Point", "coordinates": [True, 1]}, "x is True"),
    "one number": ({"type": "Point", "coordinates": [1]}, "expected x and y"),
    "none": (None, "geometry is None"),
    "line": ({"type": "LineString", "coordinates": [[1, 2], [3, 4]]}, "geometry is 'LineString'"),
    "two corners": ({"type": "Polygon", "coordinates": [[[1, 2], [3, 4]]]}, "fewer than 3 corners"),
    "no corners": ({"type": "Polygon", "coordinates": []}, "has no corners"),
    "no list": ({"type": "MultiPolygon", "coordinates": [7]}, "has no corners"),
    "crossing": ({"type": "Polygon", "coordinates": [[*star(5, 2), star(5, 2)[0]]]}, "crosses itself"),
    "huge": (files.square(5000, 5000, 2000), "is 4,000 pixels across"),
    "many corners": ({"type": "Polygon", "coordinates": [star(3000, 1)]}, "3,000 corners"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_geometry_without_a_centre_says_why_and_the_others_are_read(name, tmp_path) -> None:
    geometry, reason = HOSTILE[name]
    rows = files.features([(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)])
    rows[1]["geometry"] = geometry
    complaints: list[str] = []
    file = files.write_json(tmp_path / "a.geojson", rows)
    found = collect([file], Path("s.tif"), None, (), None, lambda who, why: complaints.append(f"{who}: {why}"))
    assert [one.id for one in found.slides[Path("s.tif")]] == [files.uuid(0), files.uuid(2)] and found.total == 3
    [line] = complaints
    assert line.startswith(f"{file}, feature 2: ") and reason in line


def test_an_id_that_comes_twice_counts_once(tmp_path) -> None:
    rows = files.features([(1.0, 2.0), (3.0, 4.0)])
    rows[1]["id"] = rows[0]["id"]
    complaints: list[str] = []
    file = files.write_json(tmp_path / "a.geojson", rows)
    found = collect([file], Path("s.tif"), None, (), None, lambda _, why: complaints.append(why))
    assert len(found.slides[Path("s.tif")]) == 1 and "is that of another object" in complaints[0]


numbers = st.floats(0, 1e5, allow_nan=False).map(lambda value: round(value, 2))
texts = st.text(max_size=8)
values = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), texts, st.lists(st.integers(), max_size=2))
any_geometry = st.one_of(
    st.tuples(numbers, numbers).map(lambda place: {"type": "Point", "coordinates": list(place)}),
    st.tuples(numbers, numbers, st.floats(1, 300)).map(lambda one: files.square(*one)),
    st.tuples(numbers, numbers).map(
        lambda p: {"type": "MultiPolygon", "coordinates": [files.square(*p)["coordinates"]]}
    ),
)
any_feature = st.fixed_dictionaries(
    {
        "type": st.just("Feature"),
        "geometry": any_geometry,
        "properties": st.dictionaries(texts, values, max_size=3)
        | st.fixed_dictionaries(
            {
                "classification": st.one_of(texts, st.fixed_dictionaries({"name": texts})),
                "measurements": st.one_of(
                    st.dictionaries(texts, st.floats(allow_nan=False), max_size=3),
                    st.lists(st.fixed_dictionaries({"name": texts, "value": st.floats(allow_nan=False)}), max_size=3),
                ),
            }
        ),
    },
    optional={"nucleusGeometry": any_geometry, "bbox": st.lists(numbers, max_size=4)},
)
KEPT_APART = ("classification", "measurements", "metadata")


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(any_feature, min_size=1, max_size=6), p=st.floats(0, 1))
def test_any_features_come_back_with_all_that_they_held(rows, p, manifest, tmp_path_factory) -> None:
    for n, row in enumerate(rows):
        row["id"] = files.uuid(n)
    folder = tmp_path_factory.mktemp("any")
    found = targets(files.write_json(folder / "in.geojson", {"type": "FeatureCollection", "features": rows}))
    assert [one.feature for one in found] == json.loads((folder / "in.geojson").read_text())["features"]
    written = "".join(collection([with_answer(one.feature, answer(p), manifest) for one in found], manifest))
    (folder / "out.geojson").write_text(written)
    for old, new in zip(found, targets(folder / "out.geojson"), strict=True):
        assert (old.id, old.x, old.y) == (new.id, new.x, new.y)
        apart = lambda one: {k: v for k, v in one["properties"].items() if k not in KEPT_APART}  # noqa: E731
        assert apart(old.feature) == apart(new.feature)
        assert {**old.feature, "properties": 0} == {**new.feature, "properties": 0}
        before, after = old.feature["properties"].get("measurements", {}), new.feature["properties"]["measurements"]
        assert type(after) is type(before) or not isinstance(before, dict | list)
        if isinstance(before, dict):
            assert before.items() <= after.items() and after["P(atypical)"] == p
        elif isinstance(before, list):
            assert [one for one in after if not one["name"].startswith("P(atypical)")] == before
        called = new.feature["properties"]["classification"]["name"]
        assert called == ("Atypical mitosis" if p >= manifest.threshold else "Normal mitosis")


def crosses_itself(ring: list[tuple[int, int]]) -> bool:
    """Whether two edges have each other's ends on either side; exact, for whole numbers."""

    def side(p: tuple[int, int], q: tuple[int, int], r: tuple[int, int]) -> int:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    edges = list(zip(ring, [*ring[1:], ring[0]], strict=True))
    return any(
        side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0
        for (a, b), (c, d) in combinations(edges, 2)
    )


@example([(0, 4), (0, 2), (1, 0), (0, 0), (0, 3), (1, 0)])  # two lobes that touch, wound against each other
@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=3, max_size=9))
def test_a_polygons_centre_lies_in_its_box_or_it_crosses_itself(corners) -> None:
    ring = [list(map(float, corner)) for corner in corners]
    geometry = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
    if crosses_itself(corners):
        with pytest.raises(UserError, match="crosses itself"):
            centre(geometry)
        return
    (x, y), low, high = centre(geometry), np.min(ring, 0), np.max(ring, 0)
    assert low[0] - 1e-6 <= x <= high[0] + 1e-6 and low[1] - 1e-6 <= y <= high[1] + 1e-6


def test_a_hole_moves_the_centre() -> None:
    outer, hole = files.square(50, 50, 40)["coordinates"][0], files.square(70, 50, 10)["coordinates"][0]
    x, y = centre({"type": "Polygon", "coordinates": [outer, hole]})
    assert (x, y) == (pytest.approx((6400 * 50 - 400 * 70) / 6000), 50)


def test_every_format_has_a_name_and_what_it_is_known_by() -> None:
    assert len({form.name for form in FORMATS}) == len(FORMATS) and all(form.known_by for form in FORMATS)
