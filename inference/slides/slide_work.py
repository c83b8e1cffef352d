"""The objects of one slide: where they lie, and what earlier runs and this one answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import IO

from ..answers import Answer, Computed
from ..errors import UserError
from ..report.page import Picture
from .detections.packed import Source, Target, Targets
from .detections.targets import Complain
from .frames import placement
from .journal import Journal, key
from .part import Outcomes, Part
from .pyramid import check_inside
from .reader import Cutting, Slide


@dataclass
class Scored:
    """One slide's results, one per object, in the order of its files. title: what results call the slide."""

    slide: Slide
    title: str
    targets: Targets = field(default_factory=Targets)
    places: list[tuple[float, float]] = field(default_factory=list)  # level-0 pixels
    answers: list[Answer] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)  # for a report only
    refused: int = 0  # objects that have a place in a file and could not be scored


@dataclass(frozen=True)
class Placed:
    """An object with a place of its own: its number among the slide's objects, and its centre in level-0 pixels."""

    number: int
    centre: tuple[float, float]


def placed(
    slide: Slide, targets: Targets, origin: str | None, refuse: Callable[[int, Target, str], None]
) -> list[Placed]:
    """The objects in reading order, such that each tile is decoded once; of several in one place, only the first.

    Each other one is passed to `refuse` with its number and the reason; those outside the slide here already, and not
    where crops are read, for there may be a million.
    """
    taken: dict[tuple[float, float], int] = {}  # places, and the number of the object there
    objects = []
    source: Source | None = None
    for number, target in enumerate(targets):
        try:
            if target.source is not source:  # most have that of the one before
                source, where = target.source, placement(target.frame, slide, origin)
            x, y = where.on_slide(target.x, target.y)
            centre = round(x, 2) + 0.0, round(y, 2) + 0.0
            check_inside(slide.size, *centre)
            if centre in taken:
                raise UserError(f"it lies where {targets[taken[centre]].name} does; expected each figure once")
        except UserError as error:
            refuse(number, target, str(error))
            continue
        taken[centre] = number
        objects.append(Placed(number, centre))
    return sorted(objects, key=lambda item: (item.centre[1] // 1024, item.centre[0] // 1024))


@dataclass(frozen=True)
class Conditions:
    """What all slides of a run share.

    computed: what an answer depends on beside slide, place and cutting; complain: called with the names of objects that
    cannot be scored, and the reason; pictures: whether a report needs small pictures of the crops
    """

    cutting: Cutting
    computed: Computed
    journal: Journal
    complain: Complain
    pictures: bool


class SlideWork:
    """The objects of one slide that are to be scored, and what became of each so far.

    refused: for each target whether it cannot be scored
    objects: the others, in reading order; `answered` and `drawn` go by the position in it
    read: how many have an outcome of this run; new: how many of those were computed
    lost: the slide cannot be read to its end, so that none of them counts
    """

    def __init__(self, slide: Slide, title: str, targets: Targets, conditions: Conditions) -> None:
        """title: what results call the slide."""
        self.slide, self.title, self.targets, self.conditions = slide, title, targets, conditions
        cutting, known = conditions.cutting, conditions.journal.known
        self.refused = bytearray(len(targets))
        self.objects = placed(slide, targets, cutting.origin, self.refuse)
        self.depends = (slide.identity, cutting.side, slide.level, *conditions.computed)
        self.answered: dict[int, Answer] = {}
        self.drawn: dict[int, Picture] = {}
        self.read = self.new = 0
        self.lost = False
        if known:
            for n in range(len(self.objects)):
                if (answer := known.get(self.key(n))) is not None:
                    self.answered[n] = answer
        self.needed = len(self.objects) - (0 if conditions.pictures else len(self.answered))  # that have to be read

    @property
    def done(self) -> int:
        """How many of the targets are refused, known already, or read; all where the slide is lost."""
        return len(self.targets) - (0 if self.lost else self.needed - self.read)

    def refuse(self, number: int, target: Target, reason: str) -> None:
        """Name a target, and its number, that cannot be scored."""
        self.refused[number] = True
        self.conditions.complain([target.name], reason)

    def key(self, n: int) -> str:
        """The n-th object's in the journal."""
        return key(self.depends, self.objects[n].centre)

    def part(self, start: int, stop: int) -> Part:
        """The objects from `start` to `stop` (excluded) that still need an answer or a picture."""
        pictures, chosen = self.conditions.pictures, range(start, min(stop, len(self.objects)))
        known = frozenset(n for n in chosen if n in self.answered)
        numbers = [n for n in chosen if pictures or n not in known]
        places = [self.objects[n].centre for n in numbers]
        file, cutting = self.slide.file.absolute(), self.conditions.cutting
        return Part(file, self.slide.identity, cutting, numbers, places, known, pictures)

    def take(self, outcomes: Outcomes) -> None:
        """Keep the answers, in the journal too, and name what could not be scored."""
        fresh = []
        for n, outcome in outcomes:
            if isinstance(outcome, UserError):
                number = self.objects[n].number
                self.refuse(number, self.targets[number], str(outcome))
                self.answered.pop(n, None)
                continue
            answer, picture = outcome
            if answer is not None:
                self.answered[n] = answer
                fresh.append((self.key(n), answer))
            if picture is not None:
                self.drawn[n] = picture
        self.conditions.journal.add(fresh)
        self.read += len(outcomes)
        self.new += len(fresh)

    def scored(self) -> Scored:
        """The answers, in the order of the files."""
        result, name = Scored(self.slide, self.title, refused=sum(self.refused)), self.title
        numbers = sorted(self.answered, key=lambda n: self.objects[n].number)
        result.targets = self.targets.chosen(self.objects[n].number for n in numbers)
        for n in numbers:
            item = self.objects[n]
            result.places.append(item.centre)
            path = f"{name}/{item.centre[0]:.12g}_{item.centre[1]:.12g}"
            result.answers.append(replace(self.answered[n], path=path, domain=name))
            if n in self.drawn:
                result.pictures.append(self.drawn[n])
        return result


Answering = Iterator[tuple[SlideWork, Outcomes | UserError]]  # a UserError fails the whole slide


@dataclass(frozen=True)
class Scorer:
    """Where crops are scored: what computes them, the device's name, and a stream for lines on stderr.

    score: reads the given slides one after another, and yields the outcomes of their objects as they come
    """

    computed: Computed
    name: str
    stream: IO[str]
    score: Callable[[Iterable[SlideWork]], Answering]
