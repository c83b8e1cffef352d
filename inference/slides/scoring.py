"""Scores the objects of one slide: crops are read ahead in threads while the network computes, none is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..answers import Answer
from ..checksums import ensemble_id
from ..errors import UserError
from ..report.page import Picture, picture
from .journal import Journal, key
from .reader import Slide
from .targets import Complain, Target

if TYPE_CHECKING:
    from PIL import Image

    from ..ensemble import Ensemble

BRIGHT = 200  # of 255: a mitotic figure has chromatin, which is darker in at least one channel
DARK_SHARE = 1  # percent of the crop's central half that has to be darker than that


@dataclass(frozen=True)
class Cutting:
    """How crops are cut. origin: what the files' coordinates count from, "slide", "scan", or None: not said."""

    side: int
    mpp: float
    slide_mpp: float | None
    origin: str | None


@dataclass
class Scored:
    """One slide's results, by object in the order of its files."""

    file: Path
    slide: Slide
    targets: list[Target] = field(default_factory=list)
    places: list[tuple[float, float]] = field(default_factory=list)  # level-0 pixels
    answers: list[Answer] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)  # for a report only
    new: int = 0


def to_level_0(target: Target, slide: Slide, origin: str | None) -> tuple[float, float]:
    """An object's centre as OpenSlide counts, to a hundredth of a pixel."""
    factor = scale(target, slide)
    offset = slide.scanned_from() if origin == "scan" else (0.0, 0.0)
    return round(target.x * factor + offset[0], 2) + 0.0, round(target.y * factor + offset[1], 2) + 0.0


def scale(target: Target, slide: Slide) -> float:
    """Level-0 pixels for one of the file's."""
    if target.magnification is None:
        return 1.0
    try:
        power = float(slide.slide.properties["openslide.objective-power"])
    except (KeyError, ValueError):
        power = 0.0
    if not (power > 0 and target.magnification > 0):
        raise UserError(
            f"its file counts pixels at {target.magnification:g}x, and the slide states no magnification; "
            "expected one; give the coordinates in level-0 pixels"
        )
    return power / target.magnification


def check_origin(slide: Slide, origin: str | None) -> None:
    """UserError where it matters what coordinates count from, and nobody said it."""
    x, y = slide.scanned_from()
    if origin is None and (x, y) != (0, 0):
        raise UserError(
            f"its scanned area begins at {x:g}, {y:g}; QuPath counts from there, other programs from the slide's "
            "corner; expected to know which; give --origin scan (QuPath) or --origin slide"
        )


def placed(
    slide: Slide, targets: Sequence[Target], origin: str | None, complain: Complain
) -> Iterator[tuple[int, tuple[float, float]]]:
    """The number and the place of each object that has one of its own."""
    first: dict[tuple[float, float], str] = {}
    for n, target in enumerate(targets):
        try:
            place = to_level_0(target, slide, origin)
            if place in first:
                raise UserError(f"it lies where {first[place]} does; expected each figure once")
        except UserError as error:
            complain(target.name, str(error))
            continue
        first[place] = target.name
        yield n, place


def look(crop: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3). UserError where there is nothing to see: blank glass, or nothing was scanned."""
    pixels = np.asarray(crop)
    if not pixels.any():
        raise UserError("nothing was scanned there; expected tissue")
    h, w = pixels.shape[0] // 4, pixels.shape[1] // 4
    darkest = pixels[h : pixels.shape[0] - h, w : pixels.shape[1] - w].min(-1)
    if np.percentile(darkest, DARK_SHARE) > BRIGHT:
        raise UserError("it lies on blank glass; expected a mitotic figure")
    return pixels


def score_slide(
    file: Path,
    targets: Sequence[Target],
    cutting: Cutting,
    ensemble: Ensemble,
    journal: Journal,
    pool: ThreadPoolExecutor,
    complain: Complain,
    tick: Callable[[int, int], None],
    keep_pictures: bool,
) -> Scored:
    """All objects of one slide. UserError where it cannot be read, or changed meanwhile: then none of it counts.

    tick(done, new): called after each batch. complain: called for each object that cannot be scored.
    """
    slide = Slide(file, cutting.mpp, cutting.slide_mpp)
    check_origin(slide, cutting.origin)
    found = dict(placed(slide, targets, cutting.origin, complain))
    order = sorted(found, key=lambda n: (found[n][1] // 1024, found[n][0] // 1024))  # tiles are decoded once
    about = (slide.identity, cutting.side, slide.level, ensemble_id(ensemble.manifest), ensemble.precision)
    keys = {n: key(about, found[n]) for n in order}
    answers: dict[int, Answer] = {}
    pictures: dict[int, Picture] = {}
    name, new = file.name, 0

    def answer(n: int, known: tuple[float, tuple[float, ...], tuple[float, ...]]) -> Answer:
        x, y = found[n]
        return Answer(f"{name}/{x:.12g}_{y:.12g}", 0, *known, domain=name)

    wanted = [n for n in order if keep_pictures or keys[n] not in journal.known]
    for n in order:
        if keys[n] in journal.known:
            answers[n] = answer(n, journal.known[keys[n]])

    def use(_: int, crop: Image.Image) -> tuple[np.ndarray, Picture | None]:
        pixels = look(crop)
        return pixels, picture(pixels) if keep_pictures else None

    batch: list[tuple[int, np.ndarray]] = []
    size = 8

    def predict() -> None:
        nonlocal size, new
        if not batch:
            return
        start = time.perf_counter()
        prediction = ensemble.predict([crop for _, crop in batch])
        fresh = []
        for k, (n, _) in enumerate(batch):
            folds, members = prediction.fold_p[:, k].tolist(), prediction.member_p[:, k].tolist()
            known = float(prediction.p_atypical[k]), tuple(folds), tuple(members) if len(members) > 1 else ()
            fresh.append((keys[n], known))
            answers[n] = answer(n, known)
        if slide.changed():  # all of these crops were read before this: none is of another file
            raise UserError("it changed while it was read; expected it to stay; run the same command again")
        journal.add(fresh)
        new += len(batch)
        seconds = time.perf_counter() - start
        if len(batch) == size:  # about a second each: a run that is stopped loses no more
            size = min(2 * size, 1024) if seconds < 0.7 else max(size // 2, 1) if seconds > 3 else size
        batch.clear()

    crops = slide.each([found[n] for n in wanted], cutting.side, use, pool)
    for done, (n, got) in enumerate(zip(wanted, crops, strict=True), 1):
        if isinstance(got, UserError):
            complain(targets[n].name, str(got))
            answers.pop(n, None)
            continue
        pixels, small = got
        if small is not None:
            pictures[n] = small
        if n not in answers:
            batch.append((n, pixels))
        if len(batch) >= size:
            predict()
            tick(done, new)
    predict()
    if slide.changed():
        raise UserError("it changed while it was read; expected it to stay; run the same command again")
    scored = sorted(answers)
    return Scored(
        file,
        slide,
        [targets[n] for n in scored],
        [found[n] for n in scored],
        [answers[n] for n in scored],
        [pictures[n] for n in scored if n in pictures],
        new,
    )
