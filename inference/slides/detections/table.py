"""Tables of detections: which column says what, for `slides` and for `crops`, and the name that a crop gets."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePath
from typing import NamedTuple

from ...errors import UserError
from .documents import CellTable, documents
from .geometry import number
from .objects import DOUBT, SCAN, Frame

REQUIRED = ("slide", "x", "y")
RESERVED = ("path", "page")  # `score` reads these columns; here they would mean something else
# What columns are called, in lower case: this project's own names first, then QuPath's, and those of MIDOG 2025's table
SLIDE = ("slide", "image", "filename", "file_name", "slide_name")
IDENTITY = ("id", "object id")
CLASS = ("class", "classification", "label")
PIXELS = (("x", "y"), ("centroid x px", "centroid y px"), ("coordinatex", "coordinatey"), ("center_x", "center_y"))
MICRONS = (("centroid x µm", "centroid y µm"), ("x_um", "y_um"))
EXPECTED = "columns x and y, or Centroid X µm and Centroid Y µm"


class Columns(NamedTuple):
    """The positions of a table's columns, None where it has none; frame: how x and y count."""

    x: int
    y: int
    slide: int | None
    identity: int | None
    kind: int | None
    frame: Frame


def find_columns(table: CellTable) -> Columns | None:
    """Which columns hold what, by their names in any case; None where none holds coordinates.

    UserError where two columns have one name.
    """
    names = [name.casefold().replace("\N{MICRO SIGN}", "\N{GREEK SMALL LETTER MU}") for name in table.columns]
    names = [re.sub(r"\s+", " ", name.replace("\N{GREEK SMALL LETTER MU}", "µ")) for name in names]

    def position(aliases: tuple[str, ...]) -> int | None:
        return next((names.index(alias) for alias in aliases if alias in names), None)

    for pairs, microns in ((PIXELS, None), (MICRONS, 1.0)):
        for x, y in pairs:
            if x in names and y in names:
                if len(set(names)) < len(names):
                    raise UserError(f"its columns are {table.columns}; expected each once, in any case; rename them")
                # QuPath counts from the scanned area; who wrote a plain x and y is not known
                frame = Frame(microns=microns, origin=SCAN if x.startswith("centroid") else DOUBT)
                return Columns(
                    names.index(x), names.index(y), position(SLIDE), position(IDENTITY), position(CLASS), frame
                )
    return None


def cell_number(name: str, text: str, delimiter: str) -> float:
    """A coordinate; between semicolons or tabs, a comma is the decimal sign of many countries."""
    text = text.strip()
    if delimiter != "," and re.fullmatch(r"[+-]?\d+,\d+", text):
        text = text.replace(",", ".")
    return number(name, text)


@dataclass(frozen=True)
class Detection:
    """A row of the table; x, y in level-0 pixels, to a hundredth; `others` are the cells of its other columns."""

    slide: str
    x: float
    y: float
    others: tuple[str, ...] = field(default=(), compare=False)

    @property
    def where(self) -> str:
        return f"{self.x:.12g}, {self.y:.12g}"

    @property
    def path(self) -> str:
        """The crop's path below the output folder; it depends on this row alone, and never leads out of that folder."""
        slide = PurePath(self.slide)
        if slide.is_absolute() or ".." in slide.parts:
            slide = PurePath(f"{slide.name[:50]}-{sha256(self.slide.encode()).hexdigest()[:8]}")
        return f"{slide / f'{self.x:.12g}_{self.y:.12g}'}.png"


class Detections(NamedTuple):
    """The rows in their order, the names of their other columns, and a line for each invalid row."""

    rows: list[Detection]
    others: list[str]
    problems: list[str]


def read_detections(file: Path) -> Detections:
    """The table that `crops` cuts from. UserError where it is none, or lacks slide, x or y."""
    table = next(documents(file)).content
    if not isinstance(table, CellTable):
        raise UserError(f"{file} holds no table; expected CSV with slide, x, y; `slides` reads other formats")
    columns = find_columns(table)
    lower = {name.casefold() for name in table.columns}
    if columns is None or columns.slide is None or columns.frame.microns or set(RESERVED) & lower:
        raise UserError(
            f"{file} has the columns {table.columns}; expected {', '.join(REQUIRED)} and others, each once and "
            f"none called {' or '.join(RESERVED)}; rename them"
        )
    if not table.rows:
        raise UserError(f"{file} has no rows; expected one for each detection; check it")
    taken = (columns.slide, columns.x, columns.y)
    others = [n for n in range(len(table.columns)) if n not in taken]
    detections = Detections([], [table.columns[n] for n in others], [])
    for line, row in table.rows:
        try:
            if len(row) != len(table.columns):
                raise UserError(f"it has {len(row)} fields; expected {len(table.columns)}, as the header has")
            slide = row[columns.slide].strip()
            if not slide:
                raise UserError("slide is empty; expected a path")
            x, y = (hundredth(cell_number(n, row[at], table.delimiter)) for n, at in zip("xy", taken[1:], strict=True))
            detections.rows.append(Detection(str(PurePath(slide)), x, y, tuple(row[n] for n in others)))
        except UserError as error:
            detections.problems.append(f"{file}, line {line}: {error}")
    return detections


def hundredth(value: float) -> float:
    """A coordinate to a hundredth of a pixel; -0.0 would get a name of its own."""
    return round(value, 2) + 0.0 if math.isfinite(value) else value
