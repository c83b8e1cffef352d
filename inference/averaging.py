"""From logits to probabilities by the manifest's rule: one definition for jobs, calibration and reports.

Shapes: M members, F folds of a member, V views, N crops.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .metrics import sigmoid


def average(
    logits: Sequence[np.ndarray], averaging: str, temperature: float, weights: Sequence[float] | None = None
) -> np.ndarray:
    """P(atypical) (N,) from each member's logits (F, V, N).

    averaging: "logit" averages logits, "probability" averages probabilities; each logit is divided by the temperature
    weights: of the members, adding up to 1; equal by default. A member's folds and views count equally.
    """
    weights = [1 / len(logits)] * len(logits) if weights is None else weights
    scaled = [member.astype(np.float64) / temperature for member in logits]
    if averaging == "logit":
        return sigmoid(_weighted([member.mean((0, 1)) for member in scaled], weights))
    p = _weighted([sigmoid(member).mean((0, 1)) for member in scaled], weights)
    return p.clip(max=1)  # weights that add up to 1 may round to more


def _weighted(values: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    total = np.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total += weight * value
    return total
