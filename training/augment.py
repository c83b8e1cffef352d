"""A batch of crops as training uses it: warped, recoloured, blurred, and some covered in part or mixed.

Every draw comes from one generator, so a batch is the same in every process and thread of a run. An augmentation that
is off draws nothing and changes nothing. N crops, S side of the network's input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from inference.preprocess import Preprocess

from .colour import clahe, colour, macenko, shuffle, stain
from .optics import blur, defocus, jpeg, motion, noise
from .strengths import Augment, uniform
from .warp import Canvas, warp


def augment(crops: Sequence[Canvas], preprocess: Preprocess, a: Augment, g: torch.Generator) -> torch.Tensor:
    """One augmented batch (N, 3, S, S) in [0, 1], not yet normalised; without MixUp, which needs the targets too."""
    rgb = warp(crops, preprocess, a, g)
    if a.hed:
        rgb = stain(rgb, a.hed, g)
    if a.macenko:
        rgb = macenko(rgb, a.macenko, g)
    rgb = colour(rgb, a, g)
    if a.shuffle_p:
        rgb = shuffle(rgb, a.shuffle_p, g)
    if a.clahe_p:
        rgb = clahe(rgb, a, g)
    if a.blur_p:
        rgb = blur(rgb, a, g)
    if a.defocus_p:
        rgb = defocus(rgb, a, g)
    if a.motion_p:
        rgb = motion(rgb, a, g)
    if a.noise_p:
        rgb = noise(rgb, a, g)
    if a.jpeg_p:
        rgb = jpeg(rgb, a, g)
    if a.cutout_p:
        rgb = cutout(rgb, a, g)
    return rgb


def cutout(rgb: torch.Tensor, a: Augment, g: torch.Generator) -> torch.Tensor:
    """In a share of the crops, a square gets the crop's mean colour; never the middle, where the figure is."""
    n, _, _, size = rgb.shape
    half = uniform(n, 0.05, max(a.cutout, 0.05), g) * size / 2
    angle = uniform(n, -math.pi, math.pi, g)
    off = torch.rand(n, generator=g) < a.cutout_p
    centre = size / 2 + torch.stack([angle.sin(), angle.cos()]) * (size * 0.35)  # (2, N)
    axis = torch.arange(size) + 0.5
    inside_y = (axis - centre[0, :, None]).abs() < half[:, None]
    inside_x = (axis - centre[1, :, None]).abs() < half[:, None]
    mask = (inside_y[:, :, None] & inside_x[:, None, :] & off[:, None, None])[:, None]
    return torch.where(mask, rgb.mean((2, 3), keepdim=True), rgb)


def mixup(
    rgb: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, alpha: float, g: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """MixUp (Zhang et al. 2018) of a batch with a permutation of itself: crops, soft targets and loss weights alike."""
    seed = int(torch.randint(2**31, (1,), generator=g))
    drawn = np.random.default_rng(seed).beta(alpha, alpha, len(rgb))  # torch's Beta would draw from the global stream
    share = torch.tensor(np.maximum(drawn, 1 - drawn), dtype=torch.float32)
    other = torch.randperm(len(rgb), generator=g)
    mixed = rgb * share[:, None, None, None] + rgb[other] * (1 - share)[:, None, None, None]
    return mixed, target * share + target[other] * (1 - share), weight * share + weight[other] * (1 - share)
