"""The answer for one crop and the columns it is written in: the same for CSV files, Parquet files and reports."""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import UserError
from .imageio.source import File
from .imageio.stack import MAX_BYTES
from .manifest import Manifest

CONTENT = re.compile(r"sha256:[0-9a-f]{16}")


@dataclass(frozen=True)
class Answer:
    """p_atypical, fold_p (F,) and member_p (M,) in [0, 1]; label 1 (atypical), 0 (normal) or None (unknown).

    pages: how many the file has; content: `content_of` the file when it was read
    fold_p is empty until the crop is predicted; member_p is empty if the ensemble has one member.
    """

    path: str
    page: int
    p_atypical: float
    fold_p: tuple[float, ...]
    member_p: tuple[float, ...] = ()
    label: int | None = None
    domain: str = ""
    pages: int = 1
    content: str = ""

    @property
    def spread(self) -> float:
        """Largest minus smallest fold; 0 without folds."""
        return max(self.fold_p, default=0.0) - min(self.fold_p, default=0.0)


def fold_columns(manifest: Manifest) -> list[str]:
    """Names of the columns with each fold's P(atypical), member by member."""
    if len(manifest.members) == 1:
        return [f"fold_{n}" for n in range(len(manifest.members[0].folds))]
    return [f"{member.name}_fold_{n}" for member in manifest.members for n in range(len(member.folds))]


def member_columns(manifest: Manifest) -> list[str]:
    """Names of the columns with each member's P(atypical); none if there is only one member."""
    return [f"{member.name}_p" for member in manifest.members] if len(manifest.members) > 1 else []


def columns(manifest: Manifest) -> list[str]:
    """All columns of an answer, in order; the last four say which file was read and what computed the answer."""
    folds, members = fold_columns(manifest), member_columns(manifest)
    origin = ["content", "device", "precision", "ensemble"]
    return ["path", "page", "pages", "p_atypical", "class", *folds, *members, "spread", *origin]


def content_of(file: File) -> str:
    """The start of a file's SHA-256, to notice that it was replaced; "" for a file that `read_stack` refuses.

    Computed before the file is decoded: if it changes in between, a later run computes its answer again.
    """
    try:
        status = file.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256")  # type: ignore[arg-type]  # typeshed: no BinaryIO
                return f"sha256:{digest.hexdigest()[:16]}"
    except OSError:
        pass
    return ""


def computing(manifest: Manifest, device: str, precision: str) -> tuple[str, str]:
    """Device (cpu or cuda) and precision that this machine computes `manifest` in. UserError if it cannot.

    Only `auto` needs PyTorch. Members may choose different precisions, such as `bf16+fp32`.
    """
    if "auto" not in (device, precision):
        return device, precision
    from .ensemble import Ensemble

    ensemble = Ensemble(manifest, device, precision)
    return ensemble.device.type, ensemble.precision


def pages_of(crops: Sequence[np.ndarray], page: int | None) -> list[tuple[int, np.ndarray]]:
    """(page, crop) for every page of a file, or for `page` alone. UserError if the file has no such page."""
    if page is None:
        return list(enumerate(crops))
    if page >= len(crops):
        raise UserError(f"it has {len(crops)} pages, numbered from 0; the table names page {page}; correct the table")
    return [(page, crops[page])]
