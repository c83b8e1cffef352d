"""Read MetaImage (.mha) without ITK: a text header, then raw or deflated pixels, in one file.

Features of the format that a stack does not need are refused: pixels in other files (a header must not reach outside
the input), pixels as text, more than 16 bits. Nothing is allocated before the header's sizes are checked, inflating
stops at the size that the header promises, and pixels are converted as they are read.

Why not SimpleITK (2.5.7), whose results the tests compare with ours: from a damaged or truncated deflate stream, and
from an intact one without CompressedDataSize, it returns wrong pixels and no error; it holds the whole stack in memory
twice (16 bytes a pixel for 16-bit RGBA, where this needs only the 3 of the result); it cannot read from memory; and
importing it takes 0.2 s. Checking the stream first would take a reader like this one anyway.
Source: MetaIO's documentation, https://itk.org/Wiki/MetaIO/Documentation
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ..errors import UserError
from .pixels import rgb_page
from .source import File

HEADER = 1 << 16  # most bytes of a header; ITK writes about 300
KEYS = {"objecttype", "binarydata", "headersize", "ndims", "dimsize", "elementtype", "elementnumberofchannels"} | {
    "binarydatabyteordermsb",
    "elementbyteordermsb",
    "compresseddata",
    "elementdatafile",
}
TYPES = {"MET_UCHAR": "u1", "MET_UCHAR_ARRAY": "u1", "MET_USHORT": "u2", "MET_USHORT_ARRAY": "u2"}
CHUNK = 1 << 18  # bytes read or inflated at a time


@dataclass(frozen=True)
class PixelLayout:
    """What a header says about the pixels that follow it."""

    pages: int
    height: int
    width: int
    channels: int
    dtype: np.dtype
    compressed: bool

    @property
    def bytes(self) -> int:
        return self.pages * self.height * self.width * self.channels * self.dtype.itemsize


def read_metaimage(path: File, check: Callable[[int, int, int, int], None]) -> list[np.ndarray]:
    """The pages, each uint8 (H, W, 3). UserError for anything else; `check(0, width, height, pages)` may raise too."""
    with path.open("rb") as stream:
        layout = _layout(path, _header(path, stream))
        check(0, layout.width, layout.height, layout.pages)
        pixels = Pixels(path, stream, layout)
        pages = [
            rgb_page(layout.width, layout.height, pixels.rows, f"page {number} of {path.name}")
            for number in range(layout.pages)
        ]
        pixels.end()
    return pages


class Pixels:
    """The pixels of an open file in order. UserError if there are too many or too few, or if they are damaged."""

    def __init__(self, path: File, stream: BinaryIO, layout: PixelLayout) -> None:
        self.name, self.layout = path.name, layout
        self.stream, self.read = stream, 0
        self.inflater = zlib.decompressobj(47) if layout.compressed else None  # 47: zlib or gzip, as the stream says

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """The next `bottom - top` rows, (R, W, C)."""
        shape = (bottom - top, self.layout.width, self.layout.channels)
        wanted = math.prod(shape) * self.layout.dtype.itemsize
        data = bytearray()
        while len(data) < wanted:
            block = self._next(wanted - len(data))
            if not block:
                raise self._wrong("0 readable" if self.inflater else f"{self.read:,} readable")
            data += block
        return np.frombuffer(data, self.layout.dtype).reshape(shape)

    def end(self) -> None:
        """UserError unless there are no more pixels, and a deflated stream's checksum is right."""
        if self._next(1):
            raise self._wrong("more")
        if self.inflater and not self.inflater.eof:
            raise self._wrong("0 readable")

    def _next(self, most: int) -> bytes:
        """Up to `most` bytes of pixels; none at the end of the file or stream. UserError if it is damaged."""
        if self.inflater is None:
            block = self.stream.read(most)
        else:
            block = b""
            while not block and not self.inflater.eof:
                packed = self.inflater.unconsumed_tail or self.stream.read(CHUNK)
                if not packed:  # truncated
                    break
                try:
                    block = self.inflater.decompress(packed, most)
                except zlib.error:
                    raise self._wrong("0 readable") from None
        self.read += len(block)
        return block

    def _wrong(self, found: str) -> UserError:
        return UserError(
            f"{self.name} holds {found} bytes of pixels; expected {self.layout.bytes:,} by its header; write it again"
        )


def _header(path: File, stream: BinaryIO) -> dict[str, str]:
    """The values of KEYS that the header has; leaves the stream at the first byte of pixels.

    Other lines are ignored: ITK's writer adds the keys that the image's former file had, such as DICOM's 0028|0010,
    and their values may go on for several lines (NIfTI's and NRRD's do).
    """
    fields: dict[str, str] = {}
    while "elementdatafile" not in fields:
        line = stream.readline(HEADER)
        if not line.endswith(b"\n") or stream.tell() > HEADER:
            raise UserError(
                f"{path.name} has a damaged header; expected a MetaImage's, up to ElementDataFile; write it again"
            )
        name, equals, value = line.decode("latin-1").partition("=")
        key = name.strip().lower()
        if not equals or key not in KEYS:
            continue
        if key in fields:
            raise UserError(f"{path.name} has {key:.40} twice in its header; expected it once; write it again")
        fields[key] = value.strip()
    return fields


def _layout(path: File, fields: dict[str, str]) -> PixelLayout:
    """The layout, validated. UserError unless it is a stack in a single file."""
    source = fields["elementdatafile"]
    if source.upper() != "LOCAL":
        raise UserError(
            f"{path.name} keeps its pixels in {source:.80}; expected LOCAL; write header and pixels into one file"
        )
    if fields.get("objecttype", "Image").lower() != "image" or not _flag(fields, "binarydata", "true"):
        raise UserError(f"{path.name} is not a binary MetaImage (ObjectType, BinaryData); expected one; write it again")
    if fields.get("headersize", "0") not in ("0", ""):
        raise UserError(f"{path.name} has HeaderSize {fields['headersize']:.40}; expected none; write it again")
    sides = _numbers(path, fields, "dimsize")
    if len(sides) != _numbers(path, fields, "ndims")[0]:
        raise UserError(f"{path.name} has a DimSize that does not match NDims; expected NDims numbers; write it again")
    kind = TYPES.get(fields.get("elementtype", ""))
    if kind is None:
        element = fields.get("elementtype", "no ElementType")
        raise UserError(f"{path.name} holds {element:.40} pixels; expected MET_UCHAR or MET_USHORT; convert the stack")
    width, height, pages, *rest = (*sides, 1, 1)[:6]
    channels = _numbers(path, fields, "elementnumberofchannels", "1")[0]
    if any(side != 1 for side in rest) or channels not in (1, 3, 4):
        raise UserError(
            f"{path.name} has DimSize {fields['dimsize']:.40} and {channels} channels; expected width, height and "
            "pages, with 1, 3 or 4 channels; convert the stack"
        )
    big = _flag(fields, "binarydatabyteordermsb") or _flag(fields, "elementbyteordermsb")
    dtype = np.dtype(kind).newbyteorder(">" if big else "<")
    return PixelLayout(pages, height, width, channels, dtype, _flag(fields, "compresseddata"))


def _numbers(path: File, fields: dict[str, str], key: str, default: str = "") -> list[int]:
    words = fields.get(key, default).split()
    if not 1 <= len(words) <= 6 or not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise UserError(f"{path.name} has {key} {fields.get(key, '')!r:.40}; expected positive numbers; write it again")
    return [int(word) for word in words]


def _flag(fields: dict[str, str], key: str, default: str = "false") -> bool:
    return fields.get(key, default).lower() in ("true", "t", "1")
