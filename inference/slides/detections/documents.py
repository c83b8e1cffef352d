"""What a file with detections holds, unpacked: JSON documents, tables, XML, or an SQLite database."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import IO, Any, NamedTuple
from xml.etree import ElementTree

from ...errors import UserError
from . import json_text
from .databases import Database
from .json_text import Features
from .pairing import stem

PACKED = (".geojson", ".json", ".ndjson", ".jsonl", ".csv", ".tsv", ".xml", ".ndpa")  # what is read of a zip file
LARGEST = 2 << 30  # bytes of a file, unpacked: a million polygons of QuPath are about 1 GB
PIECE = 1 << 20  # bytes that are read at a time
DELIMITERS = ",;\t"


class Document(NamedTuple):
    """content: JSON, Features, a CellTable, an XML element or a Database; member: its name in a zip file, or "".

    called: the file names by which its slide may be called: the member's, in a zip file of one also that file's
    """

    content: Any
    called: tuple[str, ...]
    member: str = ""


@dataclass(frozen=True)
class CellTable:
    """A CSV file: the names of its columns, its rows with their line numbers, and what separates the cells."""

    columns: list[str]
    rows: list[tuple[int, list[str]]]
    delimiter: str = ","


def documents(file: Path) -> Iterator[Document]:
    """The documents in a file, unpacked where it is gzip or zip. UserError where it cannot be read.

    Each is to be read before the next is asked for: features are read from the file while they are used.
    """
    with readable(file):
        with file.open("rb") as stream:
            start = stream.read(16)
        if not start:
            raise UserError(f"{file} is empty; expected detections; export it again")
        if start.startswith(b"SQLite format 3\0"):
            yield Document(Database(file), (file.name,))
        elif start.startswith(b"PK\3\4"):
            yield from zipped(file)
        else:
            with gzip.open(file) if start.startswith(b"\x1f\x8b") else file.open("rb") as stream:
                yield Document(parse(stream, file), (file.name,))


def zipped(file: Path) -> Iterator[Document]:
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if n.lower().endswith(PACKED) and "__MACOSX" not in n]
        if not names:
            raise UserError(
                f"{file} holds no .geojson, .json, .csv or .xml file; expected what QuPath exports; check it"
            )
        for name in names:
            with archive.open(name) as stream:
                own = PurePath(name).name
                names_slide = PurePath(
                    stem(own)
                ).suffix  # as case.ndpi.ndpa does: then the zip file's name is not asked
                called = (own, *([file.name] if len(names) == 1 and not names_slide else []))
                yield Document(parse(stream, file), called, name)


class Unreadable(UserError):
    """A file that cannot be read to its end; the message names it."""


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Unreadable for what reading and parsing the file may raise."""
    try:
        yield
    except (ValueError, RecursionError, csv.Error, ElementTree.ParseError) as error:
        raise Unreadable(
            f"{file} cannot be read ({error!s:.200}); expected JSON, CSV or XML in UTF-8 or UTF-16; export it again"
        ) from None
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Unreadable(f"{file} cannot be read ({reason}); expected detections; check the file") from None


def texts(stream: IO[bytes] | gzip.GzipFile, file: Path) -> Iterator[str]:
    """The text of a file, piece by piece. UserError where it is too large, ValueError where it is no text."""
    data, size = stream.read(PIECE), 0
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    decoder = codecs.getincrementaldecoder(encoding)()
    while data:
        size += len(data)
        if size > LARGEST:
            raise Unreadable(f"{file} is larger than {LARGEST >> 30} GiB; expected less; split it")
        yield decoder.decode(data)
        data = stream.read(PIECE)
    yield decoder.decode(b"", final=True)


def parse(stream: IO[bytes] | gzip.GzipFile, file: Path) -> Any:
    """JSON (one document, or one on each line), XML, or the rows of a CSV file. Features are read as they are used."""
    pieces = texts(stream, file)
    begin = []  # of the text, up to the first piece that is not white space alone
    for piece in pieces:
        begin.append(piece)
        if piece.strip():
            break
    text = chain(begin, pieces)
    match begin[-1].lstrip()[:1]:
        case "{" | "[":
            document = json_text.parse(text)
            return Features(guarded(document, file)) if isinstance(document, Features) else document
        case "<":
            return parse_xml("".join(text))
    return parse_table("".join(text))


def guarded(features: Features, file: Path) -> Iterator[Any]:
    with readable(file):
        yield from features


def parse_xml(text: str) -> ElementTree.Element:
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # a few lines of entities can expand to gigabytes
        raise ValueError("it declares a document type, which no viewer does")
    return ElementTree.fromstring(text)


def parse_table(text: str) -> CellTable:
    header = text.lstrip().partition("\n")[0]
    delimiter = max(DELIMITERS, key=header.count)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    columns = [name.strip() for name in next(lines, [])]
    return CellTable(columns, [(lines.line_num, row) for row in lines if any(map(str.strip, row))], delimiter)
