"""What long commands say while they work: one line on a terminal, and elsewhere a line every half minute.

tqdm knows one rate for what is done and what is left; here most files of a resumed run take none.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

EVERY = 30.0  # seconds between lines where there is no terminal


class Beat:
    """Calls `speak` every EVERY seconds, from a thread of its own, until `stop`."""

    def __init__(self, speak: Callable[[], None]) -> None:
        self.speak, self.stopped = speak, threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while not self.stopped.wait(EVERY):
            self.speak()

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()  # so that nothing is said afterwards


def clock(seconds: float) -> str:
    """h:mm:ss."""
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}"


@contextmanager
def speaking(what: str, stream: IO[str] | None = None) -> Iterator[None]:
    """For work whose end nobody knows: every EVERY seconds a line that it goes on. stream: stderr if None."""
    start = time.perf_counter()

    def speak() -> None:
        print(f"{what}: {clock(time.perf_counter() - start)} so far", file=stream or sys.stderr, flush=True)

    beat = Beat(speak)
    try:
        yield
    finally:
        beat.stop()


@dataclass
class Progress:
    """How much is done of a known amount, with the rate and the time left.

    rate: what is counted by the second. Without a terminal the latest state is told every EVERY seconds from the first
    `show` to `clear`, or to the end of the `with` block, even where one step takes longer than that.
    """

    total: int
    unit: str
    stream: IO[str] = field(default_factory=lambda: sys.stderr)
    rate: str = "crops"
    start: float = field(default_factory=time.perf_counter)
    drawn: float = 0.0
    state: tuple[int, int, int] = 0, 0, 0
    beat: Beat | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, done: int, worked: int, crops: int) -> None:
        """done: of `total`; worked: of those, how many took time; crops: predicted so far."""
        now, self.state = time.perf_counter(), (done, worked, crops)
        if not self.stream.isatty():
            self.beat = self.beat or Beat(lambda: print(self.line(), file=self.stream, flush=True))
        elif now - self.drawn >= 0.1:
            self.drawn = now
            bar = "━" * round(20 * done / self.total)
            print(f"\r\x1b[K{bar:─<20} {self.line()}", end="", file=self.stream, flush=True)

    def line(self) -> str:
        done, worked, crops = self.state
        elapsed = time.perf_counter() - self.start
        left = f"{clock((self.total - done) * elapsed / worked)} left" if worked else f"{clock(elapsed)} so far"
        return f"{done:,} of {self.total:,} {self.unit}, {crops / elapsed:,.1f} {self.rate}/s, {left}"

    def clear(self) -> None:
        """Remove the line, or say no more, until the next `show`."""
        if self.beat:
            self.beat.stop()
            self.beat = None
        if self.stream.isatty():
            print("\r\x1b[K", end="", file=self.stream, flush=True)
