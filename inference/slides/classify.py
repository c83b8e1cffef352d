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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from ..commandline import add_cluster_options, add_ensemble_options, require
from ..errors import UserError
from ..exits import INCOMPLETE, INTERRUPTED
from ..files import begins_with
from ..hub import local_folder
from ..manifest import Manifest, default_ensemble, load_manifest
from ..report.page import is_report
from ..resolution import MPP
from . import outputs, statistics
from .crops import add_origin, check
from .detections.targets import Collected, Selection, collect
from .journal import journal
from .qupath import MARK
from .reader import Cutting
from .run import SlideRun, on_this_machine
from .slide_work import Scorer

RESULTS = ("output", "csv", "table", "dicom", "summary", "report")


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("detections", nargs="+", type=Path, metavar="DETECTIONS", help="QuPath GeoJSON, and what docs/qupath.md lists")
    add("--slide", type=Path, metavar="FILE", help="the slide of all detections")
    add("--slides", type=Path, metavar="FOLDER", help="where slides lie: as DETECTIONS names them, or called as it is")
    add("--output", type=Path, metavar="FILE.geojson", help="for QuPath; a folder where there are several slides")
    add("--csv", type=Path, metavar="FILE", help="one row an object")
    add("--table", type=Path, metavar="FILE.parquet", help="the same for tables of cells, with places in µm too")
    add("--dicom", type=Path, metavar="FILE.dcm", help="annotations of DICOM slides; a folder for several slides")
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
    add_origin(parser)
    add("--boxes", choices=("xywh", "xyxy"), help="how COCO's boxes are written: x, y, width, height, or two corners")
    add("--side", type=int, default=128, help="of a crop, in pixels (default 128)")
    add("--mpp", type=float, default=MPP, help=f"µm/px of a crop (default {MPP})")
    add("--slide-mpp", type=float, metavar="MPP", help="µm/px of level 0 of slides that do not state it")
    add_ensemble_options(parser, hub=True)
    add_cluster_options(parser.add_argument_group("on a cluster"))


def check_folder(options: argparse.Namespace, name: str, suffixes: Sequence[str], slides: Sequence[Path]) -> None:
    """Make the folder of a result that has a file for each slide. UserError where it is a file, or has to be one."""
    given: Path | None = getattr(options, name)
    if given is None:
        return
    single = given.suffix.lower() in suffixes or given.is_file()
    if single and len(slides) > 1:
        raise UserError(f"--{name} {given} for {len(slides):,} slides; expected a folder; name one")
    if single and given.suffix.lower() not in suffixes:
        raise UserError(f"{given} is a file; expected a folder, or a name that ends in {suffixes[0]}")
    if not single:
        given.mkdir(parents=True, exist_ok=True)
    if len({slide.name for slide in slides}) < len(slides):
        raise UserError("two slides have the same file name; expected different ones; run them one by one")


def check_outputs(options: argparse.Namespace, collected: Collected, manifest: Manifest) -> Path:
    """The first of the results, beside which the journal lies. UserError where one would overwrite something."""
    asked = [getattr(options, name) for name in RESULTS if getattr(options, name)]
    if not asked:
        names = ", ".join(f"--{name}" for name in RESULTS)
        raise UserError(f"nothing to write; expected one of {names}; add one")
    slides = list(collected.slides)
    inputs = [*options.detections, *slides]
    written: list[tuple[Path, Callable[[Path], bool]]] = []  # each file, and whether what it holds is ours
    check_folder(options, "output", outputs.GEOJSON, slides)
    if options.output:
        written += [(outputs.geojson_file(options.output, slide), partial(begins_with, MARK)) for slide in slides]
    if options.dicom:
        from . import dicom

        check_folder(options, "dicom", dicom.SUFFIX, slides)
        for slide in slides:
            dicom.check(slide, manifest)
            written.append((dicom.annotations_file(options.dicom, slide), dicom.is_ours))
    ours: dict[str, Callable[[Path], bool]] = {
        "csv": partial(begins_with, ",".join(outputs.header(manifest)) + "\n"),
        "summary": partial(begins_with, ",".join(statistics.COLUMNS) + "\n"),
        "report": is_report,
    }
    if options.table:
        from .parquet import is_ours as is_our_table

        ours["table"] = partial(is_our_table, manifest)
    written += [(file, is_ours) for name, is_ours in ours.items() if (file := getattr(options, name))]
    for file, is_ours in written:
        outputs.check_writable(file, is_ours, inputs)
    if len({file.resolve() for file, _ in written}) < len(written):
        raise UserError("two results have the same name; expected a file for each; name another")
    return Path(asked[0])


