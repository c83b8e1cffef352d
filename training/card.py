"""The results of `combine`: as lines of its log, as provenance in the manifest and as the ensemble's card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inference.manifest import TTA_VIEWS
from inference.metrics import sensitivity, specificity

from .candidates import Candidate
from .joint import Calibration, Choice, Joint, Score
from .members import versions
from .selection import Step
from .stopwatch import CROPS

TABLE = "every set of members: 8 views, equal weights, mean logit; scores leave one fold out"


@dataclass(frozen=True)
class Row:
    """One ensemble of the table: interval of its balanced accuracy; seconds of a cold start with a stack."""

    choice: Choice
    score: Score
    interval: tuple[float, float]
    seconds: float

    def name(self, names: Sequence[str]) -> str:
        return " + ".join(names[member] for member in self.choice.members)

    def describe(self, names: Sequence[str]) -> str:
        return (
            f"{self.name(names)}: AUC {self.score.auc:.4f}, balanced accuracy {self.score.balanced_accuracy:.4f} "
            f"{span(self.interval)}, {self.seconds:.1f} seconds a stack"
        )


@dataclass(frozen=True)
class Result:
    """All that was found on the way to one ensemble."""

    name: str
    names: list[str]
    candidates: Sequence[Candidate]
    rows: list[Row]
    steps: list[Step]
    shipped: Row
    calibration: Calibration
    joint: Joint
    budget: float | None


def span(interval: tuple[float, float]) -> str:
    low, high = interval
    return "(no interval)" if math.isnan(low) else f"({low:.4f} to {high:.4f})"


def provenance(result: Result) -> dict[str, Any]:
    """For the manifest: of each member its recipe, data and own AUC; scores of the whole; how it was chosen."""
    choice, score = result.shipped.choice, result.shipped.score
    scored = [n for n, fold in enumerate(result.joint.folds) if fold in result.joint.numbers]
    labels, called = result.joint.labels[scored], score.called[scored]
    interval = None if math.isnan(result.shipped.interval[0]) else list(result.shipped.interval)
    members = {
        result.names[member]: {
            "recipe": result.candidates[member].settings,
            "data": result.candidates[member].data,
            "auc": auc,
        }
        for member, auc in zip(choice.members, result.calibration.aucs, strict=True)
    }
    return {
        "members": members,
        "out_of_fold": {
            "crops": len(labels),
            "atypical": int(labels.sum()),
            "balanced_accuracy": score.balanced_accuracy,
            "sensitivity": sensitivity(labels, called),
            "specificity": specificity(labels, called),
            "auc": score.auc,
            "balanced_accuracy_interval": interval,
        },
        "chosen": [str(step) for step in result.steps],
        "versions": versions(),
    }


def card(result: Result) -> str:
    """The README of the ensemble, in Markdown."""
    choice = result.shipped.choice
    lines = [
        f"# {result.name}",
        "",
        f"{len(choice.members)} of {len(result.names)} members, made by `python -m training combine`.",
        "",
        "Scores are out of fold: each crop is judged by the fold that did not train on it, with temperature, weights "
        "and threshold from the other folds. AUC is the mean of the folds' own; the intervals of balanced accuracy "
        "(95%) are from resampled slides. Members, views and averaging were chosen on the same scores, which flatters "
        "them a little.",
        "",
        "| member | views | weight | AUC alone |",
        "|---|--:|--:|--:|",
    ]
    for member, tta, share, auc in zip(choice.members, choice.tta, choice.shares, result.calibration.aucs, strict=True):
        lines.append(f"| {result.names[member]} | {TTA_VIEWS[tta]} | {share:.3f} | {auc:.4f} |")
    heading = TABLE[0].upper() + TABLE[1:]
    lines += [
        "",
        f"{heading}; seconds of a cold start with {CROPS} crops on the machine that "
        "made it, each member's from jobs of all.",
        "",
    ]
    lines += ["| members | AUC | balanced accuracy | seconds a stack |", "|---|--:|---|--:|"]
    for row, note in [*((row, "") for row in result.rows), (result.shipped, ", as shipped")]:
        lines.append(
            f"| {row.name(result.names)}{note} | {row.score.auc:.4f} | {row.score.balanced_accuracy:.4f} "
            f"{span(row.interval)} | {row.seconds:.1f} |"
        )
    budget = f" within {result.budget:g} seconds" if result.budget else ""
    lines += ["", f"Choices{budget}, by leave-one-fold-out AUC:", "", *(f"- {step}" for step in result.steps)]
    licences = {
        f"{one.entry['backbone']}: {one.entry['licence'].get('base', 'not known')}"
        for one in (result.candidates[member] for member in choice.members)
    }
    lines += ["", f"Licences of the bases: {', '.join(sorted(licences))}.", ""]
    return "\n".join(lines)
