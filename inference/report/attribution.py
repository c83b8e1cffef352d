"""Where an ensemble looks: hide one part of a crop after another and measure how the answer changes.

Occlusion (Zeiler and Fergus, arXiv 1311.2901) with soft-edged masks, weighted as in RISE (arXiv 1806.07421). It
needs only `Ensemble.predict`, so it works for convolutions and transformers, for every pooling and precision, and its
values have a unit: the number of logits by which the answer falls when this part is hidden.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..ensemble import Ensemble

GRID = 8  # positions along a side: one every 16 pixels of a 128-pixel crop
WIDTH = 0.11  # standard deviation of a mask, as a fraction of the side: it hides a disc a quarter of the side wide
SIDE = 24  # of a map
BLOCK = 1 << 16  # pixels blended at a time
CHUNK = 64 << 20  # bytes of crops predicted together
CENTRE = 0.25  # radius of the disc that counts as the centre, as a fraction of the side


@dataclass(frozen=True)
class Attribution:
    """values (SIDE, SIDE) over the central square that the networks see, in logits: positive is evidence for atypical.

    centre: share of the total |values| in the central disc, where the mitotic figure is expected, in [0, 1]
    area: share of the map that the disc covers, which `centre` would equal if every part mattered equally
    """

    values: np.ndarray
    centre: float
    area: float

    def packed(self) -> dict[str, Any]:
        """For JSON: one byte a value, 128 is 0, 1 and 255 are -largest and +largest."""
        largest = float(np.abs(self.values).max())
        bytes_ = np.round(self.values / (largest or 1) * 127 + 128).astype(np.uint8)
        text = base64.b64encode(bytes_.tobytes()).decode()
        return {
            "side": len(self.values),
            "largest": round(largest, 4),
            "centre": round(self.centre, 4),
            "area": round(self.area, 4),
            "values": text,
        }


def bumps(side: int) -> np.ndarray:
    """One axis of a Gaussian at each position, (GRID, side)."""
    places = (np.arange(GRID) + 0.5) / GRID
    pixels = (np.arange(side) + 0.5) / side
    heights: np.ndarray = np.exp(-0.5 * ((pixels[None] - places[:, None]) / WIDTH) ** 2)
    return heights


def masks(side: int) -> np.ndarray:
    """How much of each pixel each position hides, (GRID^2, side, side) in [0, 1]: a flat top with soft edges."""
    bump = bumps(side)
    product = bump[:, None, :, None] * bump[None, :, None, :]
    hidden: np.ndarray = np.clip(2 * product, 0, 1).reshape(GRID * GRID, side, side)
    return hidden


def hide(square: np.ndarray, position: int, fill: np.ndarray) -> np.ndarray:
    """A square crop, uint8 (S, S, 3), with one position covered by the colour `fill` (3,).

    Rows are blended in blocks, so that a crop of 8,192 pixels a side needs no more memory than one copy of itself.
    """
    side, bump = len(square), bumps(len(square))
    row, column = bump[position // GRID], bump[position % GRID]
    hidden = np.empty_like(square)
    step = max(1, BLOCK // side)
    for top in range(0, side, step):
        part = square[top : top + step].astype(np.float32)
        mask = np.clip(2 * np.outer(row[top : top + step], column), 0, 1)[..., None]
        hidden[top : top + step] = np.round(part + mask * (fill - part))
    return hidden


def logit(p: np.ndarray) -> np.ndarray:
    p = p.clip(1e-9, 1 - 1e-9)
    z: np.ndarray = np.log(p / (1 - p))
    return z


def attribute(ensemble: Ensemble, crop: np.ndarray) -> Attribution:
    """The map of one crop, uint8 (H, W, 3), from GRID^2 + 1 predictions of one view each."""
    from ..preprocess import central_square  # imports PyTorch

    seen = [member.preprocess["crop"] or max(crop.shape) for member in ensemble.manifest.members]
    square = central_square(crop.transpose(2, 0, 1), max(seen)).transpose(1, 2, 0)
    fill = np.median(square, axis=(0, 1))  # like tissue of the same stain, with no edge to react to
    count = max(1, CHUNK // square.nbytes)
    p = [ensemble.predict([square], tta="none").p_atypical]
    for first in range(0, GRID * GRID, count):
        hidden = [hide(square, position, fill) for position in range(first, min(first + count, GRID * GRID))]
        p.append(ensemble.predict(hidden, tta="none").p_atypical)
    scores = logit(np.concatenate(p))
    fall = scores[0] - scores[1:]  # (GRID^2,)
    weight = masks(SIDE) ** 3  # a higher power draws each fall where its mask hides most, for a sharper map
    values = np.tensordot(fall, weight, 1) / weight.sum(0)
    axis = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    disc = axis[:, None] ** 2 + axis[None] ** 2 <= CENTRE**2
    total = np.abs(values).sum()
    centre = float(np.abs(values[disc]).sum() / total) if total else float(disc.mean())
    return Attribution(values.astype(np.float32), centre, float(disc.mean()))
