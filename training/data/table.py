"""One table of labelled crops from any number of data sets: found, checked, merged without copies, hashed."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inference.errors import UserError
from inference.imageio.stack import read_stack
from inference.progress import speaking
from inference.seen import pixel_hash

from .crop import Crop
from .layouts import LAYOUTS, Layout
from .source import Row, Source, check_folders, check_names, class_folders

Report = Callable[[str], object]


class DataSet(NamedTuple):
    """One data set as it was read; notes: lines for the user."""

    layout: Layout
    crops: list[Crop]
    notes: list[str]


class Table(NamedTuple):
    """A CSV without blanks around its cells; columns: of its header."""

    file: Path
    columns: set[str]
    rows: list[Row]


@speaking("reading the data sets")
def load_data(paths: Sequence[Path], report: Report = print, *, group: str = "", ungrouped: bool = False) -> list[Crop]:
    """The merged table of the data sets in `paths`, each a folder in a known layout or a CSV.

    Every crop is opened and hashed: no two crops of the table have the same pixels, so no copy can be on both sides of
    a split.

    report: called with a line for everything left out, merged or odd
    group: where slides stand in data of one's own: a column, or a pattern of file names
    ungrouped: whether crops without a slide may each count as one
    Raises UserError where a set is missing, broken or contradicts itself or another.
    """
    sets = [load_set(path, group, ungrouped) for path in paths]
    if group and not any(each.layout.source == "your own" for each in sets):
        raise UserError(
            f"--group {group} is for data of your own; expected none: published data sets name their slides"
        )
    crops = [crop for each in sets for crop in each.crops]
    for each in sets:
        report(f"{each.layout.name}: {len(each.crops):,} crops, {sum(crop.label for crop in each.crops):,} atypical")
        for note in each.notes:
            report(note)
    check_names(crops)
    crops = without_overlap(crops, report)
    return without_copies(without_doubles(crops, report), report)


def load_set(path: Path, group: str = "", ungrouped: bool = False) -> DataSet:
    """One data set. UserError where it is missing, unknown or lacks crops."""
    layout, source = find_source(path)
    source.group, source.ungrouped = group, ungrouped
    crops = layout.load(source)
    if not crops:
        raise UserError(f"{source.file} names no crops; expected {layout.files}; get it from {layout.source}")
    missing = [crop.path for crop in crops if not crop.path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(crops)} crops of {layout.name} are missing (first: {missing[0]}); expected "
            f"{layout.files}; get them from {layout.source}"
        )
    check_folders(crops)
    atypical = sum(crop.label for crop in crops)
    if layout.crops and (len(crops), atypical) != (layout.crops, layout.atypical):
        source.note(
            f"{layout.name}: {layout.crops:,} crops with {layout.atypical:,} atypical are published, "
            f"{len(crops):,} with {atypical:,} are here"
        )
    return DataSet(layout, crops, source.notes)


def find_source(path: Path) -> tuple[Layout, Source]:
    """The data set at `path`: a CSV with a layout's columns, or a folder that has one or needs none."""
    if not path.exists():
        raise UserError(f"{path} does not exist; {_expected(path)}")
    known: list[tuple[Layout, Source]] = []
    for table in map(read_table, [path] if path.is_file() else sorted(path.glob("*.csv"))):
        layout = next((each for each in LAYOUTS if each.columns and each.columns <= table.columns), None)
        if layout is not None:
            known.append((layout, Source(table.file, table.rows)))
        elif path.is_file():
            raise UserError(
                f"{path} has the columns {', '.join(sorted(table.columns))}; expected path, label, group, domain, or "
                "those of a published data set; 'python -m training datasets' lists them"
            )
    if len(known) > 1:
        names = ", ".join(source.file.name for _, source in known)
        raise UserError(f"{path} holds {len(known)} tables of crops ({names}); expected one; name the file instead")
    if known:
        return known[0]
    if class_folders(path):
        name = "AtNorM-Br" if "atnorm-br" in path.name.lower() else "your own folders"
        return next(layout for layout in LAYOUTS if layout.name == name), Source(path)
    raise UserError(f"{path} holds no table that is known; {_expected(path)}")


