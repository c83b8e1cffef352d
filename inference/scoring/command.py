"""`python -m inference score PATH...`: P(atypical) of any crops, as a CSV file and as a page to look at.

Exit code 0 when every file was scored, 1 when nothing could be done (one line on stderr says why), 3 when the run
finished but some files could not be read: each has its line on stderr, and everything else is in the results.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np

from .. import __version__
from ..answers import computing
from ..commandline import add_ensemble_options
from ..errors import UserError
from ..exits import FAILED, INCOMPLETE, INTERRUPTED
from ..hub import local_folder
from ..imageio.listing import FOLDER, list_crops
from ..manifest import default_ensemble, load_manifest
from ..metrics import scores
from ..report.page import is_report, write_report
from .run import Run
from .table import Table

PATHS = "image, folder, or CSV file with a column path; with --ray also .parquet and .tar files, and URIs of stores"
METRICS = {
    "balanced_accuracy": "balanced accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "auc": "AUC",
}


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help=PATHS)
    add("--csv", type=Path, metavar="FILE", help="write the results as they come; a file that exists is resumed")
    add("--report", type=Path, metavar="FILE", help="write one HTML page with every crop")
    add_ensemble_options(parser, hub=True)
    add("--labels", metavar="COLUMN", help=f"labels of a table (default: label), or {FOLDER} for a crop's folder name")
    add("--domains", metavar="COLUMN", help=f"domains of a table (default: domain), or {FOLDER}")
    about = "maps in the report of where the networks look (65 predictions a crop), for the N crops most worth a look"
    add("--attribution", type=int, nargs="?", const=sys.maxsize, default=0, metavar="N", help=f"{about}, or for all")
    add("--title", help="of the report (default: the first path's name)")
    ray = parser.add_argument_group("on a cluster", "instead of --csv and --report; see docs/clusters.md").add_argument
    ray("--ray", metavar="ADDRESS", help="score on the Ray cluster there, or `local`: on all of this machine")
    ray("--output", metavar="DIR", help="folder or URI for Parquet files of answers, which a rerun resumes")
    ray("--workers", type=int, metavar="N", help="processes (default: one per GPU; without GPUs one per four cores)")
    ray("--shard", type=int, metavar="CROPS", help="what one worker takes at a time (default 4096)")
    ray("--image", metavar="COLUMN", help="of Parquet files, the column with image bytes (default: the only one)")


def summarise(run: Run, say: Callable[[str], None], seconds: float) -> None:
    """What was found, in a line or two."""
    total = len(run.rows)
    known = f", {total - run.new:,} of them known already" if total > run.new else ""
    say(f"{total:,} crops ({run.atypical:,} atypical){known}, {seconds:.1f} s")
    if run.scored:
        p, labels = np.array([p for p, _ in run.scored]), np.array([label for _, label in run.scored])
        found = scores(labels, p, run.manifest.threshold)
        text = ", ".join(
            f"{name} {'-' if math.isnan(found[key]) else f'{found[key]:.4f}'}" for key, name in METRICS.items()
        )
        say(f"{len(labels):,} labelled ({int(labels.sum()):,} atypical): {text}")


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


def write_page(run: Run, options: argparse.Namespace) -> None:
    settings = {"inference": f"version {__version__}, {date.today().isoformat()}"}
    if run.loaded:
        settings |= {"device": run.loaded.device_name, "precision": run.loaded.precision}
    title = options.title or options.paths[0].resolve().name
    maps = run.attributions(options.attribution) if options.attribution else None
    write_report(
        run.rows, run.pictures, run.manifest, options.report, title=title, settings=settings, attributions=maps
    )


def on_cluster(options: argparse.Namespace) -> int:
    """The same on Ray, which is imported only here."""
    if not options.output:
        raise UserError("--ray without --output; expected --output DIR for the answers; add it")
    for name in ("csv", "report", "attribution", "title", "labels", "domains"):
        if getattr(options, name):
            raise UserError(f"--{name} with --ray; expected --output alone; leave it out")
    for name in ("workers", "shard"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}; expected 1 or more; correct it")
    try:
        from ..cluster import command as cluster
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed; expected what requirements/ray.txt lists; run "
            "./build.sh --engine native --requirements requirements/ray.txt"
        ) from None
    return cluster.run(options)


def run(options: argparse.Namespace) -> int:
    """Exit code; UserError where nothing can be done."""
    options.weights = local_folder(options.weights or default_ensemble())
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
    check_outputs(options)
    start = time.perf_counter()
    manifest = load_manifest(options.weights)
    items = list_crops(options.paths, options.labels, options.domains)
    to_stdout = options.csv is None and options.report is None
    computed = computing(manifest, options.device, options.precision)
    table = Table(options.csv, manifest, computed, to_stdout)
    table.check_named(items, [path for path in options.paths if path.is_dir()])
    run = Run(options.device, options.precision, options.report is not None, manifest, table, items)
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
