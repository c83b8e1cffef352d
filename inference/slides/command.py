"""`python -m inference crops DETECTIONS.csv --output DIR`: crops of whole slides, one PNG for each detection.

The table has the columns slide, x and y (level-0 pixels, the centre of the figure) and any others, which are kept.

Exit code 0 when every detection was cut, 1 when nothing could be done, 3 when some could not be cut: each has its
line on stderr, and all others are in DIR/crops.csv, which `python -m inference score` takes.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..exits import INCOMPLETE, INTERRUPTED
from ..files import claim, read_json, write_whole
from ..progress import Progress
from .detections import REQUIRED, Detection, read_detections
from .pyramid import PLAUSIBLE
from .reader import Slide, identity

if TYPE_CHECKING:
    from PIL import Image

TABLE, SETTINGS = "crops.csv", "crops.json"


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("table", type=Path, metavar="DETECTIONS.csv", help="columns slide, x, y (level-0 pixels, centre) and any more")
    add("--output", type=Path, required=True, metavar="DIR", help=f"gets the crops and {TABLE}; which a rerun resumes")
    add("--slides", type=Path, metavar="FOLDER", help="what paths of slides are relative to (default: the table's)")
    add("--side", type=int, default=128, help="of a crop, in pixels (default 128)")
    add("--mpp", type=float, default=0.25, help="µm/px of a crop (default 0.25)")
    add("--slide-mpp", type=float, metavar="MPP", help="µm/px of level 0 of slides that do not state it")


def check(options: argparse.Namespace) -> None:
    """UserError for values that make no sense."""
    if not 8 <= options.side <= 2048:
        raise UserError(f"--side is {options.side}; expected 8 to 2048 pixels")
    for name in ("mpp", "slide_mpp"):
        value = getattr(options, name)
        if value is not None and not PLAUSIBLE[0] <= value <= PLAUSIBLE[1]:
            raise UserError(f"--{name.replace('_', '-')} is {value:g}; expected {PLAUSIBLE[0]} to {PLAUSIBLE[1]} µm/px")


def require(*packages: str) -> None:
    """UserError where a package that slides need cannot be imported."""
    for name in packages:
        try:
            import_module(name)
        except (ImportError, OSError) as error:
            raise UserError(
                f"{name} is not installed ({error}); expected what requirements/slides.txt lists; run "
                "./build.sh --engine native --requirements requirements/slides.txt"
            ) from None


@contextmanager
def claimed(output: Path, settings: dict[str, object]) -> Iterator[dict[str, str]]:
    """Lock the folder for this run and these settings: crops of other settings would be taken for finished ones.

    Yields, by slide name, the `reader.identity` of each slide when crops were first cut from it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); expected a folder; name another") from None
    try:
        claim(handle, output)
        yield known_files(output, settings)
    finally:
        os.close(handle)


def known_files(output: Path, settings: dict[str, object]) -> dict[str, str]:
    """The slides that crops in `output` come from. UserError where their settings differ or are not known."""
    file, files = output / SETTINGS, {}
    try:
        found = read_json(file, "name another folder", limit=1 << 30)
        if not isinstance(found, dict) or set(found) != {*settings, "files"} or not isinstance(found["files"], dict):
            raise UserError(f"{file} holds {found!r:.80}; expected how its crops were cut; name another folder")
        files = found.pop("files")
        if found["slide_mpp"] is None:  # then no crop was cut from a slide that needs it
            found["slide_mpp"] = settings["slide_mpp"]
        if found != settings:
            raise UserError(f"{output} holds crops of {found}; expected {settings}; name another folder")
    except FileNotFoundError:
        if any(output.rglob("*.png")):
            raise UserError(f"{output} holds PNG files but no {SETTINGS}; expected both; name another folder") from None
    return files


def keep_settings(output: Path, settings: dict[str, object], files: dict[str, str]) -> None:
    """What `known_files` reads in a later run. OSError where it cannot be written."""
    write_whole(output / SETTINGS, json.dumps(settings | {"files": files}, ensure_ascii=False))


def is_there(file: Path) -> bool:
    try:
        return file.stat().st_size > 0  # a loss of power may leave an empty file
    except (OSError, ValueError):
        return False


