"""Generated crops as files, archives and tables, and the command that scores them on a cluster."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from test.support import commands

CROPS = 60
POISON = {3: b"", 17: b"\x89PNG\r\n\x1a\n" + bytes(40), 41: b"no image"}


def encode(rng: np.random.Generator) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(file: Path, blobs: list[bytes], first: int = 0) -> Path:
    """Samples numbered from `first` on, each an image and a text."""
    with tarfile.open(file, "w") as archive:
        for n, blob in enumerate(blobs, first):
            for name, content in ((f"s/{n:03}.png", blob), (f"s/{n:03}.json", json.dumps({"x": n}).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file


def write_parquet(file: Path, blobs: list[bytes], rows: int = 10) -> Path:
    numbers = range(len(blobs))
    table = pa.table({"slide": [f"slide {n % 4}" for n in numbers], "image": blobs, "x": list(numbers)})
    pq.write_table(table, file, row_group_size=rows)
    return file


def write_folder(folder: Path, blobs: list[bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n, blob in enumerate(blobs):
        (folder / f"{n:03}.png").write_bytes(blob)
    return folder


def arguments(weights: Path, output: object, *more: object) -> list[str]:
    """Options that come last in `more` win over the ones here."""
    ours = ["--output", output, "--weights", weights, "--device", "cpu", "--precision", "fp32"]
    return [str(word) for word in (*ours, *more)]


def run(address: str, weights: Path, output: object, *more: object) -> int:
    return commands.inference(*["cluster", "--ray", address, *arguments(weights, output, *more)])


def read(output: Path) -> pd.DataFrame:
    """All answers; formats differ in the columns that they bring."""
    tables = [pq.read_table(file) for file in output.glob("*.parquet")]
    found = pa.concat_tables(tables, promote_options="default").to_pandas()
    return found.sort_values(["path", "page"], ignore_index=True)


def errors(output: Path) -> pd.DataFrame:
    return pd.read_parquet(output / "_errors").sort_values("path", ignore_index=True)


def finished(output: Path) -> dict[str, tuple[int, int]]:
    """Shards with answers, and what changes when one is written again."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in output.glob("*.parquet")}
