"""From files with detections to the objects of each slide: which slide, which class, and where the centre lies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from ..errors import UserError
from .formats import Format, read_file
from .found import Feature, Found, class_of
from .geometry import centre

Complain = Callable[..., None]  # (what it is about, why it is not scored, False if it is not an object to score)
NOT_SLIDES = (".geojson", ".json", ".csv", ".gz", ".zip", ".sqlite", ".db", ".html")


@dataclass(frozen=True)
class Target:
    """An object to score. x, y: its centre in the pixels that its file counts; magnification: as in Found.

    theirs: the geometry is the file's own and is kept; otherwise it was made here, in the slide's pixels.
    """

    file: Path
    where: str
    feature: Feature
    x: float
    y: float
    magnification: float | None = None
    theirs: bool = True

    @property
    def name(self) -> str:
        return f"{self.file}, {self.where}"

    @property
    def id(self) -> str:
        return str(self.feature.get("id", ""))


@dataclass(frozen=True)
class Region:
    """An outline of an area; magnification: as in Found."""

    where: str
    geometry: dict[str, Any]
    magnification: float | None


@dataclass
class Collected:
    """What the files hold. slides: the objects by slide, in their order, and slides without any; regions: outlines of
    an area, by slide; refused: objects by slide that have no usable place."""

    slides: dict[Path, list[Target]] = field(default_factory=dict)
    regions: dict[Path, list[Region]] = field(default_factory=dict)
    refused: Counter[Path] = field(default_factory=Counter)
    total: int = 0  # objects of the chosen classes, including those that cannot be scored
    classes: Counter[str] = field(default_factory=Counter)

    def titles(self) -> dict[Path, str]:
        """What results call each slide: its file name, or its path where two slides have that name."""
        names = Counter(file.name for file in self.slides)
        return {file: file.name if names[file.name] == 1 else str(file) for file in self.slides}


def collect(
    files: Sequence[Path],
    slide: Path | None,
    folder: Path | None,
    classes: Sequence[str],
    region: str | None,
    complain: Complain,
) -> Collected:
    """Read all files. classes: only objects of these (empty: of any); region: the class of outlines of an area.

    UserError where a file cannot be read at all, a class is in none of them, or a slide may be two; each invalid
    object is passed to `complain`.
    """
    collector = Collector(Slides(slide, folder), {name.casefold() for name in classes}, region, complain)
    for file in files:
        collector.read(file)
    collector.slides.check()
    found = collector.found
    kinds = ", ".join(f"{name or 'no class'} ({count:,})" for name, count in found.classes.most_common(10)) or "none"
    there = {name.casefold() for name in found.classes}
    for name in (*classes, *([] if region is None else [region])):
        if name.casefold() not in there:
            raise UserError(
                f"no object of class {name} in {', '.join(map(str, files)):.300}; expected some, found {kinds}; "
                "correct the name, or leave it out"
            )
    if not found.total:
        raise UserError(f"no detections in {', '.join(map(str, files))}; expected some, found {kinds}; check them")
    return found


@dataclass
class Collector:
    """Sorts objects by slide. wanted: the chosen classes in lower case, empty for all."""

    slides: Slides
    wanted: set[str]
    region: str | None
    complain: Complain
    found: Collected = field(default_factory=Collected)
    ids: dict[tuple[Path, Path], set[str]] = field(default_factory=dict)  # of each file, on each slide

    def read(self, file: Path) -> None:
        """All objects of a file; a slide counts even if none of its objects has a chosen class."""
        before, by_name = self.found.total, False
        for number, (form, objects) in enumerate(read_file(file), 1):
            for one in objects:
                by_name |= bool(one.slide)
                self.take(file, one if number == 1 else replace(one, where=f"document {number}, {one.where}"), form)
        if not by_name and self.found.total == before:
            try:
                self.found.slides.setdefault(self.slides.of(file, ""), [])
            except UserError as error:
                self.complain(str(file), str(error), False)

    def take(self, file: Path, one: Found, form: Format) -> None:
        """Add one object to its slide or region, or complain about it."""
        found, name = self.found, f"{file}, {one.where}"
        kind = "" if isinstance(one.feature, UserError) else class_of(one.feature)
        found.classes[kind] += 1
        valid = not isinstance(one.feature, UserError)
        outline = valid and self.region is not None and kind.casefold() == self.region.casefold()
        chosen = not outline and (not valid or not self.wanted or kind.casefold() in self.wanted)
        found.total += chosen
        try:
            where = self.slides.of(file, one.slide)
        except UserError as error:
            if chosen or outline:
                self.complain(name, str(one.feature if isinstance(one.feature, UserError) else error), chosen)
            return
        found.slides.setdefault(where, [])
        if outline and isinstance(one.feature, dict):
            geometry = one.feature.get("geometry") or {}
            found.regions.setdefault(where, []).append(Region(one.where, geometry, one.magnification))
        if not chosen:
            return
        try:
            if isinstance(one.feature, UserError):
                raise one.feature
            x, y = one.centre or centre(one.feature.get("geometry"))
            identity, ids = str(one.feature.get("id", "")), self.ids.setdefault((file, where), set())
            if identity and identity in ids:
                raise UserError(f"its id {identity:.60} is that of another object; expected each once")
            ids.add(identity)
        except UserError as error:
            found.refused[where] += 1
            self.complain(name, str(error))
            return
        theirs = form.name.startswith("QuPath")
        found.slides[where].append(Target(file, one.where, one.feature, x, y, one.magnification, theirs))


class Slides:
    """Which slide an object lies on. A slide has one path here, the first by which it was found."""

    def __init__(self, slide: Path | None, folder: Path | None) -> None:
        """slide: that of all objects; folder: where slides lie, if not beside the files."""
        self.slide, self.folder = slide, folder
        self.known: dict[tuple[Path, str], Path | UserError] = {}
        self.paths: dict[Path, Path] = {}
        self.names: dict[Path, set[PurePath]] = {}  # how files name a slide that was found by its last part alone

    def of(self, file: Path, named: str) -> Path:
        """The slide that `file` calls `named`, or "" for none. UserError where there is none."""
        key = file, named
        if key not in self.known:
            try:
                self.known[key] = self.find(file, named)
            except UserError as error:
                self.known[key] = error
        found = self.known[key]
        if isinstance(found, UserError):
            raise found
        return found

    def find(self, file: Path, named: str) -> Path:
        """--slide, or what the file names, or the slide with the same name as the file."""
        place, name = self.folder or file.parent, PurePath(named.replace("\\", "/"))
        if self.slide is not None:
            if named and name.name != self.slide.name:
                raise UserError(f"it lies on {name.name:.80}; expected {self.slide.name}; give --slides FOLDER")
            found = self.slide
        elif not named:
            stem = file.name
            while PurePath(stem).suffix.lower() in NOT_SLIDES:
                stem = PurePath(stem).stem
            found = only_one(place, stem)
        elif (place / named).exists():
            return self.paths.setdefault((place / named).resolve(), place / named)
        else:
            found = place / name.name
        path = self.paths.setdefault(found.resolve(), found)
        if named:
            self.names.setdefault(path, set()).add(name)
        return path

    def check(self) -> None:
        """UserError where files in different folders were taken for one slide, because only their names agree."""
        for path, names in self.names.items():
            longest = max(names, key=lambda name: (len(name.parts), str(name)))
            for name in sorted(names):
                if longest.parts[-len(name.parts) :] != name.parts:
                    raise UserError(
                        f"{name} and {longest} would both be {path}; expected a slide for each; keep their folders "
                        "below --slides FOLDER, or run them one by one"
                    )


def only_one(place: Path, stem: str) -> Path:
    """The only file in `place` that is called `stem` with a slide's suffix."""
    try:
        some = [one for one in sorted(place.iterdir()) if stem in (one.stem, one.name)]
    except OSError as error:
        raise UserError(f"{place} cannot be read ({error.strerror}); expected a folder of slides") from None
    files: Iterable[Path] = [one for one in some if one.suffix.lower() not in NOT_SLIDES and one.is_file()]
    match list(files):
        case [one]:
            return one
        case []:
            raise UserError(f"no slide called {stem} in {place}; expected one; give --slide FILE")
        case several:
            names = ", ".join(one.name for one in several)
            raise UserError(f"several slides called {stem} in {place} ({names:.200}); expected one; give --slide FILE")
