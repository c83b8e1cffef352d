"""One table of labelled crops from any number of data sets: found, checked, merged without copies, hashed."""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inference.errors import UserError
from inference.imageio.stack import read_stack

from .layouts import LAYOUTS, Crop, Layout, Row, check_folders

__all__ = ["Crop", "ami_br", "describe", "load_data", "load_set", "table_hash"]


def load_data(places: Sequence[Path], report: Callable[[str], object] = print) -> list[Crop]:
    """The merged table of the data sets in `places`, each a folder in its published layout or a CSV.

    Every crop is opened: no two crops of the table have the same pixels, so no copy can be on both sides of a split.

    report: called with a line for everything left out, merged or odd
    Raises UserError where a set is missing, broken or contradicts itself or another.
    """
    sets = [load_set(place) for place in places]
    crops = [crop for _, found, _ in sets for crop in found]
    for layout, found, notes in sets:
        report(f"{layout.name}: {len(found):,} crops, {sum(crop.label for crop in found):,} atypical")
        for note in notes:
            report(note)
    crops = without_overlap(crops, report)
    return without_copies(without_doubles(crops, report), report)


def ami_br(folder: Path) -> list[Crop]:
    """The crops of AMi-Br in either of its layouts, without a report."""
    return load_set(folder)[1]


def load_set(place: Path) -> tuple[Layout, list[Crop], list[str]]:
    """(layout, crops, notes) of one data set. UserError where it is missing, unknown or lacks crops."""
    file, layout, rows = find_table(place)
    notes: list[str] = []
    crops = layout.load(file, rows, notes)
    if not crops:
        raise UserError(f"{file} names no crops; expected {layout.files}; get it from {layout.place}")
    missing = [crop.path for crop in crops if not crop.path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(crops)} crops of {layout.name} are missing (first: {missing[0]}); expected "
            f"{layout.files}; get them from {layout.place}"
        )
    check_folders(crops)
    atypical = sum(crop.label for crop in crops)
    if layout.crops and (len(crops), atypical) != (layout.crops, layout.atypical):
        notes.append(
            f"{layout.name}: {layout.crops:,} crops with {layout.atypical:,} atypical are published, "
            f"{len(crops):,} with {atypical:,} are here"
        )
    return layout, crops, notes


def find_table(place: Path) -> tuple[Path, Layout, list[Row]]:
    """(file, layout, rows) of the data set in `place`: a CSV with a layout's columns, or a folder without one."""
    if not place.exists():
        raise UserError(f"{place} does not exist; {_where_published(place)}")
    files = [place] if place.is_file() else sorted(place.glob("*.csv"))
    found = []
    for file in files:
        columns, rows = _read_csv(file)
        layout = next((known for known in LAYOUTS if known.columns and known.columns <= columns), None)
        if layout is not None:
            found.append((file, layout, rows))
        elif place.is_file():
            raise UserError(
                f"{file} has the columns {', '.join(sorted(columns))}; expected path, label, group, domain, or those "
                "of a published data set; 'python -m training datasets' lists them"
            )
    if len(found) > 1:
        names = ", ".join(file.name for file, _, _ in found)
        raise UserError(f"{place} holds {len(found)} tables of crops ({names}); expected one; name the file instead")
    if found:
        return found[0]
    if {"Atypical", "Normal"} <= {child.name for child in place.iterdir()} and "atnorm-br" in place.name.lower():
        return place, next(layout for layout in LAYOUTS if layout.name == "AtNorM-Br"), []
    raise UserError(f"{place} holds no table that is known; {_where_published(place)}")


