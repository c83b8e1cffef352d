"""Choose an ensemble's members and views, then its weights and kind of mean: one decision at a time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from inference.manifest import AVERAGING, TTA_VIEWS

from .calibrate import MINIMAL_GAIN
from .joint import MANY, Choice, Joint


def subsets(count: int) -> list[tuple[int, ...]]:
    """All non-empty sets of members, the small ones first."""
    return [chosen for size in range(1, count + 1) for chosen in itertools.combinations(range(count), size)]


def every_choice(count: int) -> Iterator[Choice]:
    """All sets of members with all views of each; with many members, only with the same views for all."""
    for members in subsets(count):
        each = (
            itertools.product(TTA_VIEWS, repeat=len(members))
            if count <= MANY
            else ((tta,) * len(members) for tta in TTA_VIEWS)
        )
        for tta in each:
            yield Choice(members, tuple(tta))


@dataclass(frozen=True)
class Step:
    """One decision: what was tried, the leave-one-fold-out AUC with and without it, and whether it was taken."""

    what: str
    auc: float
    before: float
    taken: bool

    def __str__(self) -> str:
        verdict = "taken" if self.taken else "left"
        return f"{self.what}: AUC {self.auc:.4f}, {self.auc - self.before:+.4f}: {verdict}"


def simplify(joint: Joint, start: Choice, names: Sequence[str]) -> tuple[Choice, list[Step]]:
    """Leave out members, then views, one at a time, cheapest first, while that costs less AUC than MINIMAL_GAIN.

    A gain below MINIMAL_GAIN does not justify the time of a member or of more views.
    """
    choice, steps = start, []
    while len(choice.members) > 1:
        rest = [without(choice, place) for place in range(len(choice.members))]
        best = max(range(len(rest)), key=lambda place: joint.auc(rest[place]))
        taken = joint.auc(rest[best]) > joint.auc(choice) - MINIMAL_GAIN
        what = f"without {names[choice.members[best]]}"
        steps.append(Step(what, joint.auc(rest[best]), joint.auc(choice), taken))
        if not taken:
            break
        choice = rest[best]
    for place, member in enumerate(choice.members):
        for tta in TTA_VIEWS:  # the fewest first
            if TTA_VIEWS[tta] >= TTA_VIEWS[choice.tta[place]]:
                break
            views = (*choice.tta[:place], tta, *choice.tta[place + 1 :])
            fewer = dataclasses.replace(choice, tta=views)
            taken = joint.auc(fewer) > joint.auc(choice) - MINIMAL_GAIN
            what = f"{names[member]} with {TTA_VIEWS[tta]} of {TTA_VIEWS[choice.tta[place]]} views"
            steps.append(Step(what, joint.auc(fewer), joint.auc(choice), taken))
            if taken:
                choice = fewer
                break
    return choice, steps


def refine(joint: Joint, choice: Choice) -> tuple[Choice, list[Step]]:
    """Another averaging, and other weights, where the AUC rises by more than MINIMAL_GAIN: neither costs seconds."""
    steps = []
    for averaging in AVERAGING[1:]:
        other = dataclasses.replace(choice, averaging=averaging)
        taken = joint.auc(other) > joint.auc(choice) + MINIMAL_GAIN
        steps.append(Step(f"mean {averaging} for mean {choice.averaging}", joint.auc(other), joint.auc(choice), taken))
        choice = other if taken else choice
    if len(choice.members) > 1:
        other = joint.weighted(choice)
        taken = joint.auc(other) > joint.auc(choice) + MINIMAL_GAIN
        what = f"weights {', '.join(f'{weight:.2f}' for weight in other.shares)} for equal ones"
        steps.append(Step(what, joint.auc(other), joint.auc(choice), taken))
        choice = other if taken else choice
    return choice, steps


def without(choice: Choice, place: int) -> Choice:
    """`choice` without the member at `place`."""
    cut = lambda values: (*values[:place], *values[place + 1 :])  # noqa: E731
    return dataclasses.replace(choice, members=cut(choice.members), tta=cut(choice.tta))
