"""The charts of a run's report: ROC, scores by threshold, reliability, and the curves of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from inference.metrics import balanced_accuracy, reliability, roc_curve, sensitivity, specificity

from ..run import OutOfFold
from .charts import ACCENT, ATYPICAL, LINE, MUTED, NORMAL, WARN, chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def roc_chart(oof: OutOfFold, p: np.ndarray, threshold: float) -> str:
    def draw(axes: Axes) -> None:
        axes.axline((0, 0), (1, 1), color=LINE)
        for fold in np.unique(oof.folds):
            part, name = oof.folds == fold, "folds" if fold == oof.folds.min() else None
            axes.plot(*roc_curve(oof.labels[part], p[part]), color=MUTED, linewidth=0.8, label=name)
        axes.plot(*roc_curve(oof.labels, p), color=ACCENT, label="all folds")
        called = p >= threshold
        point = 1 - specificity(oof.labels, called), sensitivity(oof.labels, called)
        axes.plot(*point, "o", color=ATYPICAL, label="chosen threshold")

    return chart("ROC curve of each fold and of all folds pooled", "1 - specificity", "sensitivity", draw)


def threshold_chart(oof: OutOfFold, p: np.ndarray, chosen: dict[str, Any]) -> str:
    def draw(axes: Axes) -> None:
        cuts = np.linspace(0.01, 0.99, 99)
        axes.axvspan(*chosen["threshold_interval"], color=ATYPICAL, alpha=0.15, linewidth=0, label="95% interval")
        for name, score, colour, dash in (
            ("sensitivity", sensitivity, WARN, "--"),
            ("specificity", specificity, NORMAL, ":"),
            ("balanced accuracy", balanced_accuracy, ACCENT, "-"),
        ):
            axes.plot(cuts, [score(oof.labels, p >= cut) for cut in cuts], dash, color=colour, label=name)
        axes.axvline(chosen["threshold"], color=ATYPICAL, linewidth=1.2, label=f"chosen, {chosen['threshold']:.3f}")

    return chart("Scores by threshold", "threshold on P(atypical)", "score", draw)


def reliability_chart(oof: OutOfFold, raw: np.ndarray, p: np.ndarray) -> str:
    def draw(axes: Axes) -> None:
        axes.axline((0, 0), (1, 1), color=LINE)
        for name, values, colour, dash in (("uncalibrated", raw, MUTED, "--"), ("calibrated", p, ACCENT, "-")):
            count, mean, share = reliability(oof.labels, values)
            axes.plot(mean, share, dash, color=colour, label=name)
            axes.scatter(mean, share, 2 + 80 * count / len(p), color=colour)

    name = "Share of atypical crops by predicted probability"
    return chart(name, "mean P(atypical) in the bin", "share of atypical", draw)


def curves_chart(histories: list[dict[str, list[float]]], names: tuple[str, ...], label: str) -> str:
    """Each fold's curves by epoch: the first of `names` solid, the second dashed."""

    def draw(axes: Axes) -> None:
        colours = (ACCENT, ATYPICAL, NORMAL, WARN, MUTED)
        for fold, history in enumerate(histories):
            for name, dash in zip(names, ("-", "--"), strict=False):
                if values := history.get(name):
                    shown = f"fold {fold}" if name == names[0] else None
                    epochs = range(1, len(values) + 1)
                    axes.plot(epochs, values, dash, color=colours[fold % len(colours)], label=shown)
        if len(names) > 1:
            axes.plot([], [], "--", color=MUTED, label="held out")
        axes.locator_params("x", integer=True)

    return chart(f"{label} by epoch", "epoch", label, draw)
