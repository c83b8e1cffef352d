"""`python -m inference score --ray ADDRESS|local PATH... --output DIR`: the same answers from many GPUs or machines.

This is the driver: it finds the shards (shards.py), has Ray Data hand them to one actor per GPU (worker.py), and names
what was not scored. A shard's answers are one file, whole or not there (results.py). A finished shard is never computed
again, and a worker that dies loses only the shards that it was working on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry; Ray reads it when it is imported

import ray
import ray.data

from ..answers import computing
from ..checksums import ensemble_id
from ..errors import UserError
from ..exits import INCOMPLETE, INTERRUPTED
from ..manifest import Manifest, load_manifest
from ..progress import Progress
from .results import Results
from .shards import Shard, masked, one_line, plan, resolve, source_of
from .worker import Scorer

SHARD = 4096  # crops per shard: seconds of work for a GPU
RETRIES = 2  # of a shard whose worker died; after that it is named at the end
LOG_SECONDS = 60  # between progress lines where there is no terminal
SHOWN = 20  # lines about what was not scored


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
    code = {"py_modules": [str(Path(__file__).resolve().parents[1])]}
    try:
        ray.init(address, log_to_driver=False, runtime_env=code, **settings)
    except Exception as error:  # Ray raises many kinds, even a bare Exception
        where = "Ray does not start here" if address == "local" else f"no Ray cluster answers at {address}"
        raise UserError(f"{where} ({one_line(error)}); expected one; try again, or see docs/clusters.md") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a shard whose workers died does not stop the others


def pool(workers: int | None, device: str) -> tuple[int, dict[str, Any], int]:
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


def computing_there(manifest: Manifest, device: str, precision: str, resources: dict[str, Any]) -> tuple[str, str]:
    """The device and the precision in which a worker computes, which the driver's machine cannot tell."""
    if "auto" in (device, precision):

        def ask() -> tuple[str, str] | str:
            try:
                return computing(manifest, device, precision)
            except UserError as error:  # Ray would add a traceback to it
                return str(error)

        found = ray.get(ray.remote(**resources)(ask).remote())
        if isinstance(found, str):
            raise UserError(found)
        return found
    return computing(manifest, device, precision)


def predictions(
    shards: list[Shard], scorer: tuple[Any, ...], workers: int, resources: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The summary of each shard, in the order in which they end; UserError where the run has to stop."""
    # one block, and so one task, per shard; a worker takes the next one when it is done, so a crash costs one shard
    rows = [{"shard": json.dumps(asdict(shard))} for shard in shards]
    summaries = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Scorer,
        fn_constructor_args=scorer,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        max_restarts=-1,
        max_task_retries=RETRIES,
        **resources,
    )
    for row in summaries.iter_rows():
        if row["stop"]:
            raise UserError(row["stop"])
        yield row


def run(options: argparse.Namespace) -> int:
    """Exit code, as for the local command; UserError where nothing can be done."""
    start = time.perf_counter()
    manifest = load_manifest(options.weights.resolve())
    ensemble = ensemble_id(manifest)
    output = options.output if "://" in options.output else str(Path(options.output).absolute())
    shards, failed = plan(options.paths, options.shard or SHARD, options.image)
    for location in options.paths:
        if f"{resolve(output)[1].rstrip('/')}/".startswith(resolve(location)[1].rstrip("/") + "/"):
            raise UserError(
                f"{masked(output)} lies in {masked(location)}, which is read; expected another place; "
                "name another --output"
            )
    results = Results(output)
    job = {"ensemble": ensemble, "shard": options.shard or SHARD}
    asked = {name: value for name in ("device", "precision") if (value := getattr(options, name)) != "auto"}
    results.check(job | asked)
    todo = unfinished(results, shards, failed)
    crops = atypical = 0
    said = start
    if todo:
        with stderr_to_ourselves() as stream:
            progress = Progress(len(todo), "shards", stream)
            try:
                connect(options.ray)
                workers, resources, threads = pool(options.workers, options.device)
                device, precision = computing_there(manifest, options.device, options.precision, resources)
                results.claim(job | {"device": device, "precision": precision})
                scorer = (manifest, (device, precision, ensemble), output, options.precision, threads)
                progress.show(0, 0, 0)
                for number, row in enumerate(predictions(todo, scorer, workers, resources), 1):
                    crops, atypical = crops + row["crops"], atypical + row["atypical"]
                    progress.show(number, number, crops)
                    if not stream.isatty() and time.perf_counter() - said > LOG_SECONDS:
                        said = time.perf_counter()
                        rate = crops / (said - start)
                        print(f"{number:,} of {len(todo):,} shards, {crops:,} crops, {rate:,.1f} crops/s", flush=True)
            except KeyboardInterrupt:
                progress.clear()
                print(f"stopped after {crops:,} new crops; the same command resumes it", file=stream)
                return INTERRUPTED
            except ray.exceptions.RayError as error:
                raise UserError(f"the cluster failed ({one_line(error)}); the same command resumes it") from None
            finally:
                progress.clear()
                ray.shutdown()
    seconds = time.perf_counter() - start
    known = f", {len(shards) - len(todo):,} known already" if len(todo) < len(shards) else ""
    print(f"{crops:,} new crops ({atypical:,} atypical) in {len(todo):,} shards{known}, {seconds:.1f} s", flush=True)
    return report(results, todo, [*(shard.name for shard in shards), *failed])


def unfinished(results: Results, shards: Sequence[Shard], failed: dict[str, tuple[str, str]]) -> list[Shard]:
    """The shards without answers. UserError where the output holds answers that this run would not produce."""
    names = {shard.name for shard in shards} | set(failed)
    sources = {source_of(shard.name): shard.shown for shard in shards}
    done = results.shards()
    for name in sorted(done - names, key=lambda name: source_of(name) not in sources):
        if source_of(name) in sources:
            raise UserError(
                f"{sources[source_of(name)]} has changed since {name} was scored, or is named beside other inputs; "
                "expected it as it was; name another --output"
            )
        raise UserError(
            f"{results.folder} holds the answers {name}, whose input this command does not name; expected all inputs "
            "of earlier runs, and any new ones; name them too, or another --output"
        )
    for name in results.shards("/_errors") - names:
        if source_of(name) in sources:
            results.forget(name)
    for name, (shown, reason) in failed.items():
        results.note(name, [(shown, None, reason)])
    return [shard for shard in shards if shard.name not in done]


def report(results: Results, todo: Sequence[Shard], names: Sequence[str]) -> int:
    """Name what was not scored, in this run or one before; exit code."""
    done, noted = results.shards(), results.shards("/_errors")
    for shard in todo:
        if shard.name not in done | noted:
            results.note(shard.name, [(shard.shown, None, f"its worker died {RETRIES + 1} times")])
            noted.add(shard.name)
    total, lost = 0, sum(name not in done for name in names)
    for name in names:
        for path, page, reason in results.errors(name) if name in noted else ():
            total += 1
            if total <= SHOWN:
                where = path if page is None else f"{path}, page {page}"
                print(f"not scored: {where}: {reason}", file=sys.stderr)
    if not total:
        return 0
    shards = f", {lost:,} of {len(names):,} shards have no answers" if lost else ""
    print(f"{total:,} not scored, each in {results.folder}/_errors{shards}", file=sys.stderr)
    return INCOMPLETE
