"""Where coordinates of a file lie on a slide: one rule for objects, outlines of areas, and crops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..errors import UserError
from .detections.objects import DOUBT, GLASS, SCAN, Frame
from .reader import Slide


class Placement(NamedTuple):
    """Level-0 pixels = coordinates x scale + offset, each in x and y."""

    scale: tuple[float, float]
    offset: tuple[float, float]

    def on_slide(self, x: float, y: float) -> tuple[float, float]:
        return x * self.scale[0] + self.offset[0], y * self.scale[1] + self.offset[1]


def placement(frame: Frame, slide: Slide, origin: str | None) -> Placement:
    """How coordinates in `frame` lie on the slide. origin: "scan" or "slide", for a frame that leaves it in doubt.

    UserError where the slide does not state what the frame counts by, or cannot be the one that it counts on.
    """
    scale = 1.0, 1.0
    if frame.microns is not None:
        scale = frame.microns / slide.level.mpp[0], frame.microns / slide.level.mpp[1]
    elif frame.magnification is not None:
        scale = (objective(slide, frame.magnification) / frame.magnification,) * 2
    elif frame.deepzoom is not None:
        scale = (2.0 ** (deepest(slide, frame.deepzoom) - frame.deepzoom),) * 2
    begins = origin if frame.origin == DOUBT else frame.origin
    if begins == GLASS:
        return Placement(scale, middle_of_glass(slide))
    return Placement(scale, slide.scanned_from if begins == SCAN else (0.0, 0.0))


def deepest(slide: Slide, level: int) -> int:
    """The DeepZoom level that has level 0's pixels: each level halves the next, down to one pixel at level 0."""
    last = (max(slide.size) - 1).bit_length()
    if not 0 <= level <= last:
        raise UserError(
            f"its file counts pixels of DeepZoom level {level}, and the slide has levels 0 to {last}; expected one of "
            "these; check which slide it belongs to"
        )
    return last


def middle_of_glass(slide: Slide) -> tuple[float, float]:
    """The middle of the glass slide in level-0 pixels."""
    if slide.glass is None:
        raise UserError(
            "its file counts from the middle of the glass slide, and the slide does not state where that is; expected "
            "the NDPI file; give it by --slide, or export GeoJSON from QuPath"
        )
    return slide.glass


def check_placed(slide: Slide, origin: str | None, frames: Sequence[Frame]) -> None:
    """UserError where coordinates in none of the frames can be placed; where some can, the others' objects say so."""
    reasons = []
    for frame in set(frames):
        try:
            placement(frame, slide, origin)
        except UserError as error:
            reasons.append(error)
        else:
            return
    if reasons:
        raise reasons[0]


def objective(slide: Slide, magnification: float) -> float:
    """The magnification of level 0."""
    if not (slide.power > 0 and magnification > 0):
        raise UserError(
            f"its file counts pixels at {magnification:g}x, and the slide states no magnification; "
            "expected one; give the coordinates in level-0 pixels"
        )
    return slide.power


def check_origin(slide: Slide, origin: str | None, frames: Iterable[Frame]) -> None:
    """UserError where the origin of coordinates matters, is in doubt and was not given."""
    x, y = slide.scanned_from
    if origin is None and (x, y) != (0, 0) and any(frame.origin == DOUBT for frame in frames):
        raise UserError(
            f"its scanned area begins at {x:g}, {y:g}; QuPath counts from there, most other programs from the slide's "
            "corner; expected to know which; give --origin scan (QuPath) or --origin slide"
        )
