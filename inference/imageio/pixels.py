"""Convert a file's pixels to uint8 RGB, a few rows at a time.

The rules are the same for every format. RGB is kept; grey is repeated in three channels; transparency is blended with
white; of 16 bits the upper 8 are kept (65535 becomes 255); palette, CMYK and YCbCr are converted by Pillow. Any other
pixel type (floating point, 12 or 32 bits, Lab) is refused, because its range is unknown.

Converting a whole page at once took up to 56 bytes a pixel in temporary arrays; a block of rows takes next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    from PIL import Image

BLOCK = 1 << 16  # pixels converted at a time


def rgb_page(width: int, height: int, rows: Callable[[int, int], np.ndarray], where: str) -> np.ndarray:
    """A page as uint8 (H, W, 3); `rows(top, bottom)` returns rows of pixels for `from_array`, from the top down."""
    page = np.empty((height, width, 3), np.uint8)
    step = max(1, BLOCK // width)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        page[top:bottom] = from_array(rows(top, bottom), where)
    return page


def from_array(pixels: np.ndarray, where: str) -> np.ndarray:
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4), 8 or 16 bits, to uint8 (H, W, 3), possibly a view.

    UserError, beginning with `where`, for other shapes and types.
    """
    if pixels.dtype.newbyteorder("=") == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise UserError(f"{where} has {pixels.dtype} pixels; expected 8 or 16 bits unsigned; convert the stack")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise UserError(f"{where} has shape {pixels.shape}; expected grey, RGB or RGBA; convert the stack")
    if pixels.shape[2] == 4:
        alpha = pixels[..., 3:].astype(np.uint16)
        blend = pixels[..., :3] * alpha  # at most 255 * 255, so 16 bits suffice for all that follows
        blend += 255 * (255 - alpha) + 127
        pixels = (blend // 255).astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def from_pillow(image: Image.Image, where: str) -> np.ndarray:
    """The current page of a Pillow image as uint8 (H, W, 3). UserError if its pixel type is not supported."""
    if image.mode in ("I", "F", "LAB"):
        raise UserError(f"{where} has {image.mode} pixels; expected 8 or 16 bits; convert the stack")
    image.load()  # only now may a TIFF's orientation tag swap its sides
    width, height = image.size
    return rgb_page(width, height, lambda top, bottom: _rows(image.crop((0, top, width, bottom))), where)


def _rows(part: Image.Image) -> np.ndarray:
    """A part of a Pillow image as an array that `from_array` takes."""
    from PIL import Image

    if part.mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        return np.asarray(part)
    if part.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in part.info:
        part = part.convert("RGBA")
        part = Image.alpha_composite(Image.new("RGBA", part.size, "white"), part)
    return np.asarray(part.convert("RGB"))
