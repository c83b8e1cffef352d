"""One scoring run: reads what has no answer yet, predicts it in batches of about a second, and keeps the answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..answers import Answer, pages_of
from ..errors import UserError
from ..imageio.listing import Item
from ..imageio.stack import read_stack
from ..manifest import Manifest
from ..progress import Progress
from ..report.page import Picture, picture
from .table import Table

if TYPE_CHECKING:
    from ..ensemble import Ensemble
    from ..report.attribution import Attribution


@dataclass
class Run:
    """rows and pictures are kept for a report only, scored (p, label) where there are labels."""

    device: str
    precision: str
    keep_pictures: bool
    manifest: Manifest
    table: Table
    items: list[Item]
    rows: list[Answer] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    scored: list[tuple[float, int]] = field(default_factory=list)
    total: int = 0
    new: int = 0
    atypical: int = 0
    failed: int = 0
    loaded: Ensemble | None = None

    def ensemble(self) -> Ensemble:
        """Loaded when it is first needed: a run that finds everything done imports no PyTorch."""
        if self.loaded is None:
            from ..ensemble import Ensemble

            self.loaded = Ensemble.load(self.manifest.folder, self.device, self.precision)
        return self.loaded

    def pages(self, item: Item) -> list[tuple[Answer, np.ndarray | None]]:
        """An item's pages: finished rows, or rows without folds, each with its crop where one is needed."""
        done = self.table.done.get(item.path, {})
        # pages are written in their order, so only the last file may have been left half-way
        complete = bool(done) and item.path != self.table.last if item.page is None else item.page in done
        if complete and not self.keep_pictures:
            return [(row, None) for page, row in done.items() if item.page in (None, page)]
        pages = pages_of(read_stack(Path(item.path)), item.page)
        return [(done.get(page) or Answer(item.path, page, 0.0, ()), crop) for page, crop in pages]

    def stream(self) -> Iterator[tuple[Answer, np.ndarray | None]]:
        """All pages of all items; an item that cannot be read is named on stderr, counted and left out."""
        progress, worked = Progress(len(self.items), "files"), 0
        for number, item in enumerate(self.items):
            progress.show(number, worked, self.new)
            try:
                found = self.pages(item)
            except UserError as error:
                self.failed += 1
                progress.clear()
                print(f"not scored: {item.path}: {error}", file=sys.stderr, flush=True)
                continue
            worked += any(not row.fold_p for row, _ in found)
            yield from ((replace(row, label=item.label, domain=item.domain), crop) for row, crop in found)
        progress.clear()

    def score(self) -> None:
        """Read, predict and write in batches of about a second: a run that is stopped loses no more than that."""
        batch: list[tuple[Answer, np.ndarray | None]] = []
        size, waiting = 8, 0
        for row, crop in self.stream():
            batch.append((row, crop))
            waiting += not row.fold_p
            if waiting == size or len(batch) == 4096:
                start = time.perf_counter()
                self.finish(batch)
                seconds = time.perf_counter() - start
                if waiting == size:
                    size = min(2 * size, 1024) if seconds < 0.7 else max(size // 2, 1) if seconds > 3 else size
                batch, waiting = [], 0
        self.finish(batch)

    def finish(self, batch: list[tuple[Answer, np.ndarray | None]]) -> None:
        """Predict what has no answer yet, write it, and keep what the report and the metrics need."""
        waiting = [n for n, (row, _) in enumerate(batch) if not row.fold_p]
        rows = [row for row, _ in batch]
        if waiting:
            several = len(self.manifest.members) > 1
            prediction = self.ensemble().predict([crop for n in waiting if (crop := batch[n][1]) is not None])
            for k, n in enumerate(waiting):
                rows[n] = replace(
                    rows[n],
                    p_atypical=float(prediction.p_atypical[k]),
                    fold_p=tuple(prediction.fold_p[:, k].tolist()),
                    member_p=tuple(prediction.member_p[:, k].tolist()) if several else (),
                )
            self.table.append([rows[n] for n in waiting])
        self.total, self.new = self.total + len(rows), self.new + len(waiting)
        self.atypical += sum(row.p_atypical >= self.manifest.threshold for row in rows)
        self.scored += [(row.p_atypical, row.label) for row in rows if row.label is not None]
        if self.keep_pictures:
            self.rows += rows
            self.pictures += [picture(crop) for _, crop in batch if crop is not None]

    def attributions(self, count: int) -> list[Attribution | None]:
        """A map for each of the `count` rows most worth a look, None for the others."""
        from ..report.attribution import attribute

        order = most_worth_a_look(self.rows, self.manifest.threshold)[:count]
        maps: list[Attribution | None] = [None] * len(self.rows)
        progress = Progress(len(order), "maps")
        for done, n in enumerate(order):
            progress.show(done, done, done)
            maps[n] = attribute(self.ensemble(), read_stack(Path(self.rows[n].path))[self.rows[n].page])
        progress.clear()
        return maps


def most_worth_a_look(rows: Sequence[Answer], threshold: float) -> list[int]:
    """All positions: mistakes, the worst first, then what lies nearest to the threshold."""

    def key(n: int) -> tuple[bool, float]:
        row, distance = rows[n], abs(rows[n].p_atypical - threshold)
        wrong = row.label is not None and (row.p_atypical >= threshold) != bool(row.label)
        return not wrong, -distance if wrong else distance

    return sorted(range(len(rows)), key=key)
