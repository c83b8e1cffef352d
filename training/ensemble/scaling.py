"""How labelled logits become probabilities and calls: temperature and shift (Platt scaling), and the threshold.

Both are equivariant: logits that are multiplied or moved as a whole get another temperature and shift, and the same
answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize

from inference.averaging import average
from inference.metrics import best_threshold, group_bootstrap, sigmoid

SMOOTHING = 100  # resamples whose best cuts are averaged to get the threshold
STEEPEST, FLATTEST = 20.0, 0.05  # slopes in logits per standard deviation of the mean logit


class Scale(NamedTuple):
    """A logit z becomes (z + shift) / temperature.

    bounded: the slope ended at a bound, so the logits say next to nothing of the labels, or everything
    """

    temperature: float
    shift: float
    bounded: bool = False


def fit_scale(
    logits: Sequence[np.ndarray], labels: np.ndarray, averaging: str, weights: Sequence[float] | None = None
) -> Scale:
    """The scale of the members' mean with the least negative log-likelihood; `logits` (F, V, N) of each member.

    The shift undoes what class weights and balanced sampling do to the prior. The order of the crops stays. The fit is
    in units of the mean logit's own centre and spread, where the problem of the mean logit is convex (logistic
    regression); labels are softened as Platt (1999) does, so that classes that logits separate have a finite slope.
    """
    weights = [1 / len(logits)] * len(logits) if weights is None else list(weights)
    mean = sum(weight * z.mean((0, 1)) for weight, z in zip(weights, logits, strict=True))
    centre, spread = float(np.mean(mean)), float(np.std(mean))
    spread = spread if spread > 1e-9 * (1 + abs(centre)) else 1.0
    parts = [mean[None]] if averaging == "logit" else [z.reshape(-1, z.shape[-1]) for z in logits]
    shares = [1.0] if averaging == "logit" else weights
    x = np.concatenate([(z - centre) / spread for z in parts])  # (networks and views, N)
    share = np.concatenate([np.full(len(z), w / len(z)) for w, z in zip(shares, parts, strict=True)])
    positive, negative = labels.sum(), (1 - labels).sum()
    target = np.where(labels == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(slopes: np.ndarray) -> tuple[float, np.ndarray]:
        each = sigmoid(slopes[0] * x + slopes[1])
        p = np.clip(share @ each, 1e-12, 1 - 1e-12)
        by_p = (p - target) / (p * (1 - p)) / len(p)
        inner = each * (1 - each)
        gradient = np.array([by_p @ (share @ (inner * x)), by_p @ (share @ inner)])
        return -float(np.mean(target * np.log(p) + (1 - target) * np.log(1 - p))), gradient

    start = [1.0, float(np.log(target.mean() / (1 - target.mean())))]
    bounds = [(FLATTEST, STEEPEST), (None, None)]
    options = {"ftol": 1e-14, "gtol": 1e-9, "maxiter": 500}
    slope, offset = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x.tolist()
    temperature = spread / slope
    return Scale(temperature, offset * temperature - centre, not FLATTEST * 1.001 < slope < STEEPEST * 0.999)


def smooth_threshold(labels: np.ndarray, p: np.ndarray, groups: np.ndarray) -> float:
    """A threshold of high balanced accuracy that no slide moves far: the mean best cut of resampled slides."""
    logit = log_odds(p)
    drawn = [index for index in group_bootstrap(groups, SMOOTHING) if len(np.unique(labels[index])) == 2]
    cuts = [best_threshold(labels[index], logit[index])[0] for index in drawn or [np.arange(len(p))]]
    return float(sigmoid(np.array(np.mean(cuts))))


def log_odds(p: np.ndarray) -> np.ndarray:
    clipped = np.clip(p, 1e-12, 1 - 1e-12)
    odds: np.ndarray = np.log(clipped / (1 - clipped))
    return odds


class Correction(NamedTuple):
    """Calibration of a mean over folds, from that of single folds: `scale` of its logits, then `threshold`.

    p: the answers (N,) to the crops that no fold has seen
    crops: that no fold has seen; single, shipped: mean and standard deviation of the log-odds, and share called
        atypical, of single folds and of the mean before the correction
    """

    scale: Scale
    threshold: float
    p: np.ndarray
    crops: int
    single: tuple[float, float, float]
    shipped: tuple[float, float, float]


def correct(
    folds: Sequence[np.ndarray],
    shipped: Sequence[np.ndarray],
    averaging: str,
    temperature: float,
    threshold: float,
    weights: Sequence[float],
) -> Correction:
    """What lets the shipped network answer unseen crops as spread, and as often atypical, as its single folds do.

    folds: calibrated logits (F, V, N) of each member; shipped: (folds, V, N) of each member as they are shipped
    temperature, threshold: fitted out of fold, to answers of single folds
    A mean over folds is less spread than they are, so that it calls fewer crops atypical at their threshold.
    """
    from scipy.optimize import least_squares

    # in float64: the solver's steps are lost in float32
    folds, shipped = ([member.astype(np.float64) for member in side] for side in (folds, shipped))
    count = len(folds[0])
    single = np.concatenate(
        [average([z[f : f + 1] for z in folds], averaging, temperature, weights) for f in range(count)]
    )
    odds = log_odds(single)
    centre, spread = float(odds.mean()), float(np.mean([part.std() for part in np.split(odds, count)]))
    rate = float((single >= threshold).mean())

    def answers(slope: float, offset: float) -> np.ndarray:
        """Of the shipped mean, its logits moved and stretched about the centre of the single folds' answers."""
        z = [((member / temperature - centre) * slope + centre + offset) for member in shipped]
        return average(z, averaging, 1.0, weights)

    def misfit(x: np.ndarray) -> list[float]:
        odds_now = log_odds(answers(float(np.exp(x[0])), float(x[1])))
        return [float(odds_now.std()) - spread, float(odds_now.mean()) - centre]

    before = answers(1.0, 0.0)
    log_slope, offset = least_squares(misfit, [0.0, 0.0], xtol=1e-12, ftol=1e-12).x.tolist()
    slope = float(np.exp(log_slope))
    p = answers(slope, offset)
    after = np.sort(p)
    cut = min(max(round(len(after) * (1 - rate)), 1), len(after) - 1)
    corrected = float(after[cut - 1] + after[cut]) / 2
    new = temperature / slope
    plain = log_odds(before)
    return Correction(
        Scale(new, new * (centre + offset - slope * centre)),
        corrected,
        p,
        len(after),
        (centre, spread, rate),
        (float(plain.mean()), float(plain.std()), float((before >= threshold).mean())),
    )
