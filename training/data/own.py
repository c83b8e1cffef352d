"""Loaders for crops of one's own: a table, or the folders Atypical and Normal."""

from __future__ import annotations

import re
from pathlib import Path

from inference.errors import UserError
from inference.labels import parse_label

from .crop import Crop
from .source import Source, class_folders, images_below

GROUP_COLUMNS = ("group", "slide", "case")  # the first that a table has


def from_table(source: Source) -> list[Crop]:
    """A CSV with path and label, and optionally group, domain, votes ("1 0 1"), tumour, scanner and origin.

    Paths are relative to the CSV's folder. Slides are in the column that --group names, or in GROUP_COLUMNS.
    """
    column = _group_column(source)
    crops = []
    for number, row in enumerate(source.rows, 2):
        line = f"{source.file}, line {number}"
        votes = tuple(parse_label(vote, line) for vote in re.split(r"[\s;|]+", row.get("votes") or "") if vote)
        path = Path(row["path"])
        name = f"{source.file.stem}/{path.name if path.is_absolute() else path.as_posix()}"
        group = row[column] if column else name
        if not group:
            raise UserError(f"{line}: no {column}; expected its slide or case, which no split may divide; add it")
        label, domain = parse_label(row["label"], line), row.get("domain") or "unknown"
        tumour, scanner, origin = (row.get(key, "") for key in ("tumour", "scanner", "origin"))
        path = source.file.parent / path
        crops.append(Crop(path, label, group, domain, votes, name, tumour, scanner, origin))
    source.note_outvoted(source.file.name, crops)
    return crops


def _group_column(source: Source) -> str:
    """The column of slides; "" where there is none and each crop may count as a slide of its own."""
    columns = source.rows[0].keys() if source.rows else ()
    if source.group:
        if source.group not in columns:
            raise UserError(
                f"{source.file} has the columns {', '.join(columns)}; expected {source.group}, as --group says; "
                "correct one of them"
            )
        return source.group
    known = [name for name in GROUP_COLUMNS if name in columns]
    if not known and source.rows:
        source.without_groups(f"no column {', '.join(GROUP_COLUMNS)}", "name its column with --group")
    elif known and known[0] != "group":
        source.note(f"{source.file.name}: slides are those of the column {known[0]}")
    return known[0] if known else ""


def from_folders(source: Source) -> list[Crop]:
    """Images below Atypical/ and Normal/. A slide is a folder in them, or what --group matches in the file's name.

    Several folders deep, the slide is the outermost; without either, no slide is known.
    """
    pattern = _pattern(source.group)
    crops: list[Crop] = []
    unknown = 0
    for folder in class_folders(source.file):
        for path in images_below(folder):
            inside = path.relative_to(folder)
            name = f"{source.file.name}/{folder.name}/{inside.as_posix()}"
            group = _slide_of(inside, pattern, path)
            unknown += not group
            crops.append(Crop(path, int(folder.name.lower() == "atypical"), group or name, "unknown", (), name))
    if unknown:
        source.without_groups(
            f"{unknown} of {len(crops)} images lie in no folder of a slide",
            "put each slide's images in a folder below Atypical and Normal, or give a pattern such as "
            r"--group '(.+)_\d+' whose parentheses match the slide in a file's name",
        )
    return crops


def _pattern(text: str) -> re.Pattern[str] | None:
    """The pattern of file names that --group gives; UserError unless it has one pair of parentheses."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(f"--group {text!r} is no pattern ({error}); expected one such as '(.+)_'; correct it") from None
    if text and pattern.groups != 1:
        raise UserError(
            f"--group {text!r} has {pattern.groups} pairs of parentheses; expected one, around the slide, such as "
            "'(.+)_'; correct it"
        )
    return pattern if text else None


def _slide_of(inside: Path, pattern: re.Pattern[str] | None, path: Path) -> str:
    """The slide of an image that lies at `inside` below the folder of its class; "" where it is not known."""
    if pattern is None:
        return inside.parts[0] if len(inside.parts) > 1 else ""
    match = pattern.match(inside.as_posix())
    if match is None or not match[1]:
        raise UserError(
            f"{path} does not match --group {pattern.pattern!r}; expected a slide in the name of every image; correct "
            "the pattern"
        )
    return match[1]
