"""From crops to the network's input: shared by training, calibration and the job, with no settings of its own.

Shapes: N crops, V views (test-time augmentation), S input side. All settings come from the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

Pixels = TypeVar("Pixels", torch.Tensor, "np.ndarray")


@dataclass(frozen=True)
class Preprocess:
    """How a crop becomes a network input.

    crop: side of the central square that is kept, in pixels; None keeps the largest central square
    size: side S of the network's input, in pixels
    kernel: resize kernel, "bilinear" or "bicubic", always antialiased
    mean, std: per RGB channel, on the scale [0, 1]
    """

    crop: int | None
    size: int
    kernel: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def central_square(image: Pixels, side: int | None) -> Pixels:
    """The central square of (..., H, W), of `side` pixels or as large as fits; a view."""
    height, width = image.shape[-2:]
    side = min(height, width, side or height)
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top : top + side, left : left + side]


def normalise(batch: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """RGB in [0, 1] (N, 3, S, S) to the network's scale."""
    mean = batch.new_tensor(preprocess.mean).view(3, 1, 1)
    std = batch.new_tensor(preprocess.std).view(3, 1, 1)
    return (batch - mean) / std


def resize(square: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """RGB in [0, 1] (N, 3, H, H) to (N, 3, S, S) with the kernel, antialiased; unchanged if it has that size."""
    size = (preprocess.size, preprocess.size)
    if square.shape[-2:] == size:
        return square
    return F.interpolate(square, size, mode=preprocess.kernel, antialias=True).clamp_(0, 1)  # bicubic overshoots


def to_batch(crops: Sequence[np.ndarray], preprocess: Preprocess) -> torch.Tensor:
    """Crops, each uint8 RGB (H, W, 3) of any size, to a normalised float32 batch (N, 3, S, S)."""
    batch = torch.empty(len(crops), 3, preprocess.size, preprocess.size)
    for n, crop in enumerate(crops):
        square = central_square(torch.tensor(crop).permute(2, 0, 1), preprocess.crop)[None].float() / 255
        batch[n] = resize(square, preprocess)[0]
    return normalise(batch, preprocess)


def views(batch: torch.Tensor, tta: str) -> torch.Tensor:
    """Test-time views of a batch (N, 3, S, S), as (V * N, 3, S, S): view-major, the identity first."""
    if tta == "none":
        return batch
    rotations = [torch.rot90(batch, k, (2, 3)) for k in range(4)]
    if tta == "d4":
        rotations += [view.flip(3) for view in rotations]
    return torch.cat(rotations)
