"""Large files with detections: JSON in parts is read as `json.loads` reads it, and objects come back as they were."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inference.errors import UserError
from inference.slides.detections import documents
from inference.slides.detections.json_text import Features, parse
from inference.slides.detections.packed import BLOCK, Source, Targets
from inference.slides.detections.targets import Selection, collect
from test.support import detection_files as files

SLIDE = Path("s.tif")
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6))
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["type", "features", "a"]) | st.text(max_size=3), inner, max_size=4),
    ),
    max_leaves=20,
)
features = st.fixed_dictionaries({"type": st.just("Feature"), "id": leaves, "properties": values})
collections = st.fixed_dictionaries({"type": st.just("FeatureCollection"), "features": st.lists(features, max_size=4)})
any_document = st.one_of(
    collections,
    st.tuples(values, collections).map(lambda both: {"before": both[0], **both[1], "behind": both[0]}),
    st.lists(features, max_size=12),
    st.lists(values, max_size=3),
    st.dictionaries(st.text(max_size=3), values, max_size=3),
)


def pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def read(text: str, size: int) -> Any:
    """What the text is read as; features as json.loads gives them."""
    document = parse(pieces(text, size))
    return list(document) if isinstance(document, Features) else document


def expected(text: str) -> Any:
    document = json.loads(text)
    collection = isinstance(document, dict) and document.get("type") == "FeatureCollection"
    return document["features"] if collection and isinstance(document.get("features"), list) else document


def same(a: Any, b: Any) -> bool:
    """Whether equal, types, NaN and the order of keys included."""
    return repr(a) == repr(b)


@settings(max_examples=300, deadline=None)
@given(document=any_document, size=st.integers(1, 40), indent=st.sampled_from([None, 1]), ascii_=st.booleans())
@example(document=[1e5, -1e-7, 12345678901234567890, float("nan"), float("-inf")], size=1, indent=None, ascii_=True)
def test_json_in_parts_is_read_as_in_one(document, size, indent, ascii_) -> None:
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_)
    found = read(text, size)
    wanted = expected(text)
    if isinstance(document, dict) and isinstance(found, dict):  # no collection, or its type stands behind the features
        wanted = json.loads(text)
    assert same(found, wanted)


@settings(max_examples=300, deadline=None)
@given(
    document=any_document,
    size=st.integers(1, 40),
    at=st.integers(0, 200),
    instead=st.sampled_from(["", *'{}[],:"1e\\x']),
)
def test_what_is_no_json_is_refused_as_by_json_loads(document, size, at, instead) -> None:
    text = json.dumps(document)
    at %= len(text)
    text = text[:at] + instead + text[at + 1 :]
    try:
        wanted = expected(text)
    except ValueError:
        with pytest.raises(ValueError):
            read(text, size)
        return
    if isinstance(wanted, dict | list) and not twice(text):
        found = read(text, size)
        assert same(found, json.loads(text) if isinstance(found, dict) else wanted)


def twice(text: str) -> bool:
    """Whether an object has a key twice: json.loads takes the last, features that were read by then are refused."""
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(key for key, _ in items if [k for k, _ in items].count(key) > 1)
        return dict(items)

    json.loads(text, object_pairs_hook=pairs)
    return bool(repeated)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(features | st.dictionaries(st.text(max_size=3), leaves), min_size=2, max_size=12),
    size=st.integers(1, 40),
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", " \n\t"])
def test_json_lines_are_the_list_of_their_documents(rows, size, end) -> None:
    text = "".join(json.dumps(row) + end for row in rows)
    assert same(read(text, size), json.loads(json.dumps(rows)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"type": "FeatureCollection", "features": [], "features": []}', "Another 'features'"),
        ('{"type": "FeatureCollection", "features": [], "type": "x"}', "Another 'type'"),
        ('{"type": "FeatureCollection", "features": []} {}', "Extra data: character 47"),
        ('{"a": 1} {"a": 2}', "Extra data"),
        ('{"a": 1}\n2', "Expecting an object on each line"),
        ("[]\n[]", "Extra data"),
        ('[{"type": "Feature", "a": tru}]', "Expecting value: character 27"),
    ],
)
def test_errors_say_where_in_the_file(text, reason) -> None:
    for size in (1, 7, 1000):
        with pytest.raises(ValueError, match=reason):
            read(text, size)


def test_a_type_behind_the_features_is_read_too(tmp_path) -> None:
    file = files.write_json(tmp_path / "a.geojson", {"features": files.features([(1, 2)]), "type": "FeatureCollection"})
    [target] = next(iter(collect([file], Selection(SLIDE), lambda *_: None).slides.values()))
    assert (target.x, target.y) == (1, 2)


@pytest.mark.parametrize("cut", [1000, -3])
def test_a_file_that_ends_too_soon_is_refused_by_name(cut, tmp_path) -> None:
    whole = gzip.compress(
        json.dumps({"type": "FeatureCollection", "features": files.features([(1, 2)] * 9000)}).encode()
    )
    (tmp_path / "a.geojson.gz").write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"^\S*a\.geojson\.gz cannot be read \(.*\); expected") as refused:
        collect([tmp_path / "a.geojson.gz"], Selection(SLIDE), lambda *_: None)
    assert str(refused.value).count("a.geojson.gz") == 1


def test_a_file_beyond_the_limit_is_refused_while_it_is_read(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(documents, "LARGEST", 100_000)
    monkeypatch.setattr(documents, "PIECE", 1000)
    file = files.qupath(tmp_path / "a.geojson", [(1.0, 2.0)] * 1000)
    with pytest.raises(UserError, match="is larger than"):
        collect([file], Selection(SLIDE), lambda *_: None)


@settings(max_examples=30, deadline=None)
@given(some=st.lists(features, min_size=1, max_size=5), number=st.sampled_from([1, BLOCK - 1, BLOCK, 2 * BLOCK + 3]))
def test_packed_objects_are_what_was_put_in(some, number) -> None:
    sources = [Source(Path("a")), Source(Path("b"), own_geometry=False)]
    rows = [(sources[n % 2], f"feature {n}", n + 0.5, -n / 3, some[n % len(some)]) for n in range(number)]
    targets = Targets()
    for row in rows:
        targets.append(*row)
    assert len(targets) == number and set(targets.sources) == {row[0] for row in rows}
    for target, again, (source, where, x, y, feature) in zip(
        targets, map(targets.__getitem__, range(number)), rows, strict=True
    ):
        assert target == again and (target.source, target.where, target.x, target.y) == (source, where, x, y)
        assert same(target.feature, feature)
    with pytest.raises(IndexError):
        targets[number]


def test_an_object_that_is_nested_too_deeply_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(UserError, match="expected fewer levels"):
        Targets().append(Source(Path("a")), "feature 1", 0.0, 0.0, {"a": deep})


def test_objects_take_little_memory(tmp_path) -> None:
    """20,000 points: 0.1 kB each and what is read at a time; as Python's objects they took 2 kB each."""
    with gzip.open(tmp_path / "a.geojson.gz", "wt") as stream:
        json.dump(files.features([(float(n), 1.0) for n in range(20_000)]), stream)
    tracemalloc.start()
    found = collect([tmp_path / "a.geojson.gz"], Selection(SLIDE), lambda *_: None)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.slides[SLIDE]) == 20_000
    assert kept < 20_000 * 150 and peak < 15 << 20
