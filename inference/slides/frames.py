"""Where coordinates of a file lie on a slide: one rule for objects, outlines of areas, and crops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..errors import UserError
from .detections.objects import DOUBT, SCAN, Frame
from .reader import Slide


class Placement(NamedTuple):
    """Level-0 pixels = coordinates x scale + offset, each in x and y."""

    scale: tuple[float, float]
    offset: tuple[float, float]

    def on_slide(self, x: float, y: float) -> tuple[float, float]:
        return x * self.scale[0] + self.offset[0], y * self.scale[1] + self.offset[1]


def placement(frame: Frame, slide: Slide, origin: str | None) -> Placement:
    """How coordinates in `frame` lie on the slide. origin: "scan" or "slide", for a frame that leaves it in doubt.

    UserError where they count at a magnification and the slide states none.
    """
    scale = 1.0, 1.0
    if frame.microns is not None:
        scale = frame.microns / slide.level.mpp[0], frame.microns / slide.level.mpp[1]
    elif frame.magnification is not None:
        scale = (objective(slide, frame.magnification) / frame.magnification,) * 2
    begins = origin if frame.origin == DOUBT else frame.origin
    return Placement(scale, slide.scanned_from if begins == SCAN else (0.0, 0.0))


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
