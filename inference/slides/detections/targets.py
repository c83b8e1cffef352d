"""From files with detections to the objects of each slide: which slide, which class, and where the centre lies."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError
from .formats import Contents, read_file
from .geometry import centre
from .objects import Frame, SlideObject, class_name
from .packed import Source, Targets
from .pairing import Slides

Complain = Callable[..., None]  # (names of objects, why they are not scored, False if they are not objects to score)


@dataclass(frozen=True)
class Region:
    """An outline of an area, in its file's frame."""

    where: str
    geometry: dict[str, Any]
    frame: Frame


@dataclass(frozen=True)
class Selection:
    """What of the files is read. slide: that of all objects; folder: where slides lie, if not beside the files.

    classes: only objects of these, in any case (empty: of any); region: the class of outlines of an area
    boxes: how COCO's boxes are written, "xyxy" or "xywh"; None: to be told by the boxes
    """

    slide: Path | None = None
    folder: Path | None = None
    classes: Sequence[str] = ()
    region: str | None = None
    boxes: str | None = None


@dataclass
class Collected:
    """What the files hold. slides: the objects by slide, in their order, and slides without any; regions: outlines of
    an area, by slide; refused: objects by slide that have no usable centre."""

    slides: dict[Path, Targets] = field(default_factory=dict)
    regions: dict[Path, list[Region]] = field(default_factory=dict)
    refused: Counter[Path] = field(default_factory=Counter)
    total: int = 0  # objects of the chosen classes, including those that cannot be scored
    classes: Counter[str] = field(default_factory=Counter)

    def titles(self) -> dict[Path, str]:
        """What results call each slide: its file name, or its path where two slides have that name."""
        names = Counter(file.name for file in self.slides)
        return {file: file.name if names[file.name] == 1 else str(file) for file in self.slides}


def collect(files: Sequence[Path], choice: Selection, complain: Complain) -> Collected:
    """Read all files; each invalid object is passed to `complain`.

    UserError where a file cannot be read at all, a class is in none of them, or a slide may be two.
    """
    collector = Collector(Slides(choice.slide, choice.folder), choice, complain)
    for file in files:
        collector.read(file)
    collector.slides.check()
    collector.report_lost()
    collected = collector.collected
    most = collected.classes.most_common(10)
    kinds = ", ".join(f"{name or 'no class'} ({count:,})" for name, count in most) or "none"
    known = {name.casefold() for name in collected.classes}
    for name in (*choice.classes, *([] if choice.region is None else [choice.region])):
        if name.casefold() not in known:
            raise UserError(
                f"no object of class {name} in {', '.join(map(str, files)):.300}; expected some, found {kinds}; "
                "correct the name, or leave it out"
            )
    if not collected.total:
        raise UserError(f"no detections in {', '.join(map(str, files))}; expected some, found {kinds}; check them")
    return collected


class Collector:
    """Sorts the objects of files by slide."""

    def __init__(self, slides: Slides, choice: Selection, complain: Complain) -> None:
        self.slides, self.choice, self.complain = slides, choice, complain
        self.classes = {name.casefold() for name in choice.classes}
        self.region = None if choice.region is None else choice.region.casefold()
        self.collected = Collected()
        self.source: Source | None = None  # of the object before
        self.lost: dict[tuple[str, bool], list[str]] = defaultdict(list)  # names of objects by reason: slides not there

    def read(self, file: Path) -> None:
        """All objects of a file; a slide counts even if none of its objects has a chosen class."""
        for contents in read_file(file, self.choice.boxes):
            before, by_name, self.source = self.collected.total, False, None
            for item in contents.objects:
                by_name |= bool(item.slide)
                self.take(file, contents, item)
            if not by_name and self.collected.total == before:
                try:
                    self.collected.slides.setdefault(self.slides.of(file, contents.called, ""), Targets())
                except UserError as error:
                    self.complain([contents.title], str(error), False)

    def take(self, file: Path, contents: Contents, item: SlideObject) -> None:
        """Add one object to its slide or region, or complain about it."""
        collected = self.collected
        feature = item.feature
        valid = not isinstance(feature, UserError)
        label = class_name(feature) if isinstance(feature, dict) else item.kind
        kind = label.casefold()
        collected.classes[label] += 1
        outline = self.region is not None and kind == self.region
        unknown = not valid and not label  # it may be of a chosen class
        chosen = not outline and (unknown or not self.classes or kind in self.classes)
        collected.total += chosen
        try:
            slide = self.slides.of(file, contents.called, item.slide)
        except UserError as error:
            if chosen or outline:
                self.lost[str(feature if isinstance(feature, UserError) else error), chosen].append(
                    f"{file}, {item.where}"
                )
            return
        targets = collected.slides.get(slide)
        if targets is None:
            targets = collected.slides[slide] = Targets()
        if outline and isinstance(feature, dict):
            collected.regions.setdefault(slide, []).append(
                Region(item.where, feature.get("geometry") or {}, item.frame)
            )
        elif outline:
            self.complain([f"{file}, {item.where}"], str(feature), False)
        if chosen:
            try:
                if isinstance(feature, UserError):
                    raise feature
                x, y = item.centre or centre(feature.get("geometry"))
                targets.append(self.source_of(file, contents, item), item.where, x, y, feature)
            except UserError as error:
                collected.refused[slide] += 1
                self.complain([f"{file}, {item.where}"], str(error))

    def source_of(self, file: Path, contents: Contents, item: SlideObject) -> Source:
        """One object for all that follow each other in `contents` and share it: a million are not to be compared."""
        source = self.source
        if source is None or source.frame is not item.frame:
            source = self.source = Source(file, item.frame, contents.format.own_geometry)
        return source

    def report_lost(self) -> None:
        """One line for each reason, with the number of objects."""
        for (reason, chosen), names in self.lost.items():
            self.complain(names, reason, chosen)
