"""Crops that none of an ensemble's folds has seen, to calibrate the mean that answers.

That needs no labels. A threshold that serves domains does: then the crops are data sets, as `fit --data` takes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inference.answers import pages_of
from inference.errors import UserError
from inference.imageio.listing import list_crops
from inference.imageio.stack import read_stack
from inference.seen import pixel_hash

from ..data.crop import Crop
from ..data.table import load_data
from .candidates import StudyTable

FEWEST = 100


@dataclass(frozen=True)
class Unseen:
    """Crops, each uint8 (H, W, 3), and the SHA-256 of all their pixels; labelled: the same crops, where labels are."""

    crops: list[np.ndarray]
    sha256: str
    labelled: list[Crop]


def read_unseen(places: Sequence[Path], table: StudyTable, with_labels: bool) -> Unseen:
    """The crops in folders, files and CSVs, or of data sets.

    UserError where one is also in the table, where there are too few, or where labels are missing.
    """
    crops, labelled = [], []
    known = {pixel_hash(page) for path in {table.crops[n].path for n in table.studied} for page in read_stack(path)}
    if with_labels:
        labelled = load_data(places)
        crops = [read_stack(crop.path)[0] for crop in labelled]
    else:
        for item in list_crops(list(places)):
            crops += [page for _, page in pages_of(read_stack(Path(item.path)), item.page)]
    digests = [pixel_hash(page) for page in crops]
    seen = sum(digest in known for digest in digests)
    if seen:
        raise UserError(
            f"{seen} of {len(crops)} crops of --unseen are among those that the folds were trained or scored on; "
            "expected none; name others"
        )
    if len(crops) < FEWEST:
        raise UserError(f"--unseen has {len(crops)} crops; expected {FEWEST} or more; name others too")
    return Unseen(crops, hashlib.sha256("".join(digests).encode()).hexdigest(), labelled)
