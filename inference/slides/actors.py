"""`slides --ray`: workers with the ensemble score parts of slides; the driver does all else, as it would without Ray.

Answers come in the order of the objects and go into the driver's journal as they come, so the same command resumes the
run however it ended. A slide that is lost stops its own parts alone.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ..cluster.pool import DIED, Pool, joined
from ..cluster.shards import one_line
from ..cluster.worker import Worker
from ..errors import UserError
from ..manifest import Manifest
from .part import BATCH, Outcomes, Part, score_part
from .reader import Slide
from .slide_work import Answering, Scorer, SlideWork

PART = 4 * BATCH  # crops that a worker takes at a time, and loses if it dies


class PartScorer(Worker):
    slide: Slide | None = None  # that it read last

    def work(self, piece: Part) -> Outcomes | UserError:
        """What became of each object, or why the whole slide is lost."""
        ensemble = self.ensemble
        try:
            slide = self.open(piece)
            return [outcome for batch in score_part(slide, piece, ensemble, self.pool) for outcome in batch]
        except UserError as error:
            return error

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
def on_a_cluster(options: argparse.Namespace, manifest: Manifest) -> Iterator[Scorer]:
    """On the cluster at `options.ray`. UserError where there is none, or where it cannot compute."""
    with joined(options, manifest) as pool:
        name = f"{pool.computed.device} ({pool.workers} worker{'s' * (pool.workers > 1)} on Ray)"
        settings = manifest, pool.computed, options.precision, pool.threads
        yield Scorer(pool.computed, name, pool.stream, partial(score_on_a_cluster, pool=pool, settings=settings))


def score_on_a_cluster(works: Iterable[SlideWork], pool: Pool, settings: tuple[Any, ...]) -> Answering:
    """Results come in the order of the parts, as they do on one machine."""
    parts = (
        ((work, part), part)
        for work in works
        for start in range(0, len(work.objects), PART)
        if not work.lost and (part := work.part(start, start + PART)).numbers
    )
    for (work, part), outcomes in pool.spread(PartScorer, settings, parts, ordered=True):
        if work.lost:
            continue
        if outcomes is None:
            reason = UserError(f"{DIED}; expected it to live; see Ray's log files")
            outcomes = [(n, reason) for n in part.numbers]
        yield work, outcomes
