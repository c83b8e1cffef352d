"""On a fresh machine `./test/run_local.sh` writes the report the first time, and its last line names the file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from inference.checks import docker
from test.harness.engines import inspect

ROOT = Path(__file__).resolve().parents[2]
IMAGE = os.environ.get("IMAGE", "midog-lora")
# stands for uv: its environments see the packages that the tests run with, and installing is noted and done already
UV = """#!/bin/sh
echo "$*" >>{calls}
[ "$1" = venv ] || exit 0
for folder; do :; done
{python} -m venv --without-pip "$folder" && echo {packages} >"$folder/lib/python3.11/site-packages/borrowed.pth"
mkdir -p "$folder/bin"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """This tree as it is now, without anything that was installed or written, but with the bases."""
    target = tmp_path / "clone"
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "export", "output"))
    return target


def bare_python(folder: Path) -> Path:
    """A folder with a `python3` that has no package at all, and a `uv`; the first of a PATH."""
    base = getattr(sys, "_base_executable", sys.executable)
    subprocess.run([base, "-m", "venv", "--without-pip", folder / "bare"], check=True)
    uv = folder / "bare/bin/uv"
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    uv.write_text(UV.format(calls=folder / "calls", python=base, packages=packages))
    uv.chmod(0o755)
    return folder / "bare/bin"


def run_local(clone: Path, first: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{first}:{os.environ['PATH']}"
    known = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    command = [clone / "test/run_local.sh", *options]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True, env=known | environment | {"PATH": path})


def check(done: subprocess.CompletedProcess[str], clone: Path) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "open test/output/report.html"
    assert "Local run" in (clone / "test/output/report.html").read_text()


def test_natively(clone: Path, tmp_path: Path) -> None:
    done = run_local(clone, bare_python(tmp_path), "--engine", "native", DOCKER="/bin/false")
    check(done, clone)
    assert "several GB the first time" in done.stdout
    installs = [line for line in (tmp_path / "calls").read_text().splitlines() if line.startswith("pip install")]
    assert installs and not any("--quiet" in line for line in installs)  # progress is shown


@pytest.mark.docker
@pytest.mark.skipif(docker() is None, reason="no Docker engine answers (release/engine.sh start)")
@pytest.mark.skipif(inspect(IMAGE) is None, reason=f"no image {IMAGE} (./build.sh)")
def test_with_docker(clone: Path, tmp_path: Path) -> None:
    """The image is there, as after a build; the report's environment is not."""
    first = bare_python(tmp_path)
    done = run_local(clone, first, "--engine", "docker", "--no-build", "--image", IMAGE)
    check(done, clone)
    assert "what the report needs" in done.stdout
