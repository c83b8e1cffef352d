"""`python -m inference score PATH...`: P(atypical) of any crops, as a CSV file and as a page to look at.

Exit code 0 when every file was scored, 1 when nothing could be done (one line on stderr says why), 3 when the run
finished but some files could not be read: each has its line on stderr, and everything else is in the results.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from inference import __version__

from ..errors import UserError
from ..imageio.listing import FOLDER, Item, list_crops
from ..imageio.stack import read_stack
from ..manifest import Manifest, load_manifest
from ..progress import Progress
from ..report.page import Picture, Row, picture, write_report
from .table import Table

if TYPE_CHECKING:
    from ..ensemble import Ensemble
    from ..report.attribution import Attribution

PATHS = "image, folder, or CSV file with a column path; with --ray also .parquet and .tar files, and URIs of stores"
UNREADABLE = 3  # exit code; argparse takes 2


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m inference score", description="Score any crops.")
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help=PATHS)
    add("--csv", type=Path, metavar="FILE", help="write the results as they come; a file that exists is continued")
    add("--report", type=Path, metavar="FILE", help="write one HTML page with every crop")
    add("--weights", type=Path, metavar="DIR", help="ensemble folder (default: the bundled one)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    add("--labels", metavar="COLUMN", help=f"labels of a table (default: label), or {FOLDER} for a crop's folder name")
    add("--domains", metavar="COLUMN", help=f"domains of a table (default: domain), or {FOLDER}")
    about = (
        "show in the report where the networks look (65 predictions a crop), for the N crops most worth a look or all"
    )
    add("--attribution", type=int, nargs="?", const=sys.maxsize, default=0, metavar="N", help=about)
    add("--title", help="of the report (default: the first path's name)")
    ray = parser.add_argument_group("on a cluster", "instead of --csv and --report; see docs/clusters.md").add_argument
    ray("--ray", metavar="ADDRESS", help="score on the Ray cluster there, or `local`: on all of this machine")
    ray("--output", metavar="DIR", help="folder or URI for Parquet files of answers; a rerun goes on there")
    ray("--workers", type=int, metavar="N", help="processes (default: one per GPU; without GPUs one per four cores)")
    ray("--shard", type=int, metavar="CROPS", help="what one worker takes at a time (default 4096)")
    ray("--image", metavar="COLUMN", help="of Parquet files, the column with image bytes (default: the only one)")
    return parser.parse_args(arguments)


@dataclass
class Run:
    """One scoring run. rows and pictures are kept for a report only, scored (p, label) where there are labels."""

    options: argparse.Namespace
    manifest: Manifest
    table: Table
    items: list[Item]
    rows: list[Row] = field(default_factory=list)
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

            self.loaded = Ensemble.load(self.manifest.folder, self.options.device, self.options.precision)
        return self.loaded

    def pages(self, item: Item) -> list[tuple[Row, np.ndarray | None]]:
        """An item's pages: finished rows, or rows without folds, each with its crop where one is needed."""
        done = self.table.done.get(item.path, {})
        # pages are written in their order, so only the last file may have been left half-way
        complete = bool(done) and item.path != self.table.last if item.page is None else item.page in done
        if complete and not self.options.report:
            return [(row, None) for page, row in done.items() if item.page in (None, page)]
        crops = read_stack(Path(item.path))
        if item.page is not None and item.page >= len(crops):
            raise UserError(f"it has {len(crops)} pages; expected a page {item.page}; mend the table")
        wanted = range(len(crops)) if item.page is None else [item.page]
        return [(done.get(page) or Row(item.path, page, 0.0, ()), crops[page]) for page in wanted]

    def stream(self) -> Iterator[tuple[Row, np.ndarray | None]]:
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
        batch: list[tuple[Row, np.ndarray | None]] = []
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

    def finish(self, batch: list[tuple[Row, np.ndarray | None]]) -> None:
        """Predict what has no answer yet, write it, and keep what the report and the figures need."""
        waiting = [n for n, (row, _) in enumerate(batch) if not row.fold_p]
        rows = [row for row, _ in batch]
        if waiting:
            prediction = self.ensemble().predict([crop for n in waiting if (crop := batch[n][1]) is not None])
            for k, n in enumerate(waiting):
                folds = tuple(prediction.fold_p[:, k].tolist())
                rows[n] = replace(rows[n], p_atypical=float(prediction.p_atypical[k]), fold_p=folds)
            self.table.append([rows[n] for n in waiting])
        self.total, self.new = self.total + len(rows), self.new + len(waiting)
        self.atypical += sum(row.p_atypical >= self.manifest.threshold for row in rows)
        self.scored += [(row.p_atypical, row.label) for row in rows if row.label is not None]
        if self.options.report:
            self.rows += rows
            self.pictures += [picture(crop) for _, crop in batch if crop is not None]

    def attributions(self) -> list[Attribution | None]:
        """A map for each row, or None beyond the number that was asked for."""
        from ..report.attribution import attribute

        order = most_worth_a_look(self.rows, self.manifest.threshold)[: self.options.attribution]
        maps: list[Attribution | None] = [None] * len(self.rows)
        progress = Progress(len(order), "maps")
        for done, n in enumerate(order):
            progress.show(done, done, done)
            maps[n] = attribute(self.ensemble(), read_stack(Path(self.rows[n].path))[self.rows[n].page])
        progress.clear()
        return maps

    def report(self) -> None:
        options, file = self.options, self.options.report
        settings = {"inference": f"version {__version__}, {date.today().isoformat()}"}
        if self.loaded:
            settings |= {"device": str(self.loaded.device), "precision": self.loaded.precision}
        title = options.title or options.paths[0].resolve().name
        maps = self.attributions() if options.attribution else None
        write_report(self.rows, self.pictures, self.manifest, file, title=title, settings=settings, attributions=maps)


