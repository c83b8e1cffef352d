"""Check the structure of a TIFF file completely before a decoder sees it.

Decoders are lenient: a circular chain of pages ends early, a strip that points nowhere becomes grey, and one that is
listed a million times is read a million times. Here every page is either intact or an error, the pages are counted,
and what a decoder reads and writes is bounded by the file's own size.
Source: TIFF 6.0 (Adobe, 1992), and https://libtiff.gitlab.io/libtiff/specification/bigtiff.html
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from ..errors import UserError
from .source import File

MAX_TAGS = 1024  # of one page
MAX_SEGMENTS = 1 << 18  # strips or tiles of all pages
MAX_TILE = 8192  # pixels a side; a decoder allocates the whole tile, however little of it the page needs
MAX_TILED = 1 << 28  # pixels of all tiles together, including those beyond the page's edges, which are decoded too
# types that a structure tag may have
UNITS = {1: "B", 2: "B", 3: "H", 4: "I", 6: "B", 7: "B", 13: "I", 16: "Q", 18: "Q"}
SIZES = {5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 17: 8} | {
    kind: struct.calcsize(f"={unit}") for kind, unit in UNITS.items()
}
PAGE = WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES = 256, 257, 258, 259, 262, 277
ROWS, OFFSETS, COUNTS, PLANAR, TILE_WIDTH, TILE_HEIGHT, FORMAT = 278, (273, 324), (279, 325), 284, 322, 323, 339
READ = {*PAGE, ROWS, *OFFSETS, *COUNTS, PLANAR, TILE_WIDTH, TILE_HEIGHT, FORMAT}
RAW = 1
COMPRESSIONS = {RAW: "none", 2: "CCITT", 3: "CCITT G3", 4: "CCITT G4", 5: "LZW", 7: "JPEG", 8: "deflate"} | {
    32773: "PackBits",
    32946: "deflate",
    50000: "Zstandard",
}
OTHERS = {6: "old JPEG", 33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000", 34887: "LERC", 34925: "LZMA"} | {
    50001: "WebP",  # which the libtiff in Pillow's wheels leaves out
    50002: "JPEG XL",
}
PHOTOMETRICS = {0: "white is zero", 1: "black is zero", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr"}


class Damaged(Exception):
    """What is wrong with the current page."""


def check_tiff(path: File, check: Callable[[int, int, int], None]) -> int:
    """The number of pages of an intact file. UserError names the first page that is damaged or not supported.

    `check(pages so far, width, height)` may raise its own for the current page. Sub-IFDs are not pages and not visited.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        offset, layout = _first(path, stream)
        seen: set[int] = set()
        segments = tag_bytes = pixel_bytes = tiled = 0
        while offset:
            page = len(seen)
            if offset in seen:
                raise UserError(
                    f"{path.name} links page {page - 1} back to an earlier page; expected an end; write it again"
                )
            seen.add(offset)
            try:
                tags, offset, read = _directory(stream, offset, layout, size)
                tag_bytes += read
                check(page, *_side(tags))
                counts, area = _segments(tags, size)
            except Damaged as error:
                raise UserError(
                    f"page {page} of {path.name} {error}; expected a whole page; write the stack again"
                ) from None
            segments, pixel_bytes, tiled = segments + len(counts), pixel_bytes + sum(counts), tiled + area
            if tiled > MAX_TILED:
                raise UserError(
                    f"{path.name} has tiles of {tiled:,} pixels by page {page}; expected at most {MAX_TILED:,}; "
                    "write the stack with smaller tiles, or in strips"
                )
            if segments > MAX_SEGMENTS or tag_bytes > size or pixel_bytes > size:
                raise UserError(
                    f"{path.name} claims {segments:,} strips, {pixel_bytes:,} bytes of pixels, {tag_bytes:,} of tags "
                    f"by page {page}; expected {MAX_SEGMENTS:,} at most, in {size:,} bytes; write it again"
                )
    if not seen:
        raise UserError(f"{path.name} has no page; expected one or more; write it again")
    return len(seen)


def _first(path: File, stream: BinaryIO) -> tuple[int, tuple[str, bool]]:
    """Offset of the first directory, and (byte order, whether it is a BigTIFF)."""
    header = stream.read(16)
    order = {b"II": "<", b"MM": ">"}.get(header[:2], "")
    try:
        if order and struct.unpack(order + "H", header[2:4])[0] == 42:
            return struct.unpack(order + "I", header[4:8])[0], (order, False)
        if order and struct.unpack(order + "HHH", header[2:8]) == (43, 8, 0):
            if order == ">":
                raise UserError(
                    f"{path.name} is a big-endian BigTIFF, which Pillow does not read; expected a little-endian one; "
                    "write it again"
                )
            return struct.unpack(order + "Q", header[8:16])[0], (order, True)
    except struct.error:
        pass
    raise UserError(f"{path.name} begins with {header[:4]!r}; expected a TIFF; write it again")


