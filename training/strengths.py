"""The strength of each augmentation, and the random draws that all of them use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Augment:
    """Strengths; 0 switches an augmentation off. A name that ends in `_p` is the share of crops that get it."""

    # geometry, in pixels of the crop itself
    dihedral: bool = True  # one of the eight symmetries of the square
    rotate: float = 180.0  # degrees, either way
    scale: float = 0.15  # magnification, log-uniform in [1 - scale, 1 / (1 - scale)]
    stretch: float = 0.0  # the same, along one axis only
    shift: float = 4.0  # pixels, either way
    elastic: float = 0.0  # pixels, standard deviation of a smooth field
    grid: float = 0.0  # grid distortion: each of five columns and rows is up to this share wider or narrower
    optical: float = 0.0  # barrel or pincushion distortion: largest coefficient of the squared radius, either way
    # colour
    brightness: float = 0.15  # added, either way
    contrast: float = 0.2  # multiplied about the crop's mean
    saturation: float = 0.2
    hue: float = 0.05  # turns of the colour circle, either way
    gamma: float = 0.0  # exponent, log-uniform in [1 - gamma, 1 / (1 - gamma)]
    hed: float = 0.05  # stain concentrations: multiplied by 1 +- hed and shifted by +- hed / 5
    macenko: float = 0.0  # the same for the two stains that are estimated from the crop itself
    channel: float = 0.0  # gain per RGB channel, either way (scanners' white balance)
    grey_p: float = 0.0
    shuffle_p: float = 0.0  # the RGB channels in another order
    clahe: float = 2.0  # contrast-limited adaptive histogram equalisation of the lightness: largest clip limit
    clahe_p: float = 0.0
    # optics, in pixels of the network's input
    blur: float = 1.0  # largest standard deviation
    blur_p: float = 0.3
    defocus: float = 3.0  # largest radius of the disc
    defocus_p: float = 0.0
    motion: int = 5  # largest length of the path
    motion_p: float = 0.0
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
    """(n,) in [1 - strength, 1 / (1 - strength)], uniform in the logarithm."""
    edge = -math.log(1 - strength)
    return uniform(n, -edge, edge, g).exp()


def chosen(n: int, share: float, g: torch.Generator) -> list[int]:
    """The indices of a random `share` of the crops, which get an augmentation."""
    return (torch.rand(n, generator=g) < share).nonzero().flatten().tolist()
