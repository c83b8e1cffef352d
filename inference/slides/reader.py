"""One open slide: what it is, and its crops read ahead in threads, so that the caller does not wait."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import UserError
from .pyramid import choose_level, file_of, open_slide, read_crop

if TYPE_CHECKING:
    from openslide import ImageSlide, OpenSlide
    from PIL import Image

THREADS = min(8, os.cpu_count() or 1)  # that read one slide
ENDS = 1 << 16  # bytes at a file's start and end that help to identify it
AHEAD = 512 * 128 * 128  # pixels of the crops read ahead: 25 MB
POWER = "objective-power"
T = TypeVar("T")


def identity(file: Path) -> str:
    """What identifies a file's content: size, modification time, and its first and last bytes.

    A slide of several files (MIRAX, DICOM) is identified by the file that is named.
    """
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            start = stream.read(ENDS)
            stream.seek(max(0, status.st_size - ENDS))
            ends = sha256(start + stream.read(ENDS)).hexdigest()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot be opened ({reason}); expected a slide; check the path") from None
    return f"{status.st_size}-{status.st_mtime_ns}-{ends}"


@dataclass(frozen=True)
class Cutting:
    """How crops are cut. origin: where the files' coordinates begin: "slide", "scan", or None if not given."""

    side: int
    mpp: float
    slide_mpp: float | None
    origin: str | None


def stated_number(properties: Mapping[str, str], name: str) -> float:
    """One of OpenSlide's own properties; 0 where the slide does not state it."""
    try:
        return float(properties.get(f"openslide.{name}", 0))
    except ValueError:
        return 0.0


def middle_of_glass(
    properties: Mapping[str, str], size: tuple[int, int], mpp: tuple[float, float]
) -> tuple[float, float] | None:
    """x, y in level-0 pixels of the middle of the glass slide: NDPI states in nm how far the scan's own is from it."""
    try:
        away = [float(properties[f"hamamatsu.{axis}OffsetFromSlideCentre"]) for axis in "XY"]
    except (KeyError, ValueError):
        return None
    if not all(map(math.isfinite, away)):
        return None
    x, y = (pixels / 2 - nm / 1000 / microns for pixels, nm, microns in zip(size, away, mpp, strict=True))
    return x, y


class Slide:
    """A slide's size and resolution, and its crops. The file is open only from the first crop to `release`.

    opens: the file that is opened, of a DICOM slide's folder one of its files; level: where crops of the wanted µm/px
    are read; size: width and height in level-0 pixels; scanned_from: x and y in level-0 pixels where the scanned area
    begins, (0, 0) if the slide states none; glass: the middle of the glass slide in level-0 pixels, None if not stated;
    power: its magnification, 0 if none
    """

    def __init__(self, file: Path, mpp: float, given: float | None) -> None:
        """mpp: of crops; given: µm/px of level 0 of a slide that states none.

        UserError where the file is not a slide, or its µm/px is unknown.
        """
        self.file, self.opens = file, file_of(file)
        self.identity = identity(self.opens)
        opened = open_slide(self.opens)
        self.level = choose_level(opened, mpp, given)
        self.size: tuple[int, int] = opened.dimensions
        x, y, self.power = (stated_number(opened.properties, name) for name in ("bounds-x", "bounds-y", POWER))
        self.scanned_from = x, y
        self.glass = middle_of_glass(opened.properties, self.size, self.level.mpp)
        self.opened: OpenSlide | ImageSlide | None = None

    def open(self) -> OpenSlide | ImageSlide:
        """The slide, opened unless it is. Callers compare `changed` when they have read what they need."""
        opened = self.opened
        if opened is None:
            opened = self.opened = open_slide(self.opens)
        return opened

    def release(self) -> None:
        """Close the file, which takes up to 100 MB, when no thread reads any more: closed under one, it would crash."""
        self.opened = None

    def changed(self, known_as: str) -> bool:
        """Whether the opened file, or the file as it is now, has another `identity`."""
        try:
            return not identity(self.opens) == self.identity == known_as
        except UserError:
            return True

    def each(
        self,
        centres: Sequence[tuple[float, float]],
        side: int,
        use: Callable[[int, Image.Image], T],
        pool: ThreadPoolExecutor,
    ) -> Iterator[T | UserError]:
        """Call `use(n, crop)` for the crop around each centre, in the pool's threads; yields its result or a UserError.

        In the order of `centres` (level-0 pixels). An exception of `use` other than UserError passes through.
        """
        waiting: deque[Future[T | UserError]] = deque()
        ahead = max(2 * THREADS, AHEAD // side**2)
        if centres:
            self.open()  # once, not in each thread
        try:
            for n, centre in enumerate(centres):
                waiting.append(pool.submit(self._one, n, centre, side, use))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _one(
        self, n: int, centre: tuple[float, float], side: int, use: Callable[[int, Image.Image], T]
    ) -> T | UserError:
        from openslide import OpenSlideError

        try:
            try:
                crop = read_crop(self.open(), self.level, *centre, side)
            except OpenSlideError:
                # after one damaged tile an open slide fails for all later crops, wherever they lie: open it again
                fresh = open_slide(self.opens)
                crop = read_crop(fresh, self.level, *centre, side)
                self.opened = fresh
            if crop.getbbox() is None:
                raise UserError("nothing was scanned there; expected tissue")
            return use(n, crop)
        except UserError as error:
            return error
        except OpenSlideError as error:
            return UserError(f"the slide is damaged there ({error}); expected readable tiles; copy it again")