def _directory(
    stream: BinaryIO, offset: int, layout: tuple[str, bool], size: int
) -> tuple[dict[int, tuple[int, ...]], int, int]:
    """Structure tags of the directory at `offset`, the next one's offset, and the size of all its tag values."""
    order, big = layout
    entry, head, link = (
        (order + "HHQ8s", order + "Q", order + "Q") if big else (order + "HHI4s", order + "H", order + "I")
    )
    count = _unpack(stream, offset, head)[0]
    if not 1 <= count <= MAX_TAGS:
        raise Damaged(f"has {count:,} tags, not 1 to {MAX_TAGS}")
    start, step = offset + struct.calcsize(head), struct.calcsize(entry)
    tags: dict[int, tuple[int, ...]] = {}
    total = 0
    for number in range(count):
        tag, kind, values, inline = _unpack(stream, start + number * step, entry)
        length = values * SIZES.get(kind, 0)
        elsewhere = None
        if length > len(inline):
            total += length
            elsewhere = struct.unpack(link, inline)[0]
            if elsewhere + length > size:
                raise Damaged(f"has tag {tag} outside the file")
        if tag not in READ:
            continue
        if tag in tags or kind not in UNITS or not 1 <= values <= MAX_SEGMENTS:
            raise Damaged(f"has tag {tag} twice, or with type {kind} and {values:,} values")
        form = f"{order}{values}{UNITS[kind]}"
        tags[tag] = struct.unpack(form, inline[:length]) if elsewhere is None else _unpack(stream, elsewhere, form)
    return tags, _unpack(stream, start + count * step, link)[0], total


def _unpack(stream: BinaryIO, offset: int, form: str) -> tuple[Any, ...]:
    length = struct.calcsize(form)
    if offset >= 1 << 62:
        raise Damaged("points outside the file")
    stream.seek(offset)
    data = stream.read(length)
    if len(data) != length:
        raise Damaged("is cut off")
    return struct.unpack(form, data)


def _one(tags: dict[int, tuple[int, ...]], tag: int, default: int = 0) -> int:
    return tags.get(tag, (default,))[0]


def _side(tags: dict[int, tuple[int, ...]]) -> tuple[int, int]:
    return _one(tags, WIDTH), _one(tags, HEIGHT)


def _segments(tags: dict[int, tuple[int, ...]], size: int) -> tuple[tuple[int, ...], int]:
    """Byte counts of a page's strips or tiles, and the number of pixels of all its tiles.

    Raises Damaged unless all of them lie in the file and their number matches the page's size.
    """
    width, height = _side(tags)
    samples, compression, photometric = (
        _one(tags, SAMPLES, 1),
        _one(tags, COMPRESSION, RAW),
        _one(tags, PHOTOMETRIC, -1),
    )
    bits, formats = set(tags.get(BITS, (1,))), set(tags.get(FORMAT, (1,)))
    if compression not in COMPRESSIONS:
        name = OTHERS.get(compression, compression)
        raise Damaged(f"has compression {name}, none of {', '.join(dict.fromkeys(COMPRESSIONS.values()))}")
    if photometric not in PHOTOMETRICS:
        raise Damaged(f"has photometric interpretation {photometric}, none of {', '.join(PHOTOMETRICS.values())}")
    if not formats <= {1, 4} or len(bits) != 1 or not bits <= {1, 2, 4, 8, 16} or not 1 <= samples <= 6:
        sizes, kinds = (" and ".join(map(str, sorted(values))) for values in (bits, formats))
        raise Damaged(f"has {samples} samples of {sizes} bits, sample format {kinds}, not unsigned 8 or 16 bits")
    if photometric == 0 and bits == {16}:
        raise Damaged("has 16 bits with white as zero, which its decoder would not invert")
    planes = samples if _one(tags, PLANAR, 1) == 2 else 1
    tiled = OFFSETS[1] in tags
    segment = (
        (_one(tags, TILE_WIDTH), _one(tags, TILE_HEIGHT)) if tiled else (width, min(_one(tags, ROWS, height), height))
    )
    if not (0 < segment[0] <= MAX_TILE and 0 < segment[1] <= MAX_TILE):
        raise Damaged(f"has strips or tiles of {segment[0]} x {segment[1]} pixels")
    across, down = -(-width // segment[0]), -(-height // segment[1])
    offsets, counts = tags.get(OFFSETS[tiled], ()), tags.get(COUNTS[tiled], ())
    if not len(offsets) == len(counts) == across * down * planes:
        raise Damaged(f"has {len(offsets)} strips or tiles with {len(counts)} sizes, not {across * down * planes}")
    if any(not count or offset + count > size for offset, count in zip(offsets, counts, strict=True)):
        raise Damaged("has pixels outside the file")
    if compression == RAW:
        row = -(-segment[0] * next(iter(bits)) * samples // planes // 8)
        for number, count in enumerate(counts):
            rows = segment[1] if tiled else min(segment[1], height - number % down * segment[1])
            if count < row * rows:
                raise Damaged(f"has {count:,} bytes in a strip or tile of {row * rows:,}")
    return counts, tiled * across * down * segment[0] * segment[1]
