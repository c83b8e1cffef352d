"""The answer for one crop and the columns it is written in: the same for CSV files, Parquet files and reports."""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .checksums import ensemble_id
from .errors import UserError
from .imageio.source import File
from .imageio.stack import MAX_BYTES
from .labels import class_of
from .manifest import Manifest

if TYPE_CHECKING:
    from .ensemble import Prediction

CONTENT = re.compile(r"sha256:[0-9a-f]{16}")


class Computed(NamedTuple):
    """What computed an answer: device (cpu or cuda), precision, such as `bf16` or `bf16+fp32`, and `ensemble_id`."""

    device: str
    precision: str
    ensemble: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer for one crop: p_atypical, fold_p (F,) and member_p (M,) in [0, 1]; label 1 (atypical), 0 or None.

    pages: how many the file has; content: `content_of` the file when it was read; slide: the table's, or ""
    seen: whether the ensemble was trained on the crop; None where that is not known
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
    slide: str = ""
    seen: bool | None = None

    @classmethod
    def of(cls, prediction: Prediction, crops: Sequence[Answer] | None = None) -> list[Answer]:
        """The answer for each crop of a prediction. crops: what is known of each before it has an answer."""
        count = len(prediction.p_atypical)
        crops = [cls("", 0, 0.0, ())] * count if crops is None else crops
        members = prediction.member_p.T.tolist() if len(prediction.member_p) > 1 else [()] * count
        each = zip(crops, prediction.p_atypical.tolist(), prediction.fold_p.T.tolist(), members, strict=True)
        return [
            replace(crop, p_atypical=p, fold_p=tuple(folds), member_p=tuple(several))
            for crop, p, folds, several in each
        ]

    @property
    def spread(self) -> float:
        """Largest minus smallest fold; 0 without folds."""
        return max(self.fold_p, default=0.0) - min(self.fold_p, default=0.0)

    def values(self, threshold: float) -> list[float | str]:
        """The cells of `value_columns`."""
        return [self.p_atypical, class_of(self.p_atypical, threshold), *self.fold_p, *self.member_p, self.spread]

    def cells(self, threshold: float, computed: Computed) -> list[float | str]:
        """The cells of `columns`."""
        return [self.path, self.page, self.pages, *self.values(threshold), self.content, *computed]


def fold_columns(manifest: Manifest) -> list[str]:
    """Names of the columns with each fold's P(atypical), member by member."""
    if len(manifest.members) == 1:
        return [f"fold_{n}" for n in range(len(manifest.members[0].folds))]
    return [f"{member.name}_fold_{n}" for member in manifest.members for n in range(len(member.folds))]


def member_columns(manifest: Manifest) -> list[str]:
    """Names of the columns with each member's P(atypical); none if there is only one member."""
    return [f"{member.name}_p" for member in manifest.members] if len(manifest.members) > 1 else []


def value_columns(manifest: Manifest) -> list[str]:
    """The columns of what an ensemble says about a crop, in order."""
    return ["p_atypical", "class", *fold_columns(manifest), *member_columns(manifest), "spread"]


def columns(manifest: Manifest) -> list[str]:
    """All columns of an answer, in order; the last four say which file was read and what computed the answer."""
    return ["path", "page", "pages", *value_columns(manifest), "content", *Computed._fields]


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


def asked_for(manifest: Manifest, device: str, precision: str) -> Computed:
    """What a run is asked to compute with: device and precision are options' values, which may be `auto`."""
    return Computed(device, precision, ensemble_id(manifest))


def computing(manifest: Manifest, asked: Computed) -> Computed:
    """`asked` with this machine's choices in place of `auto`, which need PyTorch. UserError if it has none."""
    if "auto" not in asked:
        return asked
    from .ensemble import Ensemble

    ensemble = Ensemble(manifest, asked.device, asked.precision)
    return asked._replace(device=ensemble.device.type, precision=ensemble.precision)


def pages_of(crops: Sequence[np.ndarray], page: int | None) -> list[tuple[int, np.ndarray]]:
    """(page, crop) for every page of a file, or for `page` alone. UserError if the file has no such page."""
    if page is None:
        return list(enumerate(crops))
    if page >= len(crops):
        raise UserError(f"it has {len(crops)} pages, numbered from 0; the table names page {page}; correct the table")
    return [(page, crops[page])]
