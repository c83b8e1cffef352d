"""What a check found: one line each, with what to do about it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["pass", "warn", "fail"]
COLOURS = {"pass": "32", "warn": "33", "fail": "31"}


@dataclass(frozen=True)
class Finding:
    """One result of a check. `message` says what was found and expected, `fix` what to do; both are single lines."""

    level: Level
    message: str
    fix: str = ""

    def __str__(self) -> str:
        label = self.level.ljust(4)
        if sys.stdout.isatty():
            label = f"\033[{COLOURS[self.level]}m{label}\033[0m"
        return f"  {label}  {self.message}" + (f". Fix: {self.fix}" if self.fix else "")


def passed(findings: Iterable[Finding]) -> bool:
    """True when nothing failed; warnings do not count."""
    return all(finding.level != "fail" for finding in findings)
