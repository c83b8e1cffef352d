"""`python -m inference slides DETECTIONS...`: from detections on a slide to their classes on the slide.

Reads what QuPath and other programs write, scores a crop around each object, and writes GeoJSON for QuPath, tables and
a report. Crops are never written. A run that is stopped is resumed by the same command.

Exit code 0 when every object was scored, 1 when nothing could be done, 3 when some could not be scored: each is
named on stderr with the reason, and all others are in the results.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

from ..commandline import add_ensemble_options
from ..errors import UserError
from ..exits import INCOMPLETE, INTERRUPTED
from ..hub import local_folder
from ..manifest import Manifest, default_ensemble, load_manifest
from . import outputs, statistics
from .command import check, require
from .journal import journal
from .qupath import MARK
from .run import Run, here
from .scoring import Cutting
from .targets import Collected, collect
from .work import Scorer

RESULTS = ("output", "csv", "summary", "report")


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("detections", nargs="+", type=Path, metavar="DETECTIONS", help="QuPath GeoJSON, and what docs/qupath.md lists")
    add("--slide", type=Path, metavar="FILE", help="the slide of all detections")
    add("--slides", type=Path, metavar="FOLDER", help="where slides lie: as DETECTIONS names them, or called as it is")
    add("--output", type=Path, metavar="FILE.geojson", help="for QuPath; a folder where there are several slides")
    add("--csv", type=Path, metavar="FILE", help="one row an object")
    add("--summary", type=Path, metavar="FILE.csv", help="one row a slide: counts, share, density, hot spots")
    add("--report", type=Path, metavar="FILE.html", help="one page with slides and crops")
    add(
        "--class",
        action="append",
        default=[],
        dest="classes",
        metavar="NAME",
        help="only objects of this class; repeatable",
    )
    add("--region", metavar="NAME", help="class of outlines whose area the density is for, such as Tumor")
    add("--origin", choices=("scan", "slide"), help="what x and y count from: the scanned area (QuPath), or the slide")
    add("--side", type=int, default=128, help="of a crop, in pixels (default 128)")
    add("--mpp", type=float, default=0.25, help="µm/px of a crop (default 0.25)")
    add("--slide-mpp", type=float, metavar="MPP", help="µm/px of level 0 of slides that do not state it")
    add_ensemble_options(parser, hub=True)
    ray = parser.add_argument_group("on a cluster", "see docs/qupath.md").add_argument
    ray("--ray", metavar="ADDRESS", help="score on the Ray cluster there, or `local`: on all of this machine")
    ray("--workers", type=int, metavar="N", help="processes (default: one per GPU; without GPUs one per four cores)")


def check_outputs(options: argparse.Namespace, found: Collected, manifest: Manifest) -> Path:
    """The first of the results, beside which the journal lies. UserError where one would overwrite something."""
    asked = [getattr(options, name) for name in RESULTS if getattr(options, name)]
    if not asked:
        raise UserError("nothing to write; expected one of --output, --csv, --summary and --report; add one")
    slides = list(found.slides)
    inputs = [*options.detections, *slides]
    if options.output:
        single = options.output.suffix.lower() in outputs.GEOJSON or options.output.is_file()
        if single and len(slides) > 1:
            raise UserError(f"--output {options.output} for {len(slides):,} slides; expected a folder; name one")
        if single and options.output.suffix.lower() not in outputs.GEOJSON:
            raise UserError(f"{options.output} is a file; expected a folder, or a name that ends in .geojson")
        if not single:
            options.output.mkdir(parents=True, exist_ok=True)
        files = [outputs.geojson_file(options.output, slide) for slide in slides]
        if len(set(files)) < len(files):
            raise UserError("two slides have the same file name; expected different ones; run them one by one")
        for file in files:
            outputs.check_writable(file, MARK.encode(), inputs)
    begins = {
        "csv": ",".join(outputs.header(manifest)).encode() + b"\n",
        "summary": ",".join(statistics.COLUMNS).encode() + b"\n",
        "report": outputs.REPORT,
    }
    for name, start in begins.items():
        if getattr(options, name):
            outputs.check_writable(getattr(options, name), start, inputs)
    if len({file.absolute() for file in asked}) < len(asked):
        raise UserError("two results have the same name; expected a file for each; name another")
    return Path(asked[0])


def scoring(options: argparse.Namespace, manifest: Manifest) -> AbstractContextManager[Scorer]:
    """Where crops are scored: on the cluster that `--ray` names, or here."""
    if options.ray:
        from .cluster import there

        return there(options, manifest)
    return here(options)


def run(options: argparse.Namespace) -> int:
    """Exit code; UserError where nothing can be done."""
    check(options)
    require("openslide", "shapely")
    options.weights = local_folder(options.weights or default_ensemble()).resolve()
    if options.slide and options.slides:
        raise UserError("--slide and --slides; expected one of them; leave one out")
    if options.workers is not None and (not options.ray or options.workers < 1):
        raise UserError(f"--workers {options.workers}; expected 1 or more, with --ray ADDRESS; correct it")
    manifest, start = load_manifest(options.weights), time.perf_counter()
    cutting = Cutting(options.side, options.mpp, options.slide_mpp, options.origin)
    running = Run(cutting, manifest, pictures=options.report is not None)
    found = collect(
        options.detections, options.slide, options.slides, options.classes, options.region, running.complain
    )
    try:
        with journal(check_outputs(options, found, manifest)) as kept:
            running.score(found, kept, scoring(options, manifest))
            running.write(found, options)
            kept.remove()
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or 'the results'} ({error.strerror}); expected a writable folder with "
            "space left; run the same command again"
        ) from None
    except KeyboardInterrupt:
        print(f"\nstopped after {running.new:,} new crops; the same command resumes it", file=sys.stderr)
        return INTERRUPTED
    report(running, found, time.perf_counter() - start)
    return INCOMPLETE if running.incomplete else 0


def report(running: Run, found: Collected, seconds: float) -> None:
    """Print what was found: a line per slide, and the sum."""
    for one in running.summaries:
        if not one.figures:
            print(f"{one.slide}: no figures{f' in {one.area:.4g} mm²' if one.area else ''}")
            continue
        low, high = statistics.wilson(one.atypical, one.figures)
        spot = f"; hot spot of 2 mm²: {one.hottest.count:,}" if one.hottest else ""
        density = f"; {one.density(0):.4g} per mm² in {one.area:.4g} mm²" if one.area else ""
        print(
            f"{one.slide}: {one.figures:,} figures, {one.atypical:,} atypical "
            f"({one.share:.1%}, 95% interval {low:.1%} to {high:.1%}){density}{spot}"
        )
    scored = sum(one.figures for one in running.summaries)
    known = f", {scored - running.new:,} of them known already" if scored > running.new else ""
    slides = f"{len(running.summaries):,} slide{'s' * (len(running.summaries) != 1)}"
    print(f"{scored:,} of {found.total:,} detections on {slides}{known}, {seconds:.1f} s")
    coarse = [one.title for one in running.results if min(one.slide.level.scale) < 1]
    if coarse:
        print(
            f"note: slides with less detail than {running.cutting.mpp:g} µm/px: {len(coarse):,}, such as {coarse[0]}; "
            "their crops are enlarged, and blurred"
        )
    if running.failed:
        print(f"{len(running.failed):,} of {found.total:,} detections could not be scored", file=sys.stderr)
