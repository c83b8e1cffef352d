"""Files with detections: each format is recognised and read as the same objects, the rest says why not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.answers import Answer
from inference.errors import UserError
from inference.manifest import Manifest, load_manifest
from inference.slides.detections.formats import FORMATS, read_file
from inference.slides.detections.geometry import centre
from inference.slides.detections.objects import SlideObject, class_name
from inference.slides.detections.packed import Target
from inference.slides.detections.targets import Selection, collect
from inference.slides.qupath import BEFORE, collection, finite, with_answer
from test.support import detection_files as files

PLACES = [(700.0, 301.0), (333.0, 900.0), (1101.0, 777.0)]


@pytest.fixture(scope="module")
def manifest(miniature: Path) -> Manifest:
    return load_manifest(miniature)


def answer(p: float = 0.75) -> Answer:
    return Answer("s/1_2", 0, p, (p - 0.1, p + 0.1))


def objects(file: Path) -> list[SlideObject]:
    return [item for contents in read_file(file) for item in contents.objects]


def targets(file: Path, **options: Any) -> list[Target]:
    complaints: list[str] = []
    chosen = {"slide": Path("case 1.tif")} | options
    found = collect([file], Selection(**chosen), lambda names, why, *_: complaints.append(f"{names[0]}: {why}"))
    assert not complaints
    return [one for some in found.slides.values() for one in some]


@pytest.mark.parametrize("name", files.MAKERS)
def test_each_format_is_recognised_and_its_objects_are_where_it_says(name, tmp_path) -> None:
    found = targets(files.MAKERS[name](tmp_path / name, PLACES))
    assert [(one.x, one.y) for one in found] == PLACES
    assert all(one.id for one in found)


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
        assert properties.get("metadata", {}).get(BEFORE, "") == class_name(old.feature)
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
        "results.json": {"1"},
        "asap.xml": {"mitosis"},
        "aperio.xml": {"Mitosis"},
        "histomics.json": {"m"},
        "wholeslidedata.json": {"mitosis"},
    }
    for name, classes in expected.items():
        assert {class_name(one.feature) for one in targets(files.MAKERS[name](tmp_path / name, PLACES))} == classes


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


@settings(max_examples=60, deadline=None)
@given(
    centres=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=8, unique=True),
    gap=st.integers(1, 20),
)
def test_a_figure_of_two_plates_stays_one_and_cells_of_one_object_do_not(centres, gap, tmp_path_factory) -> None:
    """Figures 300 pixels apart, the first a telophase of two plates; all in one MultiPolygon."""
    figures = [(300.0 * x + 100, 300.0 * y + 100) for x, y in centres]
    (x, y), *others = figures
    plates = [(x - 10 - gap / 2, y), (x + 10 + gap / 2, y)]
    file = files.one_multipolygon(tmp_path_factory.mktemp("parts") / "a.geojson", [*plates, *others])
    assert [(t.x, t.y) for t in targets(file)] == [pytest.approx(place) for place in figures]


def test_a_cell_is_cut_at_its_nucleus(tmp_path) -> None:
    rows = [row | {"geometry": files.square(500, 500, 40)} for row in files.features(PLACES)]
    rows = [row | {"nucleusGeometry": files.square(*place, 8)} for row, place in zip(rows, PLACES, strict=True)]
    assert [(t.x, t.y) for t in targets(files.write_json(tmp_path / "a.geojson", rows))] == PLACES


@settings(max_examples=100, deadline=None)
@given(
    boxes=st.lists(st.tuples(*[st.integers(0, 3000)] * 2, *[st.integers(10, 200)] * 2), min_size=1, max_size=6),
    corners=st.booleans(),
)
def test_boxes_are_never_taken_for_the_other_kind(boxes, corners, tmp_path_factory) -> None:
    """Right, or asked about; and right once it was said."""
    rows = [[x, y, x + w, y + h] if corners else [x, y, w, h] for x, y, w, h in boxes]
    content = {
        "images": [{"id": 1, "file_name": "case 1.tif"}],
        "annotations": [{"id": 0, "image_id": 1, "bbox": row} for row in rows],
    }
    file = files.write_json(tmp_path_factory.mktemp("boxes") / "a.json", content)
    expected = [(x + w / 2, y + h / 2) for x, y, w, h in boxes]
    assert [(t.x, t.y) for t in targets(file, boxes="xyxy" if corners else "xywh")] == expected
    midog = all(abs(w - 50) <= 1 and abs(h - 50) <= 1 for _, _, w, h in boxes)
    try:
        places = [(t.x, t.y) for t in targets(file)]
    except UserError as error:
        assert "--boxes" in str(error) and not (corners and midog and len(boxes) > 1)
    else:
        assert places == expected


@pytest.mark.parametrize("key", ["images", "categories"])
def test_an_id_with_two_names_is_refused(key, tmp_path) -> None:
    content = json.loads(files.coco(tmp_path / "a.json", PLACES).read_text())
    content[key].append(content[key][0] | {"file_name": "b.tif", "name": "other"})
    with pytest.raises(UserError, match=rf"its {key} give the id \d to .* and to .*; expected each id once"):
        targets(files.write_json(tmp_path / "a.json", content))


names = st.lists(st.sampled_from(["25.tif", "01/25.tif", "02/25.tif", "a/01/25.tif"]), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(named=names, there=st.sets(st.sampled_from(["25.tif", "01/25.tif", "02/25.tif"]), min_size=1))
def test_no_two_names_become_one_slide(named, there, tmp_path_factory) -> None:
    """Every name has a slide of its own, or the run is refused, or the object is named as lost."""
    folder = tmp_path_factory.mktemp("slides")
    for name in there:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    rows = "\n".join(f"{name},{n},{n}" for n, name in enumerate(named))
    (folder / "t.csv").write_text(f"Slide,x,y\n{rows}\n")
    try:
        collected = collect([folder / "t.csv"], Selection(folder=folder), lambda *_: None)
    except UserError as error:
        assert "would both be" in str(error)
        return
    for slide, some in collected.slides.items():
        assert len({named[int(target.x)] for target in some}) == 1, slide


def test_each_export_in_a_zip_file_lies_on_the_slide_of_its_name(tmp_path) -> None:
    import zipfile

    for name in ("a.tif", "b.tif"):
        (tmp_path / name).touch()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, place in (("x/a.geojson", PLACES[0]), ("x/b.geojson", PLACES[1])):
            archive.writestr(name, json.dumps(files.features([place])))
    collected = collect([tmp_path / "a.zip"], Selection(), lambda *_: None)
    assert {slide.name: (t.x, t.y) for slide, [t] in collected.slides.items()} == {
        "a.tif": PLACES[0],
        "b.tif": PLACES[1],
    }


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
    found = collect([file], Selection(Path("s.tif")), lambda names, why, *_: complaints.append(f"{names[0]}: {why}"))
    assert [one.id for one in found.slides[Path("s.tif")]] == [files.uuid(0), files.uuid(2)] and found.total == 3
    [line] = complaints
    assert line.startswith(f"{file}, feature 2: ") and reason in line


def test_an_id_that_repeats_is_no_identity(tmp_path) -> None:
    """QuPath 0.2 wrote an object's kind as its id, tables have case numbers, COCO's results 0."""
    rows = [row | {"id": "PathDetectionObject"} for row in files.features(PLACES)]
    assert [(t.x, t.y) for t in targets(files.write_json(tmp_path / "a.geojson", rows))] == PLACES


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
        before = finite(before)  # JSON has no infinity
        if isinstance(before, dict):
            assert before.items() <= after.items() and after["P(atypical)"] == p
        elif isinstance(before, list):
            assert [one for one in after if not one["name"].startswith("P(atypical)")] == before
        called = new.feature["properties"]["classification"]["name"]
        assert called == ("Atypical mitosis" if p >= manifest.threshold else "Normal mitosis")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=3, max_size=9))
def test_a_polygons_centre_lies_in_its_box_even_if_it_crosses_itself(corners) -> None:
    ring = [list(map(float, corner)) for corner in corners]
    geometry = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
    (x, y), low, high = centre(geometry), np.min(ring, 0), np.max(ring, 0)
    assert low[0] - 1e-6 <= x <= high[0] + 1e-6 and low[1] - 1e-6 <= y <= high[1] + 1e-6


@pytest.mark.parametrize(
    ("ring", "expected"),
    [
        ([(488, 388), (512, 412), (512, 388), (488, 412)], (500, 400)),  # a bow tie: the middle of both wings
        ([*map(tuple, star(5, 2))], (100, 100)),
        ([(0, 0), (40, 0), (40, 20), (60, 20), (40, 20), (40, 40), (0, 40)], (20, 20)),  # a spur
    ],
)
def test_the_centre_is_that_of_what_a_crossing_outline_encloses(ring, expected) -> None:
    geometry = {"type": "Polygon", "coordinates": [[list(map(float, corner)) for corner in [*ring, ring[0]]]]}
    assert centre(geometry) == pytest.approx(expected)


def test_a_hole_moves_the_centre() -> None:
    outer, hole = files.square(50, 50, 40)["coordinates"][0], files.square(70, 50, 10)["coordinates"][0]
    x, y = centre({"type": "Polygon", "coordinates": [outer, hole]})
    assert (x, y) == (pytest.approx((6400 * 50 - 400 * 70) / 6000), 50)


def test_every_format_has_a_name_and_what_it_is_known_by() -> None:
    assert len({form.name for form in FORMATS}) == len(FORMATS) and all(form.known_by for form in FORMATS)
