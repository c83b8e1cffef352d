"""`slides --ray` on a real local Ray: the files of a run on one machine, byte for byte, whatever dies on the way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from test.support import detection_files as files
from test.support.pyramids import write_slide
from test.support.ray_cluster import cluster

RESULTS = ["objects.csv", "slides.csv", "out/one.tif.geojson", "out/two.tif.geojson"]


@pytest.fixture(scope="module")
def ray() -> Iterator[tuple[str, int]]:
    """Address of a cluster, and the process that all of it descends from."""
    with cluster() as found:
        yield found


def start(folder: Path, weights: Path, inputs: Sequence[object], *more: object) -> subprocess.Popen[str]:
    """In `folder`; every process computes in one thread, so that all add up numbers in the same order."""
    folder.mkdir(exist_ok=True)
    results = ["--csv", "objects.csv", "--output", "out", "--summary", "slides.csv", "--report", "page.html"]
    ensemble = ["--weights", weights, "--device", "cpu", "--precision", "fp32"]
    command = [sys.executable, "-m", "inference", "slides", *inputs, *results, *ensemble, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in command], cwd=folder, env=environment, **pipes)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)


def page(folder: Path) -> str:
    """The report without the line that says what computed it."""
    return re.sub(r"cpu \([^)]*\)", "cpu", (folder / "page.html").read_text())


def test_the_files_are_those_of_one_machine_though_workers_and_driver_are_killed(ray, miniature, tmp_path) -> None:
    address, ancestor = ray
    rng = np.random.default_rng(0)
    for name, side in (("one.tif", 1300), ("two.tif", 600)):
        write_slide(tmp_path / name, [rng.integers(0, 200, (side, side, 3), dtype=np.uint8)])
    many = [(x, y) for y in range(64, 1236, 40) for x in range(64, 1236, 40)]
    inputs = [
        files.qupath_polygons(tmp_path / "one.geojson", many),
        files.qupath(tmp_path / "two.geojson", [(300, 300), (9000, 5), (300, 300), (100, 500)]),
        files.qupath(tmp_path / "three.geojson", [(1, 2)]),
    ]
    alone = start(tmp_path / "alone", miniature, inputs)
    _, expected = alone.communicate()
    assert alone.returncode == 3 and "no slide called three" in expected

    journal = tmp_path / "shared/.objects.csv.journal"
    lines = lambda: journal.read_bytes().count(b"\n") if journal.exists() else 0  # noqa: E731
    options = [*inputs, "--ray", address, "--workers", 2]
    killed = start(tmp_path / "shared", miniature, options)
    wait_for(lines, killed)
    killed.kill()
    killed.communicate()
    before = lines()
    resumed = start(tmp_path / "shared", miniature, options)
    wait_for(lambda: lines() > before, resumed)
    workers = [one for one in psutil.Process(ancestor).children(recursive=True) if "Worker" in one.name()]
    for victim in workers:
        victim.send_signal(signal.SIGKILL)
    out, errors = resumed.communicate()
    assert workers and resumed.returncode == 3 and "of them known already" in out
    assert sorted(errors.splitlines()) == sorted(expected.splitlines())
    for name in RESULTS:
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert page(tmp_path / "shared") == page(tmp_path / "alone")
    assert not journal.exists()


def test_a_slide_that_workers_do_not_see_is_named_with_what_to_do(ray, miniature, tmp_path) -> None:
    write_slide(tmp_path / "s.tif", [np.zeros((300, 300, 3), np.uint8)])
    detections = files.qupath(tmp_path / "s.geojson", [(150, 150), (160, 160)])
    there = ["--slide", "/proc/self/cwd/s.tif", "--ray", ray[0]]  # another file in each process
    out, errors = (run := start(tmp_path, miniature, [detections], *there)).communicate()
    assert (run.returncode, out) == (1, "")
    lost, last = errors.splitlines()
    assert re.fullmatch(r"not scored: \S+/s\.tif \(2 detections\): \S+ does not read it \(.*No such file.*", lost)
    assert lost.endswith("expected slides on a file system that all nodes share; move them there")
    assert "none of 2 detections could be scored" in last
