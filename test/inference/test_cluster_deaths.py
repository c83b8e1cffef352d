"""`cluster` when something dies: a worker, the driver, a file. Each crop is answered once in the end."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from inference.errors import UserError
from test.support import commands
from test.support.image_files import with_pillow
from test.support.miniature import make_ensemble
from test.support.processes import interruptible, until, without_progress
from test.support.ray_cluster import cluster
from test.support.shard_files import (
    CROPS,
    POISON,
    arguments,
    errors,
    finished,
    read,
    run,
    write_folder,
    write_parquet,
    write_tar,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray() -> Iterator[tuple[str, int]]:
    """Address and process id."""
    with cluster() as started:
        yield started


@pytest.fixture(scope="module")
def address(ray: tuple[str, int]) -> str:
    return ray[0]


def start(address: str, weights: Path, output: Path, *more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "inference", "cluster", "--ray", address, *arguments(weights, output, *more)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, preexec_fn=interruptible)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    until(lambda: process.poll() is not None or condition(), "the command to come so far")
    assert process.poll() is None, process.communicate()


def actors(ray: tuple[str, int]) -> set[int]:
    """Those of this cluster: others of the machine are not ours to count or to kill."""
    found = set()
    for process in psutil.Process(ray[1]).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "ShardScorer" in process.name():
                found.add(process.pid)
    return found


def test_a_killed_command_is_continued(ray, address, miniature, blobs, tmp_path, capsys) -> None:
    """kill -9 of the driver: no crop is lost, none is there twice, finished shards stay as they are."""
    file, output = write_parquet(tmp_path / "a.parquet", blobs * 10), tmp_path / "out"
    command = start(address, miniature, output, file, "--shard", 20, "--workers", 2)
    wait_for(lambda: len(finished(output)) >= 3, command)
    command.kill()
    command.communicate()
    until(lambda: not actors(ray), "the actors to end with the command")  # and they may finish a shard before they do
    kept = finished(output)
    assert 0 < len(kept) < 30
    assert run(address, miniature, output, file, "--shard", 20) == 0
    assert f"in {30 - len(kept)} shards, {len(kept)} known already" in capsys.readouterr().out
    assert sorted(pd.read_parquet(output).path) == sorted(f"{file}#{n}" for n in range(10 * CROPS))  # as anybody reads
    assert kept.items() <= finished(output).items()


def test_a_killed_actor_does_not_stop_the_run(ray, address, miniature, blobs, tmp_path) -> None:
    file, output = write_parquet(tmp_path / "a.parquet", blobs * 10), tmp_path / "out"
    command = start(address, miniature, output, file, "--shard", 40)
    wait_for(lambda: finished(output) and actors(ray), command)
    for victim in actors(ray):
        os.kill(victim, signal.SIGKILL)
    kept = finished(output)
    out, err = command.communicate()
    assert (command.returncode, without_progress(err)) == (0, []) and len(kept) < 15
    assert "600 new crops" in out and "in 15 shards" in out
    assert sorted(pd.read_parquet(output).path) == sorted(f"{file}#{n}" for n in range(10 * CROPS))


CRASHING = """
import os, sys
from inference.cluster import driver
from test.support import commands

class ShardScorer(driver.ShardScorer):  # workers get it by value, with this program's text
    def score(self, shard):
        if shard.shown.endswith("/crash"):
            with open(DEATHS, "a") as file:
                file.write("x")
            os.kill(os.getpid(), 11)
        return super().score(shard)

