"""What a loader of a data set is given, and what several loaders share."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from inference.errors import UserError

from .crop import Crop

IMAGES = (".png", ".tif", ".tiff", ".jpg", ".jpeg")
FOLDERS = ("Atypical", "Normal")
Row = dict[str, str]


@dataclass
class Source:
    """A data set as it lies on disk.

    file: its CSV, or its folder where it has none
    rows: of the CSV, by column, without blanks around names and cells
    group: where slides stand, as `--group` says it; "" as the layout has it
    ungrouped: whether each crop may count as a slide of its own where no slides are known
    notes: lines for the user; loaders add to them
    """

    file: Path
    rows: list[Row] = field(default_factory=list)
    group: str = ""
    ungrouped: bool = False
    notes: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        self.notes.append(line)

    def note_outvoted(self, name: str, crops: Iterable[Crop]) -> None:
        """Count the labels that differ from the majority of their votes."""
        outvoted = sum(bool(crop.votes) and crop.label != (2 * sum(crop.votes) > len(crop.votes)) for crop in crops)
        if outvoted:
            self.note(f"{name}: {outvoted} published labels differ from the majority of their votes; labels are kept")

    def without_groups(self, missing: str, do: str) -> None:
        """UserError where slides have to be known; else a note that each crop is one. missing: what was looked for."""
        if not self.ungrouped:
            raise UserError(
                f"{self.file} names no slides ({missing}); expected the slide or case of each crop, which no split may "
                f"divide; {do}, or split crops at random, for scores that are too good, with --set split=random"
            )
        self.note(f"{self.file.name}: no slides are known, so each crop counts as one and slides lie on both sides")


def class_folders(folder: Path) -> list[Path]:
    """The folders Atypical and Normal in a folder, in any case; [] unless both are there, once."""
    children = [child for child in sorted(folder.iterdir()) if child.is_dir() and child.name.title() in FOLDERS]
    return children if sorted(child.name.title() for child in children) == list(FOLDERS) else []


def images_below(folder: Path) -> list[Path]:
    """Images at any depth below a folder, by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)


def check_folders(crops: Iterable[Crop]) -> None:
    """UserError where a crop lies in a folder named after the other class."""
    implied = {"atypical": 1, "normal": 0}
    wrong = [crop for crop in crops if implied.get(crop.path.parent.name.lower(), crop.label) != crop.label]
    if wrong:
        raise UserError(
            f"{len(wrong)} crops lie in the other class's folder (first: {wrong[0].path}, label {wrong[0].label}); "
            "expected the table and the folders to agree; download the data set again"
        )


def check_names(crops: Sequence[Crop]) -> None:
    """UserError where two slides, or two domains, have names that differ in nothing but blanks and capital letters."""
    for kind in ("group", "domain"):
        spellings: dict[str, str] = {}
        for crop in crops:
            name = getattr(crop, kind)
            key = re.sub(r"\s+", "", unicodedata.normalize("NFKC", name)).casefold()
            first = spellings.setdefault(key, name)
            if first != name:
                raise UserError(
                    f"{kind}s {first!r} and {name!r} differ in nothing but blanks or capital letters; expected one "
                    f"spelling for each {kind}, since a split keeps equal names together; correct the table"
                )
