"""Augmentation: drawn from its seed alone, in range, and each strength does what it says."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.preprocess import Preprocess, to_batch, views
from test.support.tables import tiny_table
from training.__main__ import main
from training.augment.batch import Batch, augment, cutout, mixup
from training.augment.colour import stain_vectors
from training.augment.optics import disc, path
from training.augment.strengths import Augment
from training.augment.warp import Canvas, canvases
from training.fit.feed import generator

OFF = Augment(
    dihedral=False,
    **{
        f.name: 0
        for f in dataclasses.fields(Augment)
        if f.name not in ("dihedral", "jpeg", "clahe", "defocus", "motion")
    },
)
STRENGTHS: list[dict[str, Any]] = [
    {"dihedral": True},
    {"rotate": 90.0},
    {"scale": 0.3},
    {"stretch": 0.3},
    {"shift": 6.0},
    {"elastic": 2.0},
    {"grid": 0.4},
    {"optical": 0.3},
    {"brightness": 0.3},
    {"contrast": 0.3},
    {"saturation": 0.5},
    {"hue": 0.2},
    {"gamma": 0.4},
    {"hed": 0.2},
    {"macenko": 0.2},
    {"channel": 0.2},
    {"grey_p": 0.5},
    {"shuffle_p": 1.0},
    {"clahe_p": 1.0, "clahe": 40.0},
    {"blur_p": 1.0, "blur": 2.0},
    {"defocus_p": 1.0},
    {"motion_p": 1.0},
    {"noise_p": 1.0, "noise": 0.1},
    {"jpeg_p": 1.0},
    {"cutout_p": 1.0, "cutout": 0.4},
]


@pytest.fixture
def crops() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 8, 8, generator=g)
    return torch.nn.functional.interpolate(coarse, (48, 48), mode="bicubic").clamp(0, 1).mul(255).round().byte()


def preprocess(size: int, kernel: str = "bicubic") -> Preprocess:
    return Preprocess(None, size, kernel, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def draw(crops: torch.Tensor, a: Augment, seed: int = 0) -> torch.Tensor:
    side = crops.shape[-1]
    return augment([Canvas(crop, side) for crop in crops], preprocess(side), a, generator(seed))


def test_nothing_on_changes_nothing(crops):
    assert (draw(crops, OFF) - crops / 255).abs().max() < 1e-4


@pytest.mark.parametrize("change", STRENGTHS, ids=lambda change: next(iter(change)))
def test_each_strength_changes_crops_reproducibly_and_in_range(crops, change):
    a = dataclasses.replace(OFF, **change)
    found = draw(crops, a)
    assert found.shape == crops.shape
    assert found.min() >= 0 and found.max() <= 1
    assert (found - crops / 255).abs().mean() > 1e-3
    assert torch.equal(found, draw(crops, a))
    assert not torch.equal(found, draw(crops, a, 1))


def test_all_defaults_together_and_another_size(crops):
    found = augment([Canvas(crop, 30) for crop in crops], preprocess(24), Augment(), generator(0))
    assert found.shape == (6, 3, 24, 24)
    assert found.isfinite().all()


def test_dihedral_gives_the_eight_views_and_nothing_else(crops):
    one = crops[:1].expand(64, -1, -1, -1)
    found = draw(one, dataclasses.replace(OFF, dihedral=True))
    eight = views(crops[:1] / 255, "d4")
    distance = (found[:, None] - eight[None]).abs().amax((2, 3, 4))  # (64, 8)
    assert distance.min(1).values.max() < 1e-4
    assert len(set(distance.argmin(1).tolist())) == 8


def test_cutout_spares_the_middle():
    rgb = torch.rand(200, 3, 40, 40)
    found = cutout(rgb, dataclasses.replace(OFF, cutout=0.4, cutout_p=1.0), generator(0))
    assert torch.equal(found[:, :, 18:22, 18:22], rgb[:, :, 18:22, 18:22])


def test_mixup_mixes_crops_targets_and_weights_alike():
    rgb = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    target, weight = torch.arange(4.0), 10 * torch.arange(4.0)
    mixed, t, w = mixup(Batch(rgb, target, weight), 0.4, generator(0))
    assert torch.allclose(mixed[:, 0, 0, 0], t)
    assert torch.allclose(10 * t, w)
    assert not torch.equal(t, target)


def test_canvases_keep_the_surroundings_that_there_are():
    g = np.random.default_rng(0)
    images = [g.integers(0, 256, sides, dtype=np.uint8) for sides in ((20, 30, 3), (64, 64, 3), (41, 90, 3))]
    found = canvases(images, 30)
    assert [(canvas.side, canvas.pixels.shape[-1]) for canvas in found] == [(20, 20), (30, 48), (30, 40)]
    assert torch.equal(found[1].pixels, torch.tensor(images[1][8:56, 8:56]).permute(2, 0, 1))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(8, 90), st.integers(8, 90)), min_size=1, max_size=4),
    st.sampled_from([0, 9, 40, 64, 200]),
    st.integers(8, 96),
    st.sampled_from(["bilinear", "bicubic"]),
)
def test_a_crop_without_augmentation_is_what_inference_shows(sides, crop, size, kernel):
    g = np.random.default_rng(0)
    images = [g.integers(0, 256, (*side, 3), dtype=np.uint8) for side in sides]
    how = dataclasses.replace(preprocess(size, kernel), crop=crop or None)
    found = augment(canvases(images, crop), how, OFF, generator(0))
    assert (found - to_batch(images, how)).abs().max() < 1e-3


def test_a_crop_is_augmented_alike_whatever_stands_beside_it(crops):
    """The draws are the batch's, but no size of another crop reaches into a crop's pixels."""
    small, large = Canvas(crops[0, :, :20, :20], 20), Canvas(crops[1], 48)
    one, other = (
        augment([small, second], preprocess(32), dataclasses.replace(OFF, rotate=180.0), generator(3))
        for second in (small, large)
    )
    assert torch.equal(one[0], other[0])


def test_kernels_of_optics_keep_the_light_and_spread_it():
    for kernel in (disc(0.5), disc(3.0), path(1.0, 0.3), path(5.0, 2.0)):
        assert kernel.sum() == pytest.approx(1, abs=1e-5)
        assert np.allclose(kernel, kernel[::-1, ::-1], atol=1e-6)
    assert (disc(3.0) > 0).sum() > (disc(1.0) > 0).sum()
    assert (path(5.0, 0.0) > 1e-6).sum(0).max() == 1  # a horizontal line


def test_macenko_finds_the_stains_that_made_the_picture():
    g = torch.Generator().manual_seed(0)
    stains = torch.tensor([[0.65, 0.704, 0.286], [0.2, 0.93, 0.31]]).T
    stains = stains / stains.norm(dim=0)
    amounts = torch.rand(2, 4000, generator=g) * 1.5
    amounts[0, :1000], amounts[1, 1000:2000] = 0.0, 0.0  # pixels of one stain
    found = stain_vectors(stains @ amounts)
    assert found is not None
    likeness = (found.T @ stains).abs()
    assert likeness.max(0).values.min() > 0.99
    assert stain_vectors(torch.zeros(3, 100)) is None


def test_the_picture_of_augmented_crops(tmp_path, capsys):
    from PIL import Image

    table = tiny_table(tmp_path, 6, 3)
    picture = tmp_path / "out" / "augmented.png"
    arguments = ["augmented", "--data", str(table), "--output", str(picture), "--rows", "4", "--columns", "2"]
    assert main([*arguments, "--set", "size=32", "--set", "augment.mixup=0.4"]) == 0
    with Image.open(picture) as image:
        assert image.size == (3 * 36, 4 * 36)
    assert capsys.readouterr().out.count("atypical  tumour") == 2
    assert main([*arguments, "--rows", "99"]) == 1
