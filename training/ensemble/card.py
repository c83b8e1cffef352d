"""The results of `export`: as lines of its log, as provenance in the manifest and as the ensemble's card."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from inference.manifest import TTA_VIEWS

from .candidates import Candidate
from .domains import LeftOutDomain
from .joint import Calibration, Choice, Joint, Score
from .members import versions
from .scaling import Correction
from .selection import Step
from .stopwatch import CROPS
from .unseen import Unseen

TABLE = "every set of members: their most views, equal weights, mean logit; scores are nested"
DEFINITION = (
    "Scores are out of fold and nested: each crop is judged by the fold that did not train on it, with members, views, "
    "averaging, weights, temperature, shift and threshold chosen on the other folds, and all crops are pooled. "
    "Intervals (95%) are from resampled slides."
)


@dataclass(frozen=True)
class Row:
    """One ensemble of the table; seconds of a cold start with a stack, None where they were not measured."""

    choice: Choice
    score: Score
    seconds: float | None

    def name(self, names: Sequence[str]) -> str:
        return " + ".join(names[member] for member in self.choice.members)

    def cell(self, metric: str) -> str:
        interval = self.score.intervals[metric]
        span = f"({interval[0]:.4f} to {interval[1]:.4f})" if interval else "(no interval)"
        return f"{self.score.metrics[metric]:.4f} {span}"

    def is_chance(self) -> bool:
        """Whether the AUC's 95% interval includes 0.5."""
        interval = self.score.intervals["auc"]
        return interval is not None and interval[0] <= 0.5 <= interval[1]

    def describe(self, names: Sequence[str]) -> str:
        text = f"{self.name(names)}: AUC {self.cell('auc')}, balanced accuracy {self.cell('balanced_accuracy')}"
        return text if self.seconds is None else f"{text}, {self.seconds:.1f} seconds a stack"


@dataclass(frozen=True)
class Result:
    """All that led to one ensemble.

    rows: every set of members; steps: every decision; split: the settings that made the folds
    correction: of the calibration on the crops `unseen`, from single folds to the mean that answers
    domains: each with the threshold of the others, where the threshold serves domains
    """

    name: str
    candidates: Sequence[Candidate]
    rows: list[Row]
    steps: list[Step]
    shipped: Row
    calibration: Calibration
    correction: Correction | None
    domains: Sequence[LeftOutDomain]
    joint: Joint
    split: dict[str, Any] = field(default_factory=dict)
    averaged: bool = False
    budget: float | None = None
    unseen: Unseen | None = None

    @property
    def names(self) -> list[str]:
        return [candidate.name for candidate in self.candidates]


def provenance(result: Result) -> dict[str, Any]:
    """For the manifest: of each member its recipe, data and own AUC; scores of the whole; how it was chosen."""
    choice, members = result.shipped.choice, {}
    for number, auc in zip(choice.members, result.calibration.aucs, strict=True):
        member = result.candidates[number]
        members[member.name] = {"recipe": member.recipe, "data": member.data, "auc": auc}
    return {
        "members": members,
        "folds": "averaged" if result.averaged else "apart",
        "out_of_fold": result.joint.describe(result.shipped.score, result.split),
        "calibration": calibration_facts(result),
        "chosen": [str(step) for step in result.steps],
        "versions": versions(),
    }


def calibration_facts(result: Result) -> dict[str, Any]:
    """What temperature, shift and threshold belong to, and how they were corrected."""
    facts: dict[str, Any] = {"threshold_interval": result.calibration.threshold_interval}
    if result.domains:
        facts["threshold_rule"] = result.joint.rule
        facts["domains"] = [dataclasses.asdict(row) for row in result.domains]
    if result.correction is None or result.unseen is None:
        return {"of": "single folds, out of fold"} | facts
    names = ("mean", "standard deviation", "share atypical")
    return {
        "of": "the mean that answers",
        "unseen_crops": result.correction.crops,
        "unseen_sha256": result.unseen.sha256,
        "single_folds": dict(zip(names, result.correction.single, strict=True)),
        "before_correction": dict(zip(names, result.correction.shipped, strict=True)),
        **facts,
    }


