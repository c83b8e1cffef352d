"""`slides --ray`: workers with the ensemble score parts of slides; the driver does all else, as it would without Ray.

When a worker dies, another one takes the part that it was working on. Answers are kept in the driver's journal, so the
same command resumes the run however it ended.
"""

from __future__ import annotations

import argparse
import os
import platform
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry; Ray reads it when it is imported

import ray

from ..checksums import ensemble_id
from ..cluster.command import RETRIES, computing_there, connect, pool, stderr_to_ourselves
from ..cluster.shards import one_line
from ..cluster.worker import load
from ..ensemble import Ensemble
from ..errors import UserError
from ..manifest import Manifest
from .reader import Slide
from .scoring import BATCH, Outcomes, Part, score_part
from .work import Answering, Scorer, Work

PART = 4 * BATCH  # crops that a worker takes at a time, and loses if it dies
AHEAD = 4  # parts per worker that may wait for an earlier part


class Unusable(Exception):
    """The ensemble does not work on a node, whatever the slide."""


class Worker:
    """An actor: the ensemble, loaded with its first part, and the slide that it read last."""

    def __init__(self, manifest: Manifest, computed: tuple[str, str, str], precision: str, threads: int) -> None:
        """Arguments as for cluster.worker.Scorer."""
        self.settings = manifest, computed, precision, threads
        self.pool = ThreadPoolExecutor(max(2, threads))
        self.ensemble: Ensemble | None = None
        self.slide: Slide | None = None

    def score(self, part: Part) -> Outcomes | UserError:
        """What became of each object, or why the whole slide is lost."""
        try:
            if self.ensemble is None:
                self.ensemble = load(*self.settings)
        except UserError as error:
            raise Unusable(str(error)) from None
        try:
            slide = self.open(part)
            return [one for batch in score_part(slide, part, self.ensemble, self.pool) for one in batch]
        except UserError as error:
            return error
        except Exception:  # unexpected, such as a lost GPU: another process may succeed
            traceback.print_exc()
            os._exit(1)

    def open(self, part: Part) -> Slide:
        if self.slide is None or (self.slide.file, self.slide.identity) != (part.file, part.identity):
            try:
                self.slide = Slide(part.file, part.cutting.mpp, part.cutting.slide_mpp)
            except UserError as error:
                raise UserError(
                    f"{platform.node()} does not read it ({one_line(error)}); expected slides on a file system that "
                    "all nodes share; move them there"
                ) from None
            if self.slide.identity != part.identity:
                raise UserError(
                    f"{platform.node()} has another file of that name, or it changed while it was read; expected the "
                    "same on all nodes; run the same command again"
                )
        return self.slide


@contextmanager
def there(options: argparse.Namespace, manifest: Manifest) -> Iterator[Scorer]:
    """On the cluster at `options.ray`. UserError where there is none, or where it cannot compute."""
    with stderr_to_ourselves() as stream:
        try:
            connect(options.ray)
            workers, resources, threads = pool(options.workers, options.device)
            device, precision = computing_there(manifest, options.device, options.precision, resources)
            settings = manifest, (device, precision, ensemble_id(manifest)), options.precision, threads
            kind = ray.remote(max_restarts=-1, max_task_retries=RETRIES, **resources)(Worker)
            actors = [kind.remote(*settings) for _ in range(workers)]
            name = f"{device} ({workers} worker{'s' * (workers > 1)} on Ray)"
            yield Scorer(device, precision, name, stream, partial(score_there, actors=actors))
        except Unusable as error:
            raise UserError(one_line(getattr(error, "cause", error))) from None
        except ray.exceptions.RayError as error:
            raise UserError(f"the cluster failed ({one_line(error)}); the same command resumes it") from None
        finally:
            ray.shutdown()


def score_there(works: Iterable[Work], actors: list[Any]) -> Answering:
    """Each actor works on one part at a time; results come in the order of the parts, as they do on one machine."""
    parts = (
        (work, part)
        for work in works
        for start in range(0, len(work.found), PART)
        if not work.lost and (part := work.part(start, start + PART)).numbers
    )
    free, running = list(actors), dict[Any, Any]()
    order: deque[tuple[Work, Part, Any]] = deque()
    while True:
        while free and len(order) < AHEAD * len(actors) and (following := next(parts, None)):
            actor = free.pop()
            work, part = following
            coming = actor.score.remote(part)
            running[coming] = actor
            order.append((work, part, coming))
        if not order:
            return
        for coming in ray.wait(list(running), num_returns=1)[0]:
            free.append(running.pop(coming))
        while order and order[0][2] not in running:
            work, part, coming = order.popleft()
            if not work.lost:
                yield work, outcome(coming, part)


def outcome(coming: Any, part: Part) -> Outcomes | UserError:
    try:
        found: Outcomes | UserError = ray.get(coming)
        return found
    except ray.exceptions.RayActorError:
        reason = UserError(f"its worker died {RETRIES + 1} times; expected it to live; see Ray's log files")
        return [(n, reason) for n in part.numbers]
