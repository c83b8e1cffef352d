"""A progress line for long commands."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import IO


@dataclass
class Progress:
    """One line with the rate and the time left; silent unless the stream is a terminal, to keep logs short."""

    total: int
    unit: str
    stream: IO[str] = field(default_factory=lambda: sys.stderr)
    start: float = field(default_factory=time.perf_counter)
    drawn: float = 0.0

    def show(self, done: int, worked: int, crops: int) -> None:
        """done: of `total`; worked: of those, how many took time; crops: predicted so far."""
        now = time.perf_counter()
        if not self.stream.isatty() or now - self.drawn < 0.1:
            return
        self.drawn, elapsed = now, now - self.start
        left = (self.total - done) * elapsed / max(worked, 1)
        clock = f"{int(left // 3600)}:{int(left // 60 % 60):02}:{int(left % 60):02} left" if worked else ""
        bar = "━" * round(20 * done / self.total)
        text = f"\r\x1b[K{bar:─<20} {done:,} of {self.total:,} {self.unit}, {crops / elapsed:,.1f} crops/s, {clock}"
        print(text, end="", file=self.stream, flush=True)

    def clear(self) -> None:
        if self.stream.isatty():
            print("\r\x1b[K", end="", file=self.stream, flush=True)
