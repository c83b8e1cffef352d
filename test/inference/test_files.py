"""Writing a file whole: the old content or the new, whatever happens, and nothing beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from inference import files
from inference.files import replacing, write_whole


@pytest.fixture(params=["a file without a name", "a hidden file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With and without what the kernel offers for files without a name."""
    if request.param == "a hidden file":
        monkeypatch.setattr(files.os, "O_TMPFILE", os.O_DIRECTORY)  # refused, as by a file system that lacks it
    return tmp_path


@pytest.mark.parametrize("sync", [False, True])
def test_new_and_replaced(folder: Path, sync: bool) -> None:
    file = folder / "out"
    for content in (b"first", b"second, longer", b""):
        write_whole(file, content, sync=sync)
        assert file.read_bytes() == content
        assert os.listdir(folder) == ["out"]
    write_whole(file, "caf\u00e9 \udce9")  # a path that is not UTF-8 reaches Python as a lone surrogate
    assert file.read_bytes() == "caf\u00e9 ?".encode()


def test_a_failure_leaves_the_old_content(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "out"
    write_whole(file, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, b"new", sync=True)
    with pytest.raises(OSError, match="No space"), replacing(file, sync=True) as partial:
        partial.write_bytes(b"new")
    assert file.read_bytes() == b"old" and os.listdir(folder) == ["out"]


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half"), replacing(tmp_path / "out") as partial:
        partial.write_bytes(b"half")
        raise ValueError("half")
    assert os.listdir(tmp_path) == []
    with replacing(tmp_path / "out") as partial:
        partial.write_bytes(b"whole")
    assert os.listdir(tmp_path) == ["out"]
