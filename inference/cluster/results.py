"""The output folder of a cluster's run: one Parquet file of answers per shard, whole or not there at all.

`<shard>.parquet` has the columns of the local command's CSV file, then the input's own; `_errors/<shard>.parquet` has
path, page and reason of what could not be scored; `_job.json` says which ensemble answered, on which device and in what
precision. Readers of a folder of Parquet files skip names that begin with `_` or a dot.
"""

from __future__ import annotations

import json
import os
import platform
import uuid
from collections.abc import Container, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ..answers import Answer, Computed, columns
from ..errors import UserError
from ..manifest import Manifest
from .shards import one_line, resolve

STORES = ("s3", "gcs", "abfs")  # objects appear when complete; elsewhere a rename does that
ERRORS = pa.schema({"path": pa.string(), "page": pa.int32(), "reason": pa.string()})
Error = tuple[str, int | None, str]


class Results:
    def __init__(self, location: str, expected: bool = False) -> None:
        """location: a folder or a URI, made if missing; expected: UserError unless it is there and claimed."""
        self.system, folder, _ = resolve(location)
        self.folder = folder.rstrip("/")
        self.rename = self.system.type_name not in STORES
        if expected and not self.system.get_file_info(f"{self.folder}/_job.json").is_file:
            raise UserError(f"{location} is not the run's output on {platform.node()}; expected it shared by all nodes")
        try:
            self.system.create_dir(f"{self.folder}/_errors", recursive=True)
        except OSError as error:
            raise UserError(f"{location} cannot be written ({one_line(error)}); name another folder") from None

    def check(self, job: dict[str, Any]) -> bool:
        """Refuse an output whose answers come from another `job`, as far as known; returns whether it is claimed."""
        file = f"{self.folder}/_job.json"
        try:
            with self.system.open_input_stream(file) as stream:
                claimed = json.loads(stream.read())
        except FileNotFoundError:
            if self.shards():
                raise UserError(
                    f"{self.folder} holds other Parquet files; expected an empty folder; name another --output"
                ) from None
            return False
        except ValueError:
            raise UserError(f"{file} is damaged; expected {json.dumps(job)}; name another --output") from None
        for key, value in job.items():
            if claimed.get(key) != value:
                raise UserError(
                    f"{self.folder} holds answers with {key} {claimed.get(key)}; this run has {value}; "
                    f"name another --output, or use the same {key}"
                )
        return True

    def claim(self, job: dict[str, Any]) -> None:
        """`check`, and mark an empty output as this job's."""
        if not self.check(job):
            self.put("_job.json", json.dumps(job).encode())

    def shards(self, folder: str = "") -> set[str]:
        """Names of the shards that have a file in the output, or in a folder of it."""
        listed = self.system.get_file_info(fs.FileSelector(self.folder + folder, allow_not_found=True))
        # a loss of power may leave an empty file
        names = (info.base_name for info in listed if info.is_file and info.size and info.base_name[0] not in "._")
        return {name.removesuffix(".parquet") for name in names if name.endswith(".parquet")}

    def put(self, name: str, content: Any) -> None:
        target = f"{self.folder}/{name}"
        written = f"{self.folder}/.{uuid.uuid4().hex}.partial" if self.rename else target
        with self.system.open_output_stream(written, compression=None) as stream:
            stream.write(content)
        if self.system.type_name == "local":  # flushed to disk before the file gets its name
            with open(written, "rb") as stream:
                os.fsync(stream.fileno())
        if self.rename:
            self.system.move(written, target)

    def put_table(self, name: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.put(f"{name}.parquet", sink.getvalue())

    def finish(self, shard: str, answers: pa.Table, errors: Sequence[Error]) -> None:
        """The answers are written last: a shard that has them is finished."""
        self.note(shard, errors)
        self.put_table(shard, answers)

    def note(self, shard: str, errors: Sequence[Error]) -> None:
        """Write the shard's error table, or, without errors, remove one that an earlier run left."""
        if errors:
            rows = [dict(zip(ERRORS.names, error, strict=True)) for error in errors]
            self.put_table(f"_errors/{shard}", pa.Table.from_pylist(rows, ERRORS))
        elif self.system.get_file_info(f"{self.folder}/_errors/{shard}.parquet").is_file:
            self.forget(shard)

    def forget(self, shard: str) -> None:
        self.system.delete_file(f"{self.folder}/_errors/{shard}.parquet")

    def errors(self, shard: str) -> list[Error]:
        with self.system.open_input_file(f"{self.folder}/_errors/{shard}.parquet") as stream:
            return [(row["path"], row["page"], row["reason"]) for row in pq.read_table(stream).to_pylist()]


def free_name(name: str, taken: Container[str]) -> str:
    """`name`, with `input_` before it if one of our columns has that name."""
    while name in taken:
        name = f"input_{name}"
    return name


TYPES = {"page": pa.int32(), "pages": pa.int32()} | dict.fromkeys(
    ("path", "class", "content", *Computed._fields), pa.string()
)  # of columns; all others are float64


def table_of(answers: Sequence[Answer], manifest: Manifest, computed: Computed, metadata: pa.Table) -> pa.Table:
    """A row for each answer, with its row of the metadata.

    A column of the input that has one of our names gets `input_` before it.
    """
    names = columns(manifest)
    cells = [answer.cells(manifest.threshold, computed) for answer in answers]
    table: dict[str, Any] = {
        name: pa.array([row[n] for row in cells], TYPES.get(name, pa.float64())) for n, name in enumerate(names)
    }
    for name, column in zip(metadata.column_names, metadata.columns, strict=True):
        table[free_name(name, table)] = column
    return pa.table(table)
