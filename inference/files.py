"""Files that others wrote, read with care, and files of ours, written whole or not at all. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import UserError

JSON_LIMIT = 8 << 20  # bytes; the platform's own files have a few thousand


def read_json(file: Path, do: str, limit: int = JSON_LIMIT) -> Any:
    """The value in `file`, a byte-order mark allowed. UserError that ends with `do` for all else that may lie there.

    FileNotFoundError passes through: what a missing file means is the caller's to say.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device never end
            raise UserError(f"{file} is not a regular file; expected JSON; {do}")
        if status.st_size > limit:
            raise UserError(f"{file} has {status.st_size:,} bytes; expected at most {limit:,}; {do}")
        return json.loads(file.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); expected UTF-8 JSON; {do}") from None


def write_whole(file: Path, data: bytes | str, *, sync: bool = False) -> None:
    """Write `data` to `file`, in place of what lies there; whatever ends the process, no part of it is ever seen.

    Where the file system can, the data goes into a file without a name, which the kernel drops if the process is
    killed. Text is written as UTF-8, a lone surrogate (a path that is not UTF-8) as a question mark.
    sync: the data is on the disk before the file has its name. Raises OSError.
    """
    content = data.encode("utf-8", "replace") if isinstance(data, str) else data
    partial = _partial(file)
    try:
        try:
            os.stat("/proc/self/fd")  # needed to give it a name
            handle, named = os.open(file.parent, os.O_TMPFILE | os.O_WRONLY, 0o644), False
        except OSError:  # not on this file system
            handle, named = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644), True
        with open(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            if sync:
                os.fsync(handle)
            if not named and _link(handle, file):
                return
            if not named and not _link(handle, partial):
                raise FileExistsError(errno.EEXIST, "File exists", partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def claim(stream: IO[Any] | int, place: Path) -> None:
    """Hold the open file for this process alone. UserError where another run holds it; `place` is what it writes to."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run writes to {place}; expected one at a time; wait, or name another") from None
    except OSError:
        pass  # a file system without locks


@contextlib.contextmanager
def replacing(file: Path, *, sync: bool = False) -> Iterator[Path]:
    """A hidden path beside `file` for what is written by path or as a stream; it becomes `file` if the block ends well.

    sync: on the disk before it has its name. Raises OSError.
    """
    partial = _partial(file)
    try:
        yield partial
        if sync:
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _partial(file: Path) -> Path:
    return file.with_name(f".{file.name}.{os.getpid()}.partial")


def _link(handle: int, file: Path) -> bool:
    """Give an open file without a name the name `file`; False where that is taken."""
    handles = os.open("/proc/self/fd", os.O_RDONLY)
    try:
        os.link(str(handle), file, src_dir_fd=handles)
    except FileExistsError:
        return False
    finally:
        os.close(handles)
    return True
