"""Splits into folds: which crops validate which fold. A group (slide or case) is never on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np

from inference.errors import UserError

from .crop import Crop

Kind: TypeAlias = Literal["grouped", "random", "domain", "leave-one-out"]
KINDS: tuple[Kind, ...] = get_args(Kind)
COLUMNS = ("domain", "tumour", "scanner", "origin")
EIGHT_GROUPS = "eight-groups"  # Tumor x Origin of MIDOG25: the likeliest reading of arXiv 2509.16935
INNER_FOLDS = 8  # early stopping uses one of this many parts of a fold's training crops
EXAM = -1  # the fold of crops that only a finished ensemble is scored on; folds that train and score are 0 and more
SET_ASIDE = -2  # the fold of crops that nothing trains on or is scored on: their slide may lie in two folds


def split(
    crops: Sequence[Crop], kind: Kind = "grouped", folds: int = 3, seed: int = 0, by: str = "domain", exam: int = 0
) -> np.ndarray:
    """The validating fold of each crop, int (N,): from 0, EXAM or SET_ASIDE.

    exam: leave out one of this many parts of each domain's slides, whatever the seed; 0 leaves out none; the other
        crops are split by `kind`:

    grouped: stratified by label, groups kept together (the default)
    random: stratified by label only; leaks groups; for comparison with papers that did so
    domain: stratified by label, domains kept together
    leave-one-out: one fold per domain; `folds` is not used
    by: what a domain is in the last two: see `domains_of`

    Raises UserError where the crops do not allow that many folds, or a group would be on both sides.
    """
    if kind not in KINDS:
        raise UserError(f"split {kind!r} is not known; expected one of {', '.join(KINDS)}")
    fold = np.full(len(crops), EXAM)
    studied = np.flatnonzero(~exam_slides(crops, exam)) if exam else np.arange(len(crops))
    fold[studied] = _folds([crops[n] for n in studied.tolist()], kind, folds, seed, by)
    fold[doubtful(crops, fold, kind)] = SET_ASIDE
    return fold


def _folds(crops: Sequence[Crop], kind: Kind, folds: int, seed: int, by: str) -> np.ndarray:
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


def doubtful(crops: Sequence[Crop], fold: np.ndarray, kind: Kind) -> np.ndarray:
    """Mask (N,) of the crops whose slide is inferred and may be one of another fold; see `Crop.beside`.

    In a random split a slide lies in all folds anyway; only the exam is apart.
    """
    sides = np.minimum(fold, 0) if kind == "random" else fold
    side_of = {crop.group: side for crop, side in zip(crops, sides.tolist(), strict=True)}
    return np.array(
        [any(side_of.get(near, side) != side for near in crop.beside) for crop, side in zip(crops, sides, strict=True)],
        bool,
    )


def exam_slides(crops: Sequence[Crop], parts: int) -> np.ndarray:
    """Mask (N,) of the exam: one of `parts` parts of each domain's groups, classes in proportion.

    The seed of the run plays no part: runs with other seeds or folds have the same exam.
    UserError where a domain has too few groups with the rarer class.
    """
    domains = np.array([crop.domain for crop in crops])
    exam = np.zeros(len(crops), bool)
    for domain in np.unique(domains):
        rows = np.flatnonzero(domains == domain).tolist()
        labels, groups = np.array([crops[n].label for n in rows]), np.array([crops[n].group for n in rows])
        rare = min(len(set(groups[labels == label])) for label in (0, 1))
        part = stratified(labels, groups, min(parts, rare), 0, f"groups of {domain}")
        counts = np.array([[(part == n).sum(), labels[part == n].sum()] for n in np.unique(part)])
        # slides differ in size: the part nearest to its share of the crops and of the atypical ones
        exam[rows] = part == np.abs(counts / counts.sum(axis=0) - 1 / parts).sum(axis=1).argmin()
    return exam


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
