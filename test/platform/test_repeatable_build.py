"""Two builds of the same files give the same layers, byte for byte, above the base image (needs an engine; minutes)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference.checks import docker
from test.harness.engines import inspect

ROOT = Path(__file__).resolve().parents[2]
TAGS = tuple(f"midog-lora-repeat-{os.getpid()}-{number}" for number in range(2))

pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.skipif("REPEAT_BUILD" not in os.environ, reason="two builds take ten minutes; set REPEAT_BUILD=1"),
    pytest.mark.skipif(docker() is None, reason="no Docker engine answers (test/engine.sh start)"),
]


@pytest.fixture(scope="module")
def images() -> Iterator[list[dict]]:
    """The image from the cache where there is one, and the image with every step run again."""
    for tag, options in zip(TAGS, ("", "--no-cache"), strict=True):
        environment = os.environ | {"IMAGE": tag, "DOCKER_BUILD_ARGS": options}
        done = subprocess.run(
            [ROOT / "build.sh", "--engine", "docker"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    yield [inspect(tag) or {} for tag in TAGS]
    subprocess.run([str(docker()), "image", "rm", "--force", *TAGS], capture_output=True)


def test_layers_are_the_same(images: list[dict]) -> None:
    first, second = (image["RootFS"]["Layers"] for image in images)
    assert first == second
    assert len(first) >= 5  # the base image, the lock, dependencies, bases, code


def test_the_stamp_makes_every_build_new(images: list[dict]) -> None:
    stamps = [image["Config"]["Labels"]["midog-lora.built"] for image in images]
    assert stamps[0] != stamps[1]
    assert images[0]["Id"] != images[1]["Id"]
