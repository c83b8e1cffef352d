"""How tests start processes, and wait."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable


def interruptible() -> None:
    """As `preexec_fn`: a test run that ignores Ctrl-C (nohup, a background job) does not pass that on to the child."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


KILLED = """
import os, pkgutil, signal, sys
from inference import __main__ as program

owner, name, calls = pkgutil.resolve_name(sys.argv[1]), sys.argv[2], int(sys.argv[3])
real = getattr(owner, name)

def counted(*more, **options):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*more, **options)

setattr(owner, name, counted)
sys.exit(program.main(sys.argv[4:]))
"""


def killed(owner: str, name: str, calls: int, *command: object) -> None:
    """Run a command of `python -m inference` that kills itself instead of calling `owner`.`name` once more.

    So it always dies at the same point, however busy the machine is. `owner`: as pkgutil.resolve_name takes it.
    """
    words = [sys.executable, "-c", KILLED, owner, name, str(calls), *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, (done.returncode, done.stderr)


def until(condition: Callable[[], object], what: str, seconds: int = 600) -> None:
    """Wait for `condition` to hold."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.01)


def without_progress(text: str) -> list[str]:
    """The lines but those that commands write every half minute, which a busy machine may reach."""
    return [line for line in text.splitlines() if not re.fullmatch(r".* \d+:\d\d:\d\d (left|so far)", line)]


def connections() -> int:
    """How many connections the servers of this process are answering."""
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())
