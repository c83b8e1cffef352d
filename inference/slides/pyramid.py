"""Reads crops from the pyramid of a whole slide: which level, which pixels of it, and what lies beyond the border.

A crop is cut as those of AMi-Br were: the slide's columns x - side/2 to x + side/2 - 1, rows likewise, and black where
nothing was scanned. (Of the 2,894 crops of its training split, 101 extend beyond a border: all follow that rule, and
all are black there.)
x and y are level-0 pixels as OpenSlide counts them. Reader: https://openslide.org/api/python
"""

from __future__ import annotations

import math
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..imageio.pixels import from_pillow
from ..imageio.stack import MAX_SIDE
from ..resolution import NEAR, PLAUSIBLE, is_near, is_plausible

if TYPE_CHECKING:
    from openslide import ImageSlide, OpenSlide
    from PIL import Image

CONVERT = (".czi", ".vsi", ".ets", ".lif", ".isyntax")  # OpenSlide 4 reads some CZI files, and none of the others
CONVERT_BY = "convert it with bfconvert (Bio-Formats) or QuPath to a tiled OME-TIFF"
SAME = 0.01  # share by which two statements of um/px may differ
UNITS = {"nm": 1e-3, "µm": 1.0, "\u03bcm": 1.0, "mm": 1e3, "cm": 1e4}


@dataclass(frozen=True)
class Level:
    """Where crops are read: a level of the pyramid, and the number of its pixels per pixel of a crop (x, y)."""

    number: int
    downsample: float
    scale: tuple[float, float]  # (1, 1): not resampled
    mpp: tuple[float, float]  # of level 0, um/px in x and y


def file_of(slide: Path) -> Path:
    """The file to open: the slide itself, or the first file of the only DICOM slide in a folder.

    OpenSlide finds a DICOM slide's other files, which have the same series, beside it. UserError where the folder holds
    no slide or several.
    """
    if not os.path.isdir(slide):  # Path.is_dir raises where a name is too long; to open it says so
        return slide
    from openslide import OpenSlide, OpenSlideError

    series: dict[str, Path] = {}
    reason = "no files of DICOM's form"
    try:
        for file in sorted(slide.iterdir()):
            if not file.is_file() or not begins_as_dicom(file):
                continue
            try:
                with OpenSlide(file) as opened:
                    series.setdefault(opened.properties.get("dicom.SeriesInstanceUID", ""), file)
            except OpenSlideError as error:  # annotations and segmentations may lie beside the slide
                reason = str(error)
    except OSError as error:
        raise UserError(f"cannot be opened ({error.strerror}); expected a slide; check the path") from None
    if len(series) > 1:
        raise UserError(f"is a folder with {len(series)} DICOM slides; expected one; name one of its files")
    if not series:
        raise UserError(f"is a folder without a DICOM slide ({reason:.200}); expected a slide; name its file")
    return next(iter(series.values()))


def begins_as_dicom(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def open_slide(file: Path) -> OpenSlide | ImageSlide:
    """A slide in one of OpenSlide's formats, or a flat image (PNG, JPEG, TIFF) as a slide of one level.

    file: `file_of` a slide
    """
    from openslide import OpenSlide, OpenSlideError, OpenSlideUnsupportedFormatError
    from PIL import Image

    try:
        with file.open("rb"):  # OpenSlide has the same message for every reason
            try:
                return OpenSlide(file)
            except OpenSlideUnsupportedFormatError:
                warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # its error is enough
                with Image.open(file, formats=("PNG", "JPEG", "TIFF")) as image:
                    return flat_image(image)
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


def stated_mpp(slide: OpenSlide | ImageSlide) -> tuple[float, float]:
    """µm/px of level 0 by the slide's tags or its OME-XML; (0, 0) where they do not say."""
    try:
        return float(slide.properties["openslide.mpp-x"]), float(slide.properties["openslide.mpp-y"])
    except (KeyError, ValueError):
        pass
    description = slide.properties.get("openslide.comment", "") or slide.properties.get("tiff.ImageDescription", "")
    sizes = [ome_size(description, axis) for axis in "XY"] if "<OME" in description else []
    return (sizes[0], sizes[1]) if sizes else (0.0, 0.0)


def ome_size(description: str, axis: str) -> float:
    """µm/px along an axis by OME-XML (its unit is µm unless it says another); 0 where it does not say."""
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*", description)
    size = re.search(rf'\bPhysicalSize{axis}="([0-9.eE+-]+)"', pixels[0]) if pixels else None
    unit = re.search(rf'\bPhysicalSize{axis}Unit="([^"]*)"', pixels[0]) if pixels else None
    try:
        return float(size[1]) * UNITS.get(unit[1] if unit else "µm", 0.0) if size else 0.0
    except ValueError:
        return 0.0


def flat_image(image: Image.Image) -> ImageSlide:
    """A slide of one level, all of it in memory (3 bytes a pixel), with the µm/px that its tags state."""
    from openslide import ImageSlide
    from PIL import Image

    tags = dict(getattr(image, "tag_v2", {}))
    unit = {2: 25400.0, 3: 10000.0}.get(tags.get(296, 2))  # µm in an inch, in a centimetre
    known = {"openslide.comment": str(tags.get(270, ""))}
    for axis, tag in (("x", 282), ("y", 283)):
        if unit and 0 < float(tags.get(tag, 0) or 0) < math.inf:
            known[f"openslide.mpp-{axis}"] = repr(unit / float(tags[tag]))

    class FlatImage(ImageSlide):
        properties = known  # openslide's own are empty

    return FlatImage(Image.fromarray(from_pillow(image, "it")))  # the pixels that a stack of it would have


def choose_level(slide: OpenSlide | ImageSlide, mpp: float, fallback: float | None) -> Level:
    """The coarsest level that has the detail of `mpp` um/px. fallback: um/px of level 0 if the slide states none."""
    x, y = stated_mpp(slide)
    if not (is_plausible(x) and is_plausible(y)):
        if fallback is None:
            stated = f"{x:g} µm/px" if x else "no µm/px"
            raise UserError(f"it states {stated}; expected {PLAUSIBLE[0]} to {PLAUSIBLE[1]}; give --slide-mpp")
        x, y = fallback, fallback
    elif fallback is not None and max(abs(fallback / value - 1) for value in (x, y)) > SAME:
        raise UserError(
            f"it states {x:g} µm/px, not {fallback:g}; expected the same; leave --slide-mpp out, or correct it"
        )
    fine = [n for n, factor in enumerate(slide.level_downsamples) if max(x, y) * factor <= mpp * (1 + NEAR)]
    number = max(fine, default=0)
    factor = slide.level_downsamples[number]
    scale = mpp / (x * factor), mpp / (y * factor)
    near = all(is_near(value * factor, mpp) for value in (x, y))
    return Level(number, factor, (1.0, 1.0) if near else scale, (x, y))


def check_inside(size: tuple[int, int], x: float, y: float) -> None:
    """UserError where (x, y) lies outside a slide of that width and height."""
    width, height = size
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(f"it lies outside the slide's {width:,} x {height:,} pixels; expected level-0 pixels")


def read_crop(slide: OpenSlide | ImageSlide, level: Level, x: float, y: float, side: int) -> Image.Image:
    """RGB crop of side x side pixels around (x, y). UserError where that lies outside the slide."""
    from PIL import Image

    check_inside(slide.dimensions, x, y)
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
