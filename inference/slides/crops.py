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
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..commandline import require
from ..errors import UserError
from ..exits import INCOMPLETE, INTERRUPTED
from ..files import claim, read_json, write_whole
from ..progress import Progress
from ..resolution import MPP, PLAUSIBLE, is_plausible
from .detections.objects import DOUBT, Frame
from .detections.table import CLASS, REQUIRED, Detection, read_detections
from .frames import check_origin, placement
from .pyramid import file_of
from .reader import THREADS, Cutting, Slide, identity

if TYPE_CHECKING:
    from PIL import Image

TABLE, SETTINGS = "crops.csv", "crops.json"


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("table", type=Path, metavar="DETECTIONS.csv", help="columns slide, x, y (level-0 pixels, centre) and any more")
    add("--output", type=Path, required=True, metavar="DIR", help=f"for crops and {TABLE}; resumes there")
    add("--slides", type=Path, metavar="FOLDER", help="what paths of slides are relative to (default: the table's)")
    add_origin(parser)
    add("--side", type=int, default=128, help="of a crop, in pixels (default 128)")
    add("--mpp", type=float, default=MPP, help=f"µm/px of a crop (default {MPP})")
    add("--slide-mpp", type=float, metavar="MPP", help="µm/px of level 0 of slides that do not state it")


def add_origin(parser: argparse.ArgumentParser) -> None:
    help_ = "what x and y count from, where a file leaves it open: the scanned area (as QuPath does), or the slide"
    parser.add_argument("--origin", choices=("scan", "slide"), help=help_)


def check(options: argparse.Namespace) -> None:
    """UserError for values that make no sense."""
    if not 8 <= options.side <= 2048:
        raise UserError(f"--side is {options.side}; expected 8 to 2048 pixels")
    for name in ("mpp", "slide_mpp"):
        value = getattr(options, name)
        if value is not None and not is_plausible(value):
            raise UserError(f"--{name.replace('_', '-')} is {value:g}; expected {PLAUSIBLE[0]} to {PLAUSIBLE[1]} µm/px")


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
        known = read_json(file, "name another folder", limit=1 << 30)
        if not isinstance(known, dict) or set(known) != {*settings, "files"} or not isinstance(known["files"], dict):
            raise UserError(f"{file} holds {known!r:.80}; expected how its crops were cut; name another folder")
        files = known.pop("files")
        for name in ("slide_mpp", "origin"):  # where it is None, no crop was cut from a slide that needs it
            known[name] = settings[name] if known[name] is None else known[name]
        if known != settings:
            names = [name for name in settings if known[name] != settings[name]]
            earlier, expected = (", ".join(as_option(name, each[name]) for name in names) for each in (known, settings))
            raise UserError(f"{output} holds crops of {earlier}; expected {expected}; name another folder")
    except FileNotFoundError:
        if any(output.rglob("*.png")):
            raise UserError(f"{output} holds PNG files but no {SETTINGS}; expected both; name another folder") from None
    return files


def as_option(name: str, value: object) -> str:
    option = f"--{name.replace('_', '-')}"
    return f"no {option}" if value is None else f"{option} {value}"


def keep_settings(output: Path, settings: dict[str, object], files: dict[str, str]) -> None:
    """What `known_files` reads in a later run. OSError where it cannot be written."""
    write_whole(output / SETTINGS, json.dumps(settings | {"files": files}, ensure_ascii=False))


def is_there(file: Path) -> bool:
    try:
        return file.stat().st_size > 0  # a loss of power may leave an empty file
    except (OSError, ValueError):
        return False


def check_labels(rows: Sequence[Detection], others: Sequence[str]) -> None:
    """UserError where one place, to a hundredth of a pixel, has two labels or domains: only one could be kept."""
    for column in (n for n, name in enumerate(others) if name.casefold() in (*CLASS, "domain")):
        known: dict[tuple[str, int, int], str] = {}
        for row in rows:
            value, x, y = row.others[column].strip(), round(row.x * 100), round(row.y * 100)
            for near in ((row.slide, x + dx, y + dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)):
                if known.get(near, value) != value:
                    raise UserError(
                        f"{row.slide} at {row.where} is {known[near]!r:.40} and {value!r:.40} in {others[column]}; "
                        "expected one label for one place; correct the table"
                    )
            known[row.slide, x, y] = value


