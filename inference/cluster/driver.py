"""One run of `python -m inference cluster`: the same answers as `score`, from many GPUs or machines.

The driver finds the shards (shards.py), hands them to the workers (pool.py, scorer.py), and names what was not scored.
A shard's answers are one file, whole or not there (results.py). A finished shard is never computed again, and a worker
that dies loses only the shard that it was working on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..answers import asked_for
from ..errors import UserError
from ..exits import INCOMPLETE, INTERRUPTED
from ..manifest import load_manifest
from ..progress import Progress
from .pool import DIED, joined
from .results import Results
from .scorer import Counts, ShardScorer
from .shards import Shard, masked, plan, resolve, source_of

SHOWN = 20  # lines about what was not scored


def run(options: argparse.Namespace) -> int:
    """Exit code, as for `score`; UserError where nothing can be done."""
    start = time.perf_counter()
    manifest = load_manifest(options.weights.resolve())
    output = options.output if "://" in options.output else str(Path(options.output).absolute())
    shards, failed = plan(options.paths, options.shard, options.image)
    for location in options.paths:
        if f"{resolve(output)[1].rstrip('/')}/".startswith(resolve(location)[1].rstrip("/") + "/"):
            raise UserError(
                f"{masked(output)} lies in {masked(location)}, which is read; expected another place; "
                "name another --output"
            )
    results = Results(output)
    asked = asked_for(manifest, options.device, options.precision)
    job = {"ensemble": asked.ensemble, "shard": options.shard}
    results.check(job | {name: value for name, value in asked._asdict().items() if value != "auto"})
    todo = unfinished(results, shards, failed)
    crops = atypical = 0
    if todo:
        with joined(options, manifest) as pool, Progress(len(todo), "shards", pool.stream) as progress:
            progress.show(0, 0, 0)
            computed = pool.computed
            settings = output, manifest, computed, options.precision, pool.threads
            try:
                results.claim(job | {"device": computed.device, "precision": computed.precision})
                scored = pool.spread(ShardScorer, settings, ((shard.name, shard) for shard in todo))
                for number, (_, counts) in enumerate(scored, 1):
                    new = counts or Counts(0, 0)
                    crops, atypical = crops + new.crops, atypical + new.atypical
                    progress.show(number, number, crops)
            except KeyboardInterrupt:
                progress.clear()
                print(f"stopped after {crops:,} new crops; the same command resumes it", file=pool.stream)
                return INTERRUPTED
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
            results.note(shard.name, [(shard.shown, None, DIED)])
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
