"""Scores of logits or probabilities against labels, in numpy."""

from __future__ import annotations

import numpy as np


def roc_auc(labels: np.ndarray, values: np.ndarray) -> float:
    """Area under the ROC curve (Mann-Whitney, ties count half); NaN with one class only."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, values)) if len(np.unique(labels)) == 2 else float("nan")


def sensitivity(labels: np.ndarray, called: np.ndarray) -> float:
    return float(called[labels == 1].mean())


def specificity(labels: np.ndarray, called: np.ndarray) -> float:
    return float(1 - called[labels == 0].mean())


def balanced_accuracy(labels: np.ndarray, called: np.ndarray) -> float:
    return (sensitivity(labels, called) + specificity(labels, called)) / 2


def best_threshold(labels: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """(threshold, balanced accuracy) of the cut `values >= threshold` with the highest balanced accuracy.

    The cut lies midway between two neighbouring values, in the middle of the best plateau.
    """
    order = np.argsort(values)
    sorted_values, positive = values[order], labels[order] == 1
    # cutting before position k calls k..N-1 atypical
    missed = np.concatenate([[0], np.cumsum(positive)])
    passed = np.concatenate([[0], np.cumsum(~positive)])
    score = (1 - missed / positive.sum() + passed / (~positive).sum()) / 2
    edges = np.concatenate([[sorted_values[0] - 1], (sorted_values[1:] + sorted_values[:-1]) / 2, [sorted_values[-1] + 1]])
    cuttable = np.concatenate([[True], sorted_values[1:] > sorted_values[:-1], [True]])
    score = np.where(cuttable, score, -1)
    best = score.max()
    return float(np.median(edges[score == best])), float(best)
