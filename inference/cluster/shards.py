"""What a cluster works on: shards, parts of the input that one worker reads from front to end.

A shard is a tar file, some row groups of a Parquet file, or a slice of the image files of a folder or a table. Its name
comes from its source and from what lies there (sizes, times, range): every run over the same input finds the same
shards, and a source that has changed since it was scored is recognised.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ..checksums import sha256
from ..errors import UserError
from ..imageio.listing import PATH_COLUMNS, SUFFIXES, read_rows

TARS = (".tar", ".tar.gz", ".tgz")
KINDS = (".parquet", *TARS, *SUFFIXES)
# raised by reading a damaged or missing file
UNREADABLE = (UserError, OSError, EOFError, zlib.error, tarfile.TarError, pa.ArrowException)
Item = tuple[str, int | None, dict[str, str]]  # path, page (None: all), metadata
Named = dict[str, dict[int | None, dict[str, str]]]  # by file, with all links resolved: metadata by page


@dataclass(frozen=True)
class Shard:
    """One unit of work.

    name: of its files in the output, `<readable part>-<source>-<content>`
    root: the path or URI as given, which determines the file system; path: within that; shown: the name for messages
    groups: first and last row group (excluded), row: the first one's number, image: the column with the bytes
    items: the image files
    """

    name: str
    kind: str  # tar, parquet or files
    root: str
    path: str
    shown: str
    groups: tuple[int, int] = (0, 0)
    row: int = 0
    image: str = ""
    items: Sequence[Item] = ()


def resolve(location: str) -> tuple[fs.FileSystem, str, str]:
    """A file system, the path in it, and the prefix that shows such a path in full. UserError where there is none."""
    if "://" not in location:
        return fs.LocalFileSystem(), os.path.abspath(location), ""
    try:
        system, path = fs.FileSystem.from_uri(location)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = one_line(error)
        raise UserError(
            f"{masked(f'{location}: {reason}')}; expected a path or a URI of file, s3, gs or hdfs; correct it"
        ) from None
    return system, path, "" if system.type_name == "local" else location.partition("://")[0] + "://"


def masked(text: str) -> str:
    """Without the credentials that a URI may hold, which would end up in log files."""
    return re.sub(
        r"((?:secret|session|access|key|token)[^=&\s]*=)[^&\s]*", r"\1***", re.sub(r"://[^/@\s]*@", "://***@", text)
    )


def one_line(error: object) -> str:
    return " ".join(str(error).split())[:400]


def digest(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()[:10]


def shard_name(shown: str, *content: object) -> str:
    stem = re.sub(r"[^A-Za-z0-9._]+", "_", shown.rpartition("/")[2])[:40].lstrip("._")
    return f"{stem or 'shard'}-{digest(shown)}-{digest(*content)}"


def source_of(name: str) -> str:
    """The part of a shard's name that stays the same when its source changes."""
    return name.rpartition("-")[0].rpartition("-")[2]


def stamp(info: fs.FileInfo) -> str:
    return f"{info.size} {info.mtime_ns}"


def unnamed(system: fs.FileSystem, scheme: str, files: Sequence[fs.FileInfo], named: Named) -> list[fs.FileInfo]:
    """The files that no earlier input named, by whatever path. UserError where a table named pages of one."""
    new = []
    for info in files:
        file = os.path.realpath(info.path) if system.type_name == "local" else scheme + info.path
        if file not in named:
            named[file] = {None: {}}
            new.append(info)
        elif None not in named[file]:
            raise UserError(f"{info.path} is named as a whole and, in a table, by page; expected one; leave one out")
    return new


def walk(system: fs.FileSystem, folder: str, unreadable: dict[str, str]) -> list[fs.FileInfo]:
    """All files below `folder` that may hold crops, as `score` finds them: by name, without those that begin with "."

    Of tables and archives, those in names that begin with _ are left out too: other programs keep theirs there.
    unreadable: gets the folders that cannot be listed, with the reason
    """
    if system.type_name == "local":  # like the local command, does not follow links to folders
        errors: list[OSError] = []
        roots = os.walk(folder, onerror=errors.append)
        files = system.get_file_info([os.path.join(root, name) for root, _, names in roots for name in names])
        unreadable |= {str(error.filename): one_line(error.strerror) for error in errors}
    else:
        files = system.get_file_info(fs.FileSelector(folder, recursive=True))

    def is_shown(info: fs.FileInfo) -> bool:
        below = info.path[len(folder) :].lstrip("/")
        hidden = r"(^|/)\." if info.path.lower().endswith(SUFFIXES) else r"(^|/)[._]"
        return info.is_file and info.path.lower().endswith(KINDS) and not re.search(hidden, below)

    return sorted(filter(is_shown, files), key=lambda info: info.path)


