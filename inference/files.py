"""Read files that others wrote defensively, and write ours atomically. Standard library only."""

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
    """The JSON value in `file`, which may begin with a byte-order mark. UserError, ending with `do`, for anything else.

    FileNotFoundError passes through: the caller knows what a missing file means.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device would never end
            raise UserError(f"{file} is not a regular file; expected JSON; {do}")
        if status.st_size > limit:
            raise UserError(f"{file} has {status.st_size:,} bytes; expected at most {limit:,}; {do}")
        return json.loads(file.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); expected UTF-8 JSON; {do}") from None


def write_whole(file: Path, data: bytes | str, *, sync: bool = False) -> None:
    """Create or replace `file` with `data` atomically: however the process ends, nobody sees a part of it.

    Where the file system supports it, the data goes into an unnamed file, which the kernel deletes if the process is
    killed. Text is written as UTF-8, a lone surrogate (a path that is not UTF-8) as a question mark.
    sync: flush the data to disk before the file gets its name. Raises OSError.
    """
    content = data.encode("utf-8", "replace") if isinstance(data, str) else data
    partial = _partial(file)
    try:
        try:
            os.stat("/proc/self/fd")  # needed to link it
            handle, named = os.open(file.parent, os.O_TMPFILE | os.O_WRONLY, 0o644), False
        except OSError:  # not supported by this file system
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


def begins_with(text: str, file: Path) -> bool:
    """Whether `file` begins with `text`, as one of ours does. OSError where it cannot be read."""
    with file.open("rb") as stream:
        return stream.read(len(text.encode())) == text.encode()


def claim(stream: IO[Any] | int, output: Path) -> None:
    """Lock an open file for this process. UserError, naming the `output`, if another run holds it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing to {output}; expected one at a time; wait, or name another") from None
    except OSError:
        pass  # a file system without locks


@contextlib.contextmanager
def replacing(file: Path, *, sync: bool = False) -> Iterator[Path]:
    """Yield a hidden path beside `file` to write to; it replaces `file` if the block ends without an exception.

    sync: flush the data to disk before the file gets its name. Raises OSError.
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
    """Give an open unnamed file the name `file`; False if that name is taken."""
    handles = os.open("/proc/self/fd", os.O_RDONLY)
    try:
        os.link(str(handle), file, src_dir_fd=handles)
    except FileExistsError:
        return False
    finally:
        os.close(handles)
    return True