def most_worth_a_look(rows: Sequence[Row], threshold: float) -> list[int]:
    """All positions: mistakes, the worst first, then what lies nearest to the threshold."""

    def key(n: int) -> tuple[bool, float]:
        row, distance = rows[n], abs(rows[n].p_atypical - threshold)
        wrong = row.label is not None and (row.p_atypical >= threshold) != bool(row.label)
        return not wrong, -distance if wrong else distance

    return sorted(range(len(rows)), key=key)


def figures(p: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float | None]:
    """Balanced accuracy, sensitivity, specificity and AUC (ties count half) of (N,); None where a class is missing."""
    called, positive = p >= threshold, labels == 1
    if positive.all() or not positive.any():
        return dict.fromkeys(("balanced accuracy", "sensitivity", "specificity", "AUC"))
    sensitivity, specificity = float(called[positive].mean()), float((~called[~positive]).mean())
    ordered = np.sort(p[~positive])
    below, upto = np.searchsorted(ordered, p[positive], "left"), np.searchsorted(ordered, p[positive], "right")
    auc = float((below + upto).mean() / 2 / len(ordered))
    both = (sensitivity + specificity) / 2
    return {"balanced accuracy": both, "sensitivity": sensitivity, "specificity": specificity, "AUC": auc}


def summarise(run: Run, say: Callable[[str], None], seconds: float) -> None:
    """What was found, in a line or two. UserError where nothing was."""
    if not run.total:
        raise UserError(f"none of {run.failed} files could be read; each is named above; expected images of crops")
    known = f", {run.total - run.new:,} of them known already" if run.total > run.new else ""
    say(f"{run.total:,} crops ({run.atypical:,} atypical){known}, {seconds:.1f} s")
    if run.scored:
        p, labels = np.array([p for p, _ in run.scored]), np.array([label for _, label in run.scored])
        found = figures(p, labels, run.manifest.threshold)
        text = ", ".join(f"{name} {'-' if value is None else f'{value:.4f}'}" for name, value in found.items())
        say(f"{len(labels):,} labelled ({int(labels.sum()):,} atypical): {text}")


def on_cluster(options: argparse.Namespace) -> int:
    """The same on Ray, which only this imports."""
    if not options.output:
        raise UserError("--ray without --output; expected --output DIR for the answers; add it")
    for name in ("csv", "report", "attribution", "title", "labels", "domains"):
        if getattr(options, name):
            raise UserError(f"--{name} with --ray; expected --output alone; leave it out")
    for name in ("workers", "shard"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}; expected 1 or more; mend it")
    try:
        from ..cluster import command as cluster
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; expected what requirements/ray.txt lists; run "
                        "./build.sh --engine native --requirements requirements/ray.txt") from None  # fmt: skip
    return cluster.main(options)


def main(arguments: Sequence[str]) -> int:
    """Exit code; UserError where nothing can be done."""
    options = parse(arguments)
    if options.weights is None:
        from ..__main__ import default_weights

        options.weights = default_weights()
    if options.ray:
        return on_cluster(options)
    for name in ("output", "workers", "shard", "image"):
        if getattr(options, name):
            raise UserError(
                f"--{name} without --ray; expected --ray ADDRESS, or --ray local; add it, or leave this out"
            )
    options.paths = [Path(path) for path in options.paths]
    if options.attribution and not options.report:
        raise UserError("--attribution shows its maps in a report; expected --report FILE too; add it")
    if options.report and (options.report.is_dir() or not os.access(options.report.absolute().parent, os.W_OK)):
        raise UserError(f"{options.report} cannot be written; expected a file in a writable folder; name another")
    start = time.perf_counter()
    manifest = load_manifest(options.weights)
    items = list_crops(options.paths, options.labels, options.domains)
    to_stdout = options.csv is None and options.report is None
    run = Run(options, manifest, Table(options.csv, manifest, to_stdout), items)
    say = lambda text: print(text, file=sys.stderr if to_stdout else sys.stdout, flush=True)  # noqa: E731
    try:
        run.score()
        summarise(run, say, time.perf_counter() - start)
        if options.report:
            run.report()
            say(f"{options.report}: {options.report.stat().st_size / 1e6:.1f} MB")
    except KeyboardInterrupt:
        again = "the same command goes on from there" if options.csv else "nothing is kept without --csv"
        print(f"\nstopped after {run.new} new crops; {again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our stdout has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the interpreter flushes it when it ends)
        return 1
    if run.failed:
        print(f"{run.failed:,} of {len(items):,} files could not be read", file=sys.stderr)
    return UNREADABLE if run.failed else 0
