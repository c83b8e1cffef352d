"""What the platform puts into /input is found, what it never puts there is refused; /output holds all or nothing."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference import contract
from inference.contract import OUTPUT, SLUG, check_answers, find_stack, remove_answers, write_answers
from inference.errors import UserError
from test.support.stub import LISTING, make_input

SOCKET = {"slug": SLUG, "kind": "Image", "relative_path": f"images/{SLUG}"}
FULL = {"title": "x", "description": "", "pk": 5, "default_value": None, "overlay_segments": [], "look_up_table": None}


@pytest.mark.parametrize(
    "listing",
    [
        [
            {
                "interface": SOCKET | FULL,
                "value": None,
                "file": None,
                "image": {"pk": "1", "name": "stack_1.tiff"},
                "pk": 1,
            }
        ],
        [{"socket": SOCKET, "image": {"name": "x.tiff"}}],
        [{"socket": SOCKET, "interface": SOCKET | FULL, "image": None}],
        [{"socket": "something new", "interface": SOCKET}],
        [{"socket": {"slug": "age"}, "value": 60}, {"socket": SOCKET}],
        # the platform has renamed the key before: a list that names no socket contradicts nothing
        [],
        [{"port": SOCKET, "image": {"name": "x.tiff"}}],
        [{"slug": SLUG}],
        [{"interface": {}}],
        [{"interface": {"slug": [SLUG]}}],
        b"\xef\xbb\xbf" + json.dumps(LISTING).encode(),
        b'[{"interface": {"slug": "' + SLUG.encode() + b'", "default_value": NaN}, "value": Infinity}]',
        None,
    ],
)
def test_finds_the_stack(listing: Any, tmp_path: Path) -> None:
    make_input(tmp_path, b"x", "0b2c.tiff", listing)
    assert find_stack(tmp_path).name == "0b2c.tiff"


@pytest.mark.parametrize("name", ["A.TIFF", "b.Tif", "c.mha", "d.MHA"])
def test_any_name_and_case(name: str, tmp_path: Path) -> None:
    folder = make_input(tmp_path, b"x", name) / "images" / SLUG
    for hidden in (".DS_Store", "._" + name, ".hidden.tiff"):
        (folder / hidden).write_bytes(b"x")
    assert find_stack(tmp_path).name == name


def test_the_platforms_input_is_a_link(tmp_path: Path) -> None:
    make_input(tmp_path / "opt/ml/input/data/1-input", b"x")
    (tmp_path / "input").symlink_to(tmp_path / "opt/ml/input/data/1-input")
    assert find_stack(tmp_path / "input").read_bytes() == b"x"


def test_nothing_leads_out_of_the_input(tmp_path: Path) -> None:
    secret = make_input(tmp_path / "other", b"secret")
    for link in (f"images/{SLUG}/stack.tiff", f"images/{SLUG}", "images", "inputs.json"):
        folder = make_input(tmp_path / link.replace("/", "-"), b"x")
        (folder / link).rename(folder / "moved")
        (folder / link).symlink_to(secret / link)
        with pytest.raises(UserError, match="leads out of"):
            find_stack(folder)
    folder = make_input(tmp_path / "loop", b"x")
    (folder / "inputs.json").unlink()
    (folder / "inputs.json").symlink_to("inputs.json")
    with pytest.raises(UserError, match="expected"):
        find_stack(folder)


@pytest.mark.parametrize(
    ("listing", "reason"),
    [
        ([{"socket": {"slug": "other"}}], "names the sockets"),
        ([{"interface": {}}, {"interface": {"slug": "other"}}], "names the sockets"),
        ({"socket": {"slug": SLUG}}, "is not a list of objects"),
        ([SLUG], "is not a list of objects"),
        (b"", "cannot be read"),
        (b"\xff\xfe[\0]\0", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[" + b"9" * 10_000 + b"]", "cannot be read"),
        (b'[{"socket": {"slug": "' + SLUG.encode(), "cannot be read"),
    ],
)
def test_refuses_listings(listing: Any, reason: str, tmp_path: Path) -> None:
    make_input(tmp_path, b"x", listing=listing)
    with pytest.raises(UserError, match=reason) as caught:
        find_stack(tmp_path)
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


def test_a_listing_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    make_input(tmp_path, b"x")
    with (tmp_path / "inputs.json").open("wb") as stream:
        stream.truncate(100 << 20)
    with pytest.raises(UserError, match="expected at most"):
        find_stack(tmp_path)
    (tmp_path / "inputs.json").unlink()
    os.mkfifo(tmp_path / "inputs.json")  # opening it would wait for ever
    with pytest.raises(UserError, match="not a regular file"):
        find_stack(tmp_path)


def test_refuses_folders_without_one_stack(tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            find_stack(folder)
    (tmp_path / "inputs.json").write_text(json.dumps(LISTING))  # right, but the image's folder is missing
    with pytest.raises(UserError, match="No such file"):
        find_stack(tmp_path)
    folder = make_input(tmp_path, b"x") / "images" / SLUG
    (folder / "second.mha").write_bytes(b"x")
    with pytest.raises(UserError, match="2 images"):
        find_stack(tmp_path)
    for name in ("second.mha", "stack.tiff"):
        (folder / name).rename(folder / f"{name}.txt")
    with pytest.raises(UserError, match="no image among 2 files"):
        find_stack(tmp_path)
    (tmp_path / "inputs.json").unlink()
    (tmp_path / "images").rename(tmp_path / "moved")
    (tmp_path / "images").write_text("a file")
    with pytest.raises(UserError, match="Not a directory"):
        find_stack(tmp_path)


@settings(max_examples=200, deadline=None)
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=40), threshold=st.floats(0.01, 0.99))
def test_answers_survive_the_way_through_json(
    p: list[float], threshold: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    text = write_answers(folder, p, threshold).read_text()
    found = json.loads(text)
    assert [answer["confidence"] for answer in found] == p  # at full precision
    assert [answer["class"] == "atypical" for answer in found] == [value >= threshold for value in p]
    assert all(isinstance(answer["confidence"], float) for answer in found)  # the evaluator refuses 0 and 1 as integers
    check_answers(found, len(p), threshold)


@pytest.mark.parametrize("p", [math.nan, math.inf, -0.001, 1.0000001])
def test_impossible_probabilities_are_not_written(p: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_answers(tmp_path, [0.5, p], 0.5)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "found",
    [
        None,
        {},
        [],
        [{"class": "normal"}],
        [{"class": "normal", "confidence": 0}],
        [[0.1]],
        [{"class": "normal", "confidence": True}],
        [{"class": "Normal", "confidence": 0.1}],
        [{"class": 0, "confidence": 0.1}],
        [{"class": "normal", "confidence": None}],
        [{"class": "normal", "confidence": math.nan}],
        [{"class": "normal", "confidence": 0.9}],
        [{"class": "normal", "confidence": 0.1, "page": 0}],
        [{"class": "normal", "confidence": 0.1}] * 2,
    ],
)
def test_check_refuses(found: Any) -> None:
    with pytest.raises(ValueError):
        check_answers(found, 1, 0.5)


@pytest.mark.parametrize("unnamed", [True, False])
def test_answers_replace_older_ones_and_nothing_else_is_left(
    unnamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not unnamed:  # as on a file system without O_TMPFILE
        real = os.open

        def without(path: Any, flags: int, *more: Any, **options: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(95, "Operation not supported")
            return real(path, flags, *more, **options)

        monkeypatch.setattr(contract.os, "open", without)
    for value in (0.1, 0.9):
        write_answers(tmp_path, [value], 0.5)
        assert os.listdir(tmp_path) == [OUTPUT]
        assert json.loads((tmp_path / OUTPUT).read_text())[0]["confidence"] == value
    assert (tmp_path / OUTPUT).stat().st_mode & 0o777 == 0o644
    remove_answers(tmp_path)
    remove_answers(tmp_path)
    assert not os.listdir(tmp_path)


def test_an_output_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_answers(tmp_path / "missing", [0.1], 0.5)
    (tmp_path / OUTPUT).mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_answers(tmp_path, [0.1], 0.5)
    with pytest.raises(UserError, match="cannot remove"):
        remove_answers(tmp_path)
    assert os.listdir(tmp_path) == [OUTPUT]
