"""How a run's logits become answers, chosen out of fold: views, averaging, temperature, shift, threshold.

What is shipped is chosen on all folds; scores are nested, as `joint` defines them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from inference.averaging import average
from inference.commandline import DEVICES
from inference.errors import UserError
from inference.files import write_whole
from inference.manifest import AVERAGING, TTA_VIEWS, ensemble_folder, holds_ensemble
from inference.metrics import balanced_accuracy

from ..run import OutOfFold, RunFolder
from .joint import METRICS, Choice, Joint, Score, metrics
from .selection import choose


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=ensemble_folder, metavar="RUN_OR_ENSEMBLE", help="a finished run's folder, or an ensemble's"
    )
    help_ = "for an ensemble: data sets with labels that it has not seen, as 'fit --data' takes them; repeatable"
    parser.add_argument("--data", type=Path, action="append", default=[], metavar="CROPS", help=help_)
    parser.add_argument("--ungrouped", action="store_true", help="crops without a slide may each count as one")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="for an ensemble (default auto)")


def run(options: argparse.Namespace) -> None:
    if holds_ensemble(options.run):
        if not options.data:
            raise UserError(f"{options.run} is an ensemble; expected crops that it has not seen; add --data CROPS")
        from .heldout import calibrate_on, describe_scores

        facts = calibrate_on(options.run, options.data, options.device, options.ungrouped)
        print(f"{options.run}: {describe_scores(facts)}")
        return
    if options.data:
        raise UserError(f"{options.run} is no ensemble; expected one for --data; a run is calibrated out of fold")
    result = calibrate(RunFolder(options.run).out_of_fold())
    write_whole(options.run / "calibration.json", json.dumps(result, indent=1) + "\n")
    for tta, by_rule in result["tried"].items():
        print(f"{tta:>5}: " + ", ".join(f"{rule} AUC {auc:.4f}" for rule, auc in by_rule.items()))
    low, high = result["threshold_interval"]
    print(
        f"chosen: tta {result['tta']}, averaging {result['averaging']}, temperature {result['temperature']:.3f}, "
        f"shift {result['shift']:+.3f}, threshold {result['threshold']:.3f} (95% {low:.3f} to {high:.3f})"
    )
    if result["bounded"]:
        print("warning: the temperature ended at a bound: these logits hardly depend on the labels, or separate them")
    print(f"leave one fold out: {describe(result)}")
    same = result["same_crops"]
    print(
        f"on the crops that chose it, and so too good: balanced accuracy {same['balanced_accuracy']:.4f}, "
        f"AUC {same['auc']:.4f}"
    )


def describe(scores: dict[str, Any]) -> str:
    """Nested balanced accuracy and AUC in one line, with their intervals."""
    text = []
    for key, name in (("balanced_accuracy", "balanced accuracy"), ("auc", "AUC")):
        text.append(f"{name} {scores[key]:.4f}")
        if scores[f"{key}_interval"]:
            low, high = scores[f"{key}_interval"]
            text[-1] += f" (95% {low:.4f} to {high:.4f})"
    return ", ".join(text)


def averaged(logits: np.ndarray, averaging: str, temperature: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """P(atypical) (N,) from the views' logits (V, N), by the rule of inference."""
    return average([logits[None] + shift], averaging, temperature)


def calibrated(logits: np.ndarray, chosen: dict[str, Any]) -> np.ndarray:
    """P(atypical) (N,) from the views' logits (V, N) by what `calibrate` chose."""
    views = logits[: TTA_VIEWS[chosen["tta"]]]
    return averaged(views, chosen["averaging"], chosen["temperature"], chosen["shift"])


def of_one(oof: OutOfFold) -> Joint:
    """A run's logits as an ensemble of one member."""
    return Joint([oof.logits], oof.labels, oof.groups, oof.folds)


def leave_one_fold_out(oof: OutOfFold) -> Score:
    """A run's nested scores, with the answer and the call of every crop."""
    joint = of_one(oof)
    return joint.score(lambda left: choose(joint, [""], left)[0])


def calibrate(oof: OutOfFold) -> dict[str, Any]:
    """What calibration.json holds: the choices on all folds, and scores.

    balanced_accuracy, sensitivity, specificity, auc and their intervals: nested
    same_crops: the same metrics of the choices on the crops that they were chosen on
    Raises UserError where fewer than two folds can be left out.
    """
    joint = of_one(oof)
    choice, _ = choose(joint, [""])
    fitted, score = joint.calibrate(choice), leave_one_fold_out(oof)
    [head], [tta] = fitted.heads, choice.tta
    return {
        "tta": tta,
        "averaging": choice.averaging,
        "temperature": head.temperature * fitted.temperature,
        "shift": head.shift,
        "bounded": head.bounded,
        "threshold": fitted.threshold,
        "threshold_interval": fitted.threshold_interval,
        "tried": {tta: {rule: joint.auc(Choice((0,), (tta,), rule)) for rule in AVERAGING} for tta in joint.views(0)},
        **score.metrics,
        **{f"{name}_interval": score.intervals[name] for name in METRICS},
        "same_crops": metrics(oof.labels, fitted.p, fitted.p >= fitted.threshold),
        "balanced_accuracy_at_half": balanced_accuracy(
            oof.labels, averaged(oof.logits[: TTA_VIEWS[tta]], choice.averaging) >= 0.5
        ),
        "crops": int(joint.scored.sum()),
        "atypical": int(oof.labels[joint.scored].sum()),
    }
