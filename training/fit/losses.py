"""Losses on one logit per crop (atypical = 1), and the weights by class and domain that go into them.

z logit, p = sigmoid(z), t target in [0, 1] (hard, or a share of expert votes), w weight of the crop:
    BCE:    L = -w [t log p + (1 - t) log(1 - p)]
    focal:  L = -w [t (1 - p)^gamma log p + (1 - t) p^gamma log(1 - p)]                         (Lin et al. 2017)
    domain-weighted focal: the focal loss with w by domain, or by domain x class (arXiv 2508.21041; the paper's formula
    for w is not published, so the three usual ones are offered).
A batch's loss is the mean of L. Weights average 1 over the training crops, so they do not rescale the learning rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F

Weighting: TypeAlias = Literal["none", "inverse", "sqrt_inverse", "effective"]
EFFECTIVE_BETA = 0.999  # Cui et al. 2019: effective number of n samples = (1 - beta^n) / (1 - beta)


def focal(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, gamma: float) -> torch.Tensor:
    """Mean weighted focal loss over a batch (B,); gamma = 0 is BCE."""
    log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
    if gamma == 0:
        loss = -(targets * log_p + (1 - targets) * log_q)
    else:  # p^gamma from its logarithm keeps the gradient finite
        loss = -(targets * (gamma * log_q).exp() * log_p + (1 - targets) * (gamma * log_p).exp() * log_q)
    return (weights * loss).mean()


def weights_by(keys: Sequence[Hashable], weighting: Weighting) -> torch.Tensor:
    """One weight per crop (N,), mean 1, from how often its key (class, domain, or both) occurs.

    inverse: 1 / n; sqrt_inverse: 1 / sqrt(n); effective: (1 - beta) / (1 - beta^n).
    """
    count = Counter(keys)
    rules: dict[Weighting, Callable[[int], float]] = {
        "none": lambda n: 1.0,
        "inverse": lambda n: 1 / n,
        "sqrt_inverse": lambda n: n**-0.5,
        "effective": lambda n: (1 - EFFECTIVE_BETA) / (1 - EFFECTIVE_BETA**n),
    }
    rule = rules[weighting]
    weights = torch.tensor([rule(count[key]) for key in keys])
    return weights / weights.mean()
