"""Augmentation of crops as tensors, a whole batch at a time: one resampling, one colour transform, a few extras.

Input (N, 3, C, C) in [0, 1], where C is the canvas side; output (N, 3, S, S) in [0, 1]. Every draw comes from one
generator, so a batch is the same on every process of a run. N crops, S side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

# Ruifrok and Johnston 2001: optical density of haematoxylin, eosin and DAB (rows) in R, G, B (columns)
HED = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
LUMA = torch.tensor([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Augment:
    """Strengths; 0 switches an augmentation off. `_p` is the share of crops that get it."""

    dihedral: bool = True  # one of the eight symmetries of the square
    rotate: float = 180.0  # degrees, either way
    scale: float = 0.15  # magnification, log-uniform in [1 - scale, 1 / (1 - scale)]
    stretch: float = 0.0  # the same, along one axis only
    shift: float = 4.0  # pixels of the original crop, either way
    elastic: float = 0.0  # pixels of the original crop, standard deviation of a smooth field
    brightness: float = 0.15  # added, either way
    contrast: float = 0.2  # multiplied about the crop's mean
    saturation: float = 0.2
    hue: float = 0.05  # turns of the colour circle, either way
    gamma: float = 0.0  # exponent, log-uniform in [1 - gamma, 1 / (1 - gamma)]
    hed: float = 0.05  # stain concentrations: multiplied by 1 +- hed and shifted by +- hed / 5
    channel: float = 0.0  # gain per RGB channel, either way (scanners' white balance)
    grey_p: float = 0.0
    blur: float = 1.0  # largest standard deviation, in input pixels
    blur_p: float = 0.3
    noise: float = 0.02  # largest standard deviation
    noise_p: float = 0.3
    jpeg: int = 40  # lowest quality
    jpeg_p: float = 0.2
    cutout: float = 0.25  # largest side of the square, as a share of the crop's side
    cutout_p: float = 0.2
    mixup: float = 0.0  # alpha of the Beta distribution


def uniform(n: int, low: float, high: float, g: torch.Generator) -> torch.Tensor:
    return torch.rand(n, generator=g) * (high - low) + low


def log_uniform(n: int, strength: float, g: torch.Generator) -> torch.Tensor:
    edge = -math.log(1 - strength)
    return uniform(n, -edge, edge, g).exp()


def geometry(crops: torch.Tensor, crop: int, size: int, a: Augment, g: torch.Generator) -> torch.Tensor:
    """Cut (N, 3, C, C) to (N, 3, S, S) about the centre: flip, turn, scale, shift and bend in one resampling."""
    n, canvas = len(crops), crops.shape[-1]
    angle = uniform(n, -a.rotate, a.rotate, g) / 180 * math.pi
    flip = torch.ones(n)
    if a.dihedral:
        angle += torch.randint(4, (n,), generator=g) * (math.pi / 2)
        flip = torch.randint(2, (n,), generator=g) * 2.0 - 1
    zoom = (crop / canvas) / log_uniform(n, a.scale, g)  # canvas units per unit of output
    zoom_x = zoom / log_uniform(n, a.stretch, g)
    cos, sin = angle.cos(), angle.sin()
    shift = uniform(2 * n, -a.shift, a.shift, g).view(n, 2) * (2 / canvas)
    row_x = torch.stack([cos * zoom_x * flip, -sin * zoom, shift[:, 0]], dim=1)
    row_y = torch.stack([sin * zoom_x * flip, cos * zoom, shift[:, 1]], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), [n, 3, size, size], align_corners=False)
    if a.elastic:
        field = torch.randn(n, 2, 5, 5, generator=g) * (a.elastic * 2 / canvas)
        grid = grid + F.interpolate(field, (size, size), mode="bicubic").permute(0, 2, 3, 1)
    return F.grid_sample(crops, grid, padding_mode="reflection", align_corners=False)


def stain(rgb: torch.Tensor, strength: float, g: torch.Generator) -> torch.Tensor:
    """HED jitter (Tellez et al. 2018): each stain's concentration scaled and shifted, in optical density."""
    n = len(rgb)
    scale = 1 + uniform(3 * n, -strength, strength, g).view(n, 3)
    shift = uniform(3 * n, -strength, strength, g).view(n, 3) / 5
    matrix = torch.linalg.inv(HED) @ torch.diag_embed(scale) @ HED  # (N, 3, 3), from density to density
    offset = shift @ HED
    density = -rgb.clamp_min(1 / 255).log()
    density = torch.einsum("ncd,nchw->ndhw", matrix, density) + offset[:, :, None, None]
    return density.neg_().exp_().clamp_(0, 1)


