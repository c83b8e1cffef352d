"""Choose an ensemble's members and views, then its weights and kind of mean: one decision at a time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from inference.manifest import AVERAGING, TTA_VIEWS

from .joint import MANY, Choice, Joint
from .stopwatch import Seconds

MINIMAL_GAIN = 5e-4  # in AUC: a smaller gain does not pay for more members or views


def subsets(count: int) -> list[tuple[int, ...]]:
    """All non-empty sets of members, the small ones first."""
    return [chosen for size in range(1, count + 1) for chosen in itertools.combinations(range(count), size)]


def every_choice(joint: Joint) -> Iterator[Choice]:
    """All sets of members with all views of each; with many members, only with the same views for all."""
    count = len(joint.logits)
    for members in subsets(count):
        views = [joint.views(member) for member in members]
        shared = [tta for tta in TTA_VIEWS if all(tta in each for each in views)]
        for tta in itertools.product(*views) if count <= MANY else ((tta,) * len(members) for tta in shared):
            yield Choice(members, tuple(tta))


def everything(joint: Joint) -> Choice:
    """All members with their most views, equal weights and the mean logit."""
    members = tuple(range(len(joint.logits)))
    return Choice(members, tuple(joint.views(member)[-1] for member in members))


def choose(joint: Joint, names: Sequence[str], left: int | None = None) -> tuple[Choice, list[Step]]:
    """Members and views, then averaging and weights, with every decision on the way; chosen without fold `left`."""
    choice, simpler = simplify(joint, everything(joint), names, left)
    choice, refined = refine(joint, choice, left)
    return choice, simpler + refined


def choose_within(
    joint: Joint, names: Sequence[str], affordable: Sequence[Choice], seconds: Seconds, left: int | None = None
) -> tuple[Choice, list[Step]]:
    """The fastest of the best among `affordable`, which is not empty, then averaging and weights."""
    aucs = [joint.auc(choice, left) for choice in affordable]
    best = min((c for c, auc in zip(affordable, aucs, strict=True) if auc > max(aucs) - MINIMAL_GAIN), key=seconds.of)
    choice, refined = refine(joint, best, left)
    views = ", ".join(
        f"{names[m]} with {TTA_VIEWS[tta]} of {len(joint.logits[m])} views"
        for m, tta in zip(best.members, best.tta, strict=True)
    )
    text = f"{views}, of {len(affordable)} choices within the budget"
    return choice, [Step(text, joint.auc(best, left), max(aucs), True), *refined]


@dataclass(frozen=True)
class Step:
    """One decision: what was tried, the out-of-fold AUC with and without it, and whether it was taken."""

    text: str
    auc: float
    before: float
    taken: bool

    def __str__(self) -> str:
        verdict = "taken" if self.taken else "left"
        return f"{self.text}: AUC {self.auc:.4f}, {self.auc - self.before:+.4f}: {verdict}"


def simplify(joint: Joint, start: Choice, names: Sequence[str], left: int | None = None) -> tuple[Choice, list[Step]]:
    """Leave out members, then views, one at a time, cheapest first, while that costs less AUC than MINIMAL_GAIN.

    A gain below MINIMAL_GAIN does not justify the time of a member or of more views.
    """
    auc = lambda choice: joint.auc(choice, left)  # noqa: E731
    choice, steps = start, []
    while len(choice.members) > 1:
        smaller = [without(choice, position) for position in range(len(choice.members))]
        best = max(range(len(smaller)), key=lambda position: auc(smaller[position]))
        taken = auc(smaller[best]) > auc(choice) - MINIMAL_GAIN
        text = f"without {names[choice.members[best]]}"
        steps.append(Step(text, auc(smaller[best]), auc(choice), taken))
        if not taken:
            break
        choice = smaller[best]
    for position, member in enumerate(choice.members):
        for tta in TTA_VIEWS:  # the fewest first
            if TTA_VIEWS[tta] >= TTA_VIEWS[choice.tta[position]]:
                break
            views = (*choice.tta[:position], tta, *choice.tta[position + 1 :])
            fewer = dataclasses.replace(choice, tta=views)
            taken = auc(fewer) > auc(choice) - MINIMAL_GAIN
            text = f"{names[member]} with {TTA_VIEWS[tta]} of {TTA_VIEWS[choice.tta[position]]} views"
            steps.append(Step(text, auc(fewer), auc(choice), taken))
            if taken:
                choice = fewer
                break
    return choice, steps


def refine(joint: Joint, choice: Choice, left: int | None = None) -> tuple[Choice, list[Step]]:
    """Another averaging, and other weights, where the AUC rises by more than MINIMAL_GAIN: neither costs seconds."""
    auc = lambda choice: joint.auc(choice, left)  # noqa: E731
    steps = []
    for averaging in AVERAGING[1:]:
        other = dataclasses.replace(choice, averaging=averaging)
        taken = auc(other) > auc(choice) + MINIMAL_GAIN
        steps.append(Step(f"mean {averaging} for mean {choice.averaging}", auc(other), auc(choice), taken))
        choice = other if taken else choice
    if len(choice.members) > 1:
        other = joint.weighted(choice, left)
        taken = auc(other) > auc(choice) + MINIMAL_GAIN
        text = f"weights {', '.join(f'{weight:.2f}' for weight in other.shares)} for equal ones"
        steps.append(Step(text, auc(other), auc(choice), taken))
        choice = other if taken else choice
    return choice, steps


def without(choice: Choice, position: int) -> Choice:
    """`choice` without the member at `position`."""
    cut = lambda values: (*values[:position], *values[position + 1 :])  # noqa: E731
    return dataclasses.replace(choice, members=cut(choice.members), tta=cut(choice.tta))
