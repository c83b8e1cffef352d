"""A check's result as one line with its fix, and where the container engine is: for `doctor` and the test harness.

Standard library only: both run before anything is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

Level = Literal["PASS", "WARN", "FAIL"]
COLOURS = {"PASS": "32", "WARN": "33", "FAIL": "31"}


@dataclass(frozen=True)
class Check:
    """One result. `message` says what was found and expected, `fix` what to do; one line each."""

    level: Level
    message: str
    fix: str = ""

    def __str__(self) -> str:
        label = f"\033[{COLOURS[self.level]}m{self.level}\033[0m" if sys.stdout.isatty() else self.level
        return f"{label}  {self.message}" + (f". Fix: {self.fix}" if self.fix else "")


def passed(checks: Iterable[Check]) -> bool:
    """True when nothing failed; warnings do not count."""
    return all(check.level != "FAIL" for check in checks)


@cache
def docker() -> str | None:
    """The first Docker client that reaches an engine, or None. Scripts ask `release/engine.sh client`.

    Debian's own comes first: another on the PATH may lack the build plugin.
    """
    for client in os.environ.get("DOCKER", "/usr/bin/docker docker").split():
        try:
            if subprocess.run([client, "info"], capture_output=True, timeout=20).returncode == 0:
                return client
        except (OSError, subprocess.TimeoutExpired):
            continue
    return None
