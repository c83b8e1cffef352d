"""`python -m inference score PATH...`: P(atypical) of any crops, as a CSV file and as a page to look at.

Exit code 0 when every file was scored, 1 when nothing could be done (one line on stderr says why), 3 when the run
finished but some files could not be read: each has its line on stderr, and everything else is in the results.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..answers import asked_for, computing
from ..assessment import assess, in_one_line, in_training, unseen
from ..commandline import add_ensemble_options
from ..errors import UserError
from ..exits import FAILED, INCOMPLETE, INTERRUPTED
from ..hub import local_folder
from ..imageio.listing import FOLDER, list_crops
from ..manifest import default_ensemble, load_manifest
from ..report.page import Page, is_report, write_report
from ..seen import load_seen
from .run import ScoreRun
from .table import AnswerTable


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="PATH", help="image, folder, or CSV file with a column path")
    add("--csv", type=Path, metavar="FILE", help="write the results as they come; a file that exists is resumed")
    add("--report", type=Path, metavar="FILE", help="write one HTML page with every crop")
    add_ensemble_options(parser, hub=True)
    add("--labels", metavar="COLUMN", help=f"labels of a table (default: label), or {FOLDER} for a crop's folder name")
    add("--domains", metavar="COLUMN", help=f"domains of a table (default: domain), or {FOLDER}")
    help_ = "maps in the report of where the networks look (65 predictions a crop), for the N crops most worth a look"
    add("--attribution", type=int, nargs="?", const=sys.maxsize, default=0, metavar="N", help=f"{help_}, or for all")
    add("--title", help="of the report (default: the first path's name)")


def summarise(run: ScoreRun, say: Callable[[str], None], seconds: float) -> None:
    """What was found, in a line; with labels also how well it agrees with them."""
    total = len(run.rows)
    known = f", {total - run.new:,} of them known already" if total > run.new else ""
    say(f"{total:,} crops ({run.atypical:,} atypical){known}, {seconds:.1f} s")
    assessment = assess(run.rows, run.manifest.threshold)
    if assessment is None:
        return
    labels = assessment.labelled.labels
    say(f"{len(labels):,} labelled ({int(labels.sum()):,} atypical): {in_one_line(assessment)}")
    say(in_training(run.rows))
    others = unseen(run.rows)
    if others and (new := assess(others, run.manifest.threshold)):
        say(f"{len(others):,} without the training crops: {in_one_line(new)}")


def check_outputs(options: argparse.Namespace) -> None:
    """UserError where the report cannot be written, or would take the place of something else."""
    used = [path.resolve() for path in (*options.paths, options.csv, options.report) if path]
    for file in (options.csv, options.report):
        if file and used.count(file.resolve()) > 1:
            raise UserError(f"{file} is named twice; expected a file of its own for each input and output; rename one")
    report = options.report
    if report is None:
        return
    if report.is_dir() or not os.access(report.absolute().parent, os.W_OK):
        raise UserError(f"{report} cannot be written; expected a file in a writable folder; name another")
    if report.exists() and not (report.is_file() and (report.stat().st_size == 0 or is_report(report))):
        raise UserError(f"{report} is there, and is no report; expected a new file or an earlier report; name another")


def write_page(run: ScoreRun, options: argparse.Namespace) -> None:
    settings = {"device": run.loaded.device_name, "precision": run.loaded.precision} if run.loaded else {}
    page = Page(options.title or options.paths[0].resolve().name, settings)
    maps = run.attributions(options.attribution) if options.attribution else None
    write_report(run.rows, run.pictures, run.manifest, options.report, page, maps)


def run(options: argparse.Namespace) -> int:
    """Exit code; UserError where nothing can be done."""
    options.weights = local_folder(options.weights or default_ensemble())
    if options.attribution and not options.report:
        raise UserError("--attribution shows its maps in a report; expected --report FILE too; add it")
    check_outputs(options)
    start = time.perf_counter()
    manifest = load_manifest(options.weights)
    items = list_crops(options.paths, options.labels, options.domains)
    to_stdout = options.csv is None and options.report is None
    computed = computing(manifest, asked_for(manifest, options.device, options.precision))
    table = AnswerTable(options.csv, manifest, computed, to_stdout)
    table.check_named(items, [path for path in options.paths if path.is_dir()])
    seen = load_seen(manifest) if any(item.label is not None for item in items) else None
    run = ScoreRun(options.device, options.precision, options.report is not None, manifest, table, items, seen)
    say = partial(print, file=sys.stderr if to_stdout else sys.stdout, flush=True)
    try:
        run.score()
        if not run.rows:
            raise UserError(f"none of {run.failed} files could be read; each is named above; expected images of crops")
        if dropped := table.settle(run.rows):
            say(f"{dropped:,} earlier answers dropped: their files have changed, are gone or cannot be read")
        summarise(run, say, time.perf_counter() - start)
        if options.report:
            write_page(run, options)
            say(f"{options.report}: {options.report.stat().st_size / 1e6:.1f} MB")
    except KeyboardInterrupt:
        again = "the same command resumes it" if options.csv else "nothing is kept without --csv"
        print(f"\nstopped after {run.new} new crops; {again}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our stdout closed it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the interpreter flushes it when it ends)
        return FAILED
    if run.failed:
        print(f"{run.failed:,} of {len(items):,} files could not be read", file=sys.stderr)
    return INCOMPLETE if run.failed else 0
