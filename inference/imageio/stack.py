"""Read a stack: multi-page TIFF or MetaImage (.mha), and single PNG or JPEG crops, to uint8 RGB pages.

Conversion, the same for every format: RGB as it is; grey repeated into three channels; transparency laid over white; of
16 bits the upper 8 (65535 becomes 255); palette, CMYK and YCbCr through Pillow's own conversion. Any other pixel type
(floating point, 12 or 32 bits, Lab) is refused, because its range is not known. An orientation tag of a TIFF turns the
page, as it does for the challenge's reference container. Pages of a TIFF are its directories in the order of their
chain, flagged as reduced or not; sub-IFDs are not pages. Of PNG and JPEG only the first image is read.

One damaged page fails the whole stack. An answer for it would be a guess that looks like a result: nobody could tell it
from the others, and the evaluator counts it. An error is seen before anything is submitted, and it names the page.

Bounds hold before anything is decoded: no file costs more memory or time than the largest stack that is allowed.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    from PIL import Image

MAX_SIDE = 8192  # pixels of one page; a crop has about 128
MAX_PAGES = 4096
MAX_PIXELS = 1 << 28  # of all pages together: 768 MiB as RGB
MAX_BYTES = 2 << 30  # of the file: what MAX_PIXELS take with four channels of 16 bits
MAX_SCANS = 100  # of a progressive JPEG; each costs a pass over the image, and takes ten bytes


@dataclass(frozen=True)
class Blob:
    """The content of an image file that lies in no folder, but in a table, an archive or an object store.

    It answers what the readers ask of a path; `name` is for messages, and its suffix for `.mha`.
    """

    name: str
    content: bytes

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def stat(self) -> os.stat_result:
        return os.stat_result((stat.S_IFREG, 0, 0, 1, 0, 0, len(self.content), 0, 0, 0))

    def open(self, mode: str = "rb") -> BinaryIO:
        return io.BytesIO(self.content)

    def read_bytes(self) -> bytes:
        return self.content


File = Path | Blob


def read_stack(path: File) -> list[np.ndarray]:
    """The pages in their order, each uint8 (H, W, 3). UserError, naming the page, where one cannot be read whole."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path.name} is not a regular file; expected a stack; check the input")
        if not 0 < status.st_size <= MAX_BYTES:
            found = "is empty" if status.st_size == 0 else f"has {status.st_size:,} bytes"
            raise UserError(f"{path.name} {found}; expected a stack of up to {MAX_BYTES:,} bytes; upload it again")
        if path.suffix.lower() == ".mha":
            return _read_metaimage(path)
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise UserError(f"{path.name} cannot be read ({error.strerror}); expected a stack; check the input") from None
    if magic[:2] in (b"II", b"MM"):
        from .tiff import check_tiff

        totals = Totals(path)
        return _decode(path, "TIFF", check_tiff(path, totals.add))
    if magic == b"\x89PNG":
        return _decode(path, "PNG", 1)
    if magic[:3] == b"\xff\xd8\xff":
        scans = path.read_bytes().count(b"\xff\xda")
        if scans > MAX_SCANS:
            raise UserError(f"{path.name} has {scans:,} JPEG scans; expected at most {MAX_SCANS}; write it again")
        return _decode(path, "JPEG", 1)
    raise UserError(f"{path.name} begins with {magic!r}; expected TIFF, .mha, PNG or JPEG; write it again")


class Totals:
    """Adds up pages and pixels, and refuses what is too large."""

    def __init__(self, path: File) -> None:
        self.name, self.pixels = path.name, 0

    def add(self, page: int, width: int, height: int, pages: int = 1) -> None:
        """UserError where `pages` pages of this size, the first of which is number `page`, are too many or too big."""
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
        warnings.simplefilter("ignore")  # a damaged tag is Pillow's to report and ours to judge; stderr stays empty
        try:
            with Image.open(path if isinstance(path, Path) else path.open(), formats=(kind,)) as image:
                for page in range(count):
                    image.seek(page)
                    totals.add(page, *image.size)
                    pages.append(_to_rgb(path, page, image))
        except (UserError, MemoryError):
            raise
        except Exception as error:  # decoders raise whatever they like on damaged data
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"page {len(pages)} of {path.name} is damaged or of a kind that is not read ({reason:.200}); "
                "expected a whole RGB page; write the stack again"
            ) from None
    return pages


def _to_rgb(path: File, page: int, image: Image.Image) -> np.ndarray:
    """One page of a Pillow image as uint8 (H, W, 3)."""
    from PIL import Image

    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        return from_array(np.asarray(image), f"page {page} of {path.name}")
    if image.mode in ("I", "F", "LAB"):
        raise UserError(f"page {page} of {path.name} has {image.mode} pixels; expected 8 or 16 bits; convert the stack")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def from_array(pixels: np.ndarray, where: str) -> np.ndarray:
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4), 8 or 16 bits, to uint8 (H, W, 3)."""
    if pixels.dtype.newbyteorder("=") == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise UserError(f"{where} has {pixels.dtype} pixels; expected 8 or 16 bits unsigned; convert the stack")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise UserError(f"{where} has shape {pixels.shape}; expected grey, RGB or RGBA; convert the stack")
    if pixels.shape[2] == 4:
        colour, alpha = pixels[..., :3].astype(np.uint32), pixels[..., 3:].astype(np.uint32)
        pixels = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _read_metaimage(path: File) -> list[np.ndarray]:
    from .metaimage import read_metaimage

    totals = Totals(path)
    pixels = read_metaimage(path, lambda pages, width, height: totals.add(0, width, height, pages))
    return [from_array(page, f"page {number} of {path.name}") for number, page in enumerate(pixels)]
