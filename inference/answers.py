"""An answer for one crop, and how answers are laid out as columns: the same in CSV files, Parquet files and reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import UserError
from .manifest import Manifest


@dataclass(frozen=True)
class Answer:
    """p_atypical, fold_p (F) and member_p (M) in [0, 1]; label 1 (atypical), 0 (normal) or None (not known).

    A crop that is still to be predicted has no folds; an ensemble of one member has no member_p.
    """

    path: str
    page: int
    p_atypical: float
    fold_p: tuple[float, ...]
    member_p: tuple[float, ...] = ()
    label: int | None = None
    domain: str = ""

    @property
    def spread(self) -> float:
        """Largest minus smallest fold; 0 where the folds are not known."""
        return max(self.fold_p, default=0.0) - min(self.fold_p, default=0.0)


def fold_columns(manifest: Manifest) -> list[str]:
    """The names of the columns with P(atypical) of each fold, member after member."""
    if len(manifest.members) == 1:
        return [f"fold_{n}" for n in range(len(manifest.members[0].folds))]
    return [f"{member.name}_fold_{n}" for member in manifest.members for n in range(len(member.folds))]


def member_columns(manifest: Manifest) -> list[str]:
    """The names of the columns with P(atypical) of each member; none where there is only one."""
    return [f"{member.name}_p" for member in manifest.members] if len(manifest.members) > 1 else []


def columns(manifest: Manifest) -> list[str]:
    """All columns of an answer, in their order."""
    folds, members = fold_columns(manifest), member_columns(manifest)
    return ["path", "page", "p_atypical", "class", *folds, *members, "spread", "ensemble"]


def pages_of(crops: Sequence[np.ndarray], page: int | None) -> list[tuple[int, np.ndarray]]:
    """(page, crop) of all pages of a file, or of the one that a table names. UserError where it has fewer."""
    if page is None:
        return list(enumerate(crops))
    if page >= len(crops):
        raise UserError(f"it has {len(crops)} pages; expected a page {page}; correct the table")
    return [(page, crops[page])]
