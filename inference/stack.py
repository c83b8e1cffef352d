"""Read a stack: multi-page TIFF or MetaImage (.mha), and single PNG or JPEG crops, to uint8 RGB pages.

Conversion, the same for every format: RGB as it is; grey repeated into three channels; transparency laid over white;
16-bit divided by 257 (so that 65535 becomes 255); palette, CMYK, YCbCr and Lab through Pillow's own conversion. Any other
pixel type (floating point, 32-bit integers) is refused, because its range is not known. Orientation tags are ignored, as
the platform ignores them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import UserError

if TYPE_CHECKING:
    from PIL import Image

MAX_SIDE = 8192  # pixels of one page; a crop has about 128
MAX_PAGES = 4096
MAX_PIXELS = 1 << 28  # of all pages together: 768 MiB as RGB


def read_stack(path: Path) -> list[np.ndarray]:
    """The pages in their order, each uint8 (H, W, 3). UserError, naming the page, where one cannot be read whole."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected a stack; check the input") from None
    if size == 0:
        raise UserError(f"{path} is empty; expected a TIFF or .mha stack; upload it again")
    return _read_metaimage(path) if path.suffix.lower() == ".mha" else _read_pages(path)


def _read_pages(path: Path) -> list[np.ndarray]:
    from PIL import Image, ImageFile, UnidentifiedImageError

    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.MAX_IMAGE_PIXELS = None  # _check_size is stricter, and an error instead of a warning
    pages: list[np.ndarray] = []
    pixels = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged tag is Pillow's to report and ours to judge; stderr stays empty
        try:
            image = Image.open(path, formats=("TIFF", "PNG", "JPEG"))
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, OverflowError, MemoryError) as error:
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else repr(error)
            raise UserError(f"{path.name} is unreadable ({reason}); expected TIFF, .mha, PNG or JPEG; write it again") from None
        except Exception as error:
            raise UserError(f"{path.name} is unreadable ({error!r}); expected a TIFF stack; write it again") from None
        with image:
            while True:
                page = len(pages)
                try:
                    image.seek(page)
                except EOFError:
                    break
                except Exception as error:
                    raise UserError(f"page {page} of {path.name} is unreadable ({error!r}); write it again") from None
                pixels += _check_size(path, page, *image.size)
                _check_total(path, page + 1, pixels)
                try:
                    pages.append(_to_rgb(path, page, image))
                except UserError:
                    raise
                except Exception as error:  # decoders raise whatever they like on damaged data
                    raise UserError(f"page {page} of {path.name} is damaged ({error!r}); write the stack again") from None
    return pages


def _check_size(path: Path, page: int, width: int, height: int) -> int:
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise UserError(
            f"page {page} of {path.name} has {width} x {height} pixels; expected 1 to {MAX_SIDE} a side; cut crops from it"
        )
    return width * height


def _check_total(path: Path, pages: int, pixels: int) -> None:
    if pages > MAX_PAGES or pixels > MAX_PIXELS:
        raise UserError(
            f"{path.name} has more than {MAX_PAGES} pages or {MAX_PIXELS:,} pixels; expected a stack of crops; split it"
        )


def _to_rgb(path: Path, page: int, image: Image.Image) -> np.ndarray:
    """One page of a Pillow image as uint8 (H, W, 3)."""
    from PIL import Image

    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        return from_array(np.asarray(image), f"page {page} of {path.name}")
    if image.mode in ("I", "F"):
        raise UserError(
            f"page {page} of {path.name} has {image.mode} pixels (32 bits); expected 8 or 16 bits; convert the stack"
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def from_array(pixels: np.ndarray, where: str) -> np.ndarray:
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4), 8 or 16 bits, to uint8 (H, W, 3)."""
    if pixels.dtype.newbyteorder("=") == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise UserError(f"{where} has {pixels.dtype} pixels; expected 8 or 16 bits unsigned; convert the stack")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise UserError(f"{where} has shape {pixels.shape}; expected grey, RGB or RGBA; convert the stack")
    if pixels.shape[2] == 4:
        colour, alpha = pixels[..., :3].astype(np.uint32), pixels[..., 3:].astype(np.uint32)
        pixels = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)) if pixels.shape[2] == 1 else pixels)


def _read_metaimage(path: Path) -> list[np.ndarray]:
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("MetaImageIO")
    reader.SetFileName(str(path))
    try:
        _check_header(path)
        reader.ReadImageInformation()
        size, channels = reader.GetSize(), reader.GetNumberOfComponents()
        count = size[2] if len(size) > 2 else 1
        if len(size) not in (2, 3) and any(side != 1 for side in size[3:]):
            raise UserError(f"{path.name} has {len(size)} dimensions {size}; expected (W, H, pages); convert the stack")
        _check_total(path, count, count * _check_size(path, 0, size[0], size[1]))
        pixels = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else "no reason given"
        raise UserError(f"{path.name} is unreadable as MetaImage ({reason}); write it again") from None
    pages = pixels.reshape(count, size[1], size[0], channels)
    return [from_array(page, f"page {number} of {path.name}") for number, page in enumerate(pages)]


def _check_header(path: Path) -> None:
    """Pixels must lie in the file itself: a header that names another file could reach outside the input."""
    with path.open("rb") as stream:
        header = stream.read(1 << 16)
    for line in header.split(b"\n"):
        key, _, value = line.partition(b"=")
        if key.strip().lower() == b"elementdatafile":
            if value.strip().upper() != b"LOCAL":
                raise UserError(f"{path.name} keeps its pixels in {value.strip()[:80]!r}; expected LOCAL; write one file")
            return
    raise UserError(f"{path.name} has no ElementDataFile in its header; expected a MetaImage; write it again")
