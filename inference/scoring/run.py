"""One scoring run: reads the crops without an answer, predicts them in batches of about a second, keeps the answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..answers import Answer, content_of, pages_of
from ..errors import UserError
from ..exits import describe
from ..imageio.listing import Item
from ..imageio.stack import read_stack
from ..manifest import Manifest
from ..progress import Progress
from ..report.page import Picture, picture
from ..seen import Seen
from .table import AnswerTable

if TYPE_CHECKING:
    from ..ensemble import Ensemble
    from ..report.attribution import Attribution


@dataclass
class ScoreRun:
    """rows: of the run so far, in its order; pictures: kept only for a report

    seen: the crops that the ensemble was trained on; None where it does not matter
    """

    device: str
    precision: str
    keep_pictures: bool
    manifest: Manifest
    table: AnswerTable
    items: list[Item]
    seen: Seen | None = None
    rows: list[Answer] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    new: int = 0
    atypical: int = 0
    failed: int = 0
    loaded: Ensemble | None = None

    def ensemble(self) -> Ensemble:
        """Loaded when it is first needed: a run that finds everything done reads no weights."""
        if self.loaded is None:
            from ..ensemble import Ensemble

            self.loaded = Ensemble.load(self.manifest.folder, self.device, self.precision)
        return self.loaded

    def pages(self, item: Item) -> list[tuple[Answer, np.ndarray | None]]:
        """An item's pages: known answers, or answers without folds, each with its crop if that is needed."""
        content = content_of(Path(item.path))
        known = self.table.done.get((item.path, content), {})
        if known and not self.keep_pictures and self.seen is None:
            wanted = range(next(iter(known.values())).pages) if item.page is None else [item.page]
            if all(page in known for page in wanted):
                return [(known[page], None) for page in wanted]
        crops = read_stack(Path(item.path))
        return [
            (known.get(page) or Answer(item.path, page, 0.0, (), pages=len(crops), content=content), crop)
            for page, crop in pages_of(crops, item.page)
        ]

    def stream(self, progress: Progress) -> Iterator[tuple[Answer, np.ndarray | None]]:
        """Each page once, in the order in which the pages are first named.

        An item that cannot be read is named on stderr, counted and left out.
        """
        worked = 0
        single = {(item.file, item.page): item for item in self.items if item.page is not None}
        whole = {item.file for item in self.items if item.page is None}
        seen: set[tuple[str, int]] = set()  # of files that are named as a whole and page by page
        for number, item in enumerate(self.items):
            progress.show(number, worked, self.new)
            try:
                pages = self.pages(item)
            except UserError as error:
                self.failed += 1
                progress.clear()
                print(f"not scored: {describe(UserError(f'{item.path}: {error}'))}", file=sys.stderr, flush=True)
                continue
            worked += any(not row.fold_p for row, _ in pages)
            for row, crop in pages:
                page = item.file, row.page
                if page in single and item.file in whole:
                    if page in seen:
                        continue
                    seen.add(page)
                named = single.get(page, item)
                row = replace(row, label=named.label, domain=named.domain, slide=named.slide)
                if self.seen is not None and crop is not None:
                    row = replace(row, seen=crop in self.seen)
                yield row, crop

    def score(self) -> None:
        """Read, predict and write in batches of about a second: a run that is stopped loses no more than that."""
        batch: list[tuple[Answer, np.ndarray | None]] = []
        size, waiting = 8, 0
        with Progress(len(self.items), "files") as progress:
            for row, crop in self.stream(progress):
                batch.append((row, crop))
                waiting += not row.fold_p
                if waiting == size:
                    start = time.perf_counter()
                    self.finish(batch)
                    size = next_size(size, time.perf_counter() - start)
                    batch, waiting = [], 0
                elif len(batch) == 4096:  # nearly all known
                    self.finish(batch)
                    batch, waiting = [], 0
            self.finish(batch)

    def finish(self, batch: list[tuple[Answer, np.ndarray | None]]) -> None:
        """Predict what has no answer yet, write it, and keep what the report and the metrics need."""
        waiting = [n for n, (row, _) in enumerate(batch) if not row.fold_p]
        rows = [row for row, _ in batch]
        if waiting:
            prediction = self.ensemble().predict([crop for n in waiting if (crop := batch[n][1]) is not None])
            answers = Answer.of(prediction, [rows[n] for n in waiting])
            for n, answer in zip(waiting, answers, strict=True):
                rows[n] = answer
            self.table.append(answers)
        self.new += len(waiting)
        self.atypical += sum(row.p_atypical >= self.manifest.threshold for row in rows)
        self.rows += rows
        if self.keep_pictures:
            self.pictures += [picture(crop) for _, crop in batch if crop is not None]

    def attributions(self, count: int) -> list[Attribution | None]:
        """A map for each of the `count` rows most worth a look; None for the others."""
        from ..report.attribution import attribute

        order = most_worth_a_look(self.rows, self.manifest.threshold)[:count]
        maps: list[Attribution | None] = [None] * len(self.rows)
        with Progress(len(order), "maps", rate="maps") as progress:
            for done, n in enumerate(order):
                progress.show(done, done, done)
                maps[n] = attribute(self.ensemble(), read_stack(Path(self.rows[n].path))[self.rows[n].page])
        return maps


def next_size(size: int, seconds: float) -> int:
    """Number of crops of the next batch, given that one of `size` crops took `seconds`."""
    if seconds < 0.7:
        return min(2 * size, 1024)
    if seconds > 3:
        return max(size // 2, 1)
    return size


def most_worth_a_look(rows: Sequence[Answer], threshold: float) -> list[int]:
    """All positions: mistakes, the worst first, then what lies nearest to the threshold."""

    def key(n: int) -> tuple[bool, float]:
        row, distance = rows[n], abs(rows[n].p_atypical - threshold)
        wrong = row.label is not None and (row.p_atypical >= threshold) != bool(row.label)
        return not wrong, -distance if wrong else distance

    return sorted(range(len(rows)), key=key)
