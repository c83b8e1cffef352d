"""Resume equals fresh on a cluster: after any history the output holds what one run would give, or the run is refused.

Driver, worker and output are the real ones; a loop replaces Ray between them (test_cluster_deaths.py has Ray).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from inference.cluster import pool
from inference.cluster.pool import Pool
from inference.cluster.worker import Worker
from test.support.histories import Killed, Stub, image, outcome, stubbed
from test.support.shard_files import write_parquet, write_tar
from test.support.stub import stub_manifest

NAMES = ("a.png", "b.png", "sub/c.png", "sub/d.png", "sub/s.tiff", "x.tar", "sub/x.parquet")
INPUTS = (".", "sub", "link", "table.csv", *NAMES)
REFUSALS = (
    "holds answers with",
    "has changed since",
    "does not name",
    "does not exist",
    "no crops in",
    "none of",
    "expected one for each crop",
    "expected each crop once",
    "leave one out",
)
RUN = {  # mostly what it was before: a history of refusals shows little
    "inputs": st.just(["."]) | st.lists(st.sampled_from(INPUTS), min_size=1, max_size=3),
    "weights": st.sampled_from((0, 0, 0, 0, 1)),
    "precision": st.sampled_from(("fp32", "fp32", "fp32", "fp32", "bf16")),
}


def in_a_loop(_: Pool, kind: type[Worker], settings: Any, work: Iterable[Any], ordered: bool = False) -> Iterator[Any]:
    worker = kind(*settings)
    for key, piece in work:
        yield key, worker.take(piece)


def died(code: int) -> None:
    """In place of `os._exit`, with which a worker ends after an error that nobody foresaw."""
    error = sys.exc_info()[1]
    assert error
    raise AssertionError(f"the worker ends with {code}") from error


class Scoring(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.folder, self.clock = Path(tempfile.mkdtemp()), 0
        self.closing = contextlib.ExitStack()
        self.closing.callback(shutil.rmtree, self.folder)
        for owner, name, value in (
            (Pool, "spread", in_a_loop),
            (pool, "connect", mock.Mock()),
            (pool, "placement", lambda *_: (1, {}, 1)),
        ):
            self.closing.enter_context(mock.patch.object(owner, name, value))
        self.closing.enter_context(mock.patch.object(os, "fsync"))  # a disk that takes its time shows nothing here
        self.closing.enter_context(mock.patch.object(os, "_exit", died))
        self.closing.enter_context(stubbed())
        for number, threshold in enumerate((0.5, 0.25)):
            stub_manifest(self.folder / f"weights{number}", threshold=threshold, precision={"fp32": 0.0, "bf16": 0.1})
        crops, self.out = self.folder / "crops", self.folder / "out"
        (crops / "sub").mkdir(parents=True)
        self.closing.enter_context(contextlib.chdir(crops))
        os.symlink("sub", "link")
        self.last: tuple[list[str], int, str] = (["."], 0, "fp32")
        for name in ("a.png", "sub/c.png", "sub/s.tiff", "x.tar"):
            self.write(name, 9, 3)

    def teardown(self) -> None:
        self.closing.close()

    @rule(name=st.sampled_from(NAMES), level=st.integers(0, 150), pages=st.integers(1, 3))
    def write(self, name: str, level: int, pages: int) -> None:
        if name.endswith(("tar", "parquet")):
            blobs = [image(level + n, 1) for n in range(pages)]
            write_tar(Path(name), blobs) if name.endswith("tar") else write_parquet(Path(name), blobs, 2)
        else:
            Path(name).write_bytes(image(level, pages if name.endswith("tiff") else 1))
        self.clock += 1
        os.utime(name, ns=(self.clock, self.clock))

    @rule(name=st.sampled_from(NAMES))
    def damage(self, name: str) -> None:
        Path(name).write_bytes(b"no image")

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        Path(name).unlink(missing_ok=True)

    @rule(
        entries=st.lists(st.tuples(st.sampled_from(NAMES[:5]), st.sampled_from(("", "", "1"))), min_size=1, max_size=3)
    )
    def write_table(self, entries: list[tuple[str, str]]) -> None:
        Path("table.csv").write_text("path,page\n" + "".join(f"{name},{page}\n" for name, page in entries))

    @rule(number=st.integers(0, 100))
    def lose(self, number: int) -> None:
        """What a lost file, or one that was written half, leaves."""
        there = sorted(self.out.glob("*.parquet"))
        if there:
            victim = there[number % len(there)]
            victim.unlink() if number % 2 else victim.write_bytes(b"")
            (self.out / ".half.partial").write_bytes(b"half")

    @rule()
    def start_over(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)

    @rule(batches=st.integers(0, 3), **RUN)
    def killed(self, inputs: list[str], weights: int, precision: str, batches: int) -> None:
        with mock.patch.object(Stub, "left", batches), contextlib.suppress(Killed):
            self.run_into(self.out, inputs, weights, precision)

    @rule(**RUN)
    def score(self, inputs: list[str], weights: int, precision: str) -> None:
        self.last = inputs, weights, precision
        self.compare()

    @rule(change=st.sampled_from(("write", "lose", "damage", "nothing")), number=st.integers(0, 100))
    def score_after_a_change(self, change: str, number: int) -> None:
        name = NAMES[number % len(NAMES)]
        if change == "lose":
            self.lose(number)
        elif change == "write":
            self.write(name, number, 1 + number % 3)
        elif change == "damage":
            self.damage(name)
        self.compare()

    def compare(self) -> None:
        """The last command over the output there is, and into a new one: the same end, or a refusal."""
        fresh = self.folder / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        wanted, _ = self.run_into(fresh, *self.last)
        found, said = self.run_into(self.out, *self.last)
        if found is None:
            assert any(words in said for words in REFUSALS), said
        else:
            assert found == wanted
            assert answers(self.out) == answers(fresh)
            assert answers(self.out / "_errors") == answers(fresh / "_errors")
            keys = [(os.path.realpath(row["path"]), row["page"]) for row in answers(fresh)]
            assert len(set(keys)) == len(keys)

    def run_into(self, output: Path, inputs: list[str], weights: int, precision: str) -> tuple[int | None, str]:
        """Exit code, or None and why the command refused."""
        where = ["--weights", self.folder / f"weights{weights}", "--device", "cpu", "--precision", precision]
        return outcome("cluster", "--ray", "none", *inputs, "--output", output, "--shard", "3", *where)


def answers(folder: Path) -> list[dict[str, Any]]:
    """All rows, in an order of their own."""
    tables = [pq.read_table(file) for file in folder.glob("*.parquet") if file.stat().st_size]
    rows = pa.concat_tables(tables, promote_options="default").to_pylist() if tables else []
    return sorted(rows, key=lambda row: (row["path"], -1 if row["page"] is None else row["page"]))


TestScoring = Scoring.TestCase
TestScoring.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)
