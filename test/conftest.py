"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from test.support import ray_cluster

if TYPE_CHECKING:
    import numpy as np


ray_cluster.authenticate()  # before any test module imports Ray


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

    from test.support.figures import draw
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
