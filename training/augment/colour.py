"""Augmentation of colour: stains in optical density, the usual jitters, local contrast. RGB (N, 3, S, S) in [0, 1]."""

from __future__ import annotations

import math

import numpy as np
import torch

from .strengths import Augment, chosen, log_uniform, uniform

# Ruifrok and Johnston 2001: optical density of haematoxylin, eosin and DAB (rows) in R, G, B (columns)
HED = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
LUMA = torch.tensor([0.299, 0.587, 0.114])
TISSUE = 0.15  # optical density, in natural logarithms, below which Macenko et al. count a pixel as background
FEWEST = 32  # pixels of tissue: with fewer, no stains are estimated


def stain(rgb: torch.Tensor, strength: float, rng: torch.Generator) -> torch.Tensor:
    """HED jitter (Tellez et al. 2018): each stain's concentration scaled and shifted, in optical density."""
    n = len(rgb)
    scale = 1 + uniform(3 * n, -strength, strength, rng).view(n, 3)
    shift = uniform(3 * n, -strength, strength, rng).view(n, 3) / 5
    matrix = torch.linalg.inv(HED) @ torch.diag_embed(scale) @ HED  # (N, 3, 3), from density to density
    offset = shift @ HED
    density = torch.einsum("ncd,nchw->ndhw", matrix, to_density(rgb)) + offset[:, :, None, None]
    return density.neg_().exp_().clamp_(0, 1)


def to_density(rgb: torch.Tensor) -> torch.Tensor:
    """Optical density, in natural logarithms."""
    return -rgb.clamp_min(1 / 255).log()


def macenko(rgb: torch.Tensor, strength: float, rng: torch.Generator) -> torch.Tensor:
    """The crop's own two stains (Macenko et al. 2009) scaled and shifted; the residual stays as it is."""
    n = len(rgb)
    scale = uniform(2 * n, -strength, strength, rng).view(n, 2)
    shift = uniform(2 * n, -strength, strength, rng).view(n, 2) / 5
    density = to_density(rgb).flatten(2)  # (N, 3, pixels)
    out = rgb.clone()
    for k, pixels in enumerate(density):
        stains = stain_vectors(pixels)
        if stains is not None:
            concentration = torch.linalg.pinv(stains) @ pixels  # (2, pixels)
            change = stains @ (concentration * scale[k, :, None] + shift[k, :, None])
            out[k] = (pixels + change).neg_().exp_().clamp_(0, 1).view_as(out[k])
    return out


def stain_vectors(density: torch.Tensor) -> torch.Tensor | None:
    """The two stains (3, 2) of one crop's optical density (3, pixels), unit length; None if it has hardly any."""
    tissue = density[:, (density > TISSUE).all(0)]
    if tissue.shape[1] < FEWEST:
        return None
    plane = torch.linalg.eigh(torch.cov(tissue)).eigenvectors[:, 1:]  # the two directions of the largest variance
    plane = plane * torch.where(plane.sum(0) < 0, -1.0, 1.0)
    first, second = plane.T @ tissue
    low, high = np.quantile(torch.atan2(first, second).numpy(), [0.01, 0.99])
    if high - low < 1e-3:  # one colour only
        return None
    ends = [plane @ torch.tensor([math.sin(angle), math.cos(angle)]) for angle in (low, high)]
    return torch.stack([end / end.norm() for end in ends], dim=1)


def colour(rgb: torch.Tensor, strengths: Augment, rng: torch.Generator) -> torch.Tensor:
    """Saturation, hue and channel gains as one 3 x 3 matrix a crop, then contrast, brightness and gamma."""
    n = len(rgb)
    # hue turns the plane orthogonal to grey, saturation scales it
    grey = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = (uniform(n, -strengths.hue, strengths.hue, rng) * 2 * math.pi)[:, None, None]
    hue = grey + turn.cos() * (torch.eye(3) - grey) + turn.sin() * cross
    keep = (1 + uniform(n, -strengths.saturation, strengths.saturation, rng))[:, None, None]
    keep = torch.where(torch.rand(n, 1, 1, generator=rng) < strengths.grey_p, torch.zeros(1), keep)
    saturation = keep * torch.eye(3) + (1 - keep) * LUMA.expand(3, 3)
    gain = torch.diag_embed(1 + uniform(3 * n, -strengths.channel, strengths.channel, rng).view(n, 3))
    rgb = torch.einsum("ncd,ndhw->nchw", gain @ saturation @ hue, rgb)
    contrast = (1 + uniform(n, -strengths.contrast, strengths.contrast, rng))[:, None, None, None]
    brightness = uniform(n, -strengths.brightness, strengths.brightness, rng)[:, None, None, None]
    mean = rgb.mean((1, 2, 3), keepdim=True)
    rgb = ((rgb - mean) * contrast + mean + brightness).clamp_(0, 1)
    if strengths.gamma:
        rgb = rgb.clamp_min_(1e-4) ** log_uniform(n, strengths.gamma, rng)[:, None, None, None]
    return rgb


def shuffle(rgb: torch.Tensor, share: float, rng: torch.Generator) -> torch.Tensor:
    """The channels of a share of the crops in another order, each of the six equally often."""
    for k in chosen(len(rgb), share, rng):
        rgb[k] = rgb[k, torch.randperm(3, generator=rng)]
    return rgb


def clahe(rgb: torch.Tensor, strengths: Augment, rng: torch.Generator) -> torch.Tensor:
    """Equalise the lightness (CIELAB) of a share of the crops in 4 x 4 tiles; clip limits in [1, strengths.clahe]."""
    import cv2

    limit = uniform(len(rgb), 1, max(1.0, strengths.clahe), rng).tolist()
    for k in chosen(len(rgb), strengths.clahe_p, rng):
        lab = cv2.cvtColor((rgb[k].permute(1, 2, 0) * 255).round().byte().numpy(), cv2.COLOR_RGB2LAB)
        lab[..., 0] = cv2.createCLAHE(limit[k], (4, 4)).apply(lab[..., 0])
        rgb[k] = torch.from_numpy(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)).permute(2, 0, 1) / 255
    return rgb
