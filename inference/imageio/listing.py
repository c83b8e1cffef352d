"""List the crops that a command names as files, folders and tables, in order and each once.

A table is a CSV file with a column of paths, relative to the table itself, and optional columns for the page, the
label, the domain and the slide. Standard library only.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from ..labels import parse_label

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".mha")
PATH_COLUMNS = ("path", "file", "filename", "image", "image_path")
SLIDE_COLUMNS = ("slide", "case", "group")  # the first that a table has
FOLDER = "@folder"  # instead of a column: the name of the folder that holds a crop
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes as the start of a formula


def is_formula(text: str) -> bool:
    """Whether a spreadsheet may take a cell for a formula; a number, such as -1.5, is none."""
    if not text.startswith(FORMULA):
        return False
    try:
        return text[0] in "\t\r" or not math.isfinite(float(text))
    except ValueError:
        return True


@dataclass(frozen=True)
class Item:
    """A file, or one page of it; label 1 (atypical), 0 (normal) or None (unknown).

    path: as the user named it; file: with all links resolved, the same for every name of a file; slide: "" if unknown
    """

    path: str
    page: int | None = None  # None: every page
    label: int | None = None
    domain: str = ""
    file: str = ""
    slide: str = ""


def list_crops(paths: Sequence[Path], labels: str | None = None, domains: str | None = None) -> list[Item]:
    """Every crop of the given files, folders (recursively, sorted by name) and tables, in this order.

    A crop that is named twice, by whatever paths, is listed where it was named first, with the label, domain and
    slide of either. A file that is named both as a whole and by page keeps an item for each: see `ScoreRun.stream`.
    labels, domains: names of columns, or "@folder"; by default a table's columns called label and domain.
    UserError if a path is missing, holds no crops or cannot be parsed, or if labels contradict each other.
    """
    items: dict[tuple[str, int | None], Item] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; expected a file, a folder or a CSV file; check the path")
        if path.suffix.lower() == ".csv" and not path.is_dir():
            listed = read_table(path, labels, domains)
        else:
            files = map(str, walk(path) if path.is_dir() else [path])
            listed = [Item(file, None, folder_label(file, labels), folder_name(file, domains)) for file in files]
        if not listed:
            raise UserError(f"no crops in {path}; expected {', '.join(SUFFIXES)}; check the path")
        for item in listed:
            item = replace(
                item, path=f"./{item.path}" if is_formula(item.path) else item.path, file=os.path.realpath(item.path)
            )
            before = items.get((item.file, item.page))
            items[item.file, item.page] = merged(before, item) if before else item
    return [
        merged(item, whole) if item.page is not None and (whole := items.get((item.file, None))) else item
        for item in items.values()
    ]


def merged(item: Item, other: Item) -> Item:
    """`item`, completed from `other`. UserError if they contradict each other."""
    for name in ("label", "domain", "slide"):
        ours, theirs = getattr(item, name), getattr(other, name)
        if ours not in (None, "") and theirs not in (None, "") and ours != theirs:
            raise UserError(
                f"{item.path} has the {name}s {ours} and {theirs}; expected one per crop; correct the tables"
            )
    label = other.label if item.label is None else item.label
    return replace(item, label=label, domain=item.domain or other.domain, slide=item.slide or other.slide)


def walk(folder: Path) -> Iterator[Path]:
    """The image files below `folder`, sorted, without hidden ones; links to folders are not followed.

    A folder that cannot be listed is one of them, so that it is named as what could not be read.
    """
    errors: list[OSError] = []
    for root, names, files in os.walk(folder, onerror=errors.append):
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(files) if name.lower().endswith(SUFFIXES) and name[0] != ".")
    yield from (Path(error.filename) for error in errors)


def read_rows(table: Path) -> tuple[list[Item], list[dict[str, str]]]:
    """The rows of a CSV file in order: the file or page that each names, and all its columns as text."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read ({error}); expected CSV in UTF-8 with a column of paths") from None
    of_path = next((name for name in PATH_COLUMNS if name in columns), None)
    if of_path is None:
        raise UserError(f"{table} has the columns {columns}; expected one of {', '.join(PATH_COLUMNS)}; rename it")
    items = []
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise UserError(
                f"{table}, row {number} does not have {len(columns)} fields; expected one per column; correct it"
            )
        page = row.get("page", "").strip()
        if "\0" in row[of_path]:
            raise UserError(f"{table}, row {number}: the path has a null byte; expected a file's path; correct it")
        if page and not (page.isascii() and page.isdigit() and len(page) < 10):
            raise UserError(
                f"{table}, row {number}: page is {page!r}; expected a number, counted from 0, or nothing; correct it"
            )
        items.append(Item(str(table.parent / row[of_path]), int(page) if page else None))
    return items, rows


def read_table(table: Path, labels: str | None, domains: str | None) -> list[Item]:
    """`read_rows` with labels, domains and slides."""
    items, rows = read_rows(table)
    columns = list(rows[0]) if rows else []
    for name in (labels, domains):
        if rows and name is not None and name != FOLDER and name not in columns:
            raise UserError(f"{table} has no column {name!r}; expected one of {columns}; name another")
    of_label = labels or ("label" if "label" in columns else None)
    of_domain = domains or ("domain" if "domain" in columns else None)
    of_slide = next((name for name in SLIDE_COLUMNS if name in columns), None)
    completed = []
    for number, (item, row) in enumerate(zip(items, rows, strict=True), 2):
        label = folder_label(item.path, labels)
        if of_label and of_label != FOLDER:
            label = label_or_none(row[of_label], f"{table}, row {number}, column {of_label}")
        domain = folder_name(item.path, domains) or (row[of_domain] if of_domain and of_domain != FOLDER else "")
        completed.append(replace(item, label=label, domain=domain, slide=row[of_slide].strip() if of_slide else ""))
    return completed


def label_or_none(text: str, where: str) -> int | None:
    """A table's label; None if it is empty. UserError for an unknown word: no label is ever dropped silently."""
    return parse_label(text, where) if text.strip() else None


def folder_name(file: str, wanted: str | None) -> str:
    return Path(file).absolute().parent.name if wanted == FOLDER else ""


def folder_label(file: str, labels: str | None) -> int | None:
    return parse_label(folder_name(file, labels), f"folder of {file}") if labels == FOLDER else None
