"""Geometric augmentation: each crop is warped at its own resolution, then resized exactly as inference resizes it.

So a crop without warping is exactly what inference shows the network, whatever the sizes of the other crops.
N crops, C canvas side, S side of the network's input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from inference.preprocess import Preprocess, resize

from .strengths import Augment, log_uniform, uniform

MARGIN = 0.3  # of the side, on each side of the square: room for rotation, shift and magnification without padding
CELLS = 5  # columns and rows of the grid distortion


@dataclass(frozen=True)
class Canvas:
    """pixels: uint8 (3, C, C); side: of the central square that inference sees, in pixels."""

    pixels: torch.Tensor
    side: int


def canvases(images: Sequence[np.ndarray], crop: int | None) -> list[Canvas]:
    """The central square of each image, uint8 (H, W, 3), with as much of its surroundings as there is, up to MARGIN.

    crop: side of the square, as in `Preprocess`; None or 0 keeps the largest
    """
    squares = []
    for image in images:
        height, width = image.shape[:2]
        side = min(height, width, crop or height)
        margin = min((min(height, width) - side) // 2, math.ceil(side * MARGIN))
        top, left = (height - side) // 2 - margin, (width - side) // 2 - margin
        whole = side + 2 * margin
        squares.append(Canvas(torch.tensor(image[top : top + whole, left : left + whole]).permute(2, 0, 1), side))
    return squares


def warp(crops: Sequence[Canvas], preprocess: Preprocess, strengths: Augment, rng: torch.Generator) -> torch.Tensor:
    """Crops as the network's input (N, 3, S, S) in [0, 1]: flipped, turned, scaled, shifted and bent."""
    n = len(crops)
    angle = uniform(n, -strengths.rotate, strengths.rotate, rng) / 180 * math.pi
    flip = torch.ones(n)
    if strengths.dihedral:
        angle += torch.randint(4, (n,), generator=rng) * (math.pi / 2)
        flip = torch.randint(2, (n,), generator=rng) * 2.0 - 1
    zoom = 1 / log_uniform(n, strengths.scale, rng)
    zoom_x = flip * zoom / log_uniform(n, strengths.stretch, rng)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([cos * zoom_x, -sin * zoom, sin * zoom_x, cos * zoom], dim=1).view(n, 2, 2)
    shift = uniform(2 * n, -strengths.shift, strengths.shift, rng).view(n, 2)
    elastic = torch.randn(n, 2, 5, 5, generator=rng) * strengths.elastic if strengths.elastic else None
    lines = grid_lines(n, strengths.grid, rng) if strengths.grid else None
    radial = uniform(n, -strengths.optical, strengths.optical, rng) if strengths.optical else torch.zeros(n)
    out = torch.empty(n, 3, preprocess.size, preprocess.size)
    for k, crop in enumerate(crops):
        axis = (2 * torch.arange(crop.side) + 1) / crop.side - 1  # pixel centres on [-1, 1]
        x, y = (axis, axis) if lines is None else (move_lines(axis, lines[k, 0]), move_lines(axis, lines[k, 1]))
        at = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (side, side, 2), x first
        at = at * (1 + radial[k] * at.square().sum(-1, keepdim=True))
        pixels = at @ matrix[k].T * (crop.side / 2) + shift[k]  # from the centre
        if elastic is not None:
            field = F.interpolate(elastic[k : k + 1], (crop.side, crop.side), mode="bicubic")
            pixels = pixels + field[0].permute(1, 2, 0)
        grid = pixels[None] * (2 / crop.pixels.shape[-1])
        source = crop.pixels[None].float() / 255
        warped = F.grid_sample(source, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
        out[k] = resize(warped.clamp_(0, 1), preprocess)[0]
    return out


def grid_lines(n: int, strength: float, rng: torch.Generator) -> torch.Tensor:
    """Positions of the lines of a distorted grid on [-1, 1]: (N, 2, CELLS + 1), columns then rows."""
    widths = 1 + uniform(n * 2 * CELLS, -strength, strength, rng).view(n, 2, CELLS)
    ends = F.pad(widths.cumsum(-1), (1, 0))
    return 2 * ends / ends[..., -1:] - 1


def move_lines(axis: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
    """Map positions on [-1, 1] from a regular grid to one with these `lines`, linearly in between."""
    position = (axis + 1) / 2 * CELLS
    cell = position.floor().long().clamp_(0, CELLS - 1)
    return lines[cell] + (position - cell) * (lines[cell + 1] - lines[cell])
