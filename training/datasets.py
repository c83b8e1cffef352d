"""List the known data sets with their sources and layouts, or check those that are here and how they merge."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .data import Crop, describe, load_data
from .feed import load_crops
from .layouts import LAYOUTS


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", type=Path, nargs="*", help="data set folders or CSVs to check; none lists what is known"
    )
    parser.add_argument("--pixels", action="store_true", help="open every crop too, and look for equal ones")
    parser.add_argument("--json", type=Path, help="write counts and hash to this file")


def run(options: argparse.Namespace) -> None:
    if not options.data:
        print(catalogue())
        return
    crops = load_data(options.data)
    summary = describe(crops)
    print(f"together: {summary['crops']:,} crops, {summary['atypical']:,} atypical "
          f"({summary['atypical'] / summary['crops']:.1%}), {summary['groups']:,} slides or cases")  # fmt: skip
    width = max(map(len, summary["domains"]))
    for name, count in summary["domains"].items():
        atypical = sum(crop.label for crop in crops if crop.domain == name)
        groups = len({crop.group for crop in crops if crop.domain == name})
        print(f"  {name:<{width}}  {count:>6,} crops  {atypical / count:>6.1%} atypical  {groups:>4,} slides")
    print(f"table {summary['sha256']}")
    if options.pixels:
        for line in pixel_report(crops):
            print(line)
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def catalogue() -> str:
    """What is known of every layout, as text."""
    lines = []
    for layout in LAYOUTS:
        counts = f": {layout.crops:,} crops, {layout.atypical:,} atypical" if layout.crops else ""
        lines += [f"{layout.name}{counts}", f"  from   {layout.place}", f"  files  {layout.files}"]
    return "\n".join(lines)


def pixel_report(crops: Sequence[Crop]) -> list[str]:
    """Lines on the sizes of the crops, and on crops whose pixels are equal though their files are not the same."""
    equal: dict[bytes, list[Crop]] = defaultdict(list)
    sides = []
    for crop in crops:  # one at a time: a data set may be larger than the memory
        image = load_crops([crop])[0]
        sides.append(image.shape[:2])
        equal[hashlib.sha256(np.array(image.shape).tobytes() + image.tobytes()).digest()].append(crop)
    low, high = np.min(sides, axis=0), np.max(sides, axis=0)
    lines = [f"pixels: {low[1]} x {low[0]} to {high[1]} x {high[0]}"]
    doubles = [found for found in equal.values() if len(found) > 1]
    lines.append(f"pixels: {sum(map(len, doubles)) - len(doubles):,} crops have the pixels of another")
    for kind, differ in (("label", lambda c: c.label), ("group", lambda c: c.group)):
        odd = [found for found in doubles if len({differ(crop) for crop in found}) > 1]
        if odd:
            names = " = ".join(crop.name for crop in odd[0])
            lines.append(f"pixels: {len(odd):,} of these sets differ in their {kind} (first: {names})")
    return lines
