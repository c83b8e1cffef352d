"""The manifest of an ensemble folder: every entry is needed and checked, nothing leads out, nothing but safetensors."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest

from inference.checksums import check_ensemble, start_checks
from inference.errors import UserError
from inference.manifest import PICKLES, Manifest, holds_ensemble, load_manifest
from test.support.stub import stub_manifest


def rewrite(folder: Path, content: Any) -> None:
    (folder / "ensemble.json").write_text(json.dumps(content))


def wait(manifest: Manifest) -> None:
    for check in start_checks(manifest):
        check.result()


def test_loads_with_paths_and_hashes(tmp_path: Path) -> None:
    assert not holds_ensemble(tmp_path)
    stub_manifest(tmp_path, folds=3)
    assert holds_ensemble(tmp_path)
    manifest = load_manifest(tmp_path)
    [member] = manifest.members
    assert [fold.name for fold in member.folds] == ["fold0", "fold1", "fold2"]
    assert member.base == tmp_path / "base.safetensors"
    assert len(manifest.files) == 6
    check_ensemble(manifest)
    wait(manifest)


def stub_members(folder: Path) -> dict[str, Any]:
    """The manifest of `stub_manifest` in format 2: two members, of one fold each, with one base."""
    content = stub_manifest(folder, folds=2)
    whole = {key: content.pop(key) for key in ("name", "averaging", "temperature", "threshold", "provenance")}
    folds = content.pop("folds")
    members = [{"name": name, "folds": [fold]} | content for name, fold in zip("ab", folds, strict=True)]
    for member in members:
        del member["format"]
    content = json.loads(json.dumps({"format": 2, "members": members, "weights": [0.25, 0.75]} | whole))
    rewrite(folder, content)
    return content


def test_loads_members_with_their_weights(tmp_path: Path) -> None:
    stub_members(tmp_path)
    manifest = load_manifest(tmp_path)
    assert [(member.name, member.weight) for member in manifest.members] == [("a", 0.25), ("b", 0.75)]
    assert [member.folds for member in manifest.members] == [(tmp_path / "fold0",), (tmp_path / "fold1",)]
    assert len(manifest.files) == 4 and len(manifest.bases) == 1
    wait(manifest)
    for file in (*manifest.files, *manifest.bases):
        content = file.read_bytes()
        file.write_bytes(b"altered")
        with pytest.raises(UserError, match=f"{file.name} has SHA-256"):
            check_ensemble(manifest)
        with pytest.raises(UserError, match=f"{file.name} has SHA-256"):
            wait(manifest)
        file.write_bytes(content)


def paths(content: Any, at: tuple = ()) -> list[tuple]:
    """The place of every entry that is checked, as keys from the top."""
    if isinstance(content, dict) and at[-1:] not in [("licence",), ("provenance",), ("precision",)]:
        return [path for key, value in content.items() for path in [(*at, key), *paths(value, (*at, key))]]
    return []


def replaced(content: Any, path: tuple, value: Any) -> Any:
    copy = json.loads(json.dumps(content))
    place = copy
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return copy


@pytest.mark.parametrize("several", [False, True])
def test_every_entry_is_needed_and_typed(several: bool, tmp_path: Path) -> None:
    content = stub_members(tmp_path) if several else stub_manifest(tmp_path)
    places = [*paths(content)]
    last = ("members", 1) if several else ()  # the place of a member: of the whole file, or the second of two
    member = content["members"][1] if several else content
    if several:
        places += paths(member, last)
    places += paths(member["folds"][0], (*last, "folds", 0))
    assert len(places) > 20
    for path in places:
        for value in (KeyError, None, [], {}, "", -1, True, math.nan, "../../etc/passwd", [[]], "\0", "\ud800"):
            if (path[-1] in ("licence", "provenance", "precision") and value == {}) or (
                path[-1] == "crop" and value is None
            ):
                continue
            if path[-1] == "backbone" and isinstance(value, str):  # the table of backbones judges it
                continue
            if path == ("format",) and value is True:  # equal to 1
                continue
            rewrite(tmp_path, replaced(content, path, value))
            with pytest.raises(UserError, match="expected"):
                load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("temperature",), 0),
        (("temperature",), math.inf),
        (("threshold",), 0),
        (("threshold",), 1.0),
        (("name",), "two\nlines"),
        (("name",), "\x1b[31mred"),
        (("name",), "x" * 101),
        (("name",), "a/b"),
        (("preprocess", "size"), 10**9),
        (("preprocess", "std"), [0.1, 0.1, 0]),
        (("preprocess", "extra"), 1),
        (("preprocess", "mean"), [0.1, 0.1, math.nan]),
        (("precision",), {"fp8": 0.1}),
        (("precision",), {"bf16": "low"}),
        (("base", "file"), "base.pth"),
        (("base", "file"), ".hidden.safetensors"),
        (("base", "file"), "a/b.safetensors"),
        (("base", "sha256"), "A" * 64),
        (("folds", 0, "folder"), ".."),
        (("folds", 0, "folder"), "/etc"),
        (("folds", 0, "folder"), "fold0/../fold0"),
        (("folds",), [1]),
        (("folds",), []),
    ],
)
def test_refuses(path: tuple, value: Any, tmp_path: Path) -> None:
    rewrite(tmp_path, replaced(stub_manifest(tmp_path), path, value))
    with pytest.raises(UserError, match="expected"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("weights",), [0.5]),
        (("weights",), [1.0, 0.0]),
        (("weights",), [0.5, 0.6]),
        (("weights",), [1.5, -0.5]),
        (("weights",), [True, 0.0]),
        (("weights",), {"a": 0.25, "b": 0.75}),
        (("weights",), [0.5, math.nan]),
        (("members", 1, "name"), "a"),
        (("members", 1, "name"), "a b"),
        (("members", 1, "name"), "../b"),
        (("members", 1, "folds", 0, "folder"), "fold0"),
        (("members", 1, "tta"), "d8"),
        (("members", 1, "positions"), "nearest"),
        (("members", 0), 1),
        (("members", 1, "base", "sha256"), "0" * 64),
        (("members", 1, "preprocess", "size"), 0),
        (("members", 1, "base", "file"), "missing.safetensors"),
        (("members",), []),
        (("members",), {}),
    ],
)
def test_refuses_members(path: tuple, value: Any, tmp_path: Path) -> None:
    content = stub_members(tmp_path)
    rewrite(tmp_path, replaced(content, path, value))
    with pytest.raises(UserError, match="expected") as caught:
        load_manifest(tmp_path)
    if path[:1] == ("members",) and len(path) > 3 and path[-1] not in ("folder", "sha256", "file"):
        assert ".".join([f"members[{path[1]}]", *map(str, path[2:])]) in str(caught.value)


def test_refuses_more_members_than_fit(tmp_path: Path) -> None:
    content = stub_members(tmp_path)
    member = content["members"][0]
    folds = [{**member["folds"][0], "folder": f"fold{n}"} for n in range(9)]
    members = [member | {"name": f"m{n}", "folds": [fold]} for n, fold in enumerate(folds)]
    rewrite(tmp_path, content | {"members": members[:8], "weights": [1 / 8] * 8})
    assert len(load_manifest(tmp_path).members) == 8
    rewrite(tmp_path, content | {"members": members, "weights": [1 / 9] * 9})
    with pytest.raises(UserError, match="list of 1 to 8"):
        load_manifest(tmp_path)


def test_refuses_a_fold_twice_and_too_many(tmp_path: Path) -> None:
    content = stub_manifest(tmp_path)
    rewrite(tmp_path, content | {"folds": content["folds"] * 2})
    with pytest.raises(UserError, match="twice"):
        load_manifest(tmp_path)
    rewrite(tmp_path, content | {"folds": content["folds"] * 1000})
    with pytest.raises(UserError, match="1000 folds"):
        load_manifest(tmp_path)


def test_refuses_what_is_no_manifest(tmp_path: Path) -> None:
    stub_manifest(tmp_path)
    file = tmp_path / "ensemble.json"
    for content in (
        b"",
        b"[]",
        b"1",
        b"\xff",
        b"{" * 100_000,
        b'{"format": 2}',
        b'{"format": 3}',
        b'{"format": "' + b"x" * 100_000 + b'"}',
    ):
        file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            load_manifest(tmp_path)
        assert len(str(caught.value)) < 500
    file.unlink()
    with pytest.raises(UserError, match=r"no ensemble\.json"):
        load_manifest(tmp_path)
    with file.open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(UserError, match="expected at most"):
        load_manifest(tmp_path)


class Payload:
    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('a pickle was opened')",))


@pytest.mark.parametrize("suffix", PICKLES)
@pytest.mark.parametrize("place", [".", "fold0"])
def test_a_pickle_in_the_folder_is_refused(suffix: str, place: str, tmp_path: Path) -> None:
    stub_manifest(tmp_path)
    load_manifest(tmp_path)
    (tmp_path / place / f"adapter_model{suffix.upper()}").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match="may be a pickle"):
        load_manifest(tmp_path)


def test_altered_and_missing_files_are_found(tmp_path: Path) -> None:
    stub_manifest(tmp_path)
    manifest = load_manifest(tmp_path)
    for file in (*manifest.files, *manifest.bases):
        content = file.read_bytes()
        for other in (content + b"x", content[:-1], bytes(len(content)), b""):
            file.write_bytes(other)
            with pytest.raises(UserError, match=f"{file.name} has SHA-256"):
                wait(manifest)
        file.unlink()
        with pytest.raises(UserError, match="cannot be read"):
            wait(manifest)
        file.write_bytes(content)
    manifest.members[0].base.unlink()
    with pytest.raises(UserError, match=r"base weights base\.safetensors not found"):
        load_manifest(tmp_path)
