"""How answers agree with labels: scores with 95% intervals, and curves; also without crops that were trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .answers import Answer
from .metrics import intervals, net_benefit, precision_recall, reliability, scores

RESAMPLES = 500
POINTS = 400  # most of a curve in a page
CUTS = np.arange(0.01, 1, 0.01)  # of decision curves
NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "auc": "AUC",
    "average_precision": "average precision",
    "brier": "Brier score",
    "ece": "calibration error",
}


@dataclass(frozen=True)
class Labelled:
    """Crops with a label: labels (N,) and P(atypical) (N,); groups (N,): the slide of each, or the crop itself.

    slides: how many; loose: crops without a slide
    """

    labels: np.ndarray
    p: np.ndarray
    groups: np.ndarray
    slides: int
    loose: int

    @property
    def resampled(self) -> str:
        """What intervals are resampled over, as a phrase."""
        slides = f"{self.slides:,} slide{'s' * (self.slides != 1)}"
        crops = f"{self.loose:,} crops"
        return f"{slides} and {crops} without one" if self.slides and self.loose else slides if self.slides else crops


@dataclass(frozen=True)
class Assessment:
    """Scores by name, each with its 95% interval (NaN where it has none), of `labelled` crops."""

    labelled: Labelled
    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def labelled(rows: Sequence[Answer]) -> Labelled:
    """The rows that have a label."""
    chosen = [row for row in rows if row.label is not None]
    groups = [f"slide {row.slide}" if row.slide else f"crop {row.path} {row.page}" for row in chosen]
    return Labelled(
        np.array([row.label for row in chosen], int),
        np.array([row.p_atypical for row in chosen], float),
        np.array(groups, object),
        len({row.slide for row in chosen if row.slide}),
        sum(not row.slide for row in chosen),
    )


def assess(rows: Sequence[Answer], threshold: float) -> Assessment | None:
    """Of the rows that have a label; None where none has. Intervals are bootstrapped over slides, else over crops."""
    rows_with_labels = labelled(rows)
    if not len(rows_with_labels.labels):
        return None
    number = np.unique(rows_with_labels.groups, return_inverse=True)[1]
    return Assessment(
        rows_with_labels,
        scores(rows_with_labels.labels, rows_with_labels.p, threshold),
        intervals(rows_with_labels.labels, rows_with_labels.p, number, threshold, RESAMPLES),
    )


def unseen(rows: Sequence[Answer]) -> list[Answer]:
    """The labelled rows without those that the ensemble was trained on; empty where it was trained on none of them."""
    chosen = [row for row in rows if row.label is not None]
    others = [row for row in chosen if row.seen is False]
    return others if len(others) < len(chosen) else []


def in_training(rows: Sequence[Answer]) -> str:
    """How many of the labelled rows the ensemble was trained on, as a sentence."""
    chosen = [row for row in rows if row.label is not None]
    if any(row.seen is None for row in chosen):
        return "Whether the ensemble was trained on these crops is not known: its folder does not say."
    seen = sum(bool(row.seen) for row in chosen)
    if not seen:
        return f"None of the {len(chosen):,} labelled crops was in the ensemble's training data."
    return (
        f"{seen:,} of the {len(chosen):,} labelled crops were in the ensemble's training data: scores of these say "
        "nothing about new crops."
    )


def curves(crops: Labelled) -> dict[str, Any]:
    """What the page draws, as JSON: each curve as a list of points. Empty where a class is missing."""
    labels, p = crops.labels, crops.p
    if len(np.unique(labels)) < 2:
        return {}
    recall, precision = precision_recall(labels, p)
    chosen = np.unique(np.linspace(0, len(recall) - 1, min(POINTS, len(recall))).round().astype(int))
    return {
        "prevalence": float(labels.mean()),
        "precision_recall": points(recall[chosen], precision[chosen]),
        "reliability": points(*reliability(labels, p)),
        "decision": points(CUTS, [net_benefit(labels, p >= cut, cut) for cut in CUTS]),
    }


def in_one_line(assessment: Assessment) -> str:
    """The first four scores with their intervals, and over what these are."""
    text = []
    for key, name in list(NAMES.items())[:4]:
        low, high = assessment.intervals[key]
        value = "-" if math.isnan(assessment.scores[key]) else f"{assessment.scores[key]:.4f}"
        text.append(f"{name} {value}" + ("" if math.isnan(low) else f" ({low:.4f} to {high:.4f})"))
    return f"{', '.join(text)}; 95% intervals over {assessment.labelled.resampled}"


def points(*columns: Sequence[float] | np.ndarray) -> list[list[float]]:
    return [[round(float(value), 4) for value in point] for point in zip(*columns, strict=True)]
