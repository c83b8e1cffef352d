"""Choose how logits become answers, on out-of-fold logits only: TTA, averaging, temperature, shift, threshold.

Each choice is kept only for a measured gain. Temperature and shift minimise the negative log-likelihood; the threshold
maximises balanced accuracy. What is shipped is chosen on all folds. What is reported is leave-one-fold-out: everything
is chosen again on the other folds, then scored on the one left out: no crop judges a choice that it took part in.
Intervals come from resampled groups (slides), whose crops are not independent.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inference.averaging import average
from inference.errors import UserError
from inference.files import write_whole
from inference.manifest import TTA_VIEWS
from inference.metrics import (
    balanced_accuracy,
    best_threshold,
    group_bootstrap,
    roc_auc,
    sensitivity,
    sigmoid,
    specificity,
)

MINIMAL_GAIN = 5e-4  # in AUC: a smaller gain does not pay for more views
RESAMPLES = 500
SMOOTHING = 100  # resamples whose best cuts are averaged to get the threshold


@dataclass(frozen=True)
class OutOfFold:
    """Logits (V, N) of the recipe's views from the fold that did not train on the crop; all other fields (N,)."""

    logits: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    domains: np.ndarray
    folds: np.ndarray

    def part(self, chosen: np.ndarray) -> OutOfFold:
        """The crops that `chosen` (N,) selects, by index or as a mask."""
        rest = (values[chosen] for values in (self.labels, self.groups, self.domains, self.folds))
        return OutOfFold(self.logits[:, chosen], *rest)

    @property
    def both_classes(self) -> bool:
        return len(np.unique(self.labels)) == 2


@dataclass(frozen=True)
class LeftOut:
    """Each crop by calibration on the other folds: p and whether called atypical, both (N,); the choices, by fold."""

    p: np.ndarray
    called: np.ndarray
    chosen: dict[int, dict[str, Any]]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a finished run folder of 'training fit'")


def run(options: argparse.Namespace) -> None:
    result = calibrate(read_out_of_fold(options.run))
    write_whole(options.run / "calibration.json", json.dumps(result, indent=1) + "\n")
    for tta, by_rule in result["tried"].items():
        print(f"{tta:>5}: " + ", ".join(f"{rule} AUC {auc:.4f}" for rule, auc in by_rule.items()))
    low, high = result["threshold_interval"]
    print(
        f"chosen: tta {result['tta']}, averaging {result['averaging']}, temperature {result['temperature']:.3f}, "
        f"shift {result['shift']:+.3f}, threshold {result['threshold']:.3f} (95% {low:.3f} to {high:.3f})"
    )
    print(f"leave one fold out: {describe(result)}")
    same = result["same_crops"]
    print(
        f"on the crops that chose it: balanced accuracy {same['balanced_accuracy']:.4f}, AUC {same['auc']:.4f}, "
        "which flatters"
    )


def describe(result: dict[str, Any]) -> str:
    """The leave-one-fold-out metrics of `calibrate` in one line."""
    if result["balanced_accuracy"] is None:
        return "not possible, because without one of the folds a class is missing"
    text = []
    for key, name in (("balanced_accuracy", "balanced accuracy"), ("auc", "AUC")):
        text.append(f"{name} {result[key]:.4f}")
        if result[f"{key}_interval"]:
            low, high = result[f"{key}_interval"]
            text[-1] += f" (95% {low:.4f} to {high:.4f})"
    return ", ".join(text)


def read_out_of_fold(run: Path) -> OutOfFold:
    """All folds' held-out logits of a run, in the order of its split."""
    import csv

    split = run / "split.csv"
    if not split.exists():
        raise UserError(f"{run} has no split.csv; expected a run folder; make one with 'training fit'")
    with split.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    folds = np.array([int(row["fold"]) for row in rows])
    stored = {}
    for fold in np.unique(folds):
        file = run / f"fold{fold}" / "oof.npz"
        if not file.exists():
            raise UserError(f"{file} is missing; fold {fold} is not finished; run 'training fit' again to resume it")
        stored[fold] = np.load(file)
    logits = np.full((min(len(one["logits"]) for one in stored.values()), len(rows)), np.nan)
    for one in stored.values():
        logits[:, one["index"]] = one["logits"][: len(logits)]
    if np.isnan(logits).any():
        raise UserError(
            f"{run}: {int(np.isnan(logits).any(0).sum())} crops have no out-of-fold logit; fit the run again"
        )
    column = lambda name: np.array([row[name] for row in rows])  # noqa: E731
    return OutOfFold(logits, column("label").astype(int), column("group"), column("domain"), folds)


