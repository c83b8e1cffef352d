"""Makes small image files of every kind that may lie in /input: what the reader must read, and what it must refuse.

    python -m test.support.image_files DIR

writes them all to DIR, as seeds for a fuzzer. `good_files` gives each file's pages with it;
`bad_files` what the error must say.
"""

from __future__ import annotations

import gzip
import io
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

PAGES, HEIGHT, WIDTH = 3, 20, 24


def stack(seed: int = 0, pages: int = PAGES) -> np.ndarray:
    """Random RGB pages (N, H, W, 3) uint8, no two alike."""
    return np.random.default_rng(seed).integers(0, 256, (pages, HEIGHT, WIDTH, 3), np.uint8)


def with_pillow(pages: list[Image.Image], compression: str | None = None, form: str = "TIFF", **options: Any) -> bytes:
    stream = io.BytesIO()
    more = {"save_all": True, "append_images": pages[1:]} if form == "TIFF" else {}
    if compression:
        more["compression"] = compression
    pages[0].save(stream, form, **more, **options)
    return stream.getvalue()


def with_tifffile(pages: np.ndarray, writer: dict[str, Any] | None = None, **options: Any) -> bytes:
    """Each page a directory of its own."""
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream, **(writer or {})) as file:
        for page in pages:
            file.write(page, **{"photometric": "rgb", "metadata": None, "contiguous": False} | options)
    return stream.getvalue()


def metaimage(pixels: np.ndarray, channels: int, compressed: bool = False, **fields: Any) -> bytes:
    """An .mha of `pixels` (..., H, W[, C]) as ITK writes it; `fields` replace or add header lines, None removes one."""
    sides = pixels.shape[: pixels.ndim - (channels > 1)][::-1]
    data = pixels.tobytes()
    data = zlib.compress(data) if compressed else data
    kind = {"u1": "MET_UCHAR", "u2": "MET_USHORT", "f4": "MET_FLOAT", "i2": "MET_SHORT"}[pixels.dtype.str[1:]]
    header = {
        "ObjectType": "Image",
        "NDims": len(sides),
        "BinaryData": True,
        "BinaryDataByteOrderMSB": False,
        "CompressedData": compressed,
        "CompressedDataSize": len(data) if compressed else None,
        "TransformMatrix": " ".join("1" if i % (len(sides) + 1) == 0 else "0" for i in range(len(sides) ** 2)),
        "DimSize": " ".join(map(str, sides)),
        "ElementNumberOfChannels": channels,
        "ElementType": kind,
    } | fields
    header["ElementDataFile"] = header.pop("ElementDataFile", "LOCAL")
    lines = [f"{key} = {value}\n" for key, value in header.items() if value is not None]
    return "".join(lines).encode() + data


def repeat(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, -1)


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None] / 255
    return np.rint(rgb * a + 255 * (1 - a))


