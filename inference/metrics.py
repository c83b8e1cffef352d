"""Metrics of P(atypical), or of logits, against labels (atypical = 1), in numpy; NaN if a class is missing.

The test harness has its own copy of the official ones on purpose: it judges independently.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

ECE_BINS = 10


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)), without overflow."""
    p: np.ndarray = 1 / (1 + np.exp(-np.clip(z, -500, 500)))
    return p


def roc_auc(labels: np.ndarray, values: np.ndarray) -> float:
    """Area under the ROC curve, of (N,) each: the share of pairs in the right order, ties counting half."""
    positive, negative = values[labels == 1], np.sort(values[labels == 0])
    if not len(positive) or not len(negative) or np.isnan(values).any():
        return float("nan")
    below, up_to = (np.searchsorted(negative, positive, side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(negative))


def sensitivity(labels: np.ndarray, called: np.ndarray) -> float:
    """Share of the atypical crops that are called atypical."""
    return float(called[labels == 1].mean()) if (labels == 1).any() else float("nan")


def specificity(labels: np.ndarray, called: np.ndarray) -> float:
    """Share of the normal crops that are called normal."""
    return float(1 - called[labels == 0].mean()) if (labels == 0).any() else float("nan")


def balanced_accuracy(labels: np.ndarray, called: np.ndarray) -> float:
    return (sensitivity(labels, called) + specificity(labels, called)) / 2


def brier(labels: np.ndarray, p: np.ndarray) -> float:
    """Mean squared difference of P(atypical) and label: 0 is perfect, a constant 0.5 gets 0.25."""
    return float(np.mean((p - labels) ** 2))


def reliability(labels: np.ndarray, p: np.ndarray, bins: int = ECE_BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(crops, mean P(atypical), share of atypical) of each bin of equal width that holds a crop, each (B,)."""
    number = np.minimum((p * bins).astype(int), bins - 1)
    count = np.bincount(number, minlength=bins)
    used = count > 0
    mean = np.bincount(number, p, bins)[used] / count[used]
    share = np.bincount(number, labels, bins)[used] / count[used]
    return count[used], mean, share


def ece(labels: np.ndarray, p: np.ndarray, bins: int = ECE_BINS) -> float:
    """Expected calibration error: the bins' mean distance of P(atypical) from the share of atypical."""
    count, mean, share = reliability(labels, p, bins)
    return float((count * np.abs(mean - share)).sum() / count.sum())


def roc_curve(labels: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(1 - specificity, sensitivity) at every cut between different values, (0, 0) to (1, 1)."""
    order = np.argsort(-values, kind="stable")
    positive = labels[order] == 1
    last = np.append(np.diff(values[order]) != 0, True)  # ties move together
    tp, fp = np.cumsum(positive)[last], np.cumsum(~positive)[last]
    return np.append(0, fp / max(1, fp[-1])), np.append(0, tp / max(1, tp[-1]))


def precision_recall(labels: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(recall, precision) at every cut between different values, recall rising from 0; precision begins at 1."""
    order = np.argsort(-values, kind="stable")
    positive = labels[order] == 1
    last = np.append(np.diff(values[order]) != 0, True)  # ties move together
    tp, called = np.cumsum(positive)[last], np.flatnonzero(last) + 1
    return np.append(0, tp / max(1, positive.sum())), np.append(1, tp / called)


def average_precision(labels: np.ndarray, values: np.ndarray) -> float:
    """Mean precision over the recalls that are gained, without interpolation; NaN without atypical crops."""
    if not (labels == 1).any():
        return float("nan")
    recall, precision = precision_recall(labels, values)
    return float((np.diff(recall) * precision[1:]).sum())


def net_benefit(labels: np.ndarray, called: np.ndarray, cut: float) -> float:
    """True positives a crop, less false ones at the odds of `cut`, the P(atypical) from which one would act.

    Vickers and Elkin, Medical Decision Making 26 (2006) 565.
    """
    return float((called & (labels == 1)).mean() - (called & (labels == 0)).mean() * cut / (1 - cut))


def scores_of_calls(labels: np.ndarray, p: np.ndarray, called: np.ndarray) -> dict[str, float]:
    """All metrics of P(atypical) (N,) and of the calls (N,)."""
    return {
        "balanced_accuracy": balanced_accuracy(labels, called),
        "sensitivity": sensitivity(labels, called),
        "specificity": specificity(labels, called),
        "auc": roc_auc(labels, p),
        "average_precision": average_precision(labels, p),
        "brier": brier(labels, p),
        "ece": ece(labels, p),
    }


def scores(labels: np.ndarray, p: np.ndarray, threshold: float) -> dict[str, float]:
    """All metrics of P(atypical) (N,), called atypical at or above `threshold`."""
    return scores_of_calls(labels, p, p >= threshold)


def group_bootstrap(groups: np.ndarray, resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Resamples as index arrays: groups drawn with replacement, because crops of one slide are not independent."""
    g = np.random.default_rng(seed)
    _, number, count = np.unique(groups, return_inverse=True, return_counts=True)
    order, first = np.argsort(number, kind="stable"), np.cumsum(count) - count  # crops by group, where each begins
    for _ in range(resamples):
        drawn = g.integers(len(count), size=len(count))
        sizes = count[drawn]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        yield order[np.repeat(first[drawn], sizes) + within]


def intervals(
    labels: np.ndarray, p: np.ndarray, groups: np.ndarray, threshold: float, resamples: int = 500
) -> dict[str, tuple[float, float]]:
    """95% interval of each metric, bootstrapped over groups; NaN with fewer than two groups or too few of a class."""
    drawn = [scores(labels[i], p[i], threshold) for i in group_bootstrap(groups, resamples)]
    several = len(np.unique(groups)) > 1
    return {
        name: interval(np.array([each[name] for each in drawn])) if several else (math.nan, math.nan)
        for name in drawn[0]
    }


def interval(drawn: np.ndarray) -> tuple[float, float]:
    """95% interval of a value by its resamples; NaN where too many have none, as with too few crops of a class."""
    if np.isfinite(drawn).mean() <= 0.9:
        return math.nan, math.nan
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def best_threshold(labels: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """(threshold, balanced accuracy) that maximise the balanced accuracy of calling `values >= threshold` atypical.

    The threshold lies midway between two neighbouring values; of several that are equally good, the middle one.
    """
    order = np.argsort(values)
    sorted_values, positive = values[order], labels[order] == 1
    # cutting before position k calls k..N-1 atypical
    missed = np.concatenate([[0], np.cumsum(positive)])
    passed = np.concatenate([[0], np.cumsum(~positive)])
    accuracy = (1 - missed / positive.sum() + passed / (~positive).sum()) / 2
    middles = (sorted_values[1:] + sorted_values[:-1]) / 2
    edges = np.concatenate([[sorted_values[0] - 1], middles, [sorted_values[-1] + 1]])
    cuttable = np.concatenate([[True], sorted_values[1:] > sorted_values[:-1], [True]])
    accuracy = np.where(cuttable, accuracy, -1)
    best = accuracy.max()
    return float(np.quantile(edges[accuracy == best], 0.5, method="lower")), float(best)