def plan(locations: Sequence[str], size: int, image: str | None) -> tuple[list[Shard], dict[str, tuple[str, str]]]:
    """All shards of the given files, folders and tables; and Parquet files and folders that gave none, with reasons.

    A file that is named again, by whatever path, belongs to the input that names it first.

    size: crops of a shard (a tar is never split, and neither is a row group); image: the Parquet column with the bytes.
    UserError where a location does not exist or holds no crops.
    """
    named: Named = {}
    shards: list[Shard] = []
    failed: dict[str, tuple[str, str]] = {}
    unreadable: dict[str, str] = {}
    for location in dict.fromkeys(locations):
        system, path, scheme = resolve(location)
        try:
            info = system.get_file_info(path)
            infos = walk(system, path, unreadable) if info.type == fs.FileType.Directory else [info]
        except UnicodeError:
            raise UserError(f"{location} holds a name that is not UTF-8; expected one that is; rename it") from None
        except OSError as error:
            raise UserError(
                f"{location} cannot be listed ({one_line(error)}); check the address and the rights"
            ) from None
        if info.type == fs.FileType.NotFound:
            raise UserError(f"{location} does not exist; expected a file, a folder or a URI; check the path")
        if info.is_file and path.lower().endswith(".csv"):
            if scheme:
                raise UserError(f"{location} is a table in a store; expected a local one; copy it, or use Parquet")
            shards += table_shards(location, path, size, named)
            continue
        infos = [entry for entry in infos if entry.path.lower().endswith(KINDS)]
        if not infos:
            raise UserError(f"no crops in {location}; expected {', '.join(KINDS)} or .csv; check the path")
        infos = unnamed(system, scheme, infos, named)
        images = [entry for entry in infos if entry.path.lower().endswith(SUFFIXES)]
        tars = [entry for entry in infos if entry.path.lower().endswith(TARS)]
        tables = [entry for entry in infos if entry.path.lower().endswith(".parquet")]
        for n in range(0, len(images), size):
            part = images[n : n + size]
            name = shard_name(scheme + path, size, n, *(f"{entry.path} {stamp(entry)}" for entry in part))
            items: list[Item] = [(entry.path, None, {}) for entry in part]
            shards.append(Shard(name, "files", location, path, scheme + path, items=items))
        for entry in tars:
            shown = scheme + entry.path
            shards.append(Shard(shard_name(shown, stamp(entry)), "tar", location, entry.path, shown))
        with ThreadPoolExecutor(16) as pool:  # reads footers, which a store may deliver slowly
            futures = {
                entry.path: pool.submit(parquet_shards, system, entry, location, scheme + entry.path, size, image)
                for entry in tables
            }
        for file, future in futures.items():
            try:
                shards += future.result()
            except UNREADABLE as error:
                failed[shard_name(scheme + file)] = scheme + file, one_line(error)
    failed |= {shard_name(folder): (folder, f"it cannot be listed ({why})") for folder, why in unreadable.items()}
    if failed and not shards:
        file, reason = next(iter(failed.values()))
        raise UserError(f"none of {len(failed):,} files can be read; {file}: {reason}")
    return shards, failed


def table_shards(location: str, path: str, size: int, named: Named) -> list[Shard]:
    """Slices of a CSV file; its other columns are metadata, as text. The files that it names are part of its content.

    UserError for a crop that has two rows with different metadata, or that an earlier input names.
    """
    rows: Named = {}
    entries: list[Item] = []
    for item, row in zip(*read_rows(Path(path)), strict=True):
        known = next(name for name in PATH_COLUMNS if name in row)
        metadata = {name: cell for name, cell in row.items() if name not in (known, "page")}
        file = os.path.realpath(item.path)
        pages = rows.setdefault(file, {})
        if file in named or (None in pages and item.page is not None) or (item.page is None and pages.keys() - {None}):
            raise UserError(
                f"{item.path} is in {path}, and is named in another way too; expected each crop once; "
                "leave it out of one"
            )
        if pages.setdefault(item.page, metadata) is metadata:
            entries.append((item.path, item.page, metadata))
        elif pages[item.page] != metadata:
            raise UserError(f"{path} has two different rows for {item.path}; expected one for each crop; correct it")
    if not entries:
        raise UserError(f"no crops in {location}; expected a row for each; check the table")
    named |= rows
    whole = sha256(Path(path))
    return [
        Shard(
            shard_name(path, whole, size, n, *(stamp_of(path) for path, _, _ in entries[n : n + size])),
            "files",
            location,
            path,
            path,
            items=entries[n : n + size],
        )
        for n in range(0, len(entries), size)
    ]


def stamp_of(path: str) -> str:
    """`stamp` of a local file; one that is missing has none."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def parquet_shards(
    system: fs.FileSystem, info: fs.FileInfo, root: str, shown: str, size: int, image: str | None
) -> list[Shard]:
    """Runs of row groups of at most `size` rows together, or of one group that is larger."""
    with system.open_input_file(info.path) as stream:
        file = pq.ParquetFile(stream)
        column = image_column(file.schema_arrow, image)
        rows = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    shards, first, start = [], 0, 0
    for last in range(1, len(rows) + 1):
        if last == len(rows) or sum(rows[first : last + 1]) > size:
            name = shard_name(shown, stamp(info), column, first, last)
            shards.append(Shard(name, "parquet", root, info.path, shown, (first, last), start, column))
            first, start = last, start + sum(rows[first:last])
    return shards


def image_column(schema: pa.Schema, wanted: str | None) -> str:
    """The column with image files' bytes: binary, or a struct with a binary field `bytes` (as Hugging Face writes)."""

    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0) and holds_bytes(kind.field("bytes").type)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    names: list[str] = [field.name for field in schema if holds_bytes(field.type)]
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted in names:
        return wanted
    raise UserError(
        f"columns with bytes: {', '.join(names) or 'none'}; expected {wanted or 'one'}; name it with --image"
    )
