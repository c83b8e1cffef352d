"""How a program ends: its exit codes, a log that cannot fail it, one line or none on stderr, words for every failure.

The platform marks a job that wrote to stderr, and shows the last line of it where the job failed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys
import traceback
from collections.abc import Iterator

from .errors import UserError

FAILED = 1  # nothing was done; one line on stderr says why. argparse takes 2
INCOMPLETE = 3  # the run finished, but some crops could not be read: each is named on stderr, the rest is answered
INTERRUPTED = 130  # by Ctrl-C, as shells count it

LONGEST = 900  # characters of a message; the platform cuts at 1,024
LEAST = 1 << 30  # bytes; a job with the smallest ensemble takes 0.9 of it
DEVICE_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # what creating its handle says where there is no room for its workspace
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute",
)
MEMORY = "can't allocate memory", "cannot allocate memory", "bad_alloc", "failed to map segment", "not enough memory"


def log(line: str) -> None:
    """A line on stdout, flushed. Where nobody can read it, the rest of the log is dropped: the answers count."""
    try:
        print(line, flush=True)
    except (OSError, ValueError):  # a full disk, a closed pipe, letters that the terminal does not have
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter tries again when it ends, and fails


@contextlib.contextmanager
def stderr_in_log() -> Iterator[None]:
    """Send what libraries write to stderr, in Python or below it (libtiff, PyTorch), to stdout instead."""
    saved = None
    with contextlib.suppress(OSError, AttributeError):  # neither may be open
        sys.stderr.flush()
        saved = os.dup(2)
        os.dup2(1, 2)
    try:
        with contextlib.redirect_stderr(sys.stdout):
            yield
    finally:
        if saved is not None:
            os.dup2(saved, 2)
            os.close(saved)


def describe(error: Exception) -> str:
    """One printable line for an error; the traceback of one that no user caused goes to the log."""
    text = str(error)
    if is_memory(error):
        text = "out of memory; expected to fit into the job's limit; give it more, or a smaller stack"
    elif not isinstance(error, UserError):
        with contextlib.suppress(OSError, ValueError):
            traceback.print_exception(error, file=sys.stdout)
        text = (
            f"unexpected {type(error).__name__}: {text}; expected a result; see the log, and report it with the stack"
        )
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


def check_memory_limit() -> None:
    """UserError where this process may not have the memory that PyTorch takes to start: without, it crashes in C++."""
    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
        allowed = resource.getrlimit(kind)[0]
        if allowed != resource.RLIM_INFINITY and allowed < LEAST:
            raise UserError(
                f"the job's memory limit is {allowed >> 20:,} MiB; expected {LEAST >> 20:,} or more; give it more"
            )


def is_device_memory(error: BaseException) -> bool:
    """Whether a GPU ran out of memory, under any of the names that CUDA's libraries give it."""
    return type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in DEVICE_MEMORY)


def is_memory(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, is a lack of memory, under any of the names that libraries give it."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if not isinstance(error, UserError) and any(words in str(error).lower() for words in MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
