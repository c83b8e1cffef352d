"""The drawn figures: reproducible, of the right kind, dark where chromatin is."""

from __future__ import annotations

import numpy as np
import pytest

from inference.example.figures import FIGURES, STAINS, draw

KINDS = [kind for figures in FIGURES.values() for kind in figures]


@pytest.mark.parametrize("kind", KINDS)
def test_a_figure_is_dark_in_the_middle_and_pink_around(kind: str) -> None:
    crop = draw(kind, np.random.default_rng(3), stain=0)
    assert crop.shape == (128, 128, 3)
    assert crop.dtype == np.uint8
    middle = crop[40:88, 40:88]
    chromatin = middle[middle.sum(axis=2) < 270]
    assert 60 < len(chromatin) < 1400  # pixels of 0.25 um
    assert chromatin[:, 2].mean() > chromatin[:, 0].mean() + 20  # blue, not black
    background = np.median(crop.reshape(-1, 3), axis=0)
    assert background[0] > background[1] + 15 and background[2] > background[1] + 15  # pink to purple


def test_the_same_seed_gives_the_same_crop_and_another_one_another() -> None:
    first, again, other = (draw("bridge", np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_size_and_stain_are_free() -> None:
    rng = np.random.default_rng(0)
    assert draw("metaphase", rng, side=96).shape == (96, 96, 3)
    assert (
        len({tuple(draw("metaphase", np.random.default_rng(0), stain=k).mean(axis=(0, 1))) for k in range(len(STAINS))})
        == 4
    )


def test_both_classes_have_several_kinds_and_unknown_ones_are_refused() -> None:
    assert set(FIGURES) == {"normal", "atypical"}
    assert len(KINDS) == len(set(KINDS)) == 9
    with pytest.raises(KeyError):
        draw("apoptosis", np.random.default_rng(0))
