"""Choose an ensemble's members, views, weights and averaging by scores that leave one fold out.

No crop is scored by anything that was chosen or fitted on it: a candidate's temperature and shift, the members' weights
and the threshold are fitted on the other folds, and the fold left out is scored with them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from inference.averaging import average
from inference.manifest import TTA_VIEWS
from inference.metrics import balanced_accuracy, group_bootstrap, roc_auc

from .calibrate import RESAMPLES, fit_scale, smooth_threshold

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
    """Leave-one-fold-out scores: AUC is the mean of the folds' own; p (N,) and called (N,) of every crop."""

    auc: float
    balanced_accuracy: float
    p: np.ndarray
    called: np.ndarray


@dataclass(frozen=True)
class Calibration:
    """heads: (temperature, shift) of each member, for (logit + shift) / temperature in its heads; then of the whole.

    aucs: out-of-fold AUC of each member alone, with `heads`
    """

    heads: list[tuple[float, float]]
    temperature: float
    threshold: float
    aucs: list[float]

    @classmethod
    def plain(cls, members: int) -> Calibration:
        """No calibration, for measuring members as they are."""
        return cls([(1.0, 0.0)] * members, 1.0, 0.5, [])


@dataclass
class Joint:
    """Logits (8, N) of each candidate; labels, groups and folds (N,) that all share."""

    logits: Sequence[np.ndarray]
    labels: np.ndarray
    groups: np.ndarray
    folds: np.ndarray
    _scales: dict[tuple[int, str, str, int | None], tuple[float, float]] = field(default_factory=dict)
    _aucs: dict[Choice, float] = field(default_factory=dict)

    def scale(self, member: int, tta: str, averaging: str, left: int | None) -> tuple[float, float]:
        """(temperature, shift) of one member alone, fitted without the crops of fold `left` (None: on all).

        It makes the members' logits comparable before they are averaged, whatever class weights they trained with.
        """
        key = member, tta, averaging, left
        if key not in self._scales:
            used = self.folds != left if left is not None else np.ones(len(self.folds), bool)
            views = self.logits[member][: TTA_VIEWS[tta], used]
            self._scales[key] = fit_scale(views, self.labels[used], averaging)
        return self._scales[key]

    def scaled(self, choice: Choice, left: int | None = None) -> list[np.ndarray]:
        """Each member's logits (1, V, N) as its calibrated head will give them."""
        found = []
        for member, tta in zip(choice.members, choice.tta, strict=True):
            temperature, shift = self.scale(member, tta, choice.averaging, left)
            found.append((self.logits[member][None, : TTA_VIEWS[tta]] + shift) / temperature)
        return found

    def mean(self, choice: Choice, left: int | None = None) -> np.ndarray:
        """P(atypical) (N,) of the mean, at temperature 1."""
        return average(self.scaled(choice, left), choice.averaging, 1.0, choice.shares)

    @cached_property
    def numbers(self) -> list[int]:
        """The folds that can be left out: those with both classes in them and in the other folds."""
        both = lambda chosen: len(np.unique(self.labels[chosen])) == 2  # noqa: E731
        return [int(k) for k in np.unique(self.folds) if both(self.folds == k) and both(self.folds != k)]

    def without(self, choice: Choice, left: int) -> np.ndarray:
        """P(atypical) (N,) of the mean, with everything (weights too) fitted or chosen for it without fold `left`."""
        return self.mean(self.weighted(choice, left) if choice.weights else choice, left)

    def auc(self, choice: Choice) -> float:
        """Leave-one-fold-out AUC, the mean of the folds' own."""
        if choice not in self._aucs:
            lefts = {k: self.folds == k for k in self.numbers}
            found = [roc_auc(self.labels[left], self.without(choice, k)[left]) for k, left in lefts.items()]
            self._aucs[choice] = float(np.mean(found))
        return self._aucs[choice]

    def weighted(self, choice: Choice, left: int | None = None) -> Choice:
        """`choice` with the weights of the highest AUC on the crops outside of fold `left` (None: on all).

        Among equally good weights, those nearest to equal.
        """
        used = self.folds != left if left is not None else np.ones(len(self.folds), bool)
        scaled = [z[:, :, used] for z in self.scaled(choice, left)]
        of = PARTS if len(scaled) <= MANY else PARTS_OF_MANY
        best, highest = choice, -1.0
        for parts in sorted(itertools.product(of, repeat=len(scaled)), key=lambda parts: np.ptp(parts) / sum(parts)):
            weights = tuple(part / sum(parts) for part in parts)
            auc = roc_auc(self.labels[used], average(scaled, choice.averaging, 1.0, weights))
            if auc > highest + 1e-9:
                best, highest = dataclasses.replace(choice, weights=weights), auc
        return best

    def calibrate(self, choice: Choice) -> Calibration:
        """The shipped calibration, fitted on all folds: temperature, shift and threshold of the mean, not of members.

        The mean's shift goes into the members' heads, after their own.
        """
        scaled = self.scaled(choice)
        temperature, shift = fit_mean(scaled, self.labels, choice.averaging, choice.shares)
        heads = []
        for member, tta in zip(choice.members, choice.tta, strict=True):
            own, own_shift = self.scale(member, tta, choice.averaging, None)
            heads.append((own, own_shift + own * shift))
        shifted = [z + shift for z in scaled]
        p = average(shifted, choice.averaging, temperature, choice.shares)
        aucs = [roc_auc(self.labels, average([z], choice.averaging, temperature)) for z in shifted]
        return Calibration(heads, temperature, smooth_threshold(self.labels, p, self.groups), aucs)

    def score(self, choice: Choice) -> Score:
        """Scores of a choice; each fold's threshold comes from the other folds."""
        p, called = np.full(len(self.labels), np.nan), np.zeros(len(self.labels), bool)
        for k in self.numbers:
            left, all_p = self.folds == k, self.without(choice, k)
            p[left] = all_p[left]
            called[left] = p[left] >= smooth_threshold(self.labels[~left], all_p[~left], self.groups[~left])
        scored = np.isfinite(p)
        return Score(self.auc(choice), balanced_accuracy(self.labels[scored], called[scored]), p, called)

    def interval(self, score: Score) -> tuple[float, float]:
        """95% interval of a balanced accuracy, by a bootstrap over groups (slides); NaN if there are too few."""
        found = [balanced_accuracy(self.labels[i], score.called[i]) for i in self._resamples]
        usable = [value for value in found if np.isfinite(value)]
        if len(usable) < RESAMPLES / 2:
            return float("nan"), float("nan")
        low, high = np.quantile(usable, [0.025, 0.975])
        return float(low), float(high)

    @cached_property
    def _resamples(self) -> list[np.ndarray]:
        kept = np.isin(self.folds, self.numbers)
        return [index[kept[index]] for index in group_bootstrap(self.groups, RESAMPLES)]


def fit_mean(
    scaled: Sequence[np.ndarray], labels: np.ndarray, averaging: str, shares: Sequence[float]
) -> tuple[float, float]:
    """(temperature, shift) of the mean of members' logits (1, V, N) with the least negative log-likelihood."""
    from scipy.optimize import minimize

    def loss(x: np.ndarray) -> float:
        p = average([z + x[1] for z in scaled], averaging, float(np.exp(x[0])), shares)
        p = np.clip(p, 1e-7, 1 - 1e-7)
        return -float(np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p)))

    found = minimize(loss, [0.0, 0.0], method="Nelder-Mead", bounds=[(np.log(0.1), np.log(10)), (-10, 10)])
    return float(np.exp(found.x[0])), float(found.x[1])
