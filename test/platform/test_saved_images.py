"""What preflight passes, the platform accepts and can start, and the other way round: generated `docker save` files.

The second judge lays the layers out in a folder, and a process that has it for its root finds the user as the shim does
and looks for the program as that user: the kernel follows the links and checks the permissions.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference.checks import passed
from release.preflight import check_file
from test.harness import engines
from test.platform.test_preflight import CONFIG, FILES, saved, tar_of

sys.path += [str(program.parent) for program in engines.PROGRAMS]  # a run has copies of them side by side
import shim

SETTINGS = {
    "User": (
        "user",
        "user",
        "1000",
        "1000:1000",
        "user:user",
        "4321",
        "",
        "root",
        "ROOT",
        "0",
        "0:0",
        "toor",
        "ghost",
        "a b",
    ),
    "Entrypoint": (
        ["python", "-m", "inference"],
        ["/usr/bin/python"],
        ["../../usr/bin/python"],
        ["/bin/python"],
        ["./run"],
        ["python9"],
        ["/opt/app/gone"],
        ["/opt/app"],
        None,
    ),
    "WorkingDir": ("/opt/app", "", "/"),
    "Env": (["PATH=/usr/bin:/bin"], ["PATH=/opt/app"], []),
    "Volumes": (None, {"/input": {}}, {"/tmp/": {}}, {"/data": {}}),
    "Labels": ({}, {" Org.grand-challenge.API-method": "'Invoke'"}, {"org.grand-challenge.api-method": "serve"}),
}
LAYERS: tuple[dict[str, bytes | None], ...] = (
    {},
    {"opt/app/run": b"#!"},
    {"usr/bin/.wh.python": b"", "x": b""},
    {"usr/.wh.bin": b"", "usr/bin": None, "usr/bin/python": b"#!"},
    {"etc/.wh.passwd": b"", "x": b""},
    {"opt/app/.wh..wh..opq": b"", "opt/app/run": b"#!"},
)
RESERVED = {"/input", "/output", "/tmp", "/opt/ml", "/opt/ml/model"}


def lay_out(layers: list[bytes], root: Path) -> None:
    """The image's file system."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for data in layers:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in (one for one in tar if Path(one.name).name.startswith(".wh.")):
                place = root / member.name
                hidden = place.with_name(place.name[4:])
                gone = list(place.parent.iterdir()) if place.name == ".wh..wh..opq" else [hidden]
                for old in gone:
                    shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)
            for member in tar:
                if not Path(member.name).name.startswith(".wh."):
                    tar.extract(member, root, numeric_owner=True)


def starts(root: Path, given: dict[str, Any]) -> bool:
    """Whether the shim finds the user, who is not root, an executable file for the command, and what cleans up."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chroot(root)
            os.chdir(given.get("WorkingDir") or "/")
            uid = shim.find_user(given["User"])[0]
            os.setgroups([])
            os.setgid(12345)
            os.setuid(uid or 0)
            command = (given.get("Entrypoint") or []) + (given.get("Cmd") or [])
            path = dict(line.split("=", 1) for line in given["Env"]).get("PATH", "/usr/bin:/bin")
            tools = all(Path("/bin", name).exists() for name in ("sh", "rm", "chmod"))
            code = 0 if uid and tools and shutil.which(command[0], path=path) else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def accepted(given: dict[str, Any], architecture: str, images: int) -> bool:
    """The platform's own rules for the upload."""
    user, label = given["User"].lower(), "exec"
    for key, value in given["Labels"].items():
        label = value.strip("\"'").lower() if "api-method" in key.lower() else label
    root = user in ("", "root", "0") or user.startswith(("0:", "root:"))
    mounted = {volume.rstrip("/") for volume in given["Volumes"] or {}} & RESERVED
    return images == 1 and architecture == "amd64" and not root and label in ("exec", "invoke") and not mounted


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to take another folder for the root")
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.dictionaries(st.sampled_from(sorted(SETTINGS)), st.integers(0, 99), max_size=2),
    layer=st.sampled_from(LAYERS),
    architecture=st.sampled_from(("amd64", "amd64", "amd64", "arm64")),
    images=st.sampled_from((1, 1, 1, 1, 2)),
)
def test_saved_images(
    changes: dict[str, int], layer: dict[str, bytes | None], architecture: str, images: int, tmp_path: Path
) -> None:
    chosen = {key: SETTINGS[key][n % len(SETTINGS[key])] for key, n in changes.items()}
    whole = {"Volumes": None, **CONFIG["config"], **chosen}
    layers = [tar_of(FILES, {"bin": "usr/bin"}), *([tar_of(layer)] if layer else [])]
    file = tmp_path / "image.tar.gz"
    file.write_bytes(
        gzip.compress(tar_of(saved(layers, CONFIG | {"architecture": architecture, "config": whole}, images)), 1)
    )
    lay_out(layers, tmp_path / "root")
    findings = check_file(file)
    expected = accepted(whole, architecture, images) and starts(tmp_path / "root", whole)
    assert passed(findings) == expected, json.dumps(whole) + "\n" + "\n".join(map(str, findings))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to take another folder for the root")
def test_a_good_image_passes_both(tmp_path: Path) -> None:
    """Without this, two judges that refuse everything would agree."""
    whole, layers = {"Volumes": None, **CONFIG["config"]}, [tar_of(FILES, {"bin": "usr/bin"})]
    (tmp_path / "image.tar.gz").write_bytes(gzip.compress(tar_of(saved(layers, CONFIG))))
    lay_out(layers, tmp_path / "root")
    assert passed(check_file(tmp_path / "image.tar.gz"))
    assert accepted(whole, "amd64", 1) and starts(tmp_path / "root", whole)
