"""The objects as a Parquet file, for tables of cells: one row an object, as in the CSV file, and its place in µm too.

Texts are as the files have them: what is changed in CSV for spreadsheets is not here. The file's own metadata says
under `atypical_mitosis` which ensemble answered, and at which threshold.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..answers import fold_columns, member_columns
from ..checksums import ensemble_id
from ..files import replacing
from ..labels import class_of
from ..manifest import Manifest
from .detections.objects import class_name
from .slide_work import Scored

MARK = b"atypical_mitosis"  # of the file's metadata
TEXTS = ("slide", "id", "detected_as", "detections", "class", "ensemble")


def schema(manifest: Manifest) -> pa.Schema:
    """The columns, none of which is ever null. x, y: level-0 pixels; x_um, y_um: µm from the corner of level 0."""
    numbers = [*fold_columns(manifest), *member_columns(manifest), "spread"]
    identity = ["slide", "id", "x", "y", "x_um", "y_um", "detected_as", "detections"]
    names = [*identity, "p_atypical", "class", *numbers, "ensemble"]
    fields = [pa.field(name, pa.string() if name in TEXTS else pa.float64(), nullable=False) for name in names]
    said = {"name": manifest.name, "id": ensemble_id(manifest), "threshold": manifest.threshold}
    return pa.schema(fields, {MARK: json.dumps(said)})


def is_ours(manifest: Manifest, file: Path) -> bool:
    """Whether a table of this command, to which nobody added columns. OSError where it cannot be read."""
    try:
        stored = pq.read_schema(file)
    except pa.ArrowInvalid:
        return False
    except OSError as error:
        if error.errno is None:  # Arrow's own, for a damaged file
            return False
        raise
    return MARK in (stored.metadata or {}) and stored.names == schema(manifest).names


def table(scored: Scored, manifest: Manifest) -> pa.Table:
    """One slide's objects, in the order of its files."""
    targets, answers, mpp = scored.targets, scored.answers, scored.slide.level.mpp
    number = len(targets)
    p = [answer.p_atypical for answer in answers]
    columns: dict[str, list[Any]] = {
        "slide": [scored.title] * number,
        "id": [target.id for target in targets],
        "x": [x for x, _ in scored.places],
        "y": [y for _, y in scored.places],
        "x_um": [x * mpp[0] for x, _ in scored.places],
        "y_um": [y * mpp[1] for _, y in scored.places],
        "detected_as": [class_name(target.feature) for target in targets],
        "detections": [target.file.name for target in targets],
        "p_atypical": p,
        "class": [class_of(value, manifest.threshold) for value in p],
        "spread": [answer.spread for answer in answers],
        "ensemble": [ensemble_id(manifest)] * number,
    }
    for n, name in enumerate(fold_columns(manifest)):
        columns[name] = [answer.fold_p[n] for answer in answers]
    for n, name in enumerate(member_columns(manifest)):
        columns[name] = [answer.member_p[n] for answer in answers]
    clean = {name: [whole(value) for value in values] if name in TEXTS else values for name, values in columns.items()}
    return pa.Table.from_pydict(clean, schema(manifest))


def whole(text: str) -> str:
    """The text with a question mark for what UTF-8 cannot hold: a lone surrogate, of a path in another encoding."""
    return text.encode("utf-8", "replace").decode()


def write(file: Path, results: Sequence[Scored], manifest: Manifest) -> None:
    """All slides' objects. OSError where it cannot be written."""
    tables = [table(scored, manifest) for scored in results]
    with replacing(file) as hidden:
        pq.write_table(pa.concat_tables(tables), hidden, compression="zstd")
