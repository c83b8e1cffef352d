"""The metrics of the official evaluator of MIDOG 2025 track 2, then counts and bootstrap intervals (numpy only).

All crops of all stacks are pooled. The classes give sensitivity, specificity and accuracy; the confidences give the ROC
AUC. Where the official evaluator divides by zero or returns NaN (no atypical or no normal crop), the metric is None.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.phase import PHASE

CLASSES = {word: int(word == PHASE.positive) for word in PHASE.classes}
Ints = NDArray[np.int_]
Floats = NDArray[np.float64]
Truth = dict[str, tuple[list[str], list[int]]]


def read_truth(path: Path) -> Truth:
    """Reads ground_truth.json into {image: (labels, tumour domains)}.

    Raises: ValueError when it is not a list of {"image", "labels", "tumordomains"} with equal lengths.
    """
    try:
        entries = json.loads(path.read_text())
        truth = {entry["image"]: (list(entry["labels"]), list(entry["tumordomains"])) for entry in entries}
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        message = f"{path.name} is not a list of objects with image, labels and tumordomains ({error!r})"
        raise ValueError(message) from error
    for image, (labels, domains) in truth.items():
        if len(labels) != len(domains):
            raise ValueError(f"{image} has {len(labels)} labels and {len(domains)} tumour domains")
        if not set(labels) <= set(CLASSES):
            raise ValueError(f"{image} has labels {sorted(set(labels))}; expected {' and '.join(CLASSES)}")
    return truth


def score(answers: dict[str, list[dict[str, Any]]], truth: Truth, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Scores answers, which have passed the evaluator's type checks (`readout.check_answers`).

    Args:
        answers: {stack's file name: one {"class", "confidence"} a page}.
        truth: from `read_truth`.
        draws: bootstrap samples of crops for the 95 % percentile intervals.
    Returns: {"results": {}, "aggregates": official keys, "counts", "intervals", "warnings"}.
    Raises: ValueError for a stack without ground truth, or with another number of labels than answers.
    """
    parts = []
    for image, results in answers.items():
        if image not in truth:
            raise ValueError(f"No GT for this image: {image}")
        labels, domains = truth[image]
        if len(results) != len(labels):
            lengths = f"result lengths={len(results)}, GT length={len(labels)}"
            raise ValueError(f"Results length does not match GT length. ({lengths})")
        for label, td, result in zip(labels, domains, results, strict=True):
            parts.append((CLASSES[label], CLASSES[result["class"]], result["confidence"], td))
    gt, output, confidence = (np.array([part[k] for part in parts]) for k in range(3))
    domain = np.array([part[3] for part in parts])
    warnings = []
    unscored = len(truth) - len(answers)
    if unscored:
        warnings.append(f"{unscored} stack(s) of the ground truth were not run")
    overall = figures(gt, output, confidence)
    names = ("sensitivity", "specificity", "balanced_accuracy", "roc_auc", "accuracy")
    aggregates: dict[str, Any] = {f"overall_{name}": overall[name] for name in names}
    counts = {"overall": count(gt, output)}
    intervals: dict[str, Any] = {f"overall_{k}": v for k, v in bootstrap(gt, output, confidence, draws, seed).items()}
    for td in np.unique(domain):
        mask = domain == td
        part = figures(gt[mask], output[mask], confidence[mask], empty_recall=0.0)
        aggregates[f"domain_{td}"] = part
        counts[f"domain_{td}"] = count(gt[mask], output[mask])
        intervals[f"domain_{td}"] = bootstrap(gt[mask], output[mask], confidence[mask], draws, seed)
        if part["roc_auc"] is None:
            warnings.append(f"domain_{td} has crops of one class only: its AUC does not exist")
    keys = {"aggregates": aggregates, "counts": counts, "intervals": intervals, "warnings": warnings}
    return {"results": {}} | keys


