"""The strength of each augmentation, and the random draws that all of them use."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Strength = Annotated[float, Field(ge=0)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Augment:
    """Strengths; 0 switches an augmentation off. A name that ends in `_p` is the share of crops that get it."""

    # geometry, in pixels of the crop itself
    dihedral: bool = True
    """One of the eight symmetries of the square."""
    rotate: Strength = 180.0
    """Largest angle in degrees, either way."""
    scale: Below1 = 0.15
    """Magnification, log-uniform in [1 - scale, 1 / (1 - scale)]."""
    stretch: Below1 = 0.0
    """The same along one axis only."""
    shift: Strength = 4.0
    """Pixels, either way."""
    elastic: Strength = 0.0
    """Standard deviation in pixels of a smooth field of shifts."""
    grid: Below1 = 0.0
    """Grid distortion: each of five columns and rows is up to this share wider or narrower."""
    optical: Strength = 0.0
    """Barrel or pincushion distortion: largest coefficient of the squared radius, either way."""

    # colour
    brightness: Strength = 0.15
    """Added, either way."""
    contrast: Strength = 0.2
    """Multiplied about the crop's mean: 1 - contrast to 1 + contrast."""
    saturation: Strength = 0.2
    """Multiplied, in the same way."""
    hue: Strength = 0.05
    """Turns of the colour circle, either way."""
    gamma: Below1 = 0.0
    """Exponent, log-uniform in [1 - gamma, 1 / (1 - gamma)]."""
    hed: Strength = 0.05
    """Stain concentrations (Ruifrok's): multiplied by 1 +- hed and shifted by +- hed / 5."""
    macenko: Strength = 0.0
    """The same for the two stains that are estimated from the crop itself."""
    channel: Strength = 0.0
    """Gain of each RGB channel, either way (scanners' white balance)."""
    grey_p: Share = 0.0
    """Crops without colour."""
    shuffle_p: Share = 0.0
    """Crops with the RGB channels in another order."""
    clahe: Strength = 2.0
    """Largest clip limit of contrast-limited adaptive histogram equalisation of the lightness."""
    clahe_p: Share = 0.0
    """Crops that are equalised."""

    # optics, in pixels of the network's input
    blur: Strength = 1.0
    """Largest standard deviation of a Gaussian blur."""
    blur_p: Share = 0.3
    """Crops that are blurred."""
    defocus: Strength = 3.0
    """Largest radius of the disc of a defocused lens."""
    defocus_p: Share = 0.0
    """Crops out of focus."""
    motion: Annotated[int, Field(ge=0)] = 5
    """Largest length of a straight movement."""
    motion_p: Share = 0.0
    """Crops blurred by movement."""
    noise: Strength = 0.02
    """Largest standard deviation of Gaussian noise."""
    noise_p: Share = 0.3
    """Crops with noise."""
    jpeg: Annotated[int, Field(ge=0, le=95)] = 40
    """Lowest quality of JPEG compression."""
    jpeg_p: Share = 0.2
    """Crops that are compressed."""
    cutout: Share = 0.25
    """Largest side of a square in the crop's mean colour, as a share of the crop's side; never in the middle."""
    cutout_p: Share = 0.2
    """Crops that are covered in part."""
    mixup: Strength = 0.0
    """Alpha of the Beta distribution that mixes a batch with itself."""


def uniform(n: int, low: float, high: float, rng: torch.Generator) -> torch.Tensor:
    return torch.rand(n, generator=rng) * (high - low) + low


def log_uniform(n: int, strength: float, rng: torch.Generator) -> torch.Tensor:
    """(n,) in [1 - strength, 1 / (1 - strength)], uniform in the logarithm."""
    edge = -math.log(1 - strength)
    return uniform(n, -edge, edge, rng).exp()


def chosen(n: int, share: float, rng: torch.Generator) -> list[int]:
    """The indices of a random `share` of the crops, which get an augmentation."""
    return (torch.rand(n, generator=rng) < share).nonzero().flatten().tolist()
