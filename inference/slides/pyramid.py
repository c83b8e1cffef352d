"""Reads crops from the pyramid of a whole slide: which level, which pixels of it, and what lies beyond the border.

A crop is cut as those of AMi-Br were: the slide's columns x - side/2 to x + side/2 - 1, rows likewise, and black where
nothing was scanned. (Of the 2,894 crops of its training split, 101 extend beyond a border: all follow that rule, and
all are black there.)
x and y are level-0 pixels as OpenSlide counts them. Reader: https://openslide.org/api/python
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..imageio.stack import MAX_SIDE

if TYPE_CHECKING:
    from openslide import ImageSlide, OpenSlide
    from PIL import Image

# AMi-Br's crops are the scanners' own pixels, 0.23 um/px (Hamamatsu) to 0.25 (Aperio; Aubreville et al. 2023, table 1)
NEAR = 0.1  # a level whose um/px is within this share of the wanted one is not resampled
CONVERT = (".czi", ".vsi", ".ets", ".lif", ".isyntax")  # OpenSlide 4 reads some CZI files, and none of the others
CONVERT_BY = "convert it with bfconvert (Bio-Formats) or QuPath to a tiled OME-TIFF"
PLAUSIBLE = 0.05, 5.0  # um/px of a slide; 72 dpi, a default of many programs, would be 353


@dataclass(frozen=True)
class Level:
    """Where crops are read: a level of the pyramid, and the number of its pixels per pixel of a crop (x, y)."""

    number: int
    downsample: float
    scale: tuple[float, float]  # (1, 1): not resampled
    mpp: tuple[float, float]  # of level 0, um/px in x and y


def open_slide(file: Path) -> OpenSlide | ImageSlide:
    """A slide in one of OpenSlide's formats, or a flat image (PNG, JPEG, TIFF) as a slide of one level."""
    from openslide import ImageSlide, OpenSlide, OpenSlideError, OpenSlideUnsupportedFormatError
    from PIL import Image

    try:
        with file.open("rb"):  # OpenSlide has the same message for every reason
            try:
                return OpenSlide(file)
            except OpenSlideUnsupportedFormatError:
                with Image.open(file, formats=("PNG", "JPEG", "TIFF")) as image:
                    return ImageSlide(image.convert("RGB"))  # all of it in memory: 3 bytes a pixel
    except Image.DecompressionBombError:
        raise UserError("is a flat image of too many pixels; expected a tiled, pyramidal one; convert it") from None
    except OpenSlideError as error:
        raise UserError(unreadable(file, str(error))) from None
    except (OSError, ValueError, SyntaxError) as error:  # PIL raises all three for damaged files
        reason = getattr(error, "strerror", None) or ("embedded null byte" if "\0" in str(file) else None)
        if reason is None:
            raise UserError(unreadable(file, "no format that it knows")) from None
        raise UserError(f"cannot be opened ({reason}); expected a slide; check the path") from None


def unreadable(file: Path, reason: str) -> str:
    how = f"; {CONVERT_BY}" if file.suffix.lower() in CONVERT else ""
    return f"cannot be read by OpenSlide ({reason}); expected a slide in one of its formats{how}"


def choose_level(slide: OpenSlide | ImageSlide, mpp: float, fallback: float | None) -> Level:
    """The coarsest level that has the detail of `mpp` um/px. fallback: um/px of level 0 if the slide states none."""
    try:
        x, y = (float(slide.properties[f"openslide.mpp-{axis}"]) for axis in "xy")
        stated = f"{x:g} µm/px"
    except (KeyError, ValueError):
        x, y, stated = 0.0, 0.0, "no µm/px"
    if not all(PLAUSIBLE[0] <= value <= PLAUSIBLE[1] for value in (x, y)):
        if fallback is None:
            raise UserError(f"it states {stated}; expected {PLAUSIBLE[0]} to {PLAUSIBLE[1]}; give --slide-mpp")
        x, y = fallback, fallback
    fine = [n for n, factor in enumerate(slide.level_downsamples) if max(x, y) * factor <= mpp * (1 + NEAR)]
    number = max(fine, default=0)
    factor = slide.level_downsamples[number]
    scale = mpp / (x * factor), mpp / (y * factor)
    near = all(abs(1 / share - 1) <= NEAR for share in scale)
    return Level(number, factor, (1.0, 1.0) if near else scale, (x, y))


def read_crop(slide: OpenSlide | ImageSlide, level: Level, x: float, y: float, side: int) -> Image.Image:
    """RGB crop of side x side pixels around (x, y). UserError where that lies outside the slide."""
    from PIL import Image

    width, height = slide.dimensions
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(f"it lies outside the slide's {width:,} x {height:,} pixels; expected level-0 pixels")
    as_is = level.scale == (1, 1)
    size = [side * share for share in level.scale]  # from here on in pixels of the level
    start = [centre / level.downsample - extent / 2 for centre, extent in zip((x, y), size, strict=True)]
    if max(size) > MAX_SIDE:
        raise UserError(
            f"a crop takes {max(size):,.0f} pixels a side; expected up to {MAX_SIDE:,}; lower --side or --mpp"
        )
    # the bicubic kernel extends beyond the crop's border
    margin = 0 if as_is else math.ceil(2 * max(1, *level.scale)) + 1
    corner = [math.floor(low + 0.5 if as_is else low - margin) for low in start]
    extents = [math.ceil(extent + 2 * margin + (not as_is)) for extent in size]
    location = round(corner[0] * level.downsample), round(corner[1] * level.downsample)
    region = slide.read_region(location, level.number, (extents[0], extents[1]))
    image = Image.alpha_composite(Image.new("RGBA", region.size, "black"), region).convert("RGB")
    if as_is:
        return image
    left, top = start[0] - corner[0], start[1] - corner[1]
    return image.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + size[0], top + size[1]))
