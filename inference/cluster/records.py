"""Read a shard as a stream: image files with their metadata, in chunks, and decoded by any thread later."""

from __future__ import annotations

import contextlib
import gzip
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ..answers import content_of, pages_of
from ..errors import UserError
from ..imageio.listing import SUFFIXES
from ..imageio.source import Blob
from ..imageio.stack import MAX_BYTES, read_stack
from .results import free_name
from .shards import Shard, one_line, resolve

CHUNK = 128  # images that are read, decoded and predicted together
CHUNK_BYTES = 64 << 20  # of a tar's members: a smaller chunk where images are large
BUFFER = 4 << 20  # bytes that are fetched at once
MAX_TEXT = 1 << 16  # bytes; a larger member of a tar is not metadata


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """Turn errors of a single file into a UserError; those of its store, disk or network pass through."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(one_line(error)) from None


@dataclass(frozen=True)
class Record:
    """One image file; page None: all of its pages; source a str: why there is nothing to read."""

    path: str
    page: int | None
    source: Path | Blob | tuple[fs.FileSystem, str] | str

    def read(self) -> Read:
        """UserError where this file cannot be read, OSError where no file can."""
        source = self.source
        if isinstance(source, str):
            raise UserError(source)
        if isinstance(source, tuple):
            with ours(), source[0].open_input_stream(source[1], compression=None) as stream:
                source = Blob(Path(source[1]).name, stream.read(MAX_BYTES + 1))
        elif isinstance(source, Path):
            with ours(), source.open("rb") as stream:
                stream.read(1)
        content = content_of(source)
        crops = read_stack(source)
        return Read(content, len(crops), pages_of(crops, self.page))


class Read(NamedTuple):
    """What a file holds: `content_of` it, how many pages, and (page, crop uint8 (H, W, 3)) of those asked for."""

    content: str
    pages: int
    crops: list[tuple[int, np.ndarray]]


Chunk = tuple[list[Record], pa.Table]  # metadata: a row for each record


def read_shard(shard: Shard) -> Iterator[Chunk]:
    """All records in their order. A damaged or truncated shard raises one of shards.UNREADABLE."""
    return {"tar": read_tar, "parquet": read_parquet, "files": read_files}[shard.kind](shard)


def read_files(shard: Shard) -> Iterator[Chunk]:
    system, _, scheme = resolve(shard.root)
    for start in range(0, len(shard.items), CHUNK):
        part = shard.items[start : start + CHUNK]
        records = [Record(scheme + path, page, (system, path) if scheme else Path(path)) for path, page, _ in part]
        yield records, texts([metadata for _, _, metadata in part])


def texts(rows: list[dict[str, str]]) -> pa.Table:
    """Dictionaries to columns of text, null where a dictionary has no such key."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: pa.array([row.get(name) for row in rows], pa.string()) for name in names}
    return pa.table(columns) if columns else pa.table({"": pa.nulls(len(rows))}).select([])


