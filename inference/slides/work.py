"""The objects of one slide: where they lie, and what earlier runs and this one answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ..answers import Answer
from ..errors import UserError
from ..report.page import Picture
from .journal import Answered, Journal, key
from .reader import Slide
from .scoring import Cutting, Outcomes, Part
from .targets import Complain, Target


@dataclass
class Scored:
    """One slide's results, one per object, in the order of its files. title: what results call the slide."""

    file: Path
    title: str
    slide: Slide
    targets: list[Target] = field(default_factory=list)
    places: list[tuple[float, float]] = field(default_factory=list)  # level-0 pixels
    answers: list[Answer] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)  # for a report only


def to_level_0(target: Target, slide: Slide, origin: str | None) -> tuple[float, float]:
    """An object's centre as OpenSlide counts, to a hundredth of a pixel."""
    factor = scale(target.magnification, slide)
    offset = slide.scanned_from() if origin == "scan" else (0.0, 0.0)
    return round(target.x * factor + offset[0], 2) + 0.0, round(target.y * factor + offset[1], 2) + 0.0


def scale(magnification: float | None, slide: Slide) -> float:
    """Level-0 pixels per pixel of coordinates at a magnification; None: they count level 0's."""
    if magnification is None:
        return 1.0
    try:
        power = float(slide.slide.properties["openslide.objective-power"])
    except (KeyError, ValueError):
        power = 0.0
    if not (power > 0 and magnification > 0):
        raise UserError(
            f"its file counts pixels at {magnification:g}x, and the slide states no magnification; "
            "expected one; give the coordinates in level-0 pixels"
        )
    return power / magnification


def check_origin(slide: Slide, origin: str | None) -> None:
    """UserError where the origin of the coordinates matters but was not given."""
    x, y = slide.scanned_from()
    if origin is None and (x, y) != (0, 0):
        raise UserError(
            f"its scanned area begins at {x:g}, {y:g}; QuPath counts from there, other programs from the slide's "
            "corner; expected to know which; give --origin scan (QuPath) or --origin slide"
        )


def placed(
    slide: Slide, targets: Sequence[Target], origin: str | None, complain: Complain
) -> Iterator[tuple[int, tuple[float, float]]]:
    """The number and the place of each object; of several in one place, only of the first."""
    first: dict[tuple[float, float], str] = {}
    for n, target in enumerate(targets):
        try:
            place = to_level_0(target, slide, origin)
            if place in first:
                raise UserError(f"it lies where {first[place]} does; expected each figure once")
        except UserError as error:
            complain(target.name, str(error))
            continue
        first[place] = target.name
        yield n, place


Answering = Iterator[tuple["Work", Outcomes | UserError]]  # a UserError fails the whole slide


@dataclass(frozen=True)
class Scorer:
    """Where crops are scored: device (cpu or cuda), precision, the device's name, and a stream for lines on stderr.

    score: opens the given slides one after another, and yields the outcomes of their objects as they come
    """

    device: str
    precision: str
    name: str
    stream: IO[str]
    score: Callable[[Iterable[Work]], Answering]


class Work:
    """UserError where the slide cannot be read. about: what else an answer depends on, beside slide and place."""

    def __init__(
        self,
        file: Path,
        title: str,
        targets: Sequence[Target],
        cutting: Cutting,
        about: Sequence[str],
        journal: Journal,
        complain: Complain,
        pictures: bool,
    ) -> None:
        self.file, self.title, self.targets, self.cutting = file, title, targets, cutting
        self.journal, self.complain, self.pictures = journal, complain, pictures
        self.slide = Slide(file, cutting.mpp, cutting.slide_mpp)
        check_origin(self.slide, cutting.origin)
        found = list(placed(self.slide, targets, cutting.origin, complain))
        found.sort(key=lambda one: (one[1][1] // 1024, one[1][0] // 1024))  # so that each tile is decoded once
        self.found = found  # (number of the target, place), in reading order
        self.about = (self.slide.identity, cutting.side, self.slide.level, *about)
        self.answered: dict[int, Answered] = {}  # by position in reading order, as everything below
        self.drawn: dict[int, Picture] = {}
        self.read = self.new = 0  # objects with an outcome, and those with a new answer
        self.lost = False  # the slide cannot be read to its end: none of its objects count
        if journal.known:
            for n in range(len(found)):
                if (answer := journal.known.get(self.key(n))) is not None:
                    self.answered[n] = answer

    def key(self, n: int) -> str:
        return key(self.about, self.found[n][1])

    def part(self, start: int, stop: int) -> Part:
        """The objects from `start` to `stop` (excluded) that still need an answer or a picture."""
        some = range(start, min(stop, len(self.found)))
        known = frozenset(n for n in some if n in self.answered)
        numbers = [n for n in some if self.pictures or n not in known]
        places = [self.found[n][1] for n in numbers]
        return Part(self.file.absolute(), self.slide.identity, self.cutting, numbers, places, known, self.pictures)

    def take(self, outcomes: Outcomes) -> None:
        """Keep the answers, in the journal too, and name what could not be scored."""
        fresh = []
        for n, outcome in outcomes:
            if isinstance(outcome, UserError):
                self.complain(self.targets[self.found[n][0]].name, str(outcome))
                self.answered.pop(n, None)
                continue
            answer, picture = outcome
            if answer is not None:
                self.answered[n] = answer
                fresh.append((self.key(n), answer))
            if picture is not None:
                self.drawn[n] = picture
        self.journal.add(fresh)
        self.read += len(outcomes)
        self.new += len(fresh)

    def scored(self) -> Scored:
        """The answers, in the order of the files."""
        result, name = Scored(self.file, self.title, self.slide), self.title
        for n in sorted(self.answered, key=lambda n: self.found[n][0]):
            target, place = self.found[n]
            result.targets.append(self.targets[target])
            result.places.append(place)
            path = f"{name}/{place[0]:.12g}_{place[1]:.12g}"
            result.answers.append(Answer(path, 0, *self.answered[n], domain=name))
            if n in self.drawn:
                result.pictures.append(self.drawn[n])
        return result