def _read_csv(file: Path) -> tuple[set[str], list[Row]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            rows = [{key: value or "" for key, value in row.items() if key is not None} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read ({error}); expected a CSV in UTF-8; download it again") from None
    return set(reader.fieldnames or ()), rows


def _where_published(place: Path) -> str:
    """What is expected in `place`, for the data set that its name resembles, or for all."""
    letters = re.sub(r"[^a-z0-9]", "", place.name.lower())
    for layout in LAYOUTS:
        key = re.sub(r"[^a-z0-9]", "", layout.name.split(" (")[0].lower())
        if key in letters:
            return f"expected {layout.name}: {layout.files}; get it from {layout.place}"
    return "expected a data set's folder or a CSV; 'python -m training datasets' lists the layouts and their sources"


def without_overlap(crops: list[Crop], report: Callable[[str], object]) -> list[Crop]:
    """The crops without MIDOG25's copies of AMi-Br: its breast regions have the names of MIDOG21's, 002 to 150.

    Without this, each of these 1,721 figures would count twice and could be on both sides of a split.
    """
    rois = {crop.group.removeprefix("MIDOG21/") for crop in crops if crop.group.startswith("MIDOG21/")}
    breast = [
        crop for crop in crops if crop.group.startswith("MIDOG25/") and crop.domain.startswith("human breast cancer")
    ]
    doubles = {crop.name for crop in breast if crop.group.removeprefix("MIDOG25/") in rois}
    if rois and breast:
        report(f"overlap: {len(doubles):,} breast figures of MIDOG25 are AMi-Br's and are counted once")
        if len(doubles) < len(breast):
            report(
                f"overlap: {len(breast) - len(doubles):,} breast figures of MIDOG25 are from regions that this AMi-Br "
                "table leaves out (the benchmark's test split); they stay in"
            )
    if {"MIDOG25", "AtNorM-MD"} <= {crop.name.split("/")[0] for crop in crops}:
        report("overlap: AtNorM-MD was drawn from MIDOG25's regions and names none; only equal crops are recognised")
    return [crop for crop in crops if crop.name not in doubles or not crop.group.startswith("MIDOG25/")]


def without_doubles(crops: list[Crop], report: Callable[[str], object]) -> list[Crop]:
    """Every file once; UserError where it is listed with two labels, groups or domains."""
    first: dict[Path, Crop] = {}
    for crop in crops:
        known = first.setdefault(crop.path.resolve(), crop)
        if (known.label, known.group, known.domain) != (crop.label, crop.group, crop.domain):
            raise UserError(
                f"{crop.path} is listed as label {known.label} of {known.group} in {known.domain} and as label "
                f"{crop.label} of {crop.group} in {crop.domain}; expected one answer; correct the table"
            )
    if len(first) < len(crops):
        report(f"{len(crops) - len(first):,} rows name a file that another row names too; each is counted once")
    return list(first.values())


def without_copies(crops: list[Crop], report: Callable[[str], object]) -> list[Crop]:
    """The crops without those that have the pixels of an earlier one; UserError where two copies differ in label."""
    first: dict[bytes, Crop] = {}
    sides = []
    copies: list[tuple[Crop, Crop]] = []
    contrary: list[tuple[Crop, Crop]] = []
    for crop in crops:  # one at a time: a data set may be larger than the memory
        pixels = read_stack(crop.path)[0]
        sides.append(pixels.shape[:2])
        known = first.setdefault(hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest(), crop)
        if known is not crop:
            (copies if known.label == crop.label else contrary).append((known, crop))
    if contrary:
        one, other = contrary[0]
        raise UserError(
            f"{len(contrary)} crops have the pixels of another and the other label (first: {one.name}, label "
            f"{one.label}, and {other.name}, label {other.label}); expected one label for one figure; correct a table, "
            "or leave one data set out"
        )
    if copies:
        one, other = copies[0]
        report(
            f"{len(copies):,} crops have the pixels of another and are counted once, as in the data set named first "
            f"(first: {other.name} = {one.name})"
        )
    low, high = np.min(sides, axis=0), np.max(sides, axis=0)
    if (low != high).any():
        report(f"crops are {low[1]} x {low[0]} to {high[1]} x {high[0]} pixels")
    left = set(map(id, (other for _, other in copies)))
    return [crop for crop in crops if id(crop) not in left]


def table_hash(crops: Sequence[Crop]) -> str:
    """SHA-256 of the table without its paths: the same data have the same hash on every machine."""
    lines = (f"{c.name}\t{c.label}\t{c.group}\t{c.domain}\t{' '.join(map(str, c.votes))}\n" for c in crops)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def describe(crops: Sequence[Crop]) -> dict[str, Any]:
    """What a manifest says about the data: counts and the table's hash, no path of this machine."""
    sets = Counter(crop.name.split("/")[0] if "/" in crop.name else "plain CSV" for crop in crops)
    domains = Counter(crop.domain for crop in crops)
    return {
        "sets": dict(sets),
        "crops": len(crops),
        "atypical": sum(crop.label for crop in crops),
        "groups": len({crop.group for crop in crops}),
        "domains": {name: domains[name] for name in sorted(domains)},
        "sha256": table_hash(crops),
    }