def card(result: Result) -> str:
    """The README of the ensemble, in Markdown."""
    choice = result.shipped.choice
    leaky = " The split is random: slides lie on both sides of it, so these scores are too good."
    lines = [
        f"# {result.name}",
        "",
        f"{len(choice.members)} of {len(result.candidates)} members, made by `python -m training export`; folds "
        f"{'averaged to one adapter' if result.averaged else 'apart'}.",
        "",
        DEFINITION + (leaky if result.split.get("split") == "random" else f" Split: {result.split.get('split')}."),
        "",
        "| member | views | weight | AUC alone, not nested |",
        "|---|--:|--:|--:|",
    ]
    for number, tta, share, auc in zip(choice.members, choice.tta, choice.shares, result.calibration.aucs, strict=True):
        lines.append(f"| {result.names[number]} | {TTA_VIEWS[tta]} | {share:.3f} | {auc:.4f} |")
    lines += ["", calibration_text(result), "", *domain_lines(result)]
    if result.shipped.seconds is not None:
        lines += [
            f"{TABLE[0].upper()}{TABLE[1:]}; seconds of a cold start with {CROPS} crops on the machine that made it, "
            "each member's from jobs of all.",
            "",
        ]
    lines += ["| members | AUC | balanced accuracy | seconds a stack |", "|---|---|---|--:|"]
    for row, note in [*((row, "") for row in result.rows), (result.shipped, ", as shipped")]:
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        lines.append(
            f"| {row.name(result.names)}{note} | {row.cell('auc')} | {row.cell('balanced_accuracy')} | {seconds} |"
        )
    budget = f" within {result.budget:g} seconds" if result.budget else ""
    lines += ["", f"Choices{budget}, by out-of-fold AUC:", "", *(f"- {step}" for step in result.steps)]
    licences = {
        f"{member.entry['backbone']}: {member.entry['licence'].get('base', 'not known')}"
        for member in (result.candidates[number] for number in choice.members)
    }
    lines += ["", f"Licences of the bases: {', '.join(sorted(licences))}. Not a medical device.", ""]
    return "\n".join(lines)


def domain_lines(result: Result) -> list[str]:
    """What the threshold costs in each domain, where it serves domains."""
    if not result.domains:
        return []
    of = "the lowest balanced accuracy of any domain" if result.joint.rule == "worst" else "the domains' mean accuracy"
    lines = [
        f"The threshold maximises {of}, averaged over resampled slides; each domain counts once. Crops of the training "
        "data are scored out of fold, those that no fold has seen by the mean that answers. Balanced accuracy:",
        "",
        "| domain | crops | atypical | threshold of all | threshold of the other domains | own best cut |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in result.domains:
        scores = " | ".join(f"{score:.3f}" for score in (row.shipped, row.accuracy, row.best))
        lines.append(f"| {row.domain} | {row.crops:,} | {row.atypical:,} | {scores} |")
    names = ("shipped", "accuracy", "best")
    mean = " | ".join(f"{np.mean([getattr(row, name) for row in result.domains]):.3f}" for name in names)
    return [*lines, f"| mean | | | {mean} |", ""]


def calibration_text(result: Result) -> str:
    fitted = result.calibration
    text = f"Temperature {fitted.temperature:.4f} and threshold {fitted.threshold:.4f} are of "
    if result.correction is None:
        return text + (
            "single folds, out of fold. The mean of the folds answers, whose logits are less spread, so that it calls "
            "fewer crops atypical; `export --unseen CROPS` corrects that."
        )
    single, before = result.correction.single, result.correction.shipped
    return text + (
        f"the mean that answers: on {result.correction.crops:,} crops that no fold has seen, without their labels, it "
        f"keeps the log-odds' mean and standard deviation of single folds ({single[0]:.2f}, {single[1]:.2f}; "
        f"uncorrected {before[0]:.2f}, {before[1]:.2f}) and their share called atypical ({single[2]:.1%}; uncorrected "
        f"{before[2]:.1%})."
    )