def is_text(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def read_parquet(shard: Shard) -> Iterator[Chunk]:
    """Crops are named by a string column `path`, if there is one, else by the file and the row's number."""
    system = resolve(shard.root)[0]
    with system.open_input_file(shard.path) as stream:
        # read through a buffer instead of whole column chunks: takes the memory of a few pages for any row group
        file = pq.ParquetFile(stream, buffer_size=BUFFER, pre_buffer=False)
        row = shard.row
        for batch in file.iter_batches(CHUNK, row_groups=range(*shard.groups), use_threads=False):
            table = pa.Table.from_batches([batch])
            cells = table[shard.image].combine_chunks()
            if isinstance(cells, pa.ChunkedArray):
                cells = cells.chunk(0)
            given = [None] * len(table)
            rest = table.drop_columns([shard.image])
            if "path" in rest.column_names and is_text(rest.schema.field("path").type):
                given = rest["path"].to_pylist()
                rest = rest.drop_columns(["path"])
            if pa.types.is_struct(cells.type):
                if cells.type.get_field_index("path") >= 0:
                    rest = rest.append_column(f"{shard.image}_path", cells.field("path"))
                cells = cells.field("bytes")
            records = []
            for n, cell in enumerate(cells):
                name = given[n] or f"{shard.shown}#{row + n}"
                content = cell.as_py()
                source = "the image is missing" if content is None else Blob(name.rpartition("/")[2], content)
                records.append(Record(name, None, source))
            yield records, rest
            row += len(table)


class WholeArchive(tarfile.TarInfo):
    """Headers of an archive that must end properly: tarfile itself takes a truncated or damaged header for the end.

    Reading continues after an end, because archives may be joined by `cat`.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Any:
        ended = getattr(archive, "ended", False)
        archive.ended = False  # type: ignore[attr-defined]
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros: tarfile skips it
            archive.ended = True  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            if ended and isinstance(error, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(f"cut off or damaged at byte {archive.offset:,} ({error})") from None


@contextlib.contextmanager
def open_tar(system: fs.FileSystem, path: str) -> Iterator[tarfile.TarFile]:
    """The archive as a stream. What begins like gzip is decompressed, with all of its joined members, and checked."""
    with system.open_input_stream(path, compression=None, buffer_size=BUFFER) as stream:
        plain = io.BufferedReader(stream, BUFFER)
        packed = plain.peek(2)[:2] == b"\x1f\x8b"
        source: Any = io.BufferedReader(gzip.GzipFile(fileobj=plain), BUFFER) if packed else plain
        with tarfile.open(fileobj=source, mode="r|", tarinfo=WholeArchive, ignore_zeros=True) as archive:
            yield archive


def content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    assert stream is not None  # only members that are no files have none
    return stream.read()


def samples(archive: tarfile.TarFile, shown: str) -> Iterator[tuple[str, dict[str, Record | str | None]]]:
    """(key, {extension: an image's record, a text, or None for anything else}), in the order of the members.

    The `._NAME` files of macOS are skipped. UserError for a name that occurs twice.
    """
    key, sample = "", dict[str, "Record | str | None"]()
    names: set[str] = set()
    for member in archive:
        folder, slash, name = member.name.rpartition("/")
        if not member.isfile() or name.startswith("._"):
            continue
        if member.name in names:
            raise UserError(f"it holds {member.name} twice; expected each name once; write it again")
        names.add(member.name)
        stem, _, extension = name.partition(".")
        if folder + slash + stem != key or extension in sample:
            if sample:
                yield key, sample
            key, sample = folder + slash + stem, {}
        sample[extension] = None
        path = f"{shown}#{member.name}"
        if f".{extension.lower()}" in SUFFIXES:
            fits = member.size <= MAX_BYTES
            source = Blob(name, content(archive, member)) if fits else f"it has {member.size:,} bytes; write it again"
            sample[extension] = Record(path, None, source)
        elif member.size <= MAX_TEXT:
            with contextlib.suppress(UnicodeDecodeError):
                sample[extension] = content(archive, member).decode()
    if sample:
        yield key, sample


def read_tar(shard: Shard) -> Iterator[Chunk]:
    """WebDataset: adjacent members with the same name before the first dot are a sample; its texts are metadata."""
    records: list[Record] = []
    metadata: list[dict[str, str]] = []
    held = 0
    with open_tar(resolve(shard.root)[0], shard.path) as archive:
        for key, members in samples(archive, shard.shown):
            fields = {"key": key}
            for name, member in members.items():
                if isinstance(member, str):
                    fields[free_name(name, fields)] = member
            images = [member for member in members.values() if isinstance(member, Record)]
            if not images:
                names = ", ".join(members)
                reason = f"no image among its members {names:.200}; expected png or the like after the name's first dot"
                images = [Record(f"{shard.shown}#{key}", None, reason)]
            records += images
            metadata += [fields] * len(images)
            held += sum(len(image.source.content) for image in images if isinstance(image.source, Blob))
            if len(records) >= CHUNK or held >= CHUNK_BYTES:
                yield records, texts(metadata)
                records, metadata, held = [], [], 0
    if records:
        yield records, texts(metadata)
