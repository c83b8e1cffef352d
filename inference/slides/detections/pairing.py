"""Which slide an object lies on, by what its file calls the slide, or by the file's own name."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import NamedTuple

from ...errors import UserError

# endings of files with detections, and of what lies beside slides
NOT_SLIDES = (
    *(".geojson", ".json", ".ndjson", ".jsonl", ".csv", ".tsv", ".txt", ".xml", ".ndpa", ".gz", ".zip"),
    *(".sqlite", ".db", ".html"),
)


class Match(NamedTuple):
    """exact: the file has that very path; otherwise folders in front of it were left out to find it."""

    file: Path
    exact: bool


class Slides:
    """The slides of a run. A slide has one path here, the first by which it was found."""

    def __init__(self, slide: Path | None, folder: Path | None) -> None:
        """slide: that of all objects; folder: where slides lie, if not beside the files."""
        self.slide, self.folder = slide, folder
        self.known: dict[tuple[Path, tuple[str, ...], str], Path | UserError] = {}
        self.paths: dict[Path, Path] = {}
        self.names: dict[Path, dict[PurePath, bool]] = {}  # how files name a slide, and whether it has that very path

    def of(self, file: Path, called: tuple[str, ...], named: str) -> Path:
        """The slide that `file` calls `named`, or "" for none. UserError where there is none.

        called: file names by which the slide may be called where the file does not name it
        """
        key = file, () if named else called, named
        slide = self.known.get(key)
        if slide is None:
            try:
                slide = self.named(file, named) if named else self.unnamed(file, called)
            except UserError as error:
                slide = error
            self.known[key] = slide
        if isinstance(slide, UserError):
            raise slide
        return slide

    def named(self, file: Path, named: str) -> Path:
        """--slide, or what the file names: below the folder of slides, with as many of its own folders as exist."""
        name = PurePath(named.replace("\\", "/"))
        if self.slide is not None:
            if name.name != self.slide.name:
                raise UserError(f"it lies on {name.name:.80}; expected {self.slide.name}; give --slides FOLDER")
            match = Match(self.slide, False)
        else:
            match = below(self.folder or file.parent, name)
        path = self.paths.setdefault(match.file.resolve(), match.file)
        self.names.setdefault(path, {})[name] = match.exact
        return path

    def unnamed(self, file: Path, called: tuple[str, ...]) -> Path:
        """--slide, or the only slide that has one of the names `called`."""
        if self.slide is not None:
            return self.paths.setdefault(self.slide.resolve(), self.slide)
        folder = self.folder or file.parent
        slides = list(dict.fromkeys(slide for name in called for slide in slides_called(folder, name)))
        names = " or ".join(dict.fromkeys(map(stem, called)))
        if not slides:
            raise UserError(f"no slide called {names} in {folder}; expected one; give --slide FILE")
        if len(slides) > 1:
            several = ", ".join(slide.name for slide in slides)
            raise UserError(
                f"several slides called {names} in {folder} ({several:.200}); expected one; give --slide FILE"
            )
        return self.paths.setdefault(slides[0].resolve(), slides[0])

    def check(self) -> None:
        """UserError where two names were taken for one slide, which only agree in their last parts.

        A slide called 25.tif in two folders is two slides.
        """
        for path, names in self.names.items():
            if len(names) > 1 and not all(names.values()):
                first, second = sorted(map(str, names))[:2]
                raise UserError(
                    f"{first} and {second} would both be {path}; expected a slide for each; keep their folders below "
                    "--slides FOLDER, or run them one by one"
                )


def below(folder: Path, name: PurePath) -> Match:
    """The slide `name` in `folder`: the longest end of the name that exists there; else its last part."""
    for start in range(len(name.parts)):
        path = folder / PurePath(*name.parts[start:])
        if path.exists():
            return Match(path, start == 0)
    return Match(folder / name.name, len(name.parts) == 1)


def stem(name: str) -> str:
    """The name without the endings of files with detections."""
    while PurePath(name).suffix.lower() in NOT_SLIDES:
        name = PurePath(name).stem
    return name


def slides_called(folder: Path, name: str) -> list[Path]:
    """The slides in `folder` that have the name of a file with detections, with or without a slide's suffix."""
    wanted = stem(name)
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); expected a folder of slides") from None
    slides = [
        file
        for file in files
        if wanted in (file.name, file.stem, file.stem.removesuffix(".ome"))
        and file.suffix.lower() not in NOT_SLIDES
        and (file.is_file() or any(file.glob("*.[dD][cC][mM]")))  # the files of one DICOM slide lie in a folder
    ]
    exact = [file for file in slides if file.name == wanted]  # case.ndpi for case.ndpi.ndpa, and not case.ndpi.tif
    return exact if exact and PurePath(wanted).suffix else slides
