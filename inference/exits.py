"""How a program ends: exit codes, a log that cannot fail, at most one line on stderr, and a message for every failure.

The platform flags a job that wrote to stderr, and shows the last line of stderr if the job failed.
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

FAILED = 1  # nothing was done; one line on stderr says why (2 is argparse's)
INCOMPLETE = 3  # the run finished, but some crops could not be read: stderr names each, the others have answers
INTERRUPTED = 130  # by Ctrl-C: 128 + SIGINT, as in a shell

LONGEST = 900  # characters of a message; the platform cuts at 1,024
LEAST = 1 << 30  # bytes; a job with the smallest ensemble takes 0.9 of it
DEVICE_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # creating its handle fails with this if its workspace does not fit
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute",
)
MEMORY = "can't allocate memory", "cannot allocate memory", "bad_alloc", "failed to map segment", "not enough memory"


def log(line: str) -> None:
    """Print a line to stdout, flushed. If stdout fails, drop the rest of the log: the answers matter more."""
    try:
        print(line, flush=True)
    except (OSError, ValueError):  # a full disk, a closed pipe, characters that the terminal cannot encode
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would flush again at exit and fail


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
    """One printable line for an error; the traceback of an unexpected one goes to the log."""
    text = str(error)
    if is_memory(error):
        text = "out of memory; expected the job to fit into its limit; raise the limit or use a smaller stack"
    elif isinstance(error, ModuleNotFoundError):
        text = (
            f"package {error.name} is not installed; expected what midog-lora was installed with; run 'pip install "
            f"{error.name}', or ./build.sh --engine native in a clone"
        )
    elif not isinstance(error, UserError):
        with contextlib.suppress(OSError, ValueError):
            traceback.print_exception(error, file=sys.stdout)
        text = (
            f"unexpected {type(error).__name__}: {text}; expected a result; see the log, and report it with the stack"
        )
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


def check_memory_limit() -> None:
    """UserError if this process may not use the memory that PyTorch needs to start, or it would crash in C++."""
    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
        allowed = resource.getrlimit(kind)[0]
        if allowed != resource.RLIM_INFINITY and allowed < LEAST:
            raise UserError(
                f"the job's memory limit is {allowed >> 20:,} MiB; expected {LEAST >> 20:,} or more; raise it"
            )


def is_device_memory(error: BaseException) -> bool:
    """Whether a GPU ran out of memory, under any of the names that CUDA's libraries give it."""
    return type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in DEVICE_MEMORY)


def is_memory(error: BaseException | None) -> bool:
    """Whether `error` or a cause of it means that memory ran out, under any of the names that libraries give it."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if not isinstance(error, UserError) and any(words in str(error).lower() for words in MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
