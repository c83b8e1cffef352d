"""Scores the crops of one slide: threads read ahead while the network computes, and no crop is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..answers import Answer
from ..errors import UserError
from ..report.page import Picture, picture
from .reader import Cutting, Slide

if TYPE_CHECKING:
    from PIL import Image

    from ..ensemble import Ensemble

BATCH = 32  # crops predicted together; fixed, so that answers depend neither on an earlier run nor on the machine
BRIGHT = 200  # of 255: a mitotic figure has chromatin, which is darker in at least one channel
DARK_SHARE = 0.01  # of the crop's central half, which has to be no brighter than that


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


Outcome = tuple[Answer | None, Picture | None] | UserError  # an answer unless already known, a picture if needed
Outcomes = list[tuple[int, Outcome]]  # by the number of the object


def look(crop: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3). UserError where it is blank glass."""
    pixels = np.asarray(crop)
    h, w = pixels.shape[0] // 4, pixels.shape[1] // 4
    darkest = pixels[h : pixels.shape[0] - h, w : pixels.shape[1] - w].min(-1)
    if np.count_nonzero(darkest <= BRIGHT) < DARK_SHARE * darkest.size:
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
        predicted = Answer.of(ensemble.predict([crop for _, crop in new])) if new else []
        answers = dict(zip((n for n, _ in new), predicted, strict=True))
        if slide.changed(part.identity):  # these crops were all read before this check: none is from another file
            raise UserError("it changed while it was read; expected it to stay; run the same command again")
        yield [(n, got if isinstance(got, UserError) else (answers.get(n), got[1])) for n, got in read]
