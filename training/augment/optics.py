"""Augmentation of sharpness: effects of optics, movement, sensors and compression. RGB (N, 3, S, S) in [0, 1]."""

from __future__ import annotations

import math

import numpy as np
import torch

from .strengths import Augment, chosen, uniform


def blur(rgb: torch.Tensor, strengths: Augment, rng: torch.Generator) -> torch.Tensor:
    """Gaussian blur of a share of the crops, each with its own standard deviation."""
    n, _, _, size = rgb.shape
    some = torch.rand(n, generator=rng) < strengths.blur_p
    sigma = uniform(n, 0.1, max(strengths.blur, 0.1), rng)[some]
    if not len(sigma):
        return rgb
    # as two matrix products: a convolution whose channel count changes would be compiled again each time
    away = torch.arange(size)[:, None] - torch.arange(size)
    kernel = torch.exp(-(away**2) / (2 * sigma[:, None, None, None] ** 2))
    kernel /= kernel.sum(-1, keepdim=True)  # (n, 1, S, S); near an edge the weights inside the crop are renormalised
    return rgb.index_put((some,), kernel @ rgb[some] @ kernel.mT)


def disc(radius: float) -> np.ndarray:
    """The kernel of a defocused lens, float32 (K, K) with sum 1, its edge softened over a pixel."""
    reach = math.ceil(radius)
    away = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1])
    kernel = np.clip(radius + 0.5 - away, 0, 1)
    return (kernel / kernel.sum()).astype(np.float32)


def path(length: float, angle: float) -> np.ndarray:
    """The kernel of a straight movement, float32 (K, K) with sum 1: its points, divided among the nearest pixels."""
    reach = math.ceil(length / 2)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    steps = np.linspace(-length / 2, length / 2, 8 * reach + 1)
    rows, columns = reach + steps * math.sin(angle), reach + steps * math.cos(angle)
    for row, column in zip(rows, columns, strict=True):
        i, j = min(int(row), 2 * reach - 1), min(int(column), 2 * reach - 1)
        v, u = row - i, column - j
        kernel[i : i + 2, j : j + 2] += np.outer([1 - v, v], [1 - u, u])
    return (kernel / kernel.sum()).astype(np.float32)


def filtered(rgb: torch.Tensor, kernel: np.ndarray) -> torch.Tensor:
    """One crop (3, S, S) through a kernel, mirrored at its edges."""
    import cv2

    pixels = cv2.filter2D(rgb.permute(1, 2, 0).contiguous().numpy(), -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    return torch.from_numpy(pixels).permute(2, 0, 1).clamp_(0, 1)


def defocus(rgb: torch.Tensor, strengths: Augment, rng: torch.Generator) -> torch.Tensor:
    """A share of the crops through a disc with a radius in [0.5, strengths.defocus]."""
    radius = uniform(len(rgb), 0.5, max(0.5, strengths.defocus), rng).tolist()
    for k in chosen(len(rgb), strengths.defocus_p, rng):
        rgb[k] = filtered(rgb[k], disc(radius[k]))
    return rgb


def motion(rgb: torch.Tensor, strengths: Augment, rng: torch.Generator) -> torch.Tensor:
    """A share of the crops along a straight path with a length in [1, strengths.motion], in any direction."""
    length, angle = (
        uniform(len(rgb), 1, max(1, strengths.motion), rng).tolist(),
        uniform(len(rgb), 0, math.pi, rng).tolist(),
    )
    for k in chosen(len(rgb), strengths.motion_p, rng):
        rgb[k] = filtered(rgb[k], path(length[k], angle[k]))
    return rgb


def noise(rgb: torch.Tensor, strengths: Augment, rng: torch.Generator) -> torch.Tensor:
    """Gaussian noise on a share of the crops, each with its own standard deviation."""
    strength = uniform(len(rgb), 0, strengths.noise, rng) * (torch.rand(len(rgb), generator=rng) < strengths.noise_p)
    return (rgb + torch.randn(rgb.shape, generator=rng) * strength[:, None, None, None]).clamp_(0, 1)


def jpeg(rgb: torch.Tensor, strengths: Augment, rng: torch.Generator) -> torch.Tensor:
    """A share of the crops through JPEG at a quality between `strengths.jpeg` and 95."""
    import cv2

    some = chosen(len(rgb), strengths.jpeg_p, rng)
    quality = torch.randint(strengths.jpeg, 96, (len(rgb),), generator=rng).tolist()
    for k in some:
        pixels = (rgb[k].permute(1, 2, 0) * 255).round().byte().numpy()
        _, code = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality[k]])
        decoded = np.asarray(cv2.imdecode(code, cv2.IMREAD_COLOR))[..., ::-1].copy()
        rgb[k] = torch.from_numpy(decoded).permute(2, 0, 1) / 255
    return rgb