def colour(rgb: torch.Tensor, a: Augment, g: torch.Generator) -> torch.Tensor:
    """Saturation, hue and channel gains as one 3 x 3 matrix a crop, then contrast, brightness and gamma."""
    n = len(rgb)
    # hue turns the plane orthogonal to grey, saturation scales it
    grey = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = (uniform(n, -a.hue, a.hue, g) * 2 * math.pi)[:, None, None]
    hue = grey + turn.cos() * (torch.eye(3) - grey) + turn.sin() * cross
    keep = (1 + uniform(n, -a.saturation, a.saturation, g))[:, None, None]
    keep = torch.where(torch.rand(n, 1, 1, generator=g) < a.grey_p, torch.zeros(1), keep)
    saturation = keep * torch.eye(3) + (1 - keep) * LUMA.expand(3, 3)
    gain = torch.diag_embed(1 + uniform(3 * n, -a.channel, a.channel, g).view(n, 3))
    rgb = torch.einsum("ncd,ndhw->nchw", gain @ saturation @ hue, rgb)
    contrast = (1 + uniform(n, -a.contrast, a.contrast, g))[:, None, None, None]
    brightness = uniform(n, -a.brightness, a.brightness, g)[:, None, None, None]
    mean = rgb.mean((1, 2, 3), keepdim=True)
    rgb = ((rgb - mean) * contrast + mean + brightness).clamp_(0, 1)
    if a.gamma:
        rgb = rgb.clamp_min_(1e-4) ** log_uniform(n, a.gamma, g)[:, None, None, None]
    return rgb


def blur(rgb: torch.Tensor, a: Augment, g: torch.Generator) -> torch.Tensor:
    """Gaussian blur of a share of the crops, each with its own standard deviation."""
    n, _, _, size = rgb.shape
    chosen = torch.rand(n, generator=g) < a.blur_p
    sigma = uniform(n, 0.1, max(a.blur, 0.1), g)[chosen]
    if not len(sigma):
        return rgb
    # as two matrix products: a convolution with other channel counts each time would be compiled anew each time
    away = torch.arange(size)[:, None] - torch.arange(size)
    kernel = torch.exp(-(away**2) / (2 * sigma[:, None, None, None] ** 2))
    kernel /= kernel.sum(-1, keepdim=True)  # (n, 1, S, S); near an edge the weights inside the crop are renormalised
    return rgb.index_put((chosen,), kernel @ rgb[chosen] @ kernel.mT)


def jpeg(rgb: torch.Tensor, a: Augment, g: torch.Generator) -> torch.Tensor:
    """A share of the crops through JPEG at a quality between `a.jpeg` and 95."""
    import cv2

    chosen = (torch.rand(len(rgb), generator=g) < a.jpeg_p).nonzero().flatten().tolist()
    quality = torch.randint(a.jpeg, 96, (len(rgb),), generator=g).tolist()
    for n in chosen:
        pixels = (rgb[n].permute(1, 2, 0) * 255).round().byte().numpy()
        _, code = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality[n]])
        decoded = np.asarray(cv2.imdecode(code, cv2.IMREAD_COLOR))[..., ::-1].copy()
        rgb[n] = torch.from_numpy(decoded).permute(2, 0, 1) / 255
    return rgb


def cutout(rgb: torch.Tensor, a: Augment, g: torch.Generator) -> torch.Tensor:
    """A square of a share of the crops replaced by the crop's mean colour; never the middle, where the figure is."""
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


def augment(crops: torch.Tensor, crop: int, size: int, a: Augment, g: torch.Generator) -> torch.Tensor:
    """One augmented batch (N, 3, S, S) in [0, 1] from canvases (N, 3, C, C) in [0, 1]; MixUp is `mixup`'s business."""
    rgb = geometry(crops, crop, size, a, g)
    if a.hed:
        rgb = stain(rgb, a.hed, g)
    rgb = colour(rgb, a, g)
    if a.blur_p:
        rgb = blur(rgb, a, g)
    if a.noise_p:
        strength = uniform(len(rgb), 0, a.noise, g) * (torch.rand(len(rgb), generator=g) < a.noise_p)
        rgb = (rgb + torch.randn(rgb.shape, generator=g) * strength[:, None, None, None]).clamp_(0, 1)
    if a.jpeg_p:
        rgb = jpeg(rgb, a, g)
    if a.cutout_p:
        rgb = cutout(rgb, a, g)
    return rgb


def mixup(
    rgb: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, alpha: float, g: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """MixUp (Zhang et al. 2018) of a batch with a permutation of itself: crops, soft targets and loss weights alike."""
    seed = int(torch.randint(2**31, (1,), generator=g))
    with torch.random.fork_rng(devices=[]):  # Beta takes no generator
        torch.manual_seed(seed)
        share = torch.distributions.Beta(alpha, alpha).sample((len(rgb),))
    share = torch.maximum(share, 1 - share)
    other = torch.randperm(len(rgb), generator=g)
    mixed = rgb * share[:, None, None, None] + rgb[other] * (1 - share)[:, None, None, None]
    return mixed, target * share + target[other] * (1 - share), weight * share + weight[other] * (1 - share)
