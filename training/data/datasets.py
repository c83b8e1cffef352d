"""List the known data sets with their sources and layouts, or check those on this machine and how they merge."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .layouts import LAYOUTS
from .table import describe, load_data

GROUP_HELP = (
    "where the slide or case of each crop stands in data of your own: a column of a CSV (default: group, slide or "
    "case), or a pattern for the names of files in Atypical/ and Normal/ with the slide in parentheses, such as "
    r"'(.+)_\d+' (default: the folders there)"
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", type=Path, nargs="*", help="data set folders or CSVs to check; none lists what is known"
    )
    parser.add_argument("--group", default="", metavar="COLUMN|PATTERN", help=GROUP_HELP)
    parser.add_argument("--json", type=Path, help="write counts and hash to this file")


def run(options: argparse.Namespace) -> None:
    if not options.data:
        print(catalogue())
        return
    crops = load_data(options.data, group=options.group, ungrouped=True)
    summary = describe(crops)
    print(
        f"together: {summary['crops']:,} crops, {summary['atypical']:,} atypical "
        f"({summary['atypical'] / summary['crops']:.1%}), {summary['groups']:,} slides or cases"
    )
    width = max(map(len, summary["domains"]))
    for name, count in summary["domains"].items():
        atypical = sum(crop.label for crop in crops if crop.domain == name)
        groups = len({crop.group for crop in crops if crop.domain == name})
        slides = f"{groups:>4,} slide{'s' * (groups > 1)}"
        print(f"  {name:<{width}}  {count:>6,} crops  {atypical / count:>6.1%} atypical  {slides}")
    print(f"table {summary['sha256']}")
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def catalogue() -> str:
    """A description of every known layout, as text."""
    lines = []
    for layout in LAYOUTS:
        counts = f": {layout.crops:,} crops, {layout.atypical:,} atypical" if layout.crops else ""
        lines += [f"{layout.name}{counts}", f"  from   {layout.source}", f"  files  {layout.files}"]
    return "\n".join(lines)
