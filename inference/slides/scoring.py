"""Scores the crops of one slide: threads read ahead while the network computes, and no crop is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from ..report.page import Picture, picture
from .journal import Answered
from .reader import Slide

if TYPE_CHECKING:
    from PIL import Image

    from ..ensemble import Ensemble

BATCH = 32  # crops predicted together; fixed, so that answers depend neither on an earlier run nor on the machine
BRIGHT = 200  # of 255: a mitotic figure has chromatin, which is darker in at least one channel
DARK_SHARE = 1  # percent of the crop's central half that has to be darker than that


@dataclass(frozen=True)
class Cutting:
    """How crops are cut. origin: where the files' coordinates begin: "slide", "scan", or None if not given."""

    side: int
    mpp: float
    slide_mpp: float | None
    origin: str | None


@dataclass(frozen=True)
class Part:
    """Some crops of one slide, with all that is needed to score them.

    numbers: of the objects in the slide's reading order, increasing; places: their centres in level-0 pixels;
    known: those that have an answer already, and need only a picture; identity: of the slide's file
    """

    file: Path
    identity: str
    cutting: Cutting
    numbers: Sequence[int]
    places: Sequence[tuple[float, float]]
    known: frozenset[int]
    pictures: bool


Outcome = tuple[Answered | None, Picture | None] | UserError  # an answer unless already known, a picture if needed
Outcomes = list[tuple[int, Outcome]]  # by the number of the object


def look(crop: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3). UserError where it is blank glass, or nothing was scanned."""
    pixels = np.asarray(crop)
    if not pixels.any():
        raise UserError("nothing was scanned there; expected tissue")
    h, w = pixels.shape[0] // 4, pixels.shape[1] // 4
    darkest = pixels[h : pixels.shape[0] - h, w : pixels.shape[1] - w].min(-1)
    if np.percentile(darkest, DARK_SHARE) > BRIGHT:
        raise UserError("it lies on blank glass; expected a mitotic figure")
    return pixels


def score_part(slide: Slide, part: Part, ensemble: Ensemble, pool: ThreadPoolExecutor) -> Iterator[Outcomes]:
    """The outcome of each object, batch after batch. UserError where the slide is not, or no longer, the part's."""

    def use(_: int, crop: Image.Image) -> tuple[np.ndarray, Picture | None]:
        pixels = look(crop)
        return pixels, picture(pixels) if part.pictures else None

    crops = slide.each(part.places, part.cutting.side, use, pool)
    for _, batch in groupby(zip(part.numbers, crops, strict=True), key=lambda one: one[0] // BATCH):
        read = list(batch)
        new = [(n, got[0]) for n, got in read if not isinstance(got, UserError) and n not in part.known]
        answers = dict(zip((n for n, _ in new), predict(ensemble, [crop for _, crop in new]), strict=True))
        if slide.changed(part.identity):  # these crops were all read before this check: none is from another file
            raise UserError("it changed while it was read; expected it to stay; run the same command again")
        yield [(n, got if isinstance(got, UserError) else (answers.get(n), got[1])) for n, got in read]


def predict(ensemble: Ensemble, crops: Sequence[np.ndarray]) -> list[Answered]:
    if not crops:
        return []
    found = ensemble.predict(crops)
    members = found.member_p if len(found.member_p) > 1 else np.empty((0, len(crops)))
    each = zip(found.p_atypical, found.fold_p.T, members.T, strict=True)
    return [(float(p), tuple(fold_p.tolist()), tuple(member_p.tolist())) for p, fold_p, member_p in each]