def good_files() -> dict[str, tuple[bytes, np.ndarray, int]]:
    """Name to (content, pages (N, H, W, 3), largest difference that decoding may leave: JPEG loses, CMYK rounds)."""
    rgb = stack()
    images = [Image.fromarray(page) for page in rgb]
    grey, alpha = rgb[..., 0], rgb[..., 1]
    wide = (rgb.astype(np.uint16) << 8) | stack(1)
    smooth = np.stack([np.full_like(rgb[0], 40 * n + 60) for n in range(PAGES)])
    bits = grey > 127
    files: dict[str, tuple[bytes, np.ndarray, int]] = {}
    for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd"):
        files[f"{name}.tiff"] = with_pillow(images, name), rgb, 0
    files["jpeg.tiff"] = with_pillow([Image.fromarray(page) for page in smooth], "jpeg", quality=90), smooth, 3
    for name in ("group3", "group4", "packbits"):
        files[f"bilevel-{name}.tiff"] = (
            with_pillow([Image.fromarray(page) for page in bits], name),
            repeat(bits * 255),
            0,
        )
    files["one-page.tif"] = with_pillow(images[:1]), rgb[:1], 0
    files["sixteen.TIFF"] = with_pillow([Image.fromarray(page) for page in stack(2, 16)], "tiff_lzw"), stack(2, 16), 0
    files["bigtiff.tiff"] = with_pillow(images, "tiff_adobe_deflate", big_tiff=True), rgb, 0
    files["big-endian.tiff"] = with_tifffile(rgb, {"byteorder": ">"}), rgb, 0
    files["tiled.tiff"] = with_tifffile(rgb, tile=(16, 16)), rgb, 0
    files["tiled-deflate.tiff"] = with_tifffile(rgb, tile=(16, 16), compression="zlib", predictor=True), rgb, 0
    files["planar.tiff"] = with_tifffile(np.moveaxis(rgb, -1, 1), planarconfig="separate"), rgb, 0
    planar = with_tifffile(np.moveaxis(rgb, -1, 1), planarconfig="separate", compression="zlib")
    files["planar-deflate.tiff"] = planar, rgb, 0
    files["strips.tiff"] = with_tifffile(rgb, rowsperstrip=7), rgb, 0
    files["strips-deflate.tiff"] = with_tifffile(rgb, rowsperstrip=1, compression="zlib"), rgb, 0
    files["grey.tiff"] = with_pillow([Image.fromarray(page) for page in grey]), repeat(grey), 0
    files["grey-inverted.tiff"] = with_tifffile(grey, photometric="miniswhite"), repeat(255 - grey), 0
    files["grey16.tiff"] = with_tifffile(wide[..., 0], photometric="minisblack"), repeat(grey), 0
    grey16 = with_tifffile(wide[..., 0], {"byteorder": ">"}, photometric="minisblack", compression="zlib")
    files["grey16-big-endian-deflate.tiff"] = grey16, repeat(grey), 0
    files["rgb16.tiff"] = with_tifffile(wide), rgb, 0
    files["rgb16-big-endian.tiff"] = with_tifffile(wide, {"byteorder": ">"}), rgb, 0
    files["rgb16-deflate.tiff"] = with_tifffile(wide, compression="zlib"), rgb, 0
    files["rgb16-tiled-big-endian.tiff"] = (
        with_tifffile(wide, {"byteorder": ">"}, tile=(16, 16), compression="zlib"),
        rgb,
        0,
    )
    rgba = np.concatenate([rgb, alpha[..., None]], -1)
    files["rgba.tiff"] = with_tifffile(rgba, extrasamples=["unassalpha"]), over_white(rgb, alpha), 1
    files["rgbx.tiff"] = with_tifffile(rgba, extrasamples=["unspecified"]), rgb, 0
    grey_alpha = np.stack([grey, alpha], -1)
    written = with_tifffile(grey_alpha, photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"])
    files["grey-alpha.tiff"] = written, over_white(repeat(grey), alpha), 1
    palettes = [image.quantize(32) for image in images]
    files["palette.tiff"] = with_pillow(palettes), np.stack([np.asarray(p.convert("RGB")) for p in palettes]), 0
    cmyk = [image.convert("CMYK") for image in images]
    files["cmyk.tiff"] = with_pillow(cmyk, "tiff_lzw"), rgb, 1
    files["orientation.tiff"] = with_pillow(images[:1], tiffinfo={274: 6}), np.rot90(rgb[:1], 3, (1, 2)), 0
    with_tags = with_pillow(images, dpi=(101600, 101600), tiffinfo={270: "H&E " * 50, 34675: b"\0" * 500})
    files["many-tags.tiff"] = with_tags, rgb, 0
    files["sub-ifds.tiff"] = with_tifffile(rgb[:1], subifds=2), rgb[:1], 0
    files["pyramid.tiff"] = pyramid(rgb[0]), rgb[0], 0  # the caller compares page 0 and expects three pages
    files["page.mha"] = metaimage(rgb[0], 3), rgb[:1], 0
    files["stack.mha"] = metaimage(rgb, 3), rgb, 0
    files["stack-deflated.MHA"] = metaimage(rgb, 3, compressed=True), rgb, 0
    files["stack-4d.mha"] = metaimage(rgb[None], 3), rgb, 0
    files["grey.mha"] = metaimage(grey, 1), repeat(grey), 0
    files["rgba.mha"] = metaimage(rgba, 4), over_white(rgb, alpha), 1
    files["rgb16.mha"] = metaimage(wide, 3, compressed=True), rgb, 0
    files["rgb16-big-endian.mha"] = metaimage(wide.astype(">u2"), 3, BinaryDataByteOrderMSB=True), rgb, 0
    zipped = gzip.compress(rgb.tobytes())
    header = metaimage(rgb, 3, CompressedData=True)[: -rgb.nbytes]
    files["stack-gzip.mha"] = header + zipped, rgb, 0
    files["rgb.png"] = with_pillow(images[:1], form="PNG"), rgb[:1], 0
    png = [Image.fromarray(rgba[0])]
    files["rgba.png"] = with_pillow(png, form="PNG"), over_white(rgb, alpha)[:1], 1
    files["palette.png"] = with_pillow(palettes[:1], form="PNG"), np.asarray(palettes[0].convert("RGB"))[None], 0
    files["smooth.jpg"] = with_pillow([Image.fromarray(smooth[0])], form="JPEG"), smooth[:1], 3
    return files


def pyramid(page: np.ndarray) -> bytes:
    """Three directories in the main chain, the later two flagged as reduced."""
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as file:
        for step in (1, 2, 4):
            file.write(page[::step, ::step], photometric="rgb", metadata=None, subfiletype=int(step > 1))
    return stream.getvalue()


def tiff(pages: list[dict[int, tuple[int, int, int]]], links: list[int] | None = None, data: bytes = b"") -> bytes:
    """A little-endian TIFF by hand: `data` at offset 8, then each page's tags {tag: (type, count, value or offset)}.

    links: the number of the page that follows each page, -1 for none; by default the next one.
    """
    sizes = [2 + 12 * len(page) + 4 for page in pages]
    places = [8 + len(data) + sum(sizes[:n]) for n in range(len(pages))]
    links = links or [*range(1, len(pages)), -1]
    content = b"II*\0" + struct.pack("<I", places[0] if places else 0) + data
    for page, link in zip(pages, links, strict=True):
        content += struct.pack("<H", len(page))
        content += b"".join(struct.pack("<HHII", tag, *page[tag]) for tag in sorted(page))
        content += struct.pack("<I", places[link] if link >= 0 else 0)
    return content


def grey_page(width: int = 4, height: int = 4, offset: int = 8, count: int | None = None, **more: int) -> dict:
    """Tags of an uncompressed grey page in one strip; `more` are t<tag>=value."""
    count = min(width * height, 1 << 31) if count is None else count
    values = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: offset, 277: 1, 278: height, 279: count}
    values |= {int(tag[1:]): value for tag, value in more.items()}
    return {tag: (4, 1, value) for tag, value in values.items()}


