"""Read MetaImage (.mha) without ITK: a text header, then pixels as they are or deflated, in the same file.

What ITK's own reader would allow and a stack does not need is refused: pixels in other files (a header must not reach
outside the input), text pixels, more than 16 bits. Nothing is allocated before the header's sizes are checked, and
inflating stops at the size that the header promises.
Source: MetaIO's documentation, https://itk.org/Wiki/MetaIO/Documentation
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    from .stack import File

HEADER = 1 << 16  # bytes that a header may take; ITK writes about 300
TYPES = {"MET_UCHAR": "u1", "MET_UCHAR_ARRAY": "u1", "MET_USHORT": "u2", "MET_USHORT_ARRAY": "u2"}
CHUNK = 1 << 20


def read_metaimage(path: File, check: Callable[[int, int, int], None]) -> np.ndarray:
    """Pages as uint8 or uint16 (N, H, W, C). UserError for all else; `check(pages, width, height)` may raise too."""
    with path.open("rb") as stream:
        fields = _header(path, stream)
        dtype = TYPES.get(fields.get("elementtype", ""))
        if dtype is None:
            found = fields.get("elementtype", "no ElementType")
            raise UserError(
                f"{path.name} holds {found:.40} pixels; expected MET_UCHAR or MET_USHORT; convert the stack"
            )
        width, height, pages, *rest = (*_numbers(path, fields, "dimsize"), 1, 1)[:6]
        channels = _numbers(path, fields, "elementnumberofchannels", "1")[0]
        if any(side != 1 for side in rest) or channels not in (1, 3, 4):
            raise UserError(
                f"{path.name} has DimSize {fields['dimsize']:.40} and {channels} channels; expected width, height and "
                "pages, with 1, 3 or 4 channels; convert the stack"
            )
        check(pages, width, height)
        shape = (pages, height, width, channels)
        wanted = math.prod(shape) * np.dtype(dtype).itemsize
        data = _inflate(stream, wanted) if _flag(fields, "compresseddata") else stream.read(wanted + 1)
    if len(data) != wanted:
        found = "more" if len(data) > wanted else f"{len(data):,} readable"
        raise UserError(f"{path.name} holds {found} bytes of pixels; expected {wanted:,} by its header; write it again")
    big = _flag(fields, "binarydatabyteordermsb") or _flag(fields, "elementbyteordermsb")
    return np.frombuffer(data, np.dtype(dtype).newbyteorder(">" if big else "<")).reshape(shape)


def _header(path: File, stream: BinaryIO) -> dict[str, str]:
    """Keys in lower case; leaves the stream at the first byte of pixels."""
    fields: dict[str, str] = {}
    while "elementdatafile" not in fields:
        line = stream.readline(HEADER)
        key, equals, value = line.decode("latin-1").partition("=")
        key = key.strip().lower()
        if not equals or not line.endswith(b"\n") or not key.replace("_", "").isalnum() or stream.tell() > HEADER:
            raise UserError(
                f"{path.name} has a damaged header; expected a MetaImage's, up to ElementDataFile; write it again"
            )
        if key in fields:
            raise UserError(f"{path.name} has {key:.40} twice in its header; expected it once; write it again")
        fields[key] = value.strip()
    source = fields["elementdatafile"]
    if source.upper() != "LOCAL":
        raise UserError(
            f"{path.name} keeps its pixels in {source:.80}; expected LOCAL; write header and pixels into one file"
        )
    if fields.get("objecttype", "Image").lower() != "image" or not _flag(fields, "binarydata", "true"):
        raise UserError(f"{path.name} is not a binary MetaImage (ObjectType, BinaryData); expected one; write it again")
    if fields.get("headersize", "0") not in ("0", ""):
        raise UserError(f"{path.name} has HeaderSize {fields['headersize']:.40}; expected none; write it again")
    if len(_numbers(path, fields, "dimsize")) != _numbers(path, fields, "ndims")[0]:
        raise UserError(f"{path.name} has a DimSize that does not fit NDims; expected as many numbers; write it again")
    return fields


def _numbers(path: File, fields: dict[str, str], key: str, default: str = "") -> list[int]:
    words = fields.get(key, default).split()
    if not 1 <= len(words) <= 6 or not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise UserError(f"{path.name} has {key} {fields.get(key, '')!r:.40}; expected positive numbers; write it again")
    return [int(word) for word in words]


def _flag(fields: dict[str, str], key: str, default: str = "false") -> bool:
    return fields.get(key, default).lower() in ("true", "t", "1")


def _inflate(stream: BinaryIO, wanted: int) -> bytes:
    """At most `wanted` + 1 bytes of a zlib or gzip stream; none where it is cut off or damaged."""
    inflater, data = zlib.decompressobj(47), bytearray()
    try:
        while len(data) <= wanted and not inflater.eof:
            block = inflater.unconsumed_tail or stream.read(CHUNK)
            if not block:
                return b""  # cut off, or its checksum is
            data += inflater.decompress(block, wanted + 1 - len(data))
    except zlib.error:
        return b""
    return bytes(data)
