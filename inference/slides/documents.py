"""What a file with detections holds, unpacked: JSON documents, a table, or an SQLite database."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .databases import Database

PACKED = (".geojson", ".json", ".csv")  # what is read of a zip file
LARGEST = 2 << 30  # bytes of a file, unpacked: a million polygons of QuPath are about 1 GB


@dataclass(frozen=True)
class Rows:
    """A CSV file: the names of its columns, and its rows with their line numbers."""

    columns: list[str]
    rows: list[tuple[int, list[str]]]


def documents(file: Path) -> Iterator[Any]:
    """The JSON documents, tables or databases in a file, unpacked where it is gzip or zip."""
    try:
        with file.open("rb") as stream:
            start = stream.read(16)
        if not start:
            raise UserError(f"{file} is empty; expected detections; export it again")
        if start.startswith(b"SQLite format 3\0"):
            yield Database(file)
        elif start.startswith(b"PK\3\4"):
            yield from zipped(file)
        else:
            with gzip.open(file) if start.startswith(b"\x1f\x8b") else file.open("rb") as stream:
                yield parse(bounded(stream, file), file)
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file} cannot be read ({reason}); expected detections; check the file") from None


def zipped(file: Path) -> Iterator[Any]:
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if n.lower().endswith(PACKED) and "__MACOSX" not in n]
        if not names:
            raise UserError(f"{file} holds no .geojson, .json or .csv file; expected what QuPath exports; check it")
        for name in names:
            with archive.open(name) as stream:
                yield parse(bounded(stream, file), file)


def bounded(stream: Any, file: Path) -> bytes:
    data: bytes = stream.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise UserError(f"{file} is larger than {LARGEST >> 30} GiB; expected less; split it")
    return data


def parse(data: bytes, file: Path) -> Any:
    """JSON, or rows of a CSV file."""
    try:
        text = data.decode("utf-8-sig")
        if text.lstrip()[:1] in ("{", "["):
            return json.loads(text)
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        columns = [name.strip() for name in next(lines, [])]
        return Rows(columns, [(lines.line_num, row) for row in lines if row])
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(
            f"{file} cannot be read ({error!s:.200}); expected JSON or CSV in UTF-8; export it again"
        ) from None