@dataclass
class CropRun:
    """Cuts slide after slide. An OSError means that the output cannot be written, and ends the run."""

    output: Path
    cutting: Cutting
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
        known_as = identity(file_of(file))
        if self.files.setdefault(name, known_as) != known_as:
            raise UserError("it changed since crops of it were cut; expected the same slide; name another folder")
        keep_settings(self.output, self.settings, self.files)
        missing = [detection for detection in detections if not is_there(self.output / detection.path)]
        self.done.update(set(detections).difference(missing))
        if not missing:
            return
        slide = Slide(file, self.cutting.mpp, self.cutting.slide_mpp)
        frame = Frame(origin=DOUBT)
        check_origin(slide, self.cutting.origin, [frame])
        where = placement(frame, slide, self.cutting.origin)
        if min(slide.level.scale) < 1:
            self.coarse.append(f"{name} (by {1 / min(slide.level.scale):.3g})")
        centres = [where.on_slide(detection.x, detection.y) for detection in missing]
        errors = slide.each(centres, self.cutting.side, partial(self.keep, missing), self.pool)
        new: list[Detection] = []
        for detection, error in zip(missing, errors, strict=True):
            if error:
                self.complain(f"{detection.slide} at {detection.where}: {error}", [detection])
            else:
                new.append(detection)
                self.done.add(detection)
                self.new += 1
            self.progress.show(len(self.done) + len(self.failed), self.new + len(self.failed), self.new)
        if slide.changed(known_as):  # then the new crops may show two slides
            self.take_back(name, new, others=len(missing) < len(detections))
            raise UserError("it changed while it was read; expected it to stay; run the same command again")

    def take_back(self, name: str, new: Sequence[Detection], others: bool) -> None:
        """Remove new crops of a slide. others: whether it has crops from earlier runs, which stay."""
        for detection in new:
            (self.output / detection.path).unlink()
        self.done.difference_update(new)
        self.new -= len(new)
        if not others:
            del self.files[name]
            keep_settings(self.output, self.settings, self.files)

    def write_table(self, detections: Sequence[Detection], others: Sequence[str]) -> Path:
        file = self.output / TABLE
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", *REQUIRED, *others])
        writer.writerows(
            [d.path, d.slide, f"{d.x:.12g}", f"{d.y:.12g}", *d.others] for d in detections if d in self.done
        )
        write_whole(file, text.getvalue().encode())
        return file


def run(options: argparse.Namespace) -> int:
    """Exit code; UserError where nothing can be done."""
    check(options)
    require("slides", "openslide")
    start = time.perf_counter()
    rows, others, problems = read_detections(options.table)
    check_labels(rows, others)
    detections = list(dict.fromkeys(rows))
    slides: dict[str, list[Detection]] = {}
    for detection in detections:
        slides.setdefault(detection.slide, []).append(detection)
    folder = options.slides or options.table.parent
    cutting = Cutting(options.side, options.mpp, options.slide_mpp, options.origin)
    settings = {**asdict(cutting), "slides": str(folder.resolve())}
    with (
        claimed(options.output, settings) as files,
        ThreadPoolExecutor(THREADS) as pool,
        Progress(len(detections), "detections") as progress,
    ):
        running = CropRun(options.output, cutting, settings, files, progress, pool)
        for problem in problems:
            running.complain(problem)
        progress.show(0, 0, 0)
        try:
            for name, some in slides.items():
                try:
                    running.cut(name, folder / name, some)
                except UserError as error:
                    left = set(some) - running.done - running.failed
                    running.complain(f"{name} ({len(left):,} detection{'s' * (len(left) > 1)}): {error}", left)
            if not running.done:
                raise UserError(
                    f"none of the {len(rows) + len(problems):,} detections could be cut; each is named above"
                )
            table = running.write_table(detections, others)
        except OSError as error:
            raise UserError(
                f"cannot write {error.filename or 'the results'} ({error.strerror}); expected a writable folder with "
                "space left; run the same command again"
            ) from None
        except KeyboardInterrupt:
            progress.clear()
            print(f"\nstopped after {running.new:,} new crops; the same command resumes it", file=sys.stderr)
            return INTERRUPTED
    known = f", {len(running.done) - running.new:,} of them there already" if len(running.done) > running.new else ""
    twice = f", {len(rows) - len(detections):,} detections listed twice" if len(rows) > len(detections) else ""
    print(f"{table}: {len(running.done):,} crops{known}{twice}, {time.perf_counter() - start:.1f} s")
    if running.coarse:
        print(
            f"note: slides with less detail than {options.mpp:g} µm/px: {len(running.coarse):,}, such as "
            f"{running.coarse[0]}; their crops are enlarged, and blurred"
        )
    if running.failed or problems:
        count = len(running.failed) + len(problems)
        print(f"{count:,} of {len(rows) + len(problems):,} detections could not be cut", file=sys.stderr)
        return INCOMPLETE
    return 0
