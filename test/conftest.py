"""Fixtures that several test modules share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from test.support import ray_cluster

if TYPE_CHECKING:
    import numpy as np

    from test.support.browser import Browser


ray_cluster.authenticate()  # before any test module imports Ray


@functools.cache
def marked(file: Path, mark: str) -> bool:
    """Whether some test of `file` has this mark; the process that hands out the work has no items to ask."""
    return f"pytest.mark.{mark}" in file.read_text()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: a worker that took one last would keep the others waiting."""
    items.sort(key=lambda item: (not marked(item.path, "docker"), not marked(item.path, "slow")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, where one worker takes all files with containers: they share an engine, ports and images."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "docker" if marked(config.rootpath / file, "docker") else file

    return Scheduler(config, log)


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    """A browser with a profile of its own; without one the tests are skipped, or fail under REQUIRE_BROWSER."""
    from test.support.browser import browser, find

    if not find():
        message = "no Chromium with chromedriver (apt-get install chromium chromium-driver)"
        pytest.fail(message) if os.environ.get("REQUIRE_BROWSER") else pytest.skip(message)
    with browser() as opened:
        yield opened


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands say every half minute is not said, however busy the machine is: tests compare what they print."""
    monkeypatch.setattr("inference.progress.EVERY", 3600.0)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands say every half minute, they say at once and once, so that no test waits for it."""
    from inference import progress

    class Eager:
        def __init__(self, speak: Callable[[], None]) -> None:
            speak()

        def stop(self) -> None:
            pass

    monkeypatch.setattr(progress, "Beat", Eager)


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ensemble of real architecture with random weights, in two folds. Not to be changed."""
    from test.support.miniature import make_ensemble

    folder = tmp_path_factory.mktemp("miniature")
    make_ensemble(folder, folds=2)
    return folder


@pytest.fixture(scope="session")
def blobs() -> list[bytes]:
    """Generated crops as PNG files' bytes."""
    import numpy as np

    from test.support.shard_files import CROPS, encode

    rng = np.random.default_rng(0)
    return [encode(rng) for _ in range(CROPS)]


@pytest.fixture(scope="session")
def drawn() -> np.ndarray:
    """1000 x 1300 pixels of noisy glass with a drawn figure at each of FIGURES' centres. Not to be changed."""
    import numpy as np

    from inference.example.figures import draw
    from test.support.pyramids import FIGURES

    rng = np.random.default_rng(0)
    pixels = rng.integers(225, 245, (1000, 1300, 3), dtype=np.uint8)
    for (x, y), kind in FIGURES.items():
        pixels[y - 64 : y + 64, x - 64 : x + 64] = draw(kind, rng)
    return pixels


@pytest.fixture(scope="session")
def slide(drawn: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`drawn` as a slide of 0.25 µm/px. Not to be changed."""
    from test.support.pyramids import pyramid, write_slide

    return write_slide(tmp_path_factory.mktemp("slides") / "case 1.tif", pyramid(drawn))
