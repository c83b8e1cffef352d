"""The charts of a run's report: ROC, scores by threshold, reliability, and the curves of training."""

from __future__ import annotations

from typing import Any

import numpy as np

from inference.metrics import balanced_accuracy, reliability, roc_curve, sensitivity, specificity

from .calibrate import OutOfFold
from .charts import COLOURS, Chart, ticks


def roc_chart(oof: OutOfFold, p: np.ndarray, threshold: float) -> Chart:
    chart = Chart("ROC curve of each fold and of all folds pooled", "1 - specificity", "sensitivity")
    chart.line([0, 1], [0, 1], "var(--line)", width=1)
    for fold in np.unique(oof.folds):
        chart.line(
            *roc_curve(oof.labels[oof.folds == fold], p[oof.folds == fold]), "var(--muted)", width=1, opacity=0.7
        )
    chart.legend.append(("folds", "var(--muted)", ""))
    chart.line(*roc_curve(oof.labels, p), "var(--accent)", "pooled")
    called = p >= threshold
    chart.dots([1 - specificity(oof.labels, called)], [sensitivity(oof.labels, called)], [4.5], "var(--atypical)")
    chart.legend.append(("chosen threshold", "var(--atypical)", "band"))
    return chart


def threshold_chart(oof: OutOfFold, p: np.ndarray, chosen: dict[str, Any]) -> Chart:
    chart = Chart("Scores by threshold", "threshold on P(atypical)", "score", y=(0.4, 1), y_ticks=(0.4, 0.6, 0.8, 1))
    cuts = np.linspace(0.01, 0.99, 99)
    called = [p >= cut for cut in cuts]
    low, high = chosen["threshold_interval"]
    chart.band(low, high, "var(--atypical)", "95% interval of the best threshold")
    for name, score, colour, dash in (
        ("sensitivity", sensitivity, "var(--warn)", "5 3"),
        ("specificity", specificity, "var(--normal)", "2 3"),
        ("balanced accuracy", balanced_accuracy, "var(--accent)", ""),
    ):
        y = np.array([score(oof.labels, one) for one in called])
        chart.line(cuts[y >= 0.4], y[y >= 0.4], colour, name, dash=dash)
    chart.line([chosen["threshold"]] * 2, [0.4, 1], "var(--atypical)", f"chosen, {chosen['threshold']:.3f}", 1.5)
    return chart


def reliability_chart(oof: OutOfFold, raw: np.ndarray, p: np.ndarray) -> Chart:
    chart = Chart(
        "Share of atypical crops by predicted probability", "mean P(atypical) in the bin", "share of atypical"
    )
    chart.line([0, 1], [0, 1], "var(--line)", width=1.5)
    for name, values, colour, dash in (
        ("uncalibrated", raw, "var(--muted)", "4 3"),
        ("calibrated", p, "var(--accent)", ""),
    ):
        count, mean, share = reliability(oof.labels, values)
        chart.line(mean, share, colour, name, dash=dash)
        chart.dots(mean, share, 1.5 + 9 * np.sqrt(count / len(p)), colour)
    return chart


def curves_chart(histories: list[dict[str, list[float]]], names: tuple[str, ...], label: str) -> Chart:
    """Each fold's curves by epoch: the first of `names` solid, the second dashed."""
    series = [(fold, name, one[name]) for fold, one in enumerate(histories) for name in names if one.get(name)]
    values = [v for _, _, y in series for v in y if np.isfinite(v)] or [0.0, 1.0]
    epochs = max([len(y) for _, _, y in series] + [2])
    edge = 0.05 * max(max(values) - min(values), 1e-3)
    low, high = min(values) - edge, max(values) + edge
    steps = [tick for tick in ticks(1, epochs) if tick == int(tick)]
    chart = Chart(f"{label} by epoch", "epoch", label, (1, epochs), (low, high), steps, ticks(low, high))
    for fold, name, y in series:
        dash = "4 3" if name != names[0] else ""
        shown = f"fold {fold}" + (", held out" if dash else ", training" if len(names) > 1 else "")
        x = [epoch for epoch, value in enumerate(y, 1) if np.isfinite(value)]
        chart.line(x, [v for v in y if np.isfinite(v)], COLOURS[fold % len(COLOURS)], shown, dash=dash)
    return chart
