"""The same stack gives the same bytes; a page's answer does not depend on its neighbours, its place or the batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inference.ensemble import Ensemble
from test.support.image_files import with_pillow
from test.support.miniature import make_ensemble
from test.support.stub import make_input, run_job

ALLOWED = 1e-6  # of P(atypical) in fp32
BACKBONES = ("efficientnet-lite0", "uni2-h")


def crops(count: int, seed: int = 0, side: int = 96) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8))


@pytest.fixture(scope="module", params=BACKBONES)
def ensemble(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ensemble]:
    folder = tmp_path_factory.mktemp(request.param)
    more = {} if request.param == BACKBONES[0] else {"preprocess": None}
    if more:
        from inference.backbones import lookup

        row = lookup(request.param)
        sizes = {"crop": 80, "size": 56, "kernel": "bicubic", "mean": list(row.mean), "std": list(row.std)}
        more = {"preprocess": sizes}
    make_ensemble(folder, request.param, folds=2, tta="rot4", **more)
    yield Ensemble.load(folder, "cpu", "fp32")


def test_same_bytes_twice(miniature: Path, tmp_path: Path) -> None:
    content = with_pillow([Image.fromarray(page) for page in crops(16)], "tiff_lzw")
    found = []
    for name in ("first", "second"):
        assert run_job(make_input(tmp_path / "in", content), tmp_path / name, miniature, stub=False).code == 0
        found.append(next((tmp_path / name).iterdir()).read_bytes())
    assert found[0] == found[1]


def test_one_by_one_as_all_together(ensemble: Ensemble) -> None:
    """Page counts from 1 to 37, which no batch size divides."""
    pages = crops(37)
    together = ensemble.predict(pages).p_atypical
    alone = np.array([ensemble.predict([page]).p_atypical[0] for page in pages])
    assert together.std() > 1e-3  # the network looks at its input
    assert np.abs(together - alone).max() <= ALLOWED
    for count in (2, 3, 5, 16):
        assert np.abs(ensemble.predict(pages[:count]).p_atypical - alone[:count]).max() <= ALLOWED


def test_order_and_neighbours(ensemble: Ensemble) -> None:
    pages, others = crops(16), crops(15, seed=9)
    expected = ensemble.predict(pages).p_atypical
    order = np.random.default_rng(1).permutation(16)
    assert np.abs(ensemble.predict([pages[n] for n in order]).p_atypical - expected[order]).max() <= ALLOWED
    for place in (0, 7, 15):
        mixed = [*others[:place], pages[3], *others[place:]]
        assert abs(ensemble.predict(mixed).p_atypical[place] - expected[3]) <= ALLOWED
    assert np.array_equal(ensemble.predict([pages[3]] * 16).p_atypical, ensemble.predict([pages[3]] * 16).p_atypical)


def test_any_batch_size(ensemble: Ensemble) -> None:
    pages = crops(16)
    expected = ensemble.predict(pages).p_atypical
    [member] = ensemble.members
    chosen = member._batch
    try:
        for size in (1, 2, 3, 7, 16, 64):
            member._batch = size
            assert np.abs(ensemble.predict(pages).p_atypical - expected).max() <= ALLOWED
    finally:
        member._batch = chosen


def test_number_of_threads(ensemble: Ensemble) -> None:
    pages, threads = crops(8), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ensemble.predict(pages).p_atypical
        torch.set_num_threads(2)
        assert np.abs(ensemble.predict(pages).p_atypical - one).max() <= ALLOWED
    finally:
        torch.set_num_threads(threads)


def test_a_neighbour_of_another_size(ensemble: Ensemble) -> None:
    pages = [*crops(3), *crops(2, side=33), *crops(2, side=200), crops(1, side=1)[0]]
    together = ensemble.predict(pages).p_atypical
    alone = np.array([ensemble.predict([page]).p_atypical[0] for page in pages])
    assert np.abs(together - alone).max() <= ALLOWED