def read_table(file: Path) -> Table:
    """The rows of a CSV, without blanks around names and cells: a slide is the same with a blank behind it."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            cells = [{key.strip(): (row[key] or "").strip() for key in reader.fieldnames or ()} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read ({error}); expected a CSV in UTF-8; download it again") from None
    return Table(file, {name.strip() for name in reader.fieldnames or ()}, cells)


def _expected(path: Path) -> str:
    """What is expected at `path`, for the data set that its name resembles, or for all."""
    letters = re.sub(r"[^a-z0-9]", "", path.name.lower())
    for layout in LAYOUTS:
        key = re.sub(r"[^a-z0-9]", "", layout.name.split(" (")[0].lower())
        if key in letters:
            return f"expected {layout.name}: {layout.files}; get it from {layout.source}"
    return "expected a data set's folder or a CSV; 'python -m training datasets' lists the layouts and their sources"


def without_overlap(crops: list[Crop], report: Report) -> list[Crop]:
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


def without_doubles(crops: list[Crop], report: Report) -> list[Crop]:
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


def without_copies(crops: list[Crop], report: Report) -> list[Crop]:
    """The crops with their `pixels`, without copies of an earlier crop; UserError where two copies differ in label."""
    first: dict[str, Crop] = {}
    sides = []
    copies: list[tuple[Crop, Crop]] = []
    contrary: list[tuple[Crop, Crop]] = []
    for listed in crops:  # one at a time: a data set may be larger than the memory
        image = read_stack(listed.path)[0]
        crop = dataclasses.replace(listed, pixels=pixel_hash(image))
        sides.append(image.shape[:2])
        known = first.setdefault(crop.pixels, crop)
        if known is not crop:
            (copies if known.label == crop.label else contrary).append((known, crop))
    if contrary:
        known, crop = contrary[0]
        raise UserError(
            f"{len(contrary)} crops have the pixels of another and the other label (first: {known.name}, label "
            f"{known.label}, and {crop.name}, label {crop.label}); expected one label for one figure; correct a table, "
            "or leave one data set out"
        )
    if copies:
        known, crop = copies[0]
        report(
            f"{len(copies):,} crops have the pixels of another and are counted once, as in the data set named first "
            f"(first: {crop.name} = {known.name})"
        )
    low, high = np.min(sides, axis=0), np.max(sides, axis=0)
    if (low != high).any():
        report(f"crops are {low[1]} x {low[0]} to {high[1]} x {high[0]} pixels")
    return list(first.values())


def table_hash(crops: Sequence[Crop]) -> str:
    """SHA-256 of the table without its paths: the same data have the same hash on every machine."""
    lines = (f"{c.name}\t{c.label}\t{c.group}\t{c.domain}\t{' '.join(map(str, c.votes))}\n" for c in crops)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def describe(crops: Sequence[Crop]) -> dict[str, Any]:
    """What a manifest says about the data: counts, the hashes of table and pixels, no path of this machine."""
    sets = Counter(crop.name.split("/")[0] if "/" in crop.name else "plain CSV" for crop in crops)
    domains = Counter(crop.domain for crop in crops)
    return {
        "sets": dict(sets),
        "crops": len(crops),
        "atypical": sum(crop.label for crop in crops),
        "groups": len({crop.group for crop in crops}),
        "domains": {name: domains[name] for name in sorted(domains)},
        "sha256": table_hash(crops),
        "pixels": hashlib.sha256("".join(crop.pixels for crop in crops).encode()).hexdigest(),
    }


def same_data(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two descriptions are of the same crops; those of earlier versions have no `pixels` and count without."""
    if not ("pixels" in first and "pixels" in second):
        first, second = ({name: value for name, value in each.items() if name != "pixels"} for each in (first, second))
    return first == second
