"""One open slide: what it is, and its crops read ahead in threads, so that the caller does not wait."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import UserError
from .pyramid import choose_level, open_slide, read_crop

if TYPE_CHECKING:
    from PIL import Image

ENDS = 1 << 16  # bytes at a file's start and end that help to identify it
AHEAD = 512  # crops read ahead: 25 MB at 128 x 128
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


class Slide:
    """UserError where the file is not a slide, or states no um/px and `fallback` is None."""

    def __init__(self, file: Path, mpp: float, fallback: float | None) -> None:
        self.file, self.identity = file, identity(file)
        self.slide = open_slide(file)  # never closed by hand: closing it under a thread crashes the process
        self.level = choose_level(self.slide, mpp, fallback)
        self.size: tuple[int, int] = self.slide.dimensions  # level-0 pixels, width and height

    def scanned_from(self) -> tuple[float, float]:
        """Where the scanned area begins, in level-0 pixels: (0, 0) if the slide states none."""
        try:
            x, y = (float(self.slide.properties.get(f"openslide.bounds-{axis}", 0)) for axis in "xy")
        except ValueError:
            return 0.0, 0.0
        return x, y

    def changed(self, known_as: str) -> bool:
        """Whether the opened file, or the file as it is now, has another `identity`."""
        try:
            return not identity(self.file) == self.identity == known_as
        except UserError:
            return True

    def each(
        self,
        places: Sequence[tuple[float, float]],
        side: int,
        use: Callable[[int, Image.Image], T],
        pool: ThreadPoolExecutor,
    ) -> Iterator[T | UserError]:
        """Call `use(n, crop)` for the crop at each place, in the pool's threads; yields its result or a UserError.

        In the order of `places` (level-0 pixels). An exception of `use` other than UserError passes through.
        """
        waiting: deque[Future[T | UserError]] = deque()
        try:
            for n, place in enumerate(places):
                waiting.append(pool.submit(self._one, n, place, side, use))
                if len(waiting) >= AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _one(
        self, n: int, place: tuple[float, float], side: int, use: Callable[[int, Image.Image], T]
    ) -> T | UserError:
        from openslide import OpenSlideError

        try:
            try:
                crop = read_crop(self.slide, self.level, *place, side)
            except OpenSlideError:
                # after one damaged tile an open slide fails for all later crops, wherever they lie: open it again
                fresh = open_slide(self.file)
                crop = read_crop(fresh, self.level, *place, side)
                self.slide = fresh
            return use(n, crop)
        except UserError as error:
            return error
        except OpenSlideError as error:
            return UserError(f"the slide is damaged there ({error}); expected readable tiles; copy it again")
