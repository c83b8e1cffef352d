"""A batch of crops as training uses it: warped, recoloured, blurred, and some covered in part or mixed.

Every draw comes from one generator, so a batch is the same in every process and thread of a run. An augmentation that
is off draws nothing and changes nothing. N or B crops, S side of the network's input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from inference.preprocess import Preprocess

from .colour import clahe, colour, macenko, shuffle, stain
from .optics import blur, defocus, jpeg, motion, noise
from .strengths import Augment, uniform
from .warp import Canvas, warp


class Batch(NamedTuple):
    """rgb: the network's input (B, 3, S, S); target: in [0, 1] (B,); weight: of the loss (B,)."""

    rgb: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


def augment(crops: Sequence[Canvas], preprocess: Preprocess, strengths: Augment, rng: torch.Generator) -> torch.Tensor:
    """One augmented batch (N, 3, S, S) in [0, 1], not yet normalised; without MixUp, which needs the targets too."""
    rgb = warp(crops, preprocess, strengths, rng)
    if strengths.hed:
        rgb = stain(rgb, strengths.hed, rng)
    if strengths.macenko:
        rgb = macenko(rgb, strengths.macenko, rng)
    rgb = colour(rgb, strengths, rng)
    if strengths.shuffle_p:
        rgb = shuffle(rgb, strengths.shuffle_p, rng)
    if strengths.clahe_p:
        rgb = clahe(rgb, strengths, rng)
    if strengths.blur_p:
        rgb = blur(rgb, strengths, rng)
    if strengths.defocus_p:
        rgb = defocus(rgb, strengths, rng)
    if strengths.motion_p:
        rgb = motion(rgb, strengths, rng)
    if strengths.noise_p:
        rgb = noise(rgb, strengths, rng)
    if strengths.jpeg_p:
        rgb = jpeg(rgb, strengths, rng)
    if strengths.cutout_p:
        rgb = cutout(rgb, strengths, rng)
    return rgb


def cutout(rgb: torch.Tensor, strengths: Augment, rng: torch.Generator) -> torch.Tensor:
    """In a share of the crops, a square gets the crop's mean colour; never the middle, where the figure is."""
    n, _, _, size = rgb.shape
    half = uniform(n, 0.05, max(strengths.cutout, 0.05), rng) * size / 2
    angle = uniform(n, -math.pi, math.pi, rng)
    off = torch.rand(n, generator=rng) < strengths.cutout_p
    centre = size / 2 + torch.stack([angle.sin(), angle.cos()]) * (size * 0.35)  # (2, N)
    axis = torch.arange(size) + 0.5
    inside_y = (axis - centre[0, :, None]).abs() < half[:, None]
    inside_x = (axis - centre[1, :, None]).abs() < half[:, None]
    mask = (inside_y[:, :, None] & inside_x[:, None, :] & off[:, None, None])[:, None]
    return torch.where(mask, rgb.mean((2, 3), keepdim=True), rgb)


def mixup(batch: Batch, alpha: float, rng: torch.Generator) -> Batch:
    """MixUp (Zhang et al. 2018) of a batch with a permutation of itself: crops, soft targets and loss weights alike."""
    rgb, target, weight = batch
    seed = int(torch.randint(2**31, (1,), generator=rng))
    drawn = np.random.default_rng(seed).beta(alpha, alpha, len(rgb))  # torch's Beta would draw from the global stream
    share = torch.tensor(np.maximum(drawn, 1 - drawn), dtype=torch.float32)
    other = torch.randperm(len(rgb), generator=rng)
    mixed = rgb * share[:, None, None, None] + rgb[other] * (1 - share)[:, None, None, None]
    return Batch(mixed, target * share + target[other] * (1 - share), weight * share + weight[other] * (1 - share))
