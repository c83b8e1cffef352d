"""Members' out-of-fold logits together, and the one definition of an ensemble's scores: nested, leaving one fold out.

No crop is scored by anything that it took part in: members, views, the kind of mean, weights, temperatures, shifts and
the threshold are chosen and fitted on the other folds. Every metric is of all crops pooled, each with the answer and
the call of its own fold's turn. Intervals are from resampled groups (slides), whose crops are not independent; each
resample chooses its thresholds again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from inference.averaging import average
from inference.errors import UserError
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

from .domains import DomainLogits, best_cut, cut_for_unseen
from .scaling import Correction, Scale, fit_scale, log_odds, smooth_threshold

METRICS = ("balanced_accuracy", "sensitivity", "specificity", "auc")
RESAMPLES = 500
PARTS = (1, 2, 3)  # a member's weight is proportional to one of these
PARTS_OF_MANY, MANY = (1, 2), 4  # for more than MANY members


@dataclass(frozen=True)
class Choice:
    """Members by number, the views of each, the kind of mean, their weights (None: equal)."""

    members: tuple[int, ...]
    tta: tuple[str, ...]
    averaging: str = "logit"
    weights: tuple[float, ...] | None = None

    @property
    def shares(self) -> tuple[float, ...]:
        return self.weights or (1 / len(self.members),) * len(self.members)


@dataclass(frozen=True)
class Score:
    """Nested scores.

    p, called: each crop's answer (N,), NaN where its fold cannot be left out, and whether it is called atypical
    metrics: by the names of METRICS; intervals: 95% of each, None where too few resamples have both classes
    """

    p: np.ndarray
    called: np.ndarray
    metrics: dict[str, float]
    intervals: dict[str, list[float] | None]


@dataclass(frozen=True)
class Calibration:
    """What is shipped, fitted on all folds.

    heads: of each member, for its heads; temperature, threshold: of the mean
    threshold_interval: 95% of the best cuts of resampled slides; p: answers (N,) on the crops that it was fitted on
    aucs: of each member alone on these crops
    """

    heads: list[Scale]
    temperature: float
    threshold: float
    threshold_interval: list[float]
    p: np.ndarray
    aucs: list[float]

    def corrected(self, correction: Correction) -> Calibration:
        """The calibration of what is shipped, where this one is of single folds."""
        heads = [own._replace(shift=own.shift + own.temperature * correction.scale.shift) for own in self.heads]
        return dataclasses.replace(
            self, heads=heads, temperature=correction.scale.temperature, threshold=correction.threshold
        )

    def cut_at(self, cuts: np.ndarray) -> Calibration:
        """With the mean of `cuts` (R,) of the log-odds, each of a resample, as the threshold."""
        low, high = sigmoid(np.quantile(cuts, [0.025, 0.975])).tolist()
        threshold = float(sigmoid(np.array(cuts.mean())))
        return dataclasses.replace(self, threshold=threshold, threshold_interval=[low, high])

    @classmethod
    def plain(cls, members: int) -> Calibration:
        """No calibration, for measuring members as they are."""
        return cls([Scale(1.0, 0.0)] * members, 1.0, 0.5, [], np.empty(0), [])


@dataclass
class Joint:
    """Logits (V, N) of each candidate, V of its most views; labels, groups and folds (N,) that all share.

    domains (N,) and rule: the threshold serves the domains by a rule of `domains`; without, all crops together
    UserError where fewer than two folds can be left out.
    """

    logits: Sequence[np.ndarray]
    labels: np.ndarray
    groups: np.ndarray
    folds: np.ndarray
    domains: np.ndarray | None = None
    rule: str = ""
    _scales: dict[tuple[int, str, str, int | None], Scale] = field(default_factory=dict)
    _answers: dict[tuple[Choice, int | None], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.numbers) < 2:
            raise UserError(
                f"{int(self.labels.sum())} of {len(self.labels)} crops are atypical, and fewer than two folds can be "
                "left out; expected both classes in the other folds of two or more; fit on more data"
            )

    @cached_property
    def numbers(self) -> list[int]:
        """The folds that can be left out: those without which both classes are left."""
        return [int(k) for k in np.unique(self.folds) if len(np.unique(self.labels[self.folds != k])) == 2]

    @cached_property
    def scored(self) -> np.ndarray:
        """Mask (N,) of the crops that scores are of."""
        return np.isin(self.folds, self.numbers)

    def views(self, member: int) -> list[str]:
        """The views that a member's logits allow, the fewest first."""
        return [tta for tta, count in TTA_VIEWS.items() if count <= len(self.logits[member])]

    def used(self, left: int | None) -> np.ndarray:
        """Mask (N,) of all crops outside of fold `left`; None: of all."""
        return np.ones(len(self.folds), bool) if left is None else self.folds != left

    def scale(self, member: int, tta: str, averaging: str, left: int | None) -> Scale:
        """The scale of one member alone, fitted without the crops of fold `left`.

        It makes the members' logits comparable before they are averaged, whatever class weights they trained with.
        """
        key = member, tta, averaging, left
        if key not in self._scales:
            used = self.used(left)
            views = self.logits[member][None, : TTA_VIEWS[tta], used]
            self._scales[key] = fit_scale([views], self.labels[used], averaging)
        return self._scales[key]

    def scaled(self, choice: Choice, left: int | None = None) -> list[np.ndarray]:
        """Each member's logits (1, V, N) as its calibrated head will give them."""
        scaled = []
        for member, tta in zip(choice.members, choice.tta, strict=True):
            scale = self.scale(member, tta, choice.averaging, left)
            scaled.append((self.logits[member][None, : TTA_VIEWS[tta]] + scale.shift) / scale.temperature)
        return scaled

    def answers(self, choice: Choice, left: int | None) -> np.ndarray:
        """P(atypical) (N,) of all crops, with temperatures and shifts fitted without fold `left`."""
        if (choice, left) not in self._answers:
            used, scaled = self.used(left), self.scaled(choice, left)
            scale = fit_scale([z[:, :, used] for z in scaled], self.labels[used], choice.averaging, choice.shares)
            moved = [z + scale.shift for z in scaled]
            self._answers[choice, left] = average(moved, choice.averaging, scale.temperature, choice.shares)
        return self._answers[choice, left]

    def auc(self, choice: Choice, left: int | None = None) -> float:
        """The AUC of all crops outside of fold `left`, by which members, views and averaging are chosen for it."""
        used = self.used(left)
        return roc_auc(self.labels[used], self.answers(choice, left)[used])

    def weighted(self, choice: Choice, left: int | None = None) -> Choice:
        """`choice` with the weights of the highest AUC on the crops outside of fold `left`.

        Among equally good weights, those nearest to equal.
        """
        used = self.used(left)
        scaled = [z[:, :, used] for z in self.scaled(choice, left)]
        parts_of = PARTS if len(scaled) <= MANY else PARTS_OF_MANY
        sets = itertools.product(parts_of, repeat=len(scaled))
        best, highest = choice, -1.0
        for parts in sorted(sets, key=lambda parts: np.ptp(parts) / sum(parts)):
            weights = tuple(part / sum(parts) for part in parts)
            auc = roc_auc(self.labels[used], average(scaled, choice.averaging, 1.0, weights))
            if auc > highest + 1e-9:
                best, highest = dataclasses.replace(choice, weights=weights), auc
        return best

    def calibrate(self, choice: Choice) -> Calibration:
        """The shipped calibration: temperature, shift and threshold of the mean; its shift goes into the heads."""
        scaled = self.scaled(choice)
        whole = fit_scale(scaled, self.labels, choice.averaging, choice.shares)
        heads = []
        for member, tta in zip(choice.members, choice.tta, strict=True):
            own = self.scale(member, tta, choice.averaging, None)
            heads.append(own._replace(shift=own.shift + own.temperature * whole.shift))
        moved = [z + whole.shift for z in scaled]
        p = average(moved, choice.averaging, whole.temperature, choice.shares)
        drawn = [i for i in group_bootstrap(self.groups, RESAMPLES) if len(np.unique(self.labels[i])) == 2]
        threshold = self.threshold(p, np.arange(len(p)))
        cuts = [self.cut(p, i) for i in drawn] or [threshold]
        return Calibration(
            heads,
            whole.temperature,
            threshold,
            np.quantile(cuts, [0.025, 0.975]).tolist(),
            p,
            [roc_auc(self.labels, average([z], choice.averaging, whole.temperature)) for z in moved],
        )

    def threshold(self, p: np.ndarray, chosen: np.ndarray) -> float:
        """The threshold by the answers `p` (N,) to the crops with the numbers `chosen`; no slide moves it far."""
        if self.rule:
            return float(sigmoid(np.array(cut_for_unseen(self.by_domain(p, chosen), self.rule))))
        return smooth_threshold(self.labels[chosen], p[chosen], self.groups[chosen])

    def cut(self, p: np.ndarray, chosen: np.ndarray) -> float:
        """The threshold that is the best one for just these crops, of which some may be named twice."""
        if self.rule:
            return float(sigmoid(np.array(best_cut(self.by_domain(p, chosen), self.rule))))
        return best_threshold(self.labels[chosen], p[chosen])[0]

    def by_domain(self, p: np.ndarray, chosen: np.ndarray) -> DomainLogits:
        assert self.domains is not None
        return DomainLogits(log_odds(p[chosen]), self.labels[chosen], self.groups[chosen], self.domains[chosen])

    def score(self, choose: Callable[[int], Choice]) -> Score:
        """The nested scores of what `choose` chooses without a fold, given by number."""
        p, called = np.full(len(self.labels), np.nan), np.zeros(len(self.labels), bool)
        by_fold = {k: self.answers(choose(k), k) for k in self.numbers}
        for k, answers in by_fold.items():
            left = self.folds == k
            p[left] = answers[left]
            called[left] = p[left] >= self.threshold(answers, np.flatnonzero(~left))
        drawn = []
        for index in group_bootstrap(self.groups[self.scored], RESAMPLES):
            resample = np.flatnonzero(self.scored)[index]
            labels, folds, calls = self.labels[resample], self.folds[resample], np.zeros(len(resample), bool)
            if all(len(np.unique(labels[folds != k])) == 2 for k in (None, *np.unique(folds))):
                for k in np.unique(folds).tolist():
                    left, answers = folds == k, by_fold[k][resample]
                    calls[left] = answers[left] >= self.cut(by_fold[k], resample[~left])
                drawn.append(metrics(labels, p[resample], calls))
        enough = len(drawn) > RESAMPLES / 2
        intervals = {
            name: np.quantile([values[name] for values in drawn], [0.025, 0.975]).tolist() if enough else None
            for name in METRICS
        }
        return Score(p, called, metrics(self.labels[self.scored], p[self.scored], called[self.scored]), intervals)

    def describe(self, score: Score, split: dict[str, Any], chosen_on_same_scores: bool = False) -> dict[str, Any]:
        """Nested scores for a manifest, and what they are.

        split: the recipe's settings that made the folds; chosen_on_same_scores: whether members, views and averaging
            were chosen on all crops, instead of anew without each fold
        """
        labels = self.labels[self.scored]
        return {
            "nested": True,
            "split": split,
            "groups_whole": split.get("split") != "random",
            "chosen_on_same_scores": chosen_on_same_scores,
            "crops": len(labels),
            "atypical": int(labels.sum()),
            **score.metrics,
            **{f"{name}_interval": interval for name, interval in score.intervals.items()},
        }


def metrics(labels: np.ndarray, p: np.ndarray, called: np.ndarray) -> dict[str, float]:
    calls = (balanced_accuracy(labels, called), sensitivity(labels, called), specificity(labels, called))
    return dict(zip(METRICS, (*calls, roc_auc(labels, p)), strict=True))
