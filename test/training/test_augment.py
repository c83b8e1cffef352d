"""Augmentation: drawn from its seed alone, in range, and each strength does what it says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from inference.preprocess import views
from test.support.tables import tiny_table
from training.__main__ import main
from training.augment import Augment, augment, cutout, mixup
from training.feed import canvases, generator

OFF = Augment(dihedral=False, **{
    f.name: 0 for f in dataclasses.fields(Augment) if f.name not in ("dihedral", "jpeg")
})  # fmt: skip
STRENGTHS = [
    dict(dihedral=True), dict(rotate=90.0), dict(scale=0.3), dict(stretch=0.3), dict(shift=6.0), dict(elastic=2.0),
    dict(brightness=0.3), dict(contrast=0.3), dict(saturation=0.5), dict(hue=0.2), dict(gamma=0.4), dict(hed=0.2),
    dict(channel=0.2), dict(grey_p=0.5), dict(blur=2.0, blur_p=1.0), dict(noise=0.1, noise_p=1.0), dict(jpeg_p=1.0),
    dict(cutout=0.4, cutout_p=1.0),
]  # fmt: skip


@pytest.fixture
def crops() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 8, 8, generator=g)
    return torch.nn.functional.interpolate(coarse, (48, 48), mode="bicubic").clamp(0, 1)


def draw(crops: torch.Tensor, a: Augment, seed: int = 0) -> torch.Tensor:
    return augment(crops.clone(), crops.shape[-1], crops.shape[-1], a, generator(seed))


def test_nothing_on_changes_nothing(crops):
    assert (draw(crops, OFF) - crops).abs().max() < 1e-5


@pytest.mark.parametrize("change", STRENGTHS, ids=lambda change: next(iter(change)))
def test_each_strength_changes_crops_reproducibly_and_in_range(crops, change):
    a = dataclasses.replace(OFF, **change)
    found = draw(crops, a)
    assert found.shape == crops.shape
    assert found.min() >= 0 and found.max() <= 1
    assert (found - crops).abs().mean() > 1e-3
    assert torch.equal(found, draw(crops, a))
    assert not torch.equal(found, draw(crops, a, 1))


def test_all_defaults_together_and_another_size(crops):
    found = augment(crops, 30, 24, Augment(), generator(0))
    assert found.shape == (6, 3, 24, 24)
    assert found.isfinite().all()


def test_dihedral_gives_the_eight_views_and_nothing_else(crops):
    one = crops[:1].expand(64, -1, -1, -1)
    found = draw(one, dataclasses.replace(OFF, dihedral=True))
    eight = views(crops[:1], "d4")
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
    mixed, t, w = mixup(rgb, target, weight, 0.4, generator(0))
    assert torch.allclose(mixed[:, 0, 0, 0], t)
    assert torch.allclose(10 * t, w)
    assert not torch.equal(t, target)


def test_canvases_mirror_what_is_too_small():
    import numpy as np

    images = [np.full((20, 30, 3), 9, np.uint8), np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)]
    canvas = canvases(images, 30)
    assert canvas.shape == (2, 3, 48, 48)
    assert (canvas[0] == 9).all()
    assert torch.equal(canvas[1], torch.tensor(images[1][8:56, 8:56]).permute(2, 0, 1))


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
