"""Work on the workers of a real local Ray, in order and as it ends."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from inference.answers import Computed
from inference.cluster.pool import Pool, connect
from inference.cluster.worker import Worker
from test.support.ray_cluster import cluster

pytestmark = pytest.mark.slow
SETTINGS = (None, None, "fp32", 1)


class Waiting(Worker):
    """Makes the file of a piece of work, after it has seen the one that it waits for; "die" ends the process."""

    def work(self, piece: tuple[Path, Path]) -> str:
        made, awaited = piece
        if made.name == "die":
            os._exit(1)
        while not awaited.exists():
            time.sleep(0.01)
        made.touch()
        return made.name.upper()


@pytest.fixture(scope="module")
def joined() -> Iterator[None]:
    """Two cores."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with cluster() as (address, _):
        connect(address)
        yield
        ray.shutdown()


def names(folder: Path, *pieces: tuple[str, str], cores: int = 1, ordered: bool = False) -> list[tuple[str, Any]]:
    """What two workers of `cores` each give for pieces of work, each the name that it makes and the one it awaits."""
    pool = Pool(Computed("cpu", "fp32", ""), 2, {"num_cpus": cores}, 1, sys.stderr)
    work = [(made, (folder / made, folder / awaited)) for made, awaited in pieces]
    return list(pool.spread(Waiting, SETTINGS, work, ordered))


def test_results_come_as_they_end_or_in_order(joined, tmp_path) -> None:
    pieces = [("a", "c"), ("b", "."), ("c", "b")]  # a ends when c has
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    assert names(tmp_path / "1", *pieces)[:2] == [("b", "B"), ("c", "C")]
    assert names(tmp_path / "2", *pieces, ordered=True) == [("a", "A"), ("b", "B"), ("c", "C")]


def test_a_worker_that_finds_no_place_gets_no_work(joined, tmp_path) -> None:
    assert names(tmp_path, ("a", "."), ("b", "a"), ("c", "b"), cores=2) == [("a", "A"), ("b", "B"), ("c", "C")]


def test_what_kills_its_workers_is_given_up_and_the_rest_goes_on(joined, tmp_path) -> None:
    found = names(tmp_path, ("die", "."), ("a", "."), ("b", "."), ordered=True)
    assert found == [("die", None), ("a", "A"), ("b", "B")]


def test_without_work_there_is_nothing(joined, tmp_path) -> None:
    assert names(tmp_path) == []
