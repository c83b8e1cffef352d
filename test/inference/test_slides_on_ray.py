"""`slides --ray` on a real local Ray: the files of a run on one machine, byte for byte, whatever dies on the way."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from inference.cluster import pool
from inference.errors import UserError
from inference.slides import actors
from test.support import detection_files as files
from test.support.processes import without_progress
from test.support.pyramids import write_slide
from test.support.ray_cluster import cluster

RESULTS = ["objects.csv", "slides.csv", "out/one.tif.geojson", "out/two.tif.geojson"]


DYING = """
import os, sys
from inference.slides import actors, journal
from test.support import commands

victim, *arguments = sys.argv[1:]
add = journal.Journal.add

class PartScorer(actors.PartScorer):  # workers get it by value, with this program's text
    def work(self, part):
        if victim == "worker" and part.numbers[0] >= 512 and not os.path.exists(DIED):
            open(DIED, "x").close()
            os.kill(os.getpid(), 9)
        return super().work(part)

def add_and_die(self, answers):
    add(self, answers)
    if victim == "driver" and self.file.read_bytes().count(b"\\n") == 2:
        os.kill(os.getpid(), 9)

actors.PartScorer, journal.Journal.add = PartScorer, add_and_die
sys.exit(commands.inference("slides", *arguments))
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with cluster() as (found, _):
        yield found


def run(folder: Path, program: Sequence[str], weights: Path, *more: object) -> subprocess.CompletedProcess[str]:
    """In `folder`; every process computes in one thread, so that all add up numbers in the same order."""
    folder.mkdir(exist_ok=True)
    results = ["--csv", "objects.csv", "--output", "out", "--summary", "slides.csv", "--report", "page.html"]
    ensemble = ["--weights", weights, "--device", "cpu", "--precision", "fp32"]
    command = [sys.executable, *program, *more, *results, *ensemble]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    return subprocess.run([str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True)


def page(folder: Path) -> str:
    """The report without the line that says what computed it."""
    return re.sub(r"cpu \([^)]*\)", "cpu", (folder / "page.html").read_text())


def test_a_killed_driver_and_a_killed_worker_change_no_byte(address, miniature, tmp_path) -> None:
    rng = np.random.default_rng(0)
    for name, side in (("one.tif", 1300), ("two.tif", 600)):
        write_slide(tmp_path / name, [rng.integers(0, 200, (side, side, 3), dtype=np.uint8)])
    many = [(x, y) for y in range(64, 1236, 40) for x in range(64, 1236, 40)]
    inputs = [
        files.qupath_polygons(tmp_path / "one.geojson", many),
        files.qupath(tmp_path / "two.geojson", [(300, 300), (9000, 5), (300, 300), (100, 500)]),
        files.qupath(tmp_path / "three.geojson", [(1, 2)]),
    ]
    alone, shared, died = tmp_path / "alone", tmp_path / "shared", tmp_path / "died"
    expected = run(alone, ["-m", "inference", "slides"], miniature, *inputs)
    assert expected.returncode == 3 and "no slide called three" in expected.stderr

    program = ["-c", DYING.replace("DIED", repr(str(died)))]
    options = [*inputs, "--ray", address, "--workers", 2]
    killed = run(shared, [*program, "driver"], miniature, *options)
    assert killed.returncode == -9 and not (shared / "objects.csv").exists()
    resumed = run(shared, [*program, "worker"], miniature, *options)
    assert resumed.returncode == 3 and "256 of them known already" in resumed.stdout and died.exists(), resumed
    assert sorted(without_progress(resumed.stderr)) == sorted(without_progress(expected.stderr))
    for name in RESULTS:
        assert (shared / name).read_bytes() == (alone / name).read_bytes(), name
    assert page(shared) == page(alone)
    assert not list(shared.glob(".*"))


def test_joining_a_cluster_is_told(eager, monkeypatch, capfd) -> None:
    def refuse(address: str) -> None:
        raise UserError(f"no Ray cluster answers at {address}")

    monkeypatch.setattr(pool, "connect", refuse)
    scorer = actors.on_a_cluster(argparse.Namespace(ray="there"), None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="answers at there"), scorer:
        pass
    assert capfd.readouterr().err == "joining the cluster: 0:00:00 so far\n"


def test_a_slide_that_workers_do_not_see_is_named_with_what_to_do(address, miniature, tmp_path) -> None:
    write_slide(tmp_path / "s.tif", [np.zeros((300, 300, 3), np.uint8)])
    detections = files.qupath(tmp_path / "s.geojson", [(150, 150), (160, 160)])
    there = ["--slide", "/proc/self/cwd/s.tif", "--ray", address]  # another file in each process
    done = run(tmp_path, ["-m", "inference", "slides"], miniature, detections, *there)
    assert (done.returncode, done.stdout) == (1, "")
    lost, last = without_progress(done.stderr)
    assert re.fullmatch(r"not scored: \S+/s\.tif \(2 detections\): \S+ does not read it \(.*No such file.*", lost)
    assert lost.endswith("expected slides on a file system that all nodes share; move them there")
    assert "none of 2 detections could be scored" in last
