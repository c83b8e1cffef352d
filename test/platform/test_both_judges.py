"""What preflight passes, a job accepts, and the other way round: generated model tarballs, both judges run."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference.checks import passed
from release.preflight import check_file
from release.unpack import SetupError, unpack
from test.support.programs import make_stack
from test.support.stub import make_input, run_job

Members = list[tuple[str, "bytes | str"]]  # bytes of a file, or where a symbolic link points
MANIFEST, ADAPTER, CONFIG = "ensemble.json", "fold1/adapter_model.safetensors", "fold0/adapter_config.json"


def files_of(folder: Path) -> Members:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in paths]


def change(members: Members, name: str, edit: Callable[[bytes], bytes]) -> Members:
    return [(n, edit(c) if n == name and isinstance(c, bytes) else c) for n, c in members]


def change_manifest(key: str, value: Any) -> Callable[[Members], Members]:
    def edit(content: bytes) -> bytes:
        return json.dumps(json.loads(content) | {key: value}).encode()

    return lambda members: change(members, MANIFEST, edit)


def flip(name: str, place: float) -> Callable[[Members], Members]:
    def edit(content: bytes) -> bytes:
        at = int(place * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return lambda members: change(members, name, edit)


def without(name: str) -> Callable[[Members], Members]:
    return lambda members: [member for member in members if member[0] != name]


def added(name: str, content: bytes | str) -> Callable[[Members], Members]:
    return lambda members: [*members, (name, content)]


def below(prefix: str) -> Callable[[Members], Members]:
    return lambda members: [(prefix + name, content) for name, content in members]


NAMES = [MANIFEST, ADAPTER, CONFIG, "base.safetensors"]
FOLDERS = ["", "fold0/", "notes/"]
HARMLESS = [added("README.md", b"card"), added("..data/x", b""), added("link", "README.md"), below("./"), below("/")]
EDITS = st.one_of(
    st.sampled_from(HARMLESS),
    st.builds(flip, st.sampled_from(NAMES), st.floats(0, 1)),
    st.builds(without, st.sampled_from(NAMES)),
    st.builds(
        lambda folder, suffix: added(f"{folder}extra{suffix}", b"x"),
        st.sampled_from(FOLDERS),
        st.sampled_from([".pt", ".joblib", ".PKL", ".txt"]),
    ),
    st.sampled_from([below("default/"), added("../outside", b""), added("out", "/etc/passwd"), added("out", "../..")]),
    st.builds(
        lambda pair: change_manifest(*pair),
        st.sampled_from([("format", 9), ("name", ""), ("averaging", "mean"), ("tta", "d4"), ("licence", {"x": 1})]),
    ),
)


def write(members: Members, file: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            if isinstance(content, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    file.write_bytes(gzip.compress(buffer.getvalue(), 0, mtime=0))


def job_answers(tarball: Path, folder: Path) -> bool:
    """Whether a real job ends with answers, after the platform's unpacking."""
    try:
        unpack(str(tarball), str(folder / "model"))
    except SetupError:
        return False
    stack = make_stack(folder / "stack.tiff").read_bytes()
    return run_job(make_input(folder / "input", stack), folder / "output", folder / "model", stub=False).code == 0


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(EDITS, min_size=1, max_size=2))
def test_model_tarballs(edits: list[Callable[[Members], Members]], miniature: Path, tmp_path: Path) -> None:
    folder = tmp_path / "case"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "model").mkdir(parents=True)
    members = files_of(miniature)
    for edit in edits:
        members = edit(members)
    write(members, folder / "model.tar.gz")
    findings = check_file(folder / "model.tar.gz")
    assert passed(findings) == job_answers(folder / "model.tar.gz", folder), "\n".join(map(str, findings))


@pytest.mark.parametrize("edit", [lambda members: members, *HARMLESS])
def test_a_good_tarball_passes_both(edit: Callable[[Members], Members], miniature: Path, tmp_path: Path) -> None:
    """Without this, two judges that refuse everything would agree."""
    (tmp_path / "model").mkdir()
    write(edit(files_of(miniature)), tmp_path / "model.tar.gz")
    findings = check_file(tmp_path / "model.tar.gz")
    assert passed(findings), "\n".join(map(str, findings))
    assert job_answers(tmp_path / "model.tar.gz", tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda members: [member for member in members if member[0] == MANIFEST], "base.safetensors not found"),
        (flip(ADAPTER, 0.5), "has SHA-256"),
        (added("fold0/extra.joblib", b""), "may be a pickle"),
        (added("extra.pt", b""), "may be a pickle"),
    ],
)
def test_what_every_job_would_fail_with_fails_here(
    edit: Callable[[Members], Members], message: str, miniature: Path, tmp_path: Path
) -> None:
    write(edit(files_of(miniature)), tmp_path / "model.tar.gz")
    [said] = [str(finding) for finding in check_file(tmp_path / "model.tar.gz") if finding.level == "FAIL"]
    assert "every job would fail: " in said and message in said
    assert str(tmp_path) not in said and "preflight-" not in said


def test_weights_that_do_not_fit_their_backbone_fail_both(miniature: Path, tmp_path: Path) -> None:
    """Right hashes, wrong tensors: only opening them shows it."""
    import hashlib

    from safetensors.numpy import save

    empty = save({"nothing": np.zeros(1, np.float32)})
    members = change(files_of(miniature), ADAPTER, lambda _: empty)
    old = hashlib.sha256((miniature / ADAPTER).read_bytes()).hexdigest().encode()
    members = change(members, MANIFEST, lambda text: text.replace(old, hashlib.sha256(empty).hexdigest().encode()))
    (tmp_path / "model").mkdir()
    write(members, tmp_path / "model.tar.gz")
    assert not passed(check_file(tmp_path / "model.tar.gz"))
    assert not job_answers(tmp_path / "model.tar.gz", tmp_path)