def tile_page(side: int) -> dict:
    """Tags of a page of four pixels in one deflated tile of `side` x `side` pixels."""
    page = {tag: value for tag, value in grey_page(2, 2).items() if tag not in (273, 278, 279)}
    more = {259: 8, 322: side, 323: side, 324: 8, 325: 16}
    return page | {tag: (4, 1, value) for tag, value in more.items()}


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Name to (content, part of the error that it must end in)."""
    rgb = stack()
    images = [Image.fromarray(page) for page in rgb]
    raw, deflated = with_pillow(images), with_pillow(images, "tiff_adobe_deflate")
    cut = with_tifffile(rgb, compression="zlib")
    one = bytes(16)
    # 8,000 strips of one row, each of which lists the same 60,000 bytes: half a gigabyte to read in a small file
    lists = struct.pack("<8000I", *[8] * 8000) + struct.pack("<8000I", *[60_000] * 8000)
    repeated = grey_page(1, 8000, t259=8, t278=1) | {273: (4, 8000, 8), 279: (4, 8000, 8 + 32_000)}
    mha, packed = metaimage(rgb, 3), metaimage(rgb, 3, compressed=True)
    bomb = zlib.compress(bytes(1 << 24), 9)
    png = with_pillow(images[:1], form="PNG")
    half = raw.replace(b"\x14\0\0\0", b"\x13\0\0\0", 1)
    files = {
        "empty.tiff": (b"", "is empty"),
        "text.tiff": (b"not an image at all", "expected TIFF"),
        "nulls.tiff": (bytes(4096), "expected TIFF"),
        "two-bytes.tiff": (b"II", "expected a TIFF"),
        "header-only.tiff": (b"II*\0" + struct.pack("<I", 8), "cut off"),
        "big-endian-bigtiff.tiff": (
            with_tifffile(rgb, {"byteorder": ">", "bigtiff": True}),
            "is a big-endian BigTIFF, which Pillow does not read",
        ),
        "no-page.tiff": (b"II*\0" + struct.pack("<I", 0), "no page"),
        "truncated-raw.tiff": (raw[: len(raw) // 2], "page"),
        "truncated-last-byte.tiff": (cut[:-1] if cut[-4:] != b"\0\0\0\0" else cut[: len(cut) * 2 // 3], "page 2"),
        "truncated-deflate.tiff": (deflated[: len(deflated) * 3 // 4], "page"),
        "loop.tiff": (tiff([grey_page()] * 3, [1, 2, 1], one), "back to an earlier page"),
        "self-loop.tiff": (tiff([grey_page()], [0], one), "back to an earlier page"),
        "million-pages.tiff": (million_pages(), "more than 4096 pages"),
        "huge-side.tiff": (tiff([grey_page(100_000, 100_000)], data=one), "100000 x 100000 pixels"),
        "huge-tile.tiff": (tiff([tile_page(8208)], data=one), "tiles of 8208 x 8208 pixels"),
        "large-tiles.tiff": (tiff([tile_page(8192)] * 5, data=one * 8), "has tiles of"),
        "no-side.tiff": (tiff([grey_page(0, 0)], data=one), "0 x 0 pixels"),
        "many-large-pages.tiff": (tiff([grey_page(8192, 8192, t259=8, count=16)] * 5, data=one), "pixels"),
        "strip-outside.tiff": (tiff([grey_page(offset=1 << 30)], data=one), "pixels outside the file"),
        "strip-short.tiff": (tiff([grey_page(count=15)], data=one), "15 bytes in a strip"),
        "strip-missing.tiff": (tiff([grey_page(t278=2)], data=one), "1 strips or tiles"),
        "strips-shared.tiff": (tiff([grey_page(t257=4, t278=4)] * 40, data=one * 8), ""),
        "strips-repeated.tiff": (tiff([repeated], data=lists), "claims 8,000 strips"),
        "tag-outside.tiff": (tiff([grey_page() | {270: (2, 1 << 31, 8)}], data=one), "tag 270 outside"),
        "tags-repeated.tiff": (tiff([grey_page() | {t: (2, 80, 8) for t in range(40000, 40900)}], data=one), "tags"),
        "float.tiff": (with_tifffile(rgb.astype(np.float32)), "sample format 3"),
        "int32.tiff": (with_tifffile(rgb[..., 0].astype(np.int32), photometric="minisblack"), "sample format 2"),
        "half.tiff": (with_tifffile(rgb.astype(np.float16)), "sample format 3"),
        "signed.tiff": (with_tifffile(rgb[..., 0].view(np.int8), photometric="minisblack"), "sample format 2"),
        "twelve-bits.tiff": (tiff([grey_page(count=24, t258=12)], data=bytes(24)), "1 samples of 12 bits"),
        "lab.tiff": (with_pillow([Image.new("LAB", (8, 8))]), "photometric interpretation 8"),
        "old-jpeg.tiff": (tiff([grey_page(t259=6)], data=one), "compression old JPEG"),
        "webp.tiff": (tiff([grey_page(t259=50001)], data=one), "compression WebP, none of none, CCITT"),
        "unknown.tiff": (tiff([grey_page(t259=65000)], data=one), "compression 65000, none of none, CCITT"),
        "bad-deflate.tiff": (tiff([grey_page(t259=8)], data=one), "page 0"),
        "bad-lzw.tiff": (tiff([grey_page(t259=5)], data=b"\xff" * 16), "page 0"),
        "wrong-height.tiff": (half, ""),
        "detached.mha": (metaimage(rgb[:0], 3, ElementDataFile="/etc/passwd"), "keeps its pixels in /etc/passwd"),
        "list.mha": (metaimage(rgb[:0], 3, ElementDataFile="LIST"), "keeps its pixels in LIST"),
        "pattern.mha": (metaimage(rgb[:0], 3, ElementDataFile="../%03d.raw 1 3 1"), "keeps its pixels"),
        "two-sources.mha": (b"ElementDataFile = LOCAL\n" + mha, "dimsize"),
        "twice.mha": (mha.replace(b"NDims = 3\n", b"NDims = 3\nNDims = 3\n"), "twice"),
        "comment.mha": (b"Comment = ElementDataFile = LOCAL\n" + mha[:-1], "by its header"),
        "short.mha": (mha[:-1], "by its header"),
        "long.mha": (mha + b"\0", "more bytes of pixels"),
        "no-data.mha": (mha[: mha.index(b"LOCAL")], "damaged header"),
        "no-header.mha": (bytes(1 << 17), "damaged header"),
        "cut-zlib.mha": (packed[:-9], "0 readable bytes"),
        "bad-zlib.mha": (packed[:-200] + bytes(200), "0 readable bytes"),
        "bomb.mha": (metaimage(rgb, 3, CompressedData=True)[: -rgb.nbytes] + bomb, "more bytes of pixels"),
        "huge.mha": (metaimage(rgb[:0], 3, DimSize="100000 100000 1", NDims=3), "100000 x 100000 pixels"),
        "million.mha": (metaimage(rgb[:0], 3, DimSize="1 1 1000000", NDims=3), "more than 4096 pages"),
        "no-page.mha": (metaimage(rgb[:0], 3, DimSize="8 8 0", NDims=3), "no page"),
        "negative.mha": (metaimage(rgb[:0], 3, DimSize="-8 8 1", NDims=3), "expected positive numbers"),
        "dims.mha": (metaimage(rgb, 3, NDims=2), "does not match NDims"),
        "float.mha": (metaimage(rgb.astype(np.float32), 3), "MET_FLOAT"),
        "signed.mha": (metaimage(rgb.astype(np.int16), 3), "MET_SHORT"),
        "channels.mha": (metaimage(rgb, 3, ElementNumberOfChannels=2), "2 channels"),
        "ascii.mha": (metaimage(rgb, 3, BinaryData=False), "binary MetaImage"),
        "header-size.mha": (metaimage(rgb, 3, HeaderSize=-1), "HeaderSize"),
        "truncated.png": (png[:-40], "page 0"),
        "bad-crc.png": (png[:60] + b"\xff" + png[61:], "page 0"),
        "huge.png": (huge_png(100_000), "100000 x 100000 pixels"),
        "truncated.jpg": (with_pillow(images[:1], form="JPEG")[:-300], "page 0"),
        "scans.jpg": (with_pillow(images[:1], form="JPEG")[:-2] + b"\xff\xda\0\x08\1\1\0\0\1\0" * 5000, "JPEG scans"),
    }
    return {name: file for name, file in files.items() if file[1]}


def million_pages() -> bytes:
    """Directories of one and the same page, one after another; directories beyond the reader's bound are left out."""
    page = grey_page()
    size = 2 + 12 * len(page) + 4
    body = struct.pack("<H", len(page)) + b"".join(struct.pack("<HHII", tag, *page[tag]) for tag in sorted(page))
    first = 24
    links = (first + size * (n + 1) for n in range(5000))  # the rest is never reached
    return b"II*\0" + struct.pack("<I", first) + bytes(16) + b"".join(body + struct.pack("<I", link) for link in links)


def huge_png(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1 << 20))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, (content, *_) in {**good_files(), **bad_files()}.items():
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    main(sys.argv[1:])
