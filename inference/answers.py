"""An answer for one crop, and how answers are laid out as columns: the same in CSV files, Parquet files and reports."""

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
    """p_atypical, fold_p (F) and member_p (M) in [0, 1]; label 1 (atypical), 0 (normal) or None (not known).

    pages: how many the file has; content: what `content_of` said of the file when it was read.
    A crop that is still to be predicted has no folds; an ensemble of one member has no member_p.
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
    """All columns of an answer, in their order; the last four tell which file was read, and what computed it."""
    folds, members = fold_columns(manifest), member_columns(manifest)
    origin = ["content", "device", "precision", "ensemble"]
    return ["path", "page", "pages", "p_atypical", "class", *folds, *members, "spread", *origin]


def content_of(file: File) -> str:
    """What tells a file from another that takes its place: the start of its SHA-256; "" for what `read_stack` refuses.

    Taken before the file is decoded: should it change in between, its answer does not count as known afterwards.
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
    """Device (cpu or cuda) and precision in which `manifest` is computed here. UserError where it cannot be.

    Only `auto` needs PyTorch; two members may choose two precisions, such as `bf16+fp32`.
    """
    if "auto" not in (device, precision):
        return device, precision
    from .ensemble import Ensemble

    ensemble = Ensemble(manifest, device, precision)
    return ensemble.device.type, ensemble.precision


def pages_of(crops: Sequence[np.ndarray], page: int | None) -> list[tuple[int, np.ndarray]]:
    """(page, crop) of all pages of a file, or of the one that a table names. UserError where it has fewer."""
    if page is None:
        return list(enumerate(crops))
    if page >= len(crops):
        raise UserError(f"it has {len(crops)} pages; expected a page {page}; correct the table")
    return [(page, crops[page])]