def scoring(options: argparse.Namespace, manifest: Manifest) -> AbstractContextManager[Scorer]:
    """Where crops are scored: on the cluster that `--ray` names, or here."""
    if options.ray:
        from .actors import on_a_cluster

        return on_a_cluster(options, manifest)
    return on_this_machine(options)


def run(options: argparse.Namespace) -> int:
    """Exit code; UserError where nothing can be done."""
    check(options)
    formats = [*(["pyarrow"] if options.table else []), *(["highdicom"] if options.dicom else [])]
    require("slides", "openslide", "shapely", *formats)
    if options.ray:
        require("ray", "ray", "pyarrow")
    options.weights = local_folder(options.weights or default_ensemble()).resolve()
    if options.slide and options.slides:
        raise UserError("--slide and --slides; expected one of them; leave one out")
    if options.workers and not options.ray:
        raise UserError(f"--workers {options.workers} without --ray; expected --ray ADDRESS too; add it")
    manifest, start = load_manifest(options.weights), time.perf_counter()
    cutting = Cutting(options.side, options.mpp, options.slide_mpp, options.origin)
    running = SlideRun(cutting, manifest, pictures=options.report is not None)
    choice = Selection(options.slide, options.slides, options.classes, options.region, options.boxes)
    collected = collect(options.detections, choice, running.complain)
    try:
        with journal(check_outputs(options, collected, manifest)) as kept:
            running.check(collected)
            running.score(collected, kept, scoring(options, manifest))
            running.write(collected, options)
            kept.remove()
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or 'the results'} ({error.strerror}); expected a writable folder with "
            "space left; run the same command again"
        ) from None
    except KeyboardInterrupt:
        print(f"\nstopped after {running.new:,} new crops; the same command resumes it", file=sys.stderr)
        return INTERRUPTED
    report(running, collected, time.perf_counter() - start)
    return INCOMPLETE if running.incomplete else 0


def report(running: SlideRun, collected: Collected, seconds: float) -> None:
    """Print what was found: a line per slide, and the sum."""
    for summary in running.summaries:
        if not summary.figures:
            print(f"{summary.slide}: no figures{f' in {summary.area:.4g} mm²' if summary.area else ''}")
            continue
        low, high = statistics.wilson(summary.atypical, summary.figures)
        within = " in the region" if summary.area else ""
        spot = f"; hot spot of 2 mm²{within}: {summary.hottest.count:,}" if summary.hottest else ""
        if summary.too_small:
            spot = "; the slide is too small for a hot spot of 2 mm²"
        density = f"; {summary.density(0):.4g} per mm² in {summary.area:.4g} mm²" if summary.area else ""
        print(
            f"{summary.slide}: {summary.figures:,} figure{'s' * (summary.figures != 1)}, {summary.atypical:,} atypical "
            f"({summary.share:.1%}, 95% interval {low:.1%} to {high:.1%}){density}{spot}"
        )
    scored = sum(summary.figures for summary in running.summaries)
    known = f", {scored - running.new:,} of them known already" if scored > running.new else ""
    slides = f"{len(running.summaries):,} slide{'s' * (len(running.summaries) != 1)}"
    print(f"{scored:,} of {collected.total:,} detections on {slides}{known}, {seconds:.1f} s")
    coarse = [summary.title for summary in running.results if min(summary.slide.level.scale) < 1]
    if coarse:
        print(
            f"note: slides with less detail than {running.cutting.mpp:g} µm/px: {len(coarse):,}, such as {coarse[0]}; "
            "their crops are enlarged, and blurred"
        )
    if running.failed:
        print(f"{running.failed:,} of {collected.total:,} detections could not be scored", file=sys.stderr)