driver.ShardScorer = ShardScorer
sys.exit(commands.inference("cluster", *sys.argv[1:]))
"""


def test_poison_is_named_and_stops_nothing(address, miniature, blobs, tmp_path, capsys) -> None:
    """Unreadable crops in every format, files that are not whole, a shard that crashes each worker that takes it."""
    data, output = tmp_path / "data", tmp_path / "out"
    bad = [POISON.get(n, blob) for n, blob in enumerate(blobs)]
    locations = [data / "all", write_folder(data / "crash", blobs[:5])]
    write_folder(data / "all/folder", bad)
    write_parquet(data / "all/a.parquet", bad)
    write_tar(data / "all/a.tar", bad)
    cut, damaged = write_tar(data / "all/cut.tar", blobs), data / "all/damaged.parquet"
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    damaged.write_bytes((data / "all/a.parquet").read_bytes()[:-100])
    program = CRASHING.replace("DEATHS", repr(str(tmp_path / "deaths")))
    command = [sys.executable, "-c", program, "--ray", address, *arguments(miniature, output, *locations)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "deaths").read_text() == "xxx"
    found = errors(output)
    poisoned = [
        f"{data}/all/{path}" for n in POISON for path in (f"a.parquet#{n}", f"a.tar#s/{n:03}.png", f"folder/{n:03}.png")
    ]
    assert sorted(found.path) == sorted([*poisoned, str(cut), str(damaged), f"{data}/crash"])
    lines = [f"not scored: {path}: {reason}" for path, reason in zip(found.path, found.reason, strict=True)]
    last = f"12 not scored, each in {output}/_errors, 3 of 6 shards have no answers"
    assert sorted(without_progress(done.stderr)) == sorted([*lines, last])
    reasons = found.set_index("path").reason
    assert "cannot be read to its end" in reasons[str(cut)]
    assert reasons[f"{data}/crash"] == "its worker died 3 times"
    answered = read(output)
    assert len(answered) == 3 * (CROPS - 3) and not set(answered.path) & set(poisoned)

    cut.write_bytes(whole)  # a rerun tries again what has no answers
    before = finished(output)
    assert run(address, miniature, output, *locations) == 3
    assert "in 2 shards, 3 known already" in capsys.readouterr().out
    assert sorted(errors(output).path) == sorted([*poisoned, str(damaged)])
    assert len(read(output)) == 3 * (CROPS - 3) + CROPS + 5
    assert before.items() <= finished(output).items()


def test_ctrl_c_ends_a_run_that_local_ray_continues(address, miniature, blobs, tmp_path) -> None:
    file, output = write_parquet(tmp_path / "a.parquet", blobs * 10), tmp_path / "out"
    command = start(address, miniature, output, file, "--shard", 40)
    wait_for(lambda: finished(output), command)
    command.send_signal(signal.SIGINT)
    out, err = command.communicate()
    assert (command.returncode, out) == (130, "")
    [line] = without_progress(err)
    assert "the same command resumes it" in line
    out, err = (command := start("local", miniature, output, file, "--shard", 40)).communicate()
    assert (command.returncode, without_progress(err)) == (0, []) and "known already" in out
    assert sorted(pd.read_parquet(output).path) == sorted(f"{file}#{n}" for n in range(10 * CROPS))


def test_any_history_ends_as_a_fresh_local_run_or_is_refused(address, miniature, blobs, tmp_path) -> None:
    """Answers lost, files changed before and after their answers were lost, inputs left out and added; in any order."""
    draw, output, fresh, other = random.Random(0), tmp_path / "out", tmp_path / "fresh.csv", tmp_path / "other"
    other.mkdir()
    make_ensemble(other, folds=2, threshold=0.4)
    write_folder(tmp_path / "a", blobs[:5])
    pages = [Image.open(io.BytesIO(blob)) for blob in blobs[5:8]]
    write_folder(tmp_path / "b", blobs[8:13]).joinpath("s.tiff").write_bytes(with_pillow(pages))
    inputs = [draw.choice([tmp_path / "a", tmp_path / "b"])]

    def score(where: str, *more: object) -> int:
        return run(where, miniature, output, *inputs, "--shard", 3, *more)

    def compare() -> None:
        assert score(address) == 0
        options = ["--weights", miniature, "--device", "cpu", "--precision", "fp32"]
        assert commands.inference("score", *inputs, "--csv", fresh, *options) == 0
        with fresh.open() as stream:
            wanted = sorted(csv.DictReader(stream), key=lambda row: (row["path"], int(row["page"])))
        fresh.unlink()
        found = read(output)
        for column in ("path", "page", "pages", "class", "content", "ensemble"):
            assert list(found[column].astype(str)) == [row[column] for row in wanted], column
        np.testing.assert_allclose(found.p_atypical, [float(row["p_atypical"]) for row in wanted], atol=1e-6)

    def refused(message: str, *more: object) -> None:
        with pytest.raises(UserError, match=message):
            score("nowhere:1", *more)

    compare()
    for step in draw.sample(["add", "leave out", "change", "lose", "lose and change"], 5):
        answered = draw.choice(sorted(output.glob("*.parquet")))
        crop = Path(draw.choice(pq.read_table(answered)["path"].to_pylist()))
        before, time = crop.read_bytes(), crop.stat().st_mtime_ns
        if step == "add":
            inputs = [tmp_path / "b", tmp_path / "a"]
        if "lose" in step:
            answered.unlink()
        if "change" in step:
            crop.write_bytes(draw.choice(blobs[13:]))
        if step == "leave out":
            inputs, whole = [tmp_path / "a" / "000.png"], inputs
            refused("does not name")
            inputs = whole
        elif step == "change":
            refused("has changed since")
            crop.write_bytes(before)
            os.utime(crop, ns=(time, time))
        compare()
        refused(
            *draw.choice([("holds answers with precision", "--precision", "bf16"), ("ensemble", "--weights", other)])
        )
