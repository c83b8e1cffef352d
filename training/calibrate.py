"""Choose how logits become answers, on out-of-fold logits only: TTA, averaging, temperature, shift, threshold.

Each choice is kept only for a measured gain. Temperature and shift minimise the negative log-likelihood; the threshold
maximises balanced accuracy, with an interval from a bootstrap over groups (slides), whose crops are not independent.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inference.errors import UserError
from inference.manifest import TTA_VIEWS
from inference.metrics import balanced_accuracy, best_threshold, group_bootstrap, roc_auc

MINIMAL_GAIN = 5e-4  # in AUC: less does not pay for more views
RESAMPLES = 1000


@dataclass(frozen=True)
class OutOfFold:
    """Logits (V, N) of the d4 views, from the fold that did not train on the crop; labels, groups, domains (N,)."""

    logits: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    domains: np.ndarray
    folds: np.ndarray


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a finished run folder of 'training fit'")


def run(options: argparse.Namespace) -> None:
    result = calibrate(read_out_of_fold(options.run))
    (options.run / "calibration.json").write_text(json.dumps(result, indent=1) + "\n")
    for tta, scores in result["tried"].items():
        print(f"{tta:>5}: " + ", ".join(f"{rule} AUC {auc:.4f}" for rule, auc in scores.items()))
    low, high = result["threshold_interval"]
    print(f"chosen: tta {result['tta']}, averaging {result['averaging']}, "
          f"temperature {result['temperature']:.3f}, shift {result['shift']:+.3f}")  # fmt: skip
    print(f"threshold {result['threshold']:.3f} (95% {low:.3f} to {high:.3f}), out-of-fold balanced accuracy "
          f"{result['balanced_accuracy']:.4f}, AUC {result['auc']:.4f}")  # fmt: skip


def read_out_of_fold(run: Path) -> OutOfFold:
    """All folds' held-out logits of a run, in the order of its split."""
    import csv

    split = run / "split.csv"
    if not split.exists():
        raise UserError(f"{run} has no split.csv; expected a run folder; make one with 'training fit'")
    with split.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    folds = np.array([int(row["fold"]) for row in rows])
    logits = np.full((TTA_VIEWS["d4"], len(rows)), np.nan)
    for fold in np.unique(folds):
        file = run / f"fold{fold}" / "oof.npz"
        if not file.exists():
            raise UserError(f"{file} is missing; fold {fold} is not finished; run 'training fit' again to resume it")
        stored = np.load(file)
        logits[:, stored["index"]] = stored["logits"]
    if np.isnan(logits).any():
        raise UserError(
            f"{run}: {int(np.isnan(logits).any(0).sum())} crops have no out-of-fold logit; fit the run again"
        )
    column = lambda name: np.array([row[name] for row in rows])  # noqa: E731
    return OutOfFold(logits, column("label").astype(int), column("group"), column("domain"), folds)


def averaged(logits: np.ndarray, averaging: str, temperature: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """P(atypical) (N,) from the views' logits (V, N)."""
    scaled = (logits + shift) / temperature
    return sigmoid(scaled.mean(0)) if averaging == "logit" else sigmoid(scaled).mean(0)


def calibrated(logits: np.ndarray, chosen: dict[str, Any]) -> np.ndarray:
    """P(atypical) (N,) from the eight d4 views' logits (8, N) by what `calibrate` chose."""
    views = logits[: TTA_VIEWS[chosen["tta"]]]
    return averaged(views, chosen["averaging"], chosen["temperature"], chosen["shift"])


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(z, -500, 500)))


def fit_scale(logits: np.ndarray, labels: np.ndarray, averaging: str) -> tuple[float, float]:
    """(temperature, shift) with the least negative log-likelihood (Platt scaling), temperature in [0.1, 10].

    The shift undoes what class weights and balanced sampling do to the prior; the order of the crops stays as it is.
    """
    from scipy.optimize import minimize

    def loss(x: np.ndarray) -> float:
        p = np.clip(averaged(logits, averaging, float(np.exp(x[0])), x[1]), 1e-7, 1 - 1e-7)
        return -float(np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p)))

    found = minimize(loss, [0.0, 0.0], method="Nelder-Mead", bounds=[(np.log(0.1), np.log(10)), (-10, 10)])
    return float(np.exp(found.x[0])), float(found.x[1])


def smooth_threshold(labels: np.ndarray, p: np.ndarray) -> float:
    """A threshold of high balanced accuracy that one crop cannot move: the best cut's mean over a bootstrap."""
    g = np.random.default_rng(0)
    logit = np.log(np.clip(p, 1e-7, 1 - 1e-7) / np.clip(1 - p, 1e-7, 1))
    cuts = []
    for _ in range(100):
        index = g.integers(len(p), size=len(p))
        cuts.append(best_threshold(labels[index], logit[index])[0])
    return float(sigmoid(np.array(np.mean(cuts))))


def calibrate(oof: OutOfFold) -> dict[str, Any]:
    """The choices with their scores, as calibration.json holds them."""
    tried = {
        tta: {rule: roc_auc(oof.labels, averaged(oof.logits[:views], rule)) for rule in ("logit", "probability")}
        for tta, views in TTA_VIEWS.items()
    }
    tta, averaging = "none", "logit"
    for name, rules in tried.items():
        for rule, auc in rules.items():
            if auc > tried[tta][averaging] + MINIMAL_GAIN:
                tta, averaging = name, rule
    logits = oof.logits[: TTA_VIEWS[tta]]
    temperature, shift = fit_scale(logits, oof.labels, averaging)
    p = averaged(logits, averaging, temperature, shift)
    threshold = smooth_threshold(oof.labels, p)
    cuts, accuracies = [], []
    for index in group_bootstrap(oof.groups, RESAMPLES):
        if len(np.unique(oof.labels[index])) == 2:
            cuts.append(best_threshold(oof.labels[index], p[index])[0])
            accuracies.append(balanced_accuracy(oof.labels[index], p[index] >= threshold))
    return {
        "tta": tta, "averaging": averaging, "temperature": temperature, "shift": shift,
        "threshold": threshold,
        "threshold_interval": np.quantile(cuts, [0.025, 0.975]).tolist(),
        "balanced_accuracy": balanced_accuracy(oof.labels, p >= threshold),
        "balanced_accuracy_interval": np.quantile(accuracies, [0.025, 0.975]).tolist(),
        "balanced_accuracy_at_half": balanced_accuracy(oof.labels, averaged(logits, averaging) >= 0.5),
        "auc": roc_auc(oof.labels, p), "tried": tried, "crops": len(p), "atypical": int(oof.labels.sum()),
    }  # fmt: skip
