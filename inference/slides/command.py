"""`python -m inference crops DETECTIONS.csv --output DIR`: crops of whole slides, one PNG for each detection.

The table has the columns slide, x and y (level-0 pixels, the centre of the figure) and any others, which are kept.

Exit code 0 when every detection was cut, 1 when nothing could be done, 3 when some could not: each has its line on
stderr, and all others are in DIR/crops.csv, which `python -m inference score` takes.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
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
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..exits import INCOMPLETE, INTERRUPTED
from ..files import write_whole
from ..progress import Progress
from .detections import REQUIRED, Detection, read_detections
from .pyramid import PLAUSIBLE, Level, choose_level, open_slide, read_crop

if TYPE_CHECKING:
    from openslide import OpenSlide

TABLE, SETTINGS = "crops.csv", "crops.json"
CHUNK = 256  # detections that are handed to the threads at once: a run that is stopped stops soon


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


@contextmanager
def claimed(output: Path, settings: dict[str, object]) -> Iterator[None]:
    """Hold the folder for this run alone, and for these settings: crops of others would be taken for finished."""
    file = output / SETTINGS
    try:
        output.mkdir(parents=True, exist_ok=True)
        stream = file.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); expected a folder; name another") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run writes to {output}; expected one at a time; wait, or name another") from None
        except OSError:
            pass  # a file system without locks
        stream.seek(0)
        text = stream.read()
        found = json.loads(text) if text else settings
        if found["slide_mpp"] is None:  # then nothing was cut from the slides that it is for
            found["slide_mpp"] = settings["slide_mpp"]
        if found != settings:
            raise UserError(f"{output} holds crops of {found}; expected {settings}; name another folder")
        stream.truncate(0)
        stream.write(json.dumps(settings, ensure_ascii=False))
        stream.flush()
        yield


def is_there(file: Path) -> bool:
    try:
        return file.stat().st_size > 0  # a computer that lost its power may leave an empty file
    except (OSError, ValueError):
        return False


@dataclass
class Run:
    """Cuts slide after slide. An OSError means that the output cannot be written, and ends the run."""

    options: argparse.Namespace
    progress: Progress
    pool: ThreadPoolExecutor
    done: set[Detection] = field(default_factory=set)
    failed: set[Detection] = field(default_factory=set)
    coarse: list[str] = field(default_factory=list)  # slides with less detail than was asked for
    new: int = 0

    def complain(self, what: str, detections: Iterable[Detection] = ()) -> None:
        self.failed.update(detections)
        self.progress.clear()
        print(f"not cut: {' '.join(what.split())}", file=sys.stderr, flush=True)

    def attempt(self, slide: OpenSlide, level: Level, detection: Detection) -> Exception | None:
        """Cut one, in any thread; returns why it could not be read."""
        from openslide import OpenSlideError

        data = io.BytesIO()
        try:
            read_crop(slide, level, detection.x, detection.y, self.options.side).save(data, "PNG")
        except (UserError, OpenSlideError) as error:
            return error
        file = self.options.output / detection.path
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, data.getvalue())
        return None

    def cut(self, file: Path, detections: Sequence[Detection]) -> None:
        """All crops of one slide that are not there yet. UserError where the slide cannot be read."""
        missing = [detection for detection in detections if not is_there(self.options.output / detection.path)]
        self.done.update(set(detections).difference(missing))
        if not missing:
            return
        # never closed by hand: a slide goes with its last reader, and closing it under a thread crashes the process
        slide = open_slide(file)
        level = choose_level(slide, self.options.mpp, self.options.slide_mpp)
        if min(level.scale) < 1:
            self.coarse.append(f"{missing[0].slide} (by {1 / min(level.scale):.3g})")
        for start in range(0, len(missing), CHUNK):
            some, broken = missing[start : start + CHUNK], False
            errors = self.pool.map(partial(self.attempt, slide, level), some)
            for detection, error in zip(some, errors, strict=True):
                if error and not isinstance(error, UserError):
                    # after one damaged tile an open slide fails for good, for crops elsewhere too
                    broken, error = True, self.attempt(open_slide(file), level, detection)
                if error:
                    self.complain(f"{detection.slide} at {detection.where}: {error}", [detection])
                else:
                    self.done.add(detection)
                    self.new += 1
                self.progress.show(len(self.done) + len(self.failed), self.new + len(self.failed), self.new)
            if broken:
                slide = open_slide(file)

    def write_table(self, detections: Sequence[Detection], others: Sequence[str]) -> Path:
        text, file = io.StringIO(newline=""), self.options.output / TABLE
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", *REQUIRED, *others])
        writer.writerows([d.path, d.slide, f"{d.x:.12g}", f"{d.y:.12g}", *d.rest] for d in detections if d in self.done)
        write_whole(file, text.getvalue().encode())
        return file


def run(options: argparse.Namespace) -> int:
    """Exit code; UserError where nothing can be done."""
    check(options)
    try:
        import openslide  # noqa: F401
    except (ImportError, OSError) as error:
        raise UserError(f"OpenSlide is not installed ({error}); expected what requirements/slides.txt lists; run "
                        "./build.sh --engine native --requirements requirements/slides.txt") from None  # fmt: skip
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
    with claimed(options.output, settings), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        cutting = Run(options, Progress(len(detections), "detections"), pool)
        for problem in problems:
            cutting.complain(problem)
        try:
            for name, some in slides.items():
                try:
                    cutting.cut(folder / name, some)
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
            raise UserError(f"cannot write {error.filename} ({error.strerror}); expected a writable folder with space "
                            "left; run the same command again") from None  # fmt: skip
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
