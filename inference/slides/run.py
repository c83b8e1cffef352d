"""One run of `python -m inference slides`: the objects of each slide are scored, here or on a cluster, then written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..answers import Computed
from ..checksums import ensemble_id
from ..errors import UserError
from ..manifest import Manifest
from ..progress import Progress, speaking
from ..report.page import Page, write_report
from . import outputs, overview
from .detections.targets import Collected
from .frames import check_origin, check_placed
from .journal import Journal
from .part import score_part
from .reader import THREADS, Cutting, Slide
from .slide_work import Answering, Conditions, Scored, Scorer, SlideWork
from .statistics import Summary

if TYPE_CHECKING:
    from ..ensemble import Ensemble


@contextmanager
def on_this_machine(options: argparse.Namespace) -> Iterator[Scorer]:
    """UserError where the ensemble cannot be loaded."""
    from ..ensemble import Ensemble

    with speaking("loading the ensemble"):
        ensemble = Ensemble.load(options.weights, options.device, options.precision)
    with ThreadPoolExecutor(THREADS) as pool:
        score = partial(score_on_this_machine, ensemble=ensemble, pool=pool)
        computed = Computed(ensemble.device.type, ensemble.precision, ensemble_id(ensemble.manifest))
        yield Scorer(computed, ensemble.device_name, sys.stderr, score)


def score_on_this_machine(works: Iterable[SlideWork], ensemble: Ensemble, pool: ThreadPoolExecutor) -> Answering:
    for work in works:
        try:
            for outcomes in score_part(work.slide, work.part(0, len(work.objects)), ensemble, pool):
                yield work, outcomes
        except UserError as error:
            yield work, error
        work.slide.release()


def none_scored(collected: Collected) -> UserError:
    return UserError(f"none of {collected.total:,} detections could be scored; each is named above")


class SlideRun:
    """The scored objects of each slide, and the names of those that were not scored."""

    def __init__(self, cutting: Cutting, manifest: Manifest, pictures: bool) -> None:
        """pictures: keep small pictures of the crops, for a report."""
        self.cutting, self.manifest, self.pictures = cutting, manifest, pictures
        self.stream: IO[str] = sys.stderr
        self.progress = Progress(1, "detections", self.stream)
        self.settings: dict[str, str] = {}
        self.failed = 0  # objects to score that could not be scored
        self.incomplete = False
        self.slides: dict[Path, Slide] = {}  # those that can be scored
        self.works: list[SlideWork] = []
        self.results: list[Scored] = []
        self.summaries: list[Summary] = []

    @property
    def new(self) -> int:
        return sum(work.new for work in self.works)

    def complain(self, names: Sequence[str], reason: str, scored: bool = True) -> None:
        """One line for all `names`. scored: whether they are objects to score, which count; outlines do not."""
        self.incomplete = True
        if scored:
            self.failed += len(names)
        self.say(f"{names[0]}{f' and {len(names) - 1:,} more' if len(names) > 1 else ''}: {reason}")

    def say(self, line: str) -> None:
        self.progress.clear()
        self.stream.write(f"not scored: {' '.join(line.split())}\n")  # at once: there may be a million
        self.stream.flush()

    def lose(self, file: Path, number: int, error: UserError) -> None:
        """Report that `number` objects of a slide failed: all but those that were named before."""
        self.failed += number
        self.incomplete = True
        self.say(f"{file} ({number:,} detection{'s' * (number != 1)}): {error}")

    def check(self, collected: Collected) -> None:
        """Look at each slide before anything is computed; those that cannot be scored are reported and left out.

        UserError where no object is left.
        """
        with speaking("looking at the slides"):
            self.look(collected)
        if not any(collected.slides[file] for file in self.slides):
            raise none_scored(collected)

    def look(self, collected: Collected) -> None:
        for file, targets in collected.slides.items():
            try:
                slide = Slide(file, self.cutting.mpp, self.cutting.slide_mpp)
                outlines = collected.regions.get(file, [])
                frames = [*(source.frame for source in targets.sources), *(outline.frame for outline in outlines)]
                check_origin(slide, self.cutting.origin, frames)
                check_placed(slide, self.cutting.origin, [source.frame for source in targets.sources])
            except UserError as error:
                self.lose(file, len(targets), error)
            else:
                self.slides[file] = slide

    def works_of(self, collected: Collected, conditions: Conditions) -> Iterator[SlideWork]:
        """One slide after another, each when it is asked for."""
        titles = collected.titles()
        for file, slide in self.slides.items():
            work = SlideWork(slide, titles[file], collected.slides[file], conditions)
            self.works.append(work)
            yield work

    def score(self, collected: Collected, journal: Journal, scoring: AbstractContextManager[Scorer]) -> None:
        """Score all slides. UserError where `scoring` cannot begin, on this machine or on a cluster."""
        with ExitStack() as stack:
            scorer = stack.enter_context(scoring)
            self.stream = scorer.stream
            self.progress = Progress(collected.total, "detections", self.stream)
            self.settings = {"device": scorer.name, "precision": scorer.computed.precision}
            stack.callback(lambda: self.progress.clear())
            named = collected.total - sum(len(collected.slides[file]) for file in self.slides)  # as not scored, by now
            self.progress.show(named, 0, 0)
            conditions = Conditions(self.cutting, scorer.computed, journal, self.complain, self.pictures)
            for work, outcomes in scorer.score(self.works_of(collected, conditions)):
                if isinstance(outcomes, UserError):
                    work.lost = True
                    self.lose(work.slide.file, work.refused.count(0), outcomes)
                else:
                    work.take(outcomes)
                done = named + sum(item.done for item in self.works)
                self.progress.show(done, sum(item.read for item in self.works), self.new)
        self.stream = sys.stderr
        self.results = [work.scored() for work in self.works if not work.lost]

    def write(self, collected: Collected, options: argparse.Namespace) -> None:
        """Write all results that were asked for. OSError where one cannot be written."""
        manifest, results, origin = self.manifest, self.results, self.cutting.origin
        if not any(scored.targets for scored in results):
            raise none_scored(collected)
        for scored in results:
            file = scored.slide.file
            failed = collected.refused[file] + scored.refused
            region = outputs.region_of(scored, collected.regions.get(file, []), origin, self.complain)
            self.summaries.append(outputs.summarise(scored, failed, region, manifest.threshold))
        if options.output:
            for scored in results:
                file = outputs.write_geojson(options.output, scored, origin, manifest)
                print(f"{file}: {len(scored.answers):,} objects")
        if options.csv:
            outputs.write_csv(options.csv, results, manifest)
        if options.table:
            from . import parquet

            parquet.write(options.table, results, manifest)
        if options.dicom:
            from . import dicom

            for scored in results:
                written = dicom.write(options.dicom, scored, manifest)
                print(
                    f"{written}: {len(scored.answers):,} annotations" if written else f"{scored.title}: no annotations"
                )
        if options.summary:
            outputs.write_summary(options.summary, self.summaries)
        if options.report:
            page = Page(
                options.detections[0].name,
                self.settings,
                first=overview.table(self.summaries, manifest.threshold),
                overview=overview.pictures(results, self.summaries, manifest.threshold),
                mpp=self.cutting.mpp,
            )
            answers = [answer for scored in results for answer in scored.answers]
            pictures = [picture for scored in results for picture in scored.pictures]
            write_report(answers, pictures, manifest, options.report, page)
