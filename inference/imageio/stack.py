"""Read a stack: multi-page TIFF or MetaImage (.mha), and single PNG or JPEG crops, to uint8 RGB pages.

A TIFF's orientation tag turns the page, as in the challenge's reference container. The pages of a TIFF are its chained
directories, whether flagged as reduced or not; sub-IFDs are not pages. Of PNG and JPEG only the first image is read.
pixels.py converts the pixels.

One damaged page fails the whole stack. An answer for it would be a guess that looks like a result: nobody could tell it
from the others, and the evaluator would count it. An error names the page, and is seen before anything is submitted.

Limits are checked before anything is decoded: no file costs more memory or time than the largest allowed stack.
"""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

import numpy as np

from ..errors import UserError
from .pixels import from_pillow
from .source import File

MAX_SIDE = 8192  # pixels of one page; a crop has about 128
MAX_PAGES = 4096
MAX_PIXELS = 1 << 28  # of all pages together: 768 MiB as RGB
MAX_BYTES = 2 << 30  # of the file: MAX_PIXELS with four channels of 16 bits
MAX_SCANS = 100  # of a progressive JPEG; ten bytes of file can cost a pass over the image
BYTES_A_PIXEL = 14  # most memory while a page is read, with the 3 of its RGB; afterwards it keeps those 3


def read_stack(path: File) -> list[np.ndarray]:
    """The pages in order, each uint8 (H, W, 3). UserError, naming the page, if one cannot be read completely."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            os.scandir(str(path)).close()  # says so where it may not be listed
            raise UserError(f"{path.name} is a folder; expected a stack; check the input")
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path.name} is not a regular file; expected a stack; check the input")
        if not 0 < status.st_size <= MAX_BYTES:
            size = "is empty" if status.st_size == 0 else f"has {status.st_size:,} bytes"
            raise UserError(f"{path.name} {size}; expected a stack of up to {MAX_BYTES:,} bytes; upload it again")
        if path.suffix.lower() == ".mha":
            from .metaimage import read_metaimage

            return read_metaimage(path, Totals(path).add)
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise UserError(f"{path.name} cannot be read ({error.strerror}); expected a stack; check the input") from None
    if magic[:2] in (b"II", b"MM"):
        from .tiff import check_tiff

        return _decode(path, "TIFF", check_tiff(path, Totals(path).add))
    if magic == b"\x89PNG":
        return _decode(path, "PNG", 1)
    if magic[:3] == b"\xff\xd8\xff":
        if (scans := _scans(path)) > MAX_SCANS:
            raise UserError(f"{path.name} has {scans:,} JPEG scans; expected at most {MAX_SCANS}; write it again")
        return _decode(path, "JPEG", 1)
    raise UserError(f"{path.name} begins with {magic!r}; expected TIFF, .mha, PNG or JPEG; write it again")


class _MeasuredError(Exception):
    """Ends reading a .mha once its size is known."""


def count_pixels(path: File) -> int:
    """The pixels of all pages by the file's headers alone; UserError as `read_stack`, for what headers show."""
    totals = Totals(path)

    def add_and_stop(page: int, width: int, height: int, pages: int = 1) -> None:
        totals.add(page, width, height, pages)
        raise _MeasuredError

    try:
        if path.suffix.lower() == ".mha":
            from .metaimage import read_metaimage

            read_metaimage(path, add_and_stop)
            return totals.pixels
        with path.open("rb") as stream:
            magic = stream.read(4)
        if magic[:2] in (b"II", b"MM"):
            from .tiff import check_tiff

            check_tiff(path, totals.add)
        else:
            from PIL import Image

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(path if isinstance(path, Path) else path.open(), formats=("PNG", "JPEG")) as image:
                    totals.add(0, *image.size)
    except _MeasuredError:
        pass
    except (UserError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything on damaged data
        raise UserError(f"{path.name} is damaged or not supported ({error!s:.200}); expected an image") from None
    return totals.pixels


def _scans(path: File) -> int:
    """An upper bound of a JPEG's scans: every occurrence of the marker that starts one."""
    count, last = 0, b""
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            count += (last + block).count(b"\xff\xda")
            last = block[-1:]
    return count


class Totals:
    """Adds up pages and pixels, and refuses too many."""

    def __init__(self, path: File) -> None:
        self.name, self.pixels = path.name, 0

    def add(self, page: int, width: int, height: int, pages: int = 1) -> None:
        """Add `pages` pages of this size, starting with number `page`. UserError if they are too many or too large."""
        if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
            raise UserError(
                f"page {page} of {self.name} has {width} x {height} pixels; expected 1 to {MAX_SIDE} a side; "
                "cut crops from it"
            )
        self.pixels += pages * width * height
        if not 0 < pages + page <= MAX_PAGES or self.pixels > MAX_PIXELS:
            raise UserError(
                f"{self.name} has no page, or more than {MAX_PAGES} pages or {MAX_PIXELS:,} pixels; "
                "expected a stack of crops; split it"
            )


def _decode(path: File, kind: str, count: int) -> list[np.ndarray]:
    """The first `count` pages, through Pillow."""
    from PIL import Image, ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.MAX_IMAGE_PIXELS = None  # Totals is stricter, and an error instead of a warning
    pages: list[np.ndarray] = []
    totals = Totals(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged tags; check_tiff judges them, and stderr stays empty
        try:
            with Image.open(path if isinstance(path, Path) else path.open(), formats=(kind,)) as image:
                for page in range(count):
                    image.seek(page)
                    totals.add(page, *image.size)
                    pages.append(from_pillow(image, f"page {page} of {path.name}"))
        except (UserError, MemoryError):
            raise
        except Exception as error:  # decoders raise anything on damaged data
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"page {len(pages)} of {path.name} is damaged or not supported ({reason:.200}); "
                "expected a whole RGB page; write the stack again"
            ) from None
    return pages