def averaged(logits: np.ndarray, averaging: str, temperature: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """P(atypical) (N,) from the views' logits (V, N), by the rule of inference."""
    return average([logits[None] + shift], averaging, temperature)


def calibrated(logits: np.ndarray, chosen: dict[str, Any]) -> np.ndarray:
    """P(atypical) (N,) from the views' logits (V, N) by what `calibrate` chose."""
    views = logits[: TTA_VIEWS[chosen["tta"]]]
    return averaged(views, chosen["averaging"], chosen["temperature"], chosen["shift"])


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


def smooth_threshold(labels: np.ndarray, p: np.ndarray, groups: np.ndarray) -> float:
    """A threshold of high balanced accuracy that no slide moves far: the mean best cut of resampled slides."""
    logit = np.log(np.clip(p, 1e-7, 1 - 1e-7) / np.clip(1 - p, 1e-7, 1))
    drawn = [index for index in group_bootstrap(groups, SMOOTHING) if len(np.unique(labels[index])) == 2]
    cuts = [best_threshold(labels[index], logit[index])[0] for index in drawn or [np.arange(len(p))]]
    return float(sigmoid(np.array(np.mean(cuts))))


def choose(oof: OutOfFold) -> dict[str, Any]:
    """TTA, averaging, temperature, shift and threshold, with the AUC of everything that was tried."""
    tried = {
        tta: {rule: roc_auc(oof.labels, averaged(oof.logits[:views], rule)) for rule in ("logit", "probability")}
        for tta, views in TTA_VIEWS.items()
        if views <= len(oof.logits)
    }
    tta, averaging = "none", "logit"
    for name, rules in tried.items():
        for rule, auc in rules.items():
            if auc > tried[tta][averaging] + MINIMAL_GAIN:
                tta, averaging = name, rule
    logits = oof.logits[: TTA_VIEWS[tta]]
    temperature, shift = fit_scale(logits, oof.labels, averaging)
    threshold = smooth_threshold(oof.labels, averaged(logits, averaging, temperature, shift), oof.groups)
    return {
        "tta": tta,
        "averaging": averaging,
        "temperature": temperature,
        "shift": shift,
        "threshold": threshold,
        "tried": tried,
    }


def leave_one_fold_out(oof: OutOfFold) -> LeftOut | None:
    """Each fold scored by the choices of the others; None if the other folds of any fold lack a class."""
    p, called, choices = np.empty(len(oof.labels)), np.empty(len(oof.labels), bool), {}
    for fold in np.unique(oof.folds):
        left = oof.folds == fold
        others = oof.part(~left)
        if not others.both_classes:
            return None
        choices[int(fold)] = choose(others)
        p[left] = calibrated(oof.logits[:, left], choices[int(fold)])
        called[left] = p[left] >= choices[int(fold)]["threshold"]
    return LeftOut(p, called, choices)


def resampled(oof: OutOfFold, left: LeftOut) -> tuple[list[float], list[float]]:
    """Leave-one-fold-out balanced accuracy and AUC of resampled slides; each resample chooses its own thresholds."""
    by_fold = {fold: calibrated(oof.logits, chosen) for fold, chosen in left.chosen.items()}
    accuracies, aucs = [], []
    for index in group_bootstrap(oof.groups, RESAMPLES):
        labels, folds, called = oof.labels[index], oof.folds[index], np.zeros(len(index), bool)
        for fold, p in by_fold.items():
            scored = folds == fold
            if len(np.unique(labels[~scored])) < 2:
                break
            called[scored] = p[index[scored]] >= best_threshold(labels[~scored], p[index[~scored]])[0]
        else:
            if len(np.unique(labels)) == 2:
                accuracies.append(balanced_accuracy(labels, called))
                aucs.append(roc_auc(labels, left.p[index]))
    return accuracies, aucs


def span(values: list[float]) -> list[float] | None:
    """The middle 95% of resampled values; None where too few resamples had both classes."""
    return np.quantile(values, [0.025, 0.975]).tolist() if len(values) > RESAMPLES / 2 else None


def calibrate(oof: OutOfFold) -> dict[str, Any]:
    """What calibration.json holds: the choices on all folds, and metrics.

    balanced_accuracy, sensitivity, specificity, auc and the intervals of the first and last: leave-one-fold-out, None
        where that is not possible
    same_crops: the same metrics of the choices on the crops that they were chosen on
    Raises UserError where all crops are of one class.
    """
    if not oof.both_classes:
        raise UserError(
            f"found {len(oof.labels)} crops, {oof.labels.sum()} of them atypical; calibration needs both classes; "
            "fit on more data"
        )
    chosen, left = choose(oof), leave_one_fold_out(oof)
    p = calibrated(oof.logits, chosen)
    views = oof.logits[: TTA_VIEWS[chosen["tta"]]]
    drawn = [index for index in group_bootstrap(oof.groups, RESAMPLES) if len(np.unique(oof.labels[index])) == 2]
    cuts = [best_threshold(oof.labels[index], p[index])[0] for index in drawn] or [chosen["threshold"]]
    accuracies, aucs = resampled(oof, left) if left else ([], [])
    return {
        **chosen,
        "threshold_interval": np.quantile(cuts, [0.025, 0.975]).tolist(),
        **(metrics(oof.labels, left.p, left.called) if left else dict.fromkeys(METRICS)),
        "balanced_accuracy_interval": span(accuracies),
        "auc_interval": span(aucs),
        "same_crops": metrics(oof.labels, p, p >= chosen["threshold"]),
        "balanced_accuracy_at_half": balanced_accuracy(oof.labels, averaged(views, chosen["averaging"]) >= 0.5),
        "crops": len(p),
        "atypical": int(oof.labels.sum()),
    }


METRICS = ("balanced_accuracy", "sensitivity", "specificity", "auc")


def metrics(labels: np.ndarray, p: np.ndarray, called: np.ndarray) -> dict[str, float]:
    found = (balanced_accuracy(labels, called), sensitivity(labels, called), specificity(labels, called))
    return dict(zip(METRICS, (*found, roc_auc(labels, p)), strict=True))
