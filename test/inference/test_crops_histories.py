"""Resume equals fresh for `crops`: after any history it leaves what one run over the files as they are would.

Where it does not, it names the slide that changed, or refuses the folder and says why.
"""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from inference.exits import INCOMPLETE
from inference.slides import crops as command
from test.support.histories import Killed, outcome
from test.support.pyramids import write_slide

NAMES = ("a.tif", "sub/b.tif", "plain.tif")  # the last one states no scale
PLACES = (20.0, 33.5, 41.0, 400.0)  # the last one lies outside
REFUSALS = (
    "holds crops of",
    "cannot be read",
    "expected how its crops were cut",
    "none of the",
    "has no rows",
    "holds PNG",
)
RUN = {  # mostly what it was before: a history of refusals shows little
    "side": st.sampled_from((16, 16, 16, 16, 24)),
    "slide_mpp": st.sampled_from((None, None, 0.25, 0.5)),
}


class Cutting(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.folder, self.clock = Path(tempfile.mkdtemp()), 0
        self.closing = contextlib.ExitStack()
        self.closing.callback(shutil.rmtree, self.folder)
        self.out, self.table = self.folder / "out", self.folder / "found.csv"
        self.last: tuple[int, float | None] = (16, None)
        for name in NAMES:
            self.write(name, 7)
        self.list([(NAMES[0], 20.0, 33.5), (NAMES[0], 41.0, 20.0), (NAMES[1], 20.0, 20.0), (NAMES[2], 41.0, 41.0)])

    def teardown(self) -> None:
        self.closing.close()

    @rule(name=st.sampled_from(NAMES), level=st.integers(0, 200))
    def write(self, name: str, level: int) -> None:
        """A new slide, or another one in its place, of the same size and of another time."""
        pixels = np.full((64, 64, 3), level, np.uint8)
        pixels[::3, :: 1 + level % 4] = 250
        write_slide(self.folder / name, [pixels], None if name == "plain.tif" else 0.25)
        self.clock += 1
        os.utime(self.folder / name, ns=(self.clock, self.clock))

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    @rule(
        rows=st.lists(
            st.tuples(st.sampled_from(NAMES), st.sampled_from(PLACES), st.sampled_from(PLACES)), min_size=1, max_size=6
        )
    )
    def list(self, rows: list[tuple[str, float, float]]) -> None:
        with self.table.open("w", newline="") as stream:
            csv.writer(stream).writerows([("slide", "x", "y", "n"), *((*row, n) for n, row in enumerate(rows))])

    @rule(number=st.integers(0, 100))
    def lose(self, number: int) -> None:
        """What a computer that lost its power leaves: a crop that is gone, or empty."""
        there = sorted(self.out.rglob("*.png"))
        if there:
            victim = there[number % len(there)]
            victim.unlink() if number % 2 else victim.write_bytes(b"")

    @rule(share=st.floats(0, 1))
    def cut(self, share: float) -> None:
        file = self.out / command.SETTINGS
        if file.exists():
            os.truncate(file, int(share * file.stat().st_size))

    @rule()
    def start_over(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)

    @rule(files=st.integers(0, 5), **RUN)
    def killed(self, files: int, side: int, slide_mpp: float | None) -> None:
        """A kill before any of the files that a run writes."""
        left, real = [files], command.write_whole

        def write(file: Path, data: bytes | str) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            real(file, data)

        with mock.patch.object(command, "write_whole", write), contextlib.suppress(Killed):
            self.run_into(self.out, side, slide_mpp)

    @rule(**RUN)
    def crops(self, side: int, slide_mpp: float | None) -> None:
        self.last = side, slide_mpp
        self.compare()

    @rule(kind=st.sampled_from(("write", "lose", "nothing")), number=st.integers(0, 100))
    def crops_after_a_change(self, kind: str, number: int) -> None:
        if kind == "write":
            self.write(NAMES[number % len(NAMES)], number)
        elif kind == "lose":
            self.lose(number)
        self.compare()

    def compare(self) -> None:
        fresh = self.folder / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        wanted, _ = self.run_into(fresh, *self.last)
        found, said = self.run_into(self.out, *self.last)
        if found is None:
            assert any(words in said for words in REFUSALS), said
            return
        changed = {name for name in NAMES if f"not cut: {name} (" in said and "it changed since" in said}
        assert wanted is not None
        assert found == wanted or (changed and found == INCOMPLETE)
        expected = [row for row in rows(fresh) if not (row["slide"] in changed and row not in rows(self.out))]
        assert rows(self.out) == expected
        for row in expected:
            assert (self.out / row["path"]).read_bytes() == (fresh / row["path"]).read_bytes(), row

    def run_into(self, output: Path, side: int, slide_mpp: float | None) -> tuple[int | None, str]:
        """Exit code, or None where the command refused; and all that it said on stderr."""
        more = [] if slide_mpp is None else ["--slide-mpp", slide_mpp]
        return outcome("crops", self.table, "--output", output, "--side", side, *more)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / command.TABLE).open(newline="") as stream:
        return [*csv.DictReader(stream)]


TestCutting = Cutting.TestCase
TestCutting.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
