"""Splits into folds: which crops validate which fold. A group (slide or case) is never on both sides."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from inference.errors import UserError

from .data import Crop

KINDS = ("grouped", "random", "domain")


def split(crops: Sequence[Crop], kind: str = "grouped", folds: int = 3, seed: int = 0) -> np.ndarray:
    """The validating fold of each crop, int (N,).

    grouped: stratified by label, groups kept together (the default)
    random: stratified by label only; refuses nothing and leaks, for comparison with papers that did so
    domain: leave one domain out, one fold per domain; `folds` is not used
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    labels = np.array([crop.label for crop in crops])
    groups = np.array([crop.group for crop in crops])
    fold = np.full(len(crops), -1)
    if kind == "domain":
        domains = sorted({crop.domain for crop in crops})
        if len(domains) < 2:
            raise UserError(f"found {len(domains)} domain; leave-one-domain-out needs two or more; use --split grouped")
        fold = np.array([domains.index(crop.domain) for crop in crops])
    elif kind in ("grouped", "random"):
        of = "groups" if kind == "grouped" else "crops"
        units = groups if kind == "grouped" else np.arange(len(crops))
        fewest = min(len(set(units[labels == label])) for label in (0, 1))
        if not 2 <= folds <= fewest:
            raise UserError(f"{folds} folds; found {fewest} {of} with the rarer class; expected 2 to {fewest} folds")
        kind_of = StratifiedGroupKFold if kind == "grouped" else StratifiedKFold
        splitter = kind_of(folds, shuffle=True, random_state=seed)
        together = groups if kind == "grouped" else None
        for number, (_, held_out) in enumerate(splitter.split(labels, labels, together)):
            fold[held_out] = number
    else:
        raise UserError(f"split {kind!r} is not known; expected one of {', '.join(KINDS)}")
    if kind != "random":
        check_leaks(crops, fold)
    return fold


def check_leaks(crops: Sequence[Crop], fold: np.ndarray) -> None:
    """UserError where a group validates one fold and trains it too, that is, where it lies in two folds."""
    seen: dict[str, int] = {}
    for crop, number in zip(crops, fold.tolist(), strict=True):
        if seen.setdefault(crop.group, number) != number:
            raise UserError(
                f"group {crop.group} is in folds {seen[crop.group]} and {number}; expected one; split again by group"
            )


def write_split(file: Path, crops: Sequence[Crop], fold: np.ndarray) -> None:
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["path", "label", "group", "domain", "fold"])
        writer.writerows([c.path, c.label, c.group, c.domain, f] for c, f in zip(crops, fold.tolist(), strict=True))


def read_split(file: Path, crops: Sequence[Crop]) -> np.ndarray:
    """The folds that `write_split` wrote, for the same crops in the same order."""
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    if [row["path"] for row in rows] != [str(crop.path) for crop in crops]:
        raise UserError(f"{file} lists other crops than the data; expected the same run's; start a new run folder")
    return np.array([int(row["fold"]) for row in rows])
