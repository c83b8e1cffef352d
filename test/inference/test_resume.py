"""Resume equals fresh: after any history `score` leaves what one run over the files as they are would, or says why."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from inference.errors import UserError
from test.support.histories import Killed, Stub, image, outcome, stubbed
from test.support.stub import stub_manifest

NAMES = ("a.png", "b.png", "sub/c.png", "sub/s.tiff", "t.tiff", "=d.png", "e\rf.png", 'g "h".png', "sub/n\nl, m.png")
TABLE = "table.csv"
INPUTS = (".", "sub", TABLE, *NAMES)
REFUSALS = (
    "holds answers of ensemble",
    "was computed on",
    "does not ask for",
    "does not exist",
    "no crops in",
    "none of",
)
NAME = st.sampled_from(NAMES)
RUN = {  # mostly what it was before: a history of refusals shows little
    "inputs": st.just(["."]) | st.lists(st.sampled_from(INPUTS), min_size=1, max_size=3),
    "weights": st.sampled_from((0, 0, 0, 0, 1)),
    "precision": st.sampled_from(("fp32", "fp32", "fp32", "fp32", "bf16")),
}


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


class Scoring(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.closing = contextlib.ExitStack()
        self.closing.callback(shutil.rmtree, self.folder)
        self.closing.enter_context(stubbed())
        self.closing.enter_context(mock.patch.object(os, "fsync"))  # a disk that takes its time shows nothing here
        for number, threshold in enumerate((0.5, 0.25)):
            stub_manifest(self.folder / f"weights{number}", threshold=threshold, precision={"fp32": 0.0, "bf16": 0.1})
        self.crops, self.out = self.folder / "crops", self.folder / "out.csv"
        (self.crops / "sub").mkdir(parents=True)
        self.closing.enter_context(contextlib.chdir(self.crops))
        self.write("a.png", 9, 1)
        self.write("sub/s.tiff", 70, 20)
        self.last: tuple[list[str], int, str, bool] = (["."], 0, "fp32", False)

    def teardown(self) -> None:
        self.closing.close()

    @rule(name=NAME, level=st.integers(0, 150), pages=st.sampled_from((1, 2, 3, 20)))
    def write(self, name: str, level: int, pages: int) -> None:
        """A new file, or another one of the same time and, often, the same size."""
        self.put(name, image(level, pages if name.endswith("tiff") else 1))

    @rule(name=NAME)
    def damage(self, name: str) -> None:
        self.put(name, b"no image")

    def put(self, name: str, content: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)  # else a link's target would be written
        Path(name).write_bytes(content)
        os.utime(name, ns=(0, 0))

    @rule(name=NAME, other=NAME, link=st.booleans())
    def rename(self, name: str, other: str, link: bool) -> None:
        if os.path.isfile(name) and name != other:
            if link:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(other)
                os.symlink(os.path.abspath(name), other)
            else:
                os.rename(name, other)

    @rule(name=NAME)
    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)

    @rule(
        entries=st.lists(
            st.tuples(NAME, st.sampled_from(("", "0", "1", "7")), st.sampled_from(("", "AMF", "NMF"))), max_size=4
        )
    )
    def write_table(self, entries: list[tuple[str, str, str]]) -> None:
        with open(TABLE, "w", newline="") as stream:
            csv.writer(stream).writerows([("path", "page", "label"), *entries])

    @rule(share=st.floats(0, 1))
    def cut(self, share: float) -> None:
        """What a kill at any byte leaves."""
        if self.out.exists():
            os.truncate(self.out, int(share * self.out.stat().st_size))

    @rule()
    def start_over(self) -> None:
        self.out.unlink(missing_ok=True)

    @rule(batches=st.integers(0, 2), **RUN)
    def killed(self, inputs: list[str], weights: int, precision: str, batches: int) -> None:
        with mock.patch.object(Stub, "left", batches), contextlib.suppress(Killed, UserError):
            self.run_into(self.out, inputs, weights, precision, [])

    @rule(report=st.booleans(), **RUN)
    def score(self, inputs: list[str], weights: int, precision: str, report: bool) -> None:
        self.last = inputs, weights, precision, report
        self.compare(*self.last)

    @rule(
        number=st.integers(0, 100),
        level=st.integers(0, 150),
        kind=st.sampled_from(("file", "damage", "delete", "cut", "precision")),
    )
    def score_after_a_change(self, number: int, level: int, kind: str) -> None:
        """The last command again, after something happened to a file that it may have answered."""
        there = [name for name in NAMES if os.path.isfile(name)]
        if kind == "cut" or not there:
            self.cut(number / 100)
        elif kind == "precision":
            self.compare(*self.last[:2], "bf16" if self.last[2] == "fp32" else "fp32", False)
        elif kind == "file":
            self.write(there[number % len(there)], level, 1 + level % 3)
        else:
            getattr(self, kind)(there[number % len(there)])
        self.compare(*self.last)

    def compare(self, inputs: list[str], weights: int, precision: str, report: bool) -> None:
        """Run the command over the results there are, and into a new file: the same end, or a refusal."""
        fresh, page = self.folder / "fresh.csv", self.folder / "report.html"
        fresh.unlink(missing_ok=True)
        wanted, _ = self.run_into(fresh, inputs, weights, precision, [])
        found, said = self.run_into(self.out, inputs, weights, precision, ["--report", page] if report else [])
        if found is None:
            assert any(words in said for words in REFUSALS), said
            if "does not ask for" in said and wanted is not None:
                keys = {f"page {row['page']} of {row['path']}; " for row in rows(fresh)}
                assert not any(f"such as {key}" in said for key in keys), said
        else:
            assert found == wanted
            assert self.out.read_bytes() == fresh.read_bytes()
            keys = [(os.path.realpath(row["path"]), row["page"]) for row in rows(fresh)]
            assert len(set(keys)) == len(keys)

    def run_into(
        self, file: Path, inputs: list[str], weights: int, precision: str, more: list[object]
    ) -> tuple[int | None, str]:
        """Exit code, or None and why the command refused."""
        where = ["--weights", self.folder / f"weights{weights}", "--device", "cpu", "--precision", precision]
        return outcome("score", *inputs, "--csv", file, *where, *more)


def test_pages_and_answers_that_a_later_run_could_overlook() -> None:
    """Histories that a random one may miss: half of a stack that is not the last path, one page, a new content."""
    state = Scoring()
    state.start()
    try:
        state.compare(["sub/s.tiff"], 0, "fp32", False)
        lines = state.out.read_bytes().splitlines(keepends=True)
        state.out.write_bytes(b"".join(lines[:9]))  # killed after 8 of 20 pages
        for inputs in (["a.png"], ["sub/s.tiff", "a.png"]):
            state.compare(inputs, 0, "fp32", False)
        assert len(rows(state.out)) == 21
        state.start_over()
        state.write_table([("sub/s.tiff", "0", "")])
        for inputs in ([TABLE], [TABLE, "."]):
            state.compare(inputs, 0, "fp32", False)
        assert len(rows(state.out)) == 21
        before = rows(state.out)
        state.write("a.png", 140, 1)
        state.compare([TABLE, "."], 0, "fp32", False)
        changed = [row["path"] for row, old in zip(rows(state.out), before, strict=True) if row != old]
        assert changed == ["a.png"]
        assert state.run_into(state.out, [TABLE, "."], 0, "bf16", [])[0] is None
    finally:
        state.teardown()


TestScoring = Scoring.TestCase
TestScoring.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)
