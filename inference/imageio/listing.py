"""Which crops a command is to look at: files, folders and tables with paths, read one after another.

Standard library only. A table is a CSV file with a column of paths, relative to the table itself, and possibly columns
with a page, a label and a domain.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..labels import parse_label

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".mha")
PATH_COLUMNS = ("path", "file", "filename", "image", "image_path")
FOLDER = "@folder"  # in place of a column: the name of the folder that a crop lies in


@dataclass(frozen=True)
class Item:
    """A file, or one page of it; label 1 (atypical), 0 (normal) or None (not known)."""

    path: str
    page: int | None = None  # None: every page
    label: int | None = None
    domain: str = ""


def list_crops(paths: Sequence[Path], labels: str | None = None, domains: str | None = None) -> list[Item]:
    """Every crop file of the given files, folders (with all below them, by name) and tables, in this order.

    labels, domains: names of columns, or "@folder"; without them a table's columns called label and domain.
    UserError where a path is missing, a table cannot be understood, or nothing is found.
    """
    items: list[Item] = []
    for path in paths:
        if path.is_dir():
            found = [str(file) for file in walk(path)]
            items += [Item(file, None, folder_label(file, labels), folder_name(file, domains)) for file in found]
        elif path.suffix.lower() == ".csv":
            items += read_table(path, labels, domains)
        elif path.exists():
            items.append(Item(str(path), None, folder_label(str(path), labels), folder_name(str(path), domains)))
        else:
            raise UserError(f"{path} does not exist; expected a file, a folder or a CSV file; check the path")
    if not items:
        raise UserError(f"no crops in {', '.join(map(str, paths))}; expected {', '.join(SUFFIXES)}; check the path")
    return items


def walk(folder: Path) -> Iterator[Path]:
    """The image files below `folder`, sorted, hidden ones left out; links to folders are not followed."""
    for root, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(files) if name.lower().endswith(SUFFIXES) and name[0] != ".")


def read_table(table: Path, labels: str | None, domains: str | None) -> list[Item]:
    """The rows of a CSV file, in their order."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read ({error}); expected CSV in UTF-8 with a column of paths") from None
    columns = list(rows[0]) if rows else []
    of_path = next((name for name in PATH_COLUMNS if name in columns), None)
    if of_path is None:
        raise UserError(f"{table} has the columns {columns}; expected one of {', '.join(PATH_COLUMNS)}; rename it")
    for name in (labels, domains):
        if name is not None and name != FOLDER and name not in columns:
            raise UserError(f"{table} has no column {name!r} but {columns}; expected one of these; name another")
    of_label = labels or ("label" if "label" in columns else None)
    of_domain = domains or ("domain" if "domain" in columns else None)
    items = []
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise UserError(f"{table}, row {number} has not {len(columns)} fields; expected as many as its header")
        path, page = str(table.parent / row[of_path]), row.get("page", "").strip()
        if page and not (page.isascii() and page.isdigit()):
            raise UserError(
                f"{table}, row {number}: page is {page!r}; expected a number from 0 on or nothing; correct it"
            )
        label = folder_label(path, labels)
        if of_label and of_label != FOLDER:
            label = label_or_none(row[of_label], f"{table}, row {number}, column {of_label}")
        domain = folder_name(path, domains) or (row[of_domain] if of_domain and of_domain != FOLDER else "")
        items.append(Item(path, int(page) if page else None, label, domain))
    return items


def label_or_none(text: str, where: str) -> int | None:
    """A table's label, which may be missing. UserError for a word that is not known: a label is never lost silently."""
    return parse_label(text, where) if text.strip() else None


def folder_name(file: str, wanted: str | None) -> str:
    return Path(file).absolute().parent.name if wanted == FOLDER else ""


def folder_label(file: str, labels: str | None) -> int | None:
    return parse_label(folder_name(file, labels), f"folder of {file}") if labels == FOLDER else None
