"""Two builds of the same files give the same layers, byte for byte, above the base image (needs an engine).

Every run makes the layers above the dependencies again; with REPEAT_BUILD=1 everything, which downloads gigabytes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.checks import docker
from test.harness.engines import inspect

ROOT = Path(__file__).resolve().parents[2]
FIRST, AGAIN, BELOW = (f"midog-lora-repeat-{os.getpid()}-{name}" for name in ("first", "again", "below"))
FILES = ("build.sh", "requirements", "inference", "training", "release", "weights")
STAGE = re.compile(r"FROM \$\{BASE_IMAGE\} AS dependencies\n.*?(?=# ---- )", re.DOTALL)

pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.skipif(docker() is None, reason="no Docker engine answers (release/engine.sh start)"),
]


def build(folder: Path, tag: str, options: str = "") -> None:
    environment = os.environ | {"IMAGE": tag, "DOCKER_BUILD_ARGS": options}
    command = [folder / "build.sh", "--engine", "docker"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def copy_without_dependencies(folder: Path) -> None:
    """What an image is built from, with the finished stage of dependencies in place of the steps that make it."""
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    text, count = STAGE.subn(f"FROM {BELOW} AS dependencies\n\n", (ROOT / "Dockerfile").read_text())
    assert count == 1
    (folder / "Dockerfile").write_text(text)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict]]:
    """The image from the cache where there is one, and the image with its steps run again."""
    try:
        build(ROOT, FIRST)
        if "REPEAT_BUILD" in os.environ:
            build(ROOT, AGAIN, "--no-cache")
        else:
            build(ROOT, BELOW, "--target dependencies")
            folder = tmp_path_factory.mktemp("context")
            copy_without_dependencies(folder)
            build(folder, AGAIN, "--no-cache")
        yield [inspect(tag) or {} for tag in (FIRST, AGAIN)]
    finally:
        subprocess.run([str(docker()), "image", "rm", "--force", FIRST, AGAIN, BELOW], capture_output=True)


def test_layers_are_the_same(images: list[dict]) -> None:
    first, second = (image["RootFS"]["Layers"] for image in images)
    assert first == second
    assert len(first) >= 5  # the base image, the lock, dependencies, bases, code


def test_the_stamp_makes_every_build_new(images: list[dict]) -> None:
    stamps = [image["Config"]["Labels"]["midog-lora.built"] for image in images]
    assert stamps[0] != stamps[1]
    assert images[0]["Id"] != images[1]["Id"]


def test_the_next_build_removes_what_it_replaced(images: list[dict]) -> None:
    build(ROOT, FIRST)
    assert inspect(FIRST) is not None
    assert inspect(images[0]["Id"]) is None
