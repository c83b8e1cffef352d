"""SlideRunner's SQLite databases, which EXACT synchronises too: Slides, Annotations, their coordinates and classes.

Source: SlideRunner/dataAccess/database.py (`create`) and annotations.py (`AnnotationType`), DeepMicroscopy/SlideRunner.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from ...errors import UserError
from .geometry import box, number
from .objects import SlideObject, attempt, made

SPOTS, RECTANGLES, POLYGON = (1, 4), (2, 5), 3  # rectangles and circles are stored by two corners
NEEDED = {"Slides", "Annotations", "Annotations_coordinates", "Classes"}


@dataclass(frozen=True)
class Database:
    """An SQLite file; opened for reading only, so that it is never changed."""

    file: Path

    def query(self, text: str) -> Iterator[tuple[Any, ...]]:
        for suffix in ("-wal", "-journal"):
            if self.file.with_name(self.file.name + suffix).exists():
                raise UserError(f"{self.file} is being written by another program; expected it closed; close it")
        try:
            with closing(sqlite3.connect(f"{self.file.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as opened:
                yield from opened.execute(text)
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the second of a message that quotes the file
            raise UserError(f"{self.file} cannot be read ({error}); expected a SlideRunner database") from None


def fits(document: Any) -> bool:
    if not isinstance(document, Database):
        return False
    return {name for (name,) in document.query("SELECT name FROM sqlite_master WHERE type = 'table'")} >= NEEDED


def read(document: Database) -> Iterator[SlideObject]:
    """The annotations that are not deleted, in their order."""
    columns = {row[1] for row in document.query("PRAGMA table_info(Annotations)")}
    folder = "s.directory" if "directory" in {row[1] for row in document.query("PRAGMA table_info(Slides)")} else "NULL"
    identity = "a.guid" if "guid" in columns else "NULL"
    kept = "WHERE COALESCE(a.deleted, 0) = 0" if "deleted" in columns else ""
    rows = document.query(
        f"SELECT a.uid, {identity}, a.type, k.name, s.filename, {folder}, c.coordinateX, c.coordinateY "
        "FROM Annotations a LEFT JOIN Annotations_coordinates c ON c.annoId = a.uid "
        "LEFT JOIN Classes k ON k.uid = a.agreedClass "
        f"LEFT JOIN Slides s ON s.uid = a.slide {kept} ORDER BY a.uid, c.orderIdx"
    )
    for uid, lines in groupby(rows, key=lambda row: row[0]):
        where = f"annotation {uid}"
        yield attempt(where, partial(annotation, where, list(lines)))


def annotation(where: str, rows: list[tuple[Any, ...]]) -> SlideObject:
    uid, guid, kind, name, slide, folder, *_ = rows[0]
    if not slide:
        raise UserError("its slide is not in the database; expected one of Slides")
    corners = [[number("x", row[6]), number("y", row[7])] for row in rows]
    if kind in SPOTS and len(corners) == 1:
        geometry: dict[str, Any] = {"type": "Point", "coordinates": corners[0]}
    elif kind in RECTANGLES and len(corners) == 2:
        (ax, ay), (bx, by) = corners
        geometry = box(min(ax, bx), min(ay, by), max(ax, bx), max(ay, by))
    elif kind == POLYGON and len(corners) >= 3:
        geometry = {"type": "Polygon", "coordinates": [[*corners, corners[0]]]}
    else:
        raise UserError(f"it is of type {kind} with {len(corners)} points; expected a spot, box, circle or polygon")
    return SlideObject(where, made(geometry, guid or uid, name or ""), f"{folder}/{slide}" if folder else str(slide))