@dataclass
class Run:
    """Cuts slide after slide. An OSError means that the output cannot be written, and ends the run."""

    output: Path
    side: int  # pixels of a crop
    mpp: float  # of a crop
    slide_mpp: float | None  # of slides that do not state it
    settings: dict[str, object]  # what crops in the folder must agree on
    files: dict[str, str]  # identity of each slide, by name
    progress: Progress
    pool: ThreadPoolExecutor
    done: set[Detection] = field(default_factory=set)
    failed: set[Detection] = field(default_factory=set)
    coarse: list[str] = field(default_factory=list)  # slides with less detail than asked for
    new: int = 0

    def complain(self, what: str, detections: Iterable[Detection] = ()) -> None:
        self.failed.update(detections)
        self.progress.clear()
        print(f"not cut: {' '.join(what.split())}", file=sys.stderr, flush=True)

    def keep(self, missing: Sequence[Detection], n: int, crop: Image.Image) -> None:
        """Write the n-th crop, in any thread."""
        data = io.BytesIO()
        crop.save(data, "PNG")
        file = self.output / missing[n].path
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, data.getvalue())

    def cut(self, name: str, file: Path, detections: Sequence[Detection]) -> None:
        """Cut all crops of one slide that do not exist yet. UserError where the slide cannot be read."""
        if self.files.setdefault(name, identity(file)) != identity(file):
            raise UserError("it changed since crops of it were cut; expected the same slide; name another folder")
        keep_settings(self.output, self.settings, self.files)
        missing = [detection for detection in detections if not is_there(self.output / detection.path)]
        self.done.update(set(detections).difference(missing))
        if not missing:
            return
        slide = Slide(file, self.mpp, self.slide_mpp)
        if min(slide.level.scale) < 1:
            self.coarse.append(f"{name} (by {1 / min(slide.level.scale):.3g})")
        places = [(detection.x, detection.y) for detection in missing]
        errors = slide.each(places, self.side, partial(self.keep, missing), self.pool)
        for detection, error in zip(missing, errors, strict=True):
            if error:
                self.complain(f"{detection.slide} at {detection.where}: {error}", [detection])
            else:
                self.done.add(detection)
                self.new += 1
            self.progress.show(len(self.done) + len(self.failed), self.new + len(self.failed), self.new)

    def write_table(self, detections: Sequence[Detection], others: Sequence[str]) -> Path:
        file = self.output / TABLE
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", *REQUIRED, *others])
        writer.writerows([d.path, d.slide, f"{d.x:.12g}", f"{d.y:.12g}", *d.rest] for d in detections if d in self.done)
        write_whole(file, text.getvalue().encode())
        return file


def run(options: argparse.Namespace) -> int:
    """Exit code; UserError where nothing can be done."""
    check(options)
    require("openslide")
    start = time.perf_counter()
    rows, others, problems = read_detections(options.table)
    detections = list(dict.fromkeys(rows))
    slides: dict[str, list[Detection]] = {}
    for detection in detections:
        slides.setdefault(detection.slide, []).append(detection)
    folder = options.slides or options.table.parent
    settings = {
        "side": options.side,
        "mpp": options.mpp,
        "slide_mpp": options.slide_mpp,
        "slides": str(folder.resolve()),
    }
    with claimed(options.output, settings) as files, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        progress = Progress(len(detections), "detections")
        cutting = Run(options.output, options.side, options.mpp, options.slide_mpp, settings, files, progress, pool)
        for problem in problems:
            cutting.complain(problem)
        try:
            for name, some in slides.items():
                try:
                    cutting.cut(name, folder / name, some)
                except UserError as error:
                    rest = set(some) - cutting.done - cutting.failed
                    cutting.complain(f"{name} ({len(rest):,} detection{'s' * (len(rest) > 1)}): {error}", rest)
            cutting.progress.clear()
            if not cutting.done:
                raise UserError(
                    f"none of the {len(rows) + len(problems):,} detections could be cut; each is named above"
                )
            table = cutting.write_table(detections, others)
        except OSError as error:
            raise UserError(
                f"cannot write {error.filename or 'the results'} ({error.strerror}); expected a writable folder with "
                "space left; run the same command again"
            ) from None
        except KeyboardInterrupt:
            print(f"\nstopped after {cutting.new:,} new crops; the same command resumes it", file=sys.stderr)
            return INTERRUPTED
    known = f", {len(cutting.done) - cutting.new:,} of them there already" if len(cutting.done) > cutting.new else ""
    twice = f", {len(rows) - len(detections):,} detections listed twice" if len(rows) > len(detections) else ""
    print(f"{table}: {len(cutting.done):,} crops{known}{twice}, {time.perf_counter() - start:.1f} s")
    if cutting.coarse:
        print(
            f"note: slides with less detail than {options.mpp:g} µm/px: {len(cutting.coarse):,}, such as "
            f"{cutting.coarse[0]}; their crops are enlarged, and blurred"
        )
    if cutting.failed or problems:
        count = len(cutting.failed) + len(problems)
        print(f"{count:,} of {len(rows) + len(problems):,} detections could not be cut", file=sys.stderr)
        return INCOMPLETE
    return 0