def figures(gt: Ints, output: Ints, confidence: Floats, empty_recall: float | None = None) -> dict[str, float | None]:
    """Sensitivity, specificity, balanced accuracy, accuracy and AUC of crops (N,); `empty_recall` stands for 0/0.

    A tumour domain without atypical crops has sensitivity 0 in the official metrics (scikit-learn's convention).
    """
    sensitivity = float((output[gt == 1] == 1).mean()) if (gt == 1).any() else empty_recall
    specificity = float((output[gt == 0] == 0).mean()) if (gt == 0).any() else empty_recall
    both = None if sensitivity is None or specificity is None else (sensitivity + specificity) / 2
    return {
        "sensitivity": sensitivity,
        "specificity": specificity,
        "balanced_accuracy": both,
        "accuracy": float((gt == output).mean()),
        "roc_auc": roc_auc(gt, confidence),
    }


def roc_auc(gt: Ints, confidence: Floats) -> float | None:
    """Probability that an atypical crop outranks a normal one, ties counting half; None where a class is missing."""
    value = weighted_auc(gt, confidence, np.ones((1, len(gt))))[0]
    return None if np.isnan(value) else float(value)


def weighted_auc(gt: Ints, confidence: Floats, weight: Floats) -> Floats:
    """AUC for each row of weights (R, N) on the crops (N,); NaN where a class has no weight."""
    _, rank = np.unique(confidence, return_inverse=True)
    order = np.argsort(rank, kind="stable")
    starts = np.flatnonzero(np.diff(rank[order], prepend=-1))  # first crop of each group of equal confidences
    positive = np.add.reduceat((weight * (gt == 1))[:, order], starts, axis=1)
    negative = np.add.reduceat((weight * (gt == 0))[:, order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    with np.errstate(invalid="ignore"):
        return (positive * (below + negative / 2)).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))


def count(gt: Ints, output: Ints) -> dict[str, int]:
    """Confusion counts: crops, atypical, normal, tp, fn, tn, fp."""
    pairs = {"tp": (1, 1), "fn": (1, 0), "tn": (0, 0), "fp": (0, 1)}
    counts = {"crops": len(gt), "atypical": int((gt == 1).sum()), "normal": int((gt == 0).sum())}
    return counts | {name: int(((gt == truth) & (output == said)).sum()) for name, (truth, said) in pairs.items()}


def bootstrap(gt: Ints, output: Ints, confidence: Floats, draws: int, seed: int) -> dict[str, list[float] | None]:
    """95 % percentile intervals over `draws` resamples of the crops; draws without one class are left out.

    Crops of one slide are alike and the ground truth does not name the slides, so the true intervals are wider.
    """
    rng, n = np.random.default_rng(seed), len(gt)
    values: dict[str, list[Floats]] = {}
    for start in range(0, draws, 200):  # 200 rows of weights at a time bound the memory
        weight = rng.multinomial(n, np.full(n, 1 / n), size=min(200, draws - start)).astype(np.float64)
        right = weight * (gt == output)
        with np.errstate(invalid="ignore"):
            sensitivity = right[:, gt == 1].sum(axis=1) / weight[:, gt == 1].sum(axis=1)
            specificity = right[:, gt == 0].sum(axis=1) / weight[:, gt == 0].sum(axis=1)
        for name, value in {
            "sensitivity": sensitivity,
            "specificity": specificity,
            "balanced_accuracy": (sensitivity + specificity) / 2,
            "roc_auc": weighted_auc(gt, confidence, weight),
            "accuracy": right.sum(axis=1) / n,
        }.items():
            values.setdefault(name, []).append(value)
    intervals: dict[str, list[float] | None] = {}
    for name, chunks in values.items():
        drawn = np.concatenate(chunks)
        drawn = drawn[np.isfinite(drawn)]
        intervals[name] = [float(q) for q in np.quantile(drawn, (0.025, 0.975))] if len(drawn) else None
    return intervals


def write(metrics: dict[str, Any], path: Path) -> None:
    """Writes metrics.json."""
    path.write_text(json.dumps(metrics, indent=4) + "\n")
