"""From files with detections to the objects of each slide: which slide, which class, and where the centre lies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from ..errors import UserError
from .formats import read_file
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


@dataclass
class Collected:
    """What the files hold. slides: the objects by slide, in their order; regions: outlines of an area, by slide."""

    slides: dict[Path, list[Target]] = field(default_factory=dict)
    regions: dict[Path, list[Feature]] = field(default_factory=dict)
    total: int = 0  # objects of the chosen classes, including those that cannot be scored
    classes: Counter[str] = field(default_factory=Counter)


def collect(
    files: Sequence[Path],
    slide: Path | None,
    folder: Path | None,
    classes: Sequence[str],
    region: str | None,
    complain: Complain,
) -> Collected:
    """Read all files. classes: only objects of these (empty: of any); region: the class of outlines of an area.

    UserError where a file cannot be read at all, or nothing is left; each invalid object is passed to `complain`.
    """
    found = Collected()
    wanted = {name.casefold() for name in classes}
    for file in files:
        ids: set[str] = set()
        for form, objects in read_file(file):
            for one in objects:
                take(found, file, one, form.name.startswith("QuPath"), ids, slide, folder, wanted, region, complain)
    if not found.total:
        kinds = ", ".join(f"{name or 'no class'} ({count:,})" for name, count in found.classes.most_common(10))
        asked = f" of class {' or '.join(classes)}" if classes else ""
        raise UserError(
            f"no detections{asked} in {', '.join(map(str, files))}; expected some, found {kinds or 'none'}; check them"
        )
    return found


def take(
    found: Collected,
    file: Path,
    one: Found,
    theirs: bool,
    ids: set[str],
    slide: Path | None,
    folder: Path | None,
    wanted: set[str],
    region: str | None,
    complain: Complain,
) -> None:
    """Add one object to its slide or region, or complain about it."""
    kind = "" if isinstance(one.feature, UserError) else class_of(one.feature)
    found.classes[kind] += 1
    if not isinstance(one.feature, UserError):
        if region is not None and kind.casefold() == region.casefold():
            try:
                regions = found.regions.setdefault(slide_of(file, one.slide, slide, folder), [])
            except UserError as error:
                complain(f"{file}, {one.where}", str(error), False)
                return
            if one.feature.get("geometry") not in [known.get("geometry") for known in regions]:  # as in two exports
                regions.append(one.feature)
            return
        if wanted and kind.casefold() not in wanted:
            return
    found.total += 1
    try:
        if isinstance(one.feature, UserError):
            raise one.feature
        x, y = one.centre or centre(one.feature.get("geometry"))
        identity = str(one.feature.get("id", ""))
        if identity and identity in ids:
            raise UserError(f"its id {identity:.60} is that of another object; expected each once")
        ids.add(identity)
        where = slide_of(file, one.slide, slide, folder)
    except UserError as error:
        complain(f"{file}, {one.where}", str(error))
        return
    target = Target(file, one.where, one.feature, x, y, one.magnification, theirs)
    found.slides.setdefault(where, []).append(target)


def slide_of(file: Path, named: str, slide: Path | None, folder: Path | None) -> Path:
    """The slide of an object: --slide, or what its file names, or the slide with the same name as its file."""
    if slide is not None:
        if named and PurePath(named).name != slide.name:
            raise UserError(f"it lies on {PurePath(named).name:.80}; expected {slide.name}; give --slides FOLDER")
        return slide
    place = folder or file.parent
    if named:
        whole = place / named
        return whole if whole.exists() else place / PurePath(named.replace("\\", "/")).name
    stem = file.name
    while PurePath(stem).suffix.lower() in NOT_SLIDES:
        stem = PurePath(stem).stem
    return only_one(place, stem)


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
