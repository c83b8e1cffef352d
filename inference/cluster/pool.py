"""Joins a Ray cluster and spreads work over its workers: the shards of `cluster`, and the parts of `slides --ray`.

Each worker is an actor (worker.py) that holds the ensemble and takes one piece of work at a time. When one dies, Ray
starts it again and repeats what it was working on; after RETRIES repetitions that piece is given up, and the others go
on. Ray Data would do the same for shards, but not in order, which slides need.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, TypeVar

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry; Ray reads it when it is imported

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from ..answers import Computed, asked_for, computing
from ..errors import UserError
from ..manifest import Manifest
from ..progress import speaking
from .shards import one_line
from .worker import Unusable, Worker

RETRIES = 2  # of a piece of work whose worker died
DIED = f"its worker died {RETRIES + 1} times"
AHEAD = 4  # pieces per worker that may wait for an earlier one, where results come in order
Key = TypeVar("Key")


@contextlib.contextmanager
def stderr_to_ourselves() -> Iterator[IO[str]]:
    """The stream for our lines. What Ray itself writes to stderr is dropped, because its log files have it."""
    sys.stderr.flush()
    saved = os.dup(2)
    with os.fdopen(os.dup(2), "w") as ours, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield ours
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)


def connect(address: str) -> None:
    """Join the cluster at `address`, or start one here. Workers use this code, whatever they have installed."""
    settings: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    top = sys.modules[__name__.partition(".")[0]]  # `inference`, or where it is installed the package around it
    code = {"py_modules": [str(Path(str(top.__file__)).resolve().parent)]}
    try:
        ray.init(address, log_to_driver=False, runtime_env=code, **settings)
    except Exception as error:  # Ray raises many kinds, even a bare Exception
        where = "Ray does not start here" if address == "local" else f"no Ray cluster answers at {address}"
        raise UserError(f"{where} ({one_line(error)}); expected one; try again, or see docs/clusters.md") from None


def placement(workers: int | None, device: str) -> tuple[int, dict[str, Any], int]:
    """Number of workers, the resources and threads of each: one per GPU, or one per four cores without GPUs."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    if gpus and device != "cpu":
        return min(workers or gpus, gpus), {"num_gpus": 1}, max(1, cores // gpus)
    workers = workers or max(1, cores // 4)
    threads = max(1, cores // workers)
    while threads > 1 and sum(node.get("CPU", 0) // threads for node in nodes) < workers:
        threads -= 1
    if cores < workers:
        raise UserError(f"the cluster has {cores} cores; expected one for each of {workers} workers; ask for fewer")
    return workers, {"num_cpus": threads}, threads


def computing_there(manifest: Manifest, asked: Computed, resources: dict[str, Any]) -> Computed:
    """What a worker computes with, which the driver's machine cannot tell. Unusable where it cannot."""
    if "auto" not in asked:
        return asked

    def ask() -> Computed:
        try:
            return computing(manifest, asked)
        except UserError as error:
            raise Unusable(str(error)) from None

    found: Computed = ray.get(ray.remote(**resources)(ask).remote())
    return found


@dataclass(frozen=True)
class Pool:
    """Workers on a cluster: how many, and the resources and threads of each.

    stream: for our own lines on stderr, where nothing else appears meanwhile
    """

    computed: Computed
    workers: int
    resources: dict[str, Any]
    threads: int
    stream: IO[str]

    def spread(
        self, kind: type[Worker], settings: Sequence[Any], work: Iterable[tuple[Key, Any]], ordered: bool = False
    ) -> Iterator[tuple[Key, Any]]:
        """The key of each piece of work with its result, or with None where its worker died too often.

        kind, settings: the worker and its constructor's arguments; ordered: as `work`, else as they end
        """
        actor_class: Any = ray.remote(max_restarts=-1, max_task_retries=RETRIES, **self.resources)(kind)
        actors = [actor_class.remote(*settings) for _ in range(self.workers)]
        running = {actor.__ray_ready__.remote(): actor for actor in actors}  # one without a place yet gets no work
        free: list[Any] = []
        keys: dict[Any, Key] = {}  # of what is running, or waits for an earlier one
        coming = iter(work)
        while True:
            while free and len(keys) < AHEAD * len(actors) and (following := next(coming, None)):
                key, piece = following
                actor = free.pop()
                reference = actor.take.remote(piece)
                running[reference], keys[reference] = actor, key
            if free and not keys:
                return
            for reference in ray.wait(list(running))[0]:
                free.append(running.pop(reference))
                if reference not in keys:
                    ray.get(reference)  # raises where the worker cannot be made
            ended = (takewhile if ordered else filter)(lambda reference: reference not in running, list(keys))
            for reference in ended:
                yield keys.pop(reference), result(reference)


def result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except (RayActorError, OutOfMemoryError):
        return None


@contextlib.contextmanager
def joined(options: argparse.Namespace, manifest: Manifest) -> Iterator[Pool]:
    """On the cluster at `options.ray`. UserError where there is none, or where it cannot compute."""
    with stderr_to_ourselves() as stream:
        try:
            with speaking("joining the cluster", stream):
                connect(options.ray)
                workers, resources, threads = placement(options.workers, options.device)
                computed = computing_there(manifest, asked_for(manifest, options.device, options.precision), resources)
            yield Pool(computed, workers, resources, threads, stream)
        except Unusable as error:  # Ray's own class around it has a traceback in its text
            raise UserError(one_line(getattr(error, "cause", error))) from None
        except RayError as error:
            raise UserError(f"the cluster failed ({one_line(error)}); the same command resumes it") from None
        finally:
            ray.shutdown()
