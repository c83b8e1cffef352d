"""How much memory reading an image takes, measured by the kernel in processes of their own, against the one bound."""

from __future__ import annotations

import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from inference.imageio import stack as bounds
from test.support.image_files import grey_page, metaimage, stack, tiff, with_pillow, with_tifffile

PAGE = Path(__file__).resolve().parents[2] / "docs" / "robustness.md"
SIDE = 1536
PROGRAM = """
import resource, sys
from pathlib import Path
from inference.errors import UserError
from inference.imageio.stack import read_stack

def peak():  # of this program, not of the one that forked it
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10

resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # seconds of computing, however busy the machine is
small, large = map(Path, sys.argv[1:])
read_stack(small)  # imports what this format needs
before = peak()
try:
    print(len(read_stack(large)), "pages", end=" ")
except UserError as error:
    print(error, end=" ")
print("peak", peak() - before)
"""


def reading(folder: Path, suffix: str, small: bytes, large: bytes) -> tuple[str, int]:
    """What reading `large` says, and the bytes that it takes beyond those that reading `small` took."""
    files = [folder / f"small{suffix}", folder / f"large{suffix}"]
    for file, content in zip(files, (small, large), strict=True):
        file.write_bytes(content)
    done = subprocess.run([sys.executable, "-c", PROGRAM, *files], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    said, taken = done.stdout.rsplit("peak", 1)
    return said, int(taken)


def noise(side: int, channels: int = 4) -> np.ndarray:
    """One page (1, side, side, channels) of 16 bits that no compression makes smaller."""
    return np.random.default_rng(0).integers(0, 65536, (1, side, side, channels), np.uint16)


def rgba(side: int) -> Image.Image:
    return Image.fromarray(noise(side).astype(np.uint8)[0])


def cmyk(side: int) -> Image.Image:
    return rgba(side).convert("RGB").convert("CMYK")


def deflated(pixels: np.ndarray, **options: Any) -> bytes:
    return with_tifffile(pixels, compression="zlib", compressionargs={"level": 1}, **options)


def deflated_mha(side: int) -> bytes:
    data = zlib.compress(noise(side).tobytes(), 1)
    size = {"CompressedData": True, "CompressedDataSize": len(data), "NDims": 3, "DimSize": f"{side} {side} 1"}
    return metaimage(noise(1)[:0], 4, **size) + data


def jpeg(side: int, mode: str) -> bytes:
    return with_pillow([rgba(side).convert("RGB").convert(mode)], form="JPEG", progressive=True, subsampling=0)


def palette(side: int) -> bytes:
    image = rgba(side).convert("RGB").quantize(32)
    return with_pillow([image], form="PNG", compress_level=1, transparency=bytes(range(32)))


ALPHA = {"extrasamples": ["unassalpha"]}
LARGEST: dict[str, Callable[[int], bytes]] = {
    "rgba16.mha": deflated_mha,
    "rgba16-raw.mha": lambda side: metaimage(noise(side), 4),
    "rgba16.tiff": lambda side: deflated(noise(side), **ALPHA),
    "rgba16-turned.tiff": lambda side: deflated(noise(side), extratags=[(274, "H", 1, 6, True)], **ALPHA),
    "rgba16-raw.tiff": lambda side: with_tifffile(noise(side), **ALPHA),
    "rgba-one-tile.tiff": lambda side: deflated(noise(side).astype(np.uint8), tile=(side, side), **ALPHA),
    "rgb16-planes.tiff": lambda side: deflated(np.moveaxis(noise(side, 3), -1, 1), planarconfig="separate"),
    "grey16.tiff": lambda side: deflated(noise(side)[..., 0], photometric="minisblack"),
    "cmyk.tiff": lambda side: with_pillow(
        [rgba(side).convert("RGB").convert("CMYK")], "tiff_lzw", tiffinfo={278: side}
    ),
    "rgba.png": lambda side: with_pillow([rgba(side)], form="PNG", compress_level=1),
    "palette-alpha.png": palette,
    "rgb.jpg": lambda side: jpeg(side, "RGB"),
    "cmyk.jpg": lambda side: jpeg(side, "CMYK"),
}


@pytest.mark.parametrize("name", LARGEST)
def test_bytes_a_pixel(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large pages with the widest pixels of each reader, in one strip or tile, and of noise."""
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 1 << 26)  # for Pillow's progressive JPEG writer
    make = LARGEST[name]
    said, taken = reading(tmp_path, Path(name).suffix, make(16), make(SIDE))
    assert said == "1 pages "
    assert 3 * SIDE**2 < taken < bounds.BYTES_A_PIXEL * SIDE**2


def test_pages_that_were_read_keep_three_bytes_a_pixel(tmp_path: Path) -> None:
    pages = np.concatenate([noise(SIDE, 3)] * 4)
    taken = reading(tmp_path, ".tiff", with_tifffile(noise(16, 3)), with_tifffile(pages))[1]
    assert taken < (3 * 3 + bounds.BYTES_A_PIXEL) * SIDE**2


def test_bombs_cost_nothing(tmp_path: Path) -> None:
    """Small files that promise little and inflate to a quarter of a gigabyte."""
    bomb = zlib.compress(bytes(1 << 28), 1)
    wide = grey_page(64, 64, t259=8, count=len(bomb))
    header = metaimage(stack()[:0], 3, NDims=3, DimSize="64 64 1", CompressedData=True)
    small = with_pillow([Image.fromarray(page) for page in stack()], "tiff_adobe_deflate")
    said, taken = reading(tmp_path, ".tiff", small, tiff([wide], data=bomb))
    assert said == "1 pages " and taken < 8 << 20
    said, taken = reading(tmp_path, ".mha", metaimage(stack(), 3, compressed=True), header + bomb)
    assert "more bytes of pixels" in said and taken < 8 << 20


def test_the_page_states_the_bounds() -> None:
    page = re.sub(r"\s+", " ", PAGE.read_text())
    for words in (
        f"at most {bounds.BYTES_A_PIXEL} bytes a pixel",
        f"{bounds.MAX_BYTES >> 30} GiB, {bounds.MAX_PAGES:,} pages, {bounds.MAX_SIDE:,} pixels a side",
        f"2^{bounds.MAX_PIXELS.bit_length() - 1} pixels in all",
        f"{bounds.MAX_SCANS} scans",
    ):
        assert words in page
