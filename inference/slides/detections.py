"""A detector's table: slide, x, y and whatever else it says about a figure, and the name that its crop gets."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePath

from ..errors import UserError

REQUIRED = ("slide", "x", "y")
RESERVED = ("path", "page")  # `score` reads these columns; here they would mean something else


@dataclass(frozen=True)
class Detection:
    """A row of the table; x, y in level-0 pixels, to a hundredth; `rest` are its other columns."""

    slide: str
    x: float
    y: float
    rest: tuple[str, ...] = field(default=(), compare=False)

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


def read_detections(table: Path) -> tuple[list[Detection], list[str], list[str]]:
    """The rows in their order, the names of their other columns, and a line for each invalid row."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            lines = csv.reader(stream)
            columns = [name.strip() for name in next(lines, [])]
            rows = [(lines.line_num, row) for row in lines if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read ({error}); expected CSV in UTF-8 with slide, x, y") from None
    if not set(REQUIRED) <= set(columns) or set(RESERVED) & set(columns) or len(set(columns)) < len(columns):
        raise UserError(
            f"{table} has the columns {columns}; expected {', '.join(REQUIRED)} and others, each once and "
            f"none called {' or '.join(RESERVED)}; rename them"
        )
    if not rows:
        raise UserError(f"{table} has no rows; expected one for each detection; check it")
    others = [n for n, name in enumerate(columns) if name not in REQUIRED]
    found: list[Detection] = []
    problems: list[str] = []
    for line, row in rows:
        try:
            if len(row) != len(columns):
                raise UserError(f"it has {len(row)} fields; expected {len(columns)}, as the header has")
            slide, x, y = (row[columns.index(name)].strip() for name in REQUIRED)
            if not slide:
                raise UserError("slide is empty; expected a path")
            numbers = coordinate("x", x), coordinate("y", y)
            found.append(Detection(str(PurePath(slide)), *numbers, tuple(row[n] for n in others)))
        except UserError as error:
            problems.append(f"{table}, line {line}: {error}")
    return found, [columns[n] for n in others], problems


def coordinate(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < 1e9:
        raise UserError(f"{name} is {text!r:.40}; expected a number of level-0 pixels")
    return round(value, 2) + 0.0  # -0.0 would get a name of its own
