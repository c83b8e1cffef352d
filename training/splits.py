"""Splits into folds: which crops validate which fold. A group (slide or case) is never on both sides."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from inference.errors import UserError

from .data import Crop

KINDS = ("grouped", "random", "domain", "leave-one-out")
COLUMNS = ("domain", "tumour", "scanner", "origin")
EIGHT_GROUPS = "eight-groups"  # Tumor x Origin of MIDOG25: the likeliest reading of arXiv 2509.16935
INNER_FOLDS = 8  # early stopping uses one of this many parts of a fold's training crops


def split(
    crops: Sequence[Crop], kind: str = "grouped", folds: int = 3, seed: int = 0, by: str = "domain"
) -> np.ndarray:
    """The validating fold of each crop, int (N,).

    grouped: stratified by label, groups kept together (the default)
    random: stratified by label only; leaks groups; for comparison with papers that did so
    domain: stratified by label, domains kept together
    leave-one-out: one fold per domain; `folds` is not used
    by: what a domain is in the last two: see `domains_of`

    Raises UserError where the crops do not allow that many folds, or a group would be on both sides.
    """
    if kind not in KINDS:
        raise UserError(f"split {kind!r} is not known; expected one of {', '.join(KINDS)}")
    labels = np.array([crop.label for crop in crops])
    if kind == "random":
        return stratified(labels, None, folds, seed, "crops")
    if kind == "grouped":
        fold = stratified(labels, np.array([crop.group for crop in crops]), folds, seed, "groups")
    else:
        domains = domains_of(crops, by)
        names = np.unique(domains)
        if len(names) < 2:
            raise UserError(f"found {len(names)} {by}; expected two or more to split by; use split=grouped")
        if kind == "domain":
            fold = stratified(labels, domains, folds, seed, f"values of {by}")
        else:
            fold = np.searchsorted(names, domains)
    check_leaks(crops, fold)
    return fold


def stratified(labels: np.ndarray, units: np.ndarray | None, folds: int, seed: int, of: str) -> np.ndarray:
    """Folds (N,) with the classes in proportion and each of `units` (N,) whole; None: each crop is a unit.

    of: the units' name, for the message that there are too few
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    each = np.arange(len(labels)) if units is None else units
    fewest = min(len(set(each[labels == label])) for label in (0, 1))
    if not 2 <= folds <= fewest:
        raise UserError(f"{folds} folds; found {fewest} {of} with the rarer class; expected 2 to {fewest} folds")
    kind = StratifiedKFold if units is None else StratifiedGroupKFold
    fold = np.full(len(labels), -1)
    for number, (_, held_out) in enumerate(kind(folds, shuffle=True, random_state=seed).split(labels, labels, units)):
        fold[held_out] = number
    return fold


def domains_of(crops: Sequence[Crop], by: str) -> np.ndarray:
    """The domain of each crop (N,) by a column or a product of columns, such as "tumour x origin".

    by: one or more of COLUMNS, joined by " x ", or "eight-groups"
    UserError where `by` is neither, or where a crop has no value.
    """
    columns = ("tumour x origin" if by == EIGHT_GROUPS else by).split(" x ")
    for column in columns:
        if column not in COLUMNS:
            raise UserError(
                f"split_by {by!r} is not known; expected {EIGHT_GROUPS}, or one or more of {', '.join(COLUMNS)} joined "
                'by " x "; change it'
            )
        without = [crop for crop in crops if not getattr(crop, column)]
        if without:
            raise UserError(
                f"{len(without)} of {len(crops)} crops have no {column} (first: {without[0].name or without[0].path}); "
                f"expected one for each to split by {by}; split by another column, or leave their data set out"
            )
    return np.array([" x ".join(getattr(crop, column) for column in columns) for crop in crops])


def inner_holdout(crops: Sequence[Crop], kind: str, seed: int) -> np.ndarray:
    """Mask (N,) of a fold's training crops that choose its epoch instead of training it: an eighth, by whole groups.

    Early stopping must not watch the crops that the fold is scored on: the best of many epochs would be optimistic.
    """
    labels = np.array([crop.label for crop in crops])
    groups = None if kind == "random" else np.array([crop.group for crop in crops])
    each = np.arange(len(crops)) if groups is None else groups
    fewest = min(len(set(each[labels == label])) for label in (0, 1))
    if fewest < 2:
        raise UserError(
            f"patience needs crops that choose the epoch; found {fewest} groups with the rarer class in a fold's "
            "training crops; expected 2 or more; use --set patience=0"
        )
    return stratified(labels, groups, min(INNER_FOLDS, fewest), seed, "groups") == 0


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
