"""One run of `python -m inference slides`: the objects of each slide are scored, here or on a cluster, then written."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .. import __version__
from ..checksums import ensemble_id
from ..errors import UserError
from ..manifest import Manifest
from ..progress import Progress
from ..report.page import write_report
from . import outputs
from .journal import Journal
from .overview import overview
from .scoring import Cutting, score_part
from .statistics import Summary
from .targets import Collected, Target
from .work import Answering, Scored, Scorer, Work

if TYPE_CHECKING:
    from ..ensemble import Ensemble


@contextmanager
def here(options: argparse.Namespace) -> Iterator[Scorer]:
    """On this machine. UserError where the ensemble cannot be loaded."""
    from ..ensemble import Ensemble

    ensemble = Ensemble.load(options.weights, options.device, options.precision)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        score = partial(score_here, ensemble=ensemble, pool=pool)
        yield Scorer(ensemble.device.type, ensemble.precision, ensemble.device_name, sys.stderr, score)


def score_here(works: Iterable[Work], ensemble: Ensemble, pool: ThreadPoolExecutor) -> Answering:
    for work in works:
        try:
            for outcomes in score_part(work.slide, work.part(0, len(work.found)), ensemble, pool):
                yield work, outcomes
        except UserError as error:
            yield work, error


class Run:
    """The scored objects of each slide, and the names of those that were not scored."""

    def __init__(self, cutting: Cutting, manifest: Manifest, pictures: bool) -> None:
        """pictures: keep small pictures of the crops, for a report."""
        self.cutting, self.manifest, self.pictures = cutting, manifest, pictures
        self.stream: IO[str] = sys.stderr
        self.progress = Progress(1, "detections", self.stream)
        self.settings: dict[str, str] = {}
        self.failed: set[str] = set()
        self.incomplete = False
        self.works: list[Work] = []
        self.results: list[Scored] = []
        self.summaries: list[Summary] = []

    @property
    def new(self) -> int:
        return sum(work.new for work in self.works)

    def complain(self, name: str, reason: str, scored: bool = True) -> None:
        """scored: whether it is an object to score, which counts; an outline of an area does not."""
        self.incomplete = True
        if scored:
            self.failed.add(name)
        self.say(f"{name}: {reason}")

    def say(self, line: str) -> None:
        self.progress.clear()
        print(f"not scored: {' '.join(line.split())}", file=self.stream, flush=True)

    def lose(self, file: Path, targets: Sequence[Target], error: UserError) -> None:
        """Report all objects of a slide as failed; those with a reason of their own keep it."""
        rest = [target.name for target in targets if target.name not in self.failed]
        self.failed.update(rest)
        self.incomplete = True
        self.say(f"{file} ({len(rest):,} detection{'s' * (len(rest) != 1)}): {error}")

    def opened(self, found: Collected, about: Sequence[str], journal: Journal) -> Iterator[Work]:
        """One slide after another, each opened when it is asked for."""
        titles = found.titles()
        for file, targets in found.slides.items():
            try:
                work = Work(file, titles[file], targets, self.cutting, about, journal, self.complain, self.pictures)
            except UserError as error:
                self.lose(file, targets, error)
                continue
            self.works.append(work)
            yield work

    def score(self, found: Collected, journal: Journal, scoring: AbstractContextManager[Scorer]) -> None:
        """Score all slides. UserError where `scoring` cannot begin, here or on a cluster."""
        with scoring as scorer:
            self.stream = scorer.stream
            self.progress = Progress(found.total, "detections", self.stream)
            self.settings = {"device": scorer.name, "precision": scorer.precision}
            about = ensemble_id(self.manifest), scorer.device, scorer.precision
            for work, outcomes in scorer.score(self.opened(found, about, journal)):
                if isinstance(outcomes, UserError):
                    work.lost = True
                    self.lose(work.file, work.targets, outcomes)
                else:
                    work.take(outcomes)
                done = sum(one.read for one in self.works)
                self.progress.show(done, done, self.new)
            self.progress.clear()
        self.stream = sys.stderr
        self.results = [work.scored() for work in self.works if not work.lost]

    def write(self, found: Collected, options: argparse.Namespace) -> None:
        """Write all results that were asked for. OSError where one cannot be written."""
        manifest, results, origin = self.manifest, self.results, self.cutting.origin
        if not any(one.targets for one in results):
            raise UserError(f"none of {found.total:,} detections could be scored; each is named above")
        for one in results:
            failed = found.refused[one.file] + sum(t.name in self.failed for t in found.slides[one.file])
            regions = found.regions.get(one.file, [])
            self.summaries.append(outputs.summarise(one, failed, regions, origin, manifest, self.complain))
        if options.output:
            for one in results:
                file = outputs.write_geojson(options.output, one, origin, manifest)
                print(f"{file}: {len(one.answers):,} objects")
        if options.csv:
            outputs.write_csv(options.csv, results, manifest)
        if options.summary:
            outputs.write_summary(options.summary, self.summaries)
        if options.report:
            write_report(
                [answer for one in results for answer in one.answers],
                [small for one in results for small in one.pictures],
                manifest,
                options.report,
                title=options.detections[0].name,
                settings={"inference": f"version {__version__}, {date.today().isoformat()}"} | self.settings,
                overview=overview(results, self.summaries, manifest),
            )
