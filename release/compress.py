"""gzip on all cores, with progress: `docker save IMAGE | python -m release.compress --total BYTES >IMAGE.tar.gz`.

Standard library only, because pigz is missing where most images are built. The output is one ordinary gzip stream, as
pigz writes it: blocks are compressed in parallel, each knows the 32 KiB before it, and each ends on a byte boundary.
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import time
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

from inference.progress import speaking

BLOCK = 1 << 20  # bytes
WINDOW = 1 << 15  # bytes that deflate can refer back to
HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # no name and no time: the same bytes give the same file
LEVEL = 4  # two thirds of the default level's time, for one per cent more bytes


def deflate(block: bytes, before: bytes, level: int) -> bytes:
    """One block as a byte-aligned piece of a deflate stream; zlib works without the interpreter lock."""
    packer = zlib.compressobj(level, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, before)
    return packer.compress(block) + packer.flush(zlib.Z_SYNC_FLUSH)


def compress(
    source: IO[bytes], target: IO[bytes], total: int = 0, level: int = LEVEL, threads: int | None = None
) -> int:
    """Compresses `source` to `target`; returns the bytes read. `total` > 0 prints progress to stderr."""
    threads = threads or len(os.sched_getaffinity(0))
    crc = size = 0
    before = b""
    waiting: deque[Future[bytes]] = deque()
    said, start = 0, time.monotonic()
    target.write(HEADER)
    with speaking("compressing"), ThreadPoolExecutor(threads) as pool:
        while block := source.read(BLOCK):
            waiting.append(pool.submit(deflate, block, before, level))
            crc, size, before = zlib.crc32(block, crc), size + len(block), block[-WINDOW:]
            if len(waiting) > 2 * threads:
                target.write(waiting.popleft().result())
            if total and size * 10 // total > said:
                said = size * 10 // total
                left = (time.monotonic() - start) * max(total - size, 0) / size / 60
                line = f"  {size / 1e9:.1f} of about {total / 1e9:.1f} GB, about {left:.0f} min left"
                print(line, file=sys.stderr, flush=True)
        for piece in waiting:
            target.write(piece.result())
    target.write(zlib.compressobj(level, zlib.DEFLATED, -15).flush())  # the empty last block
    target.write(struct.pack("<II", crc, size & 0xFFFFFFFF))
    target.flush()
    return size


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m release.compress", description="gzip stdin to stdout on all cores."
    )
    parser.add_argument("--total", type=int, default=0, help="bytes to expect, for the progress on stderr")
    options = parser.parse_args(arguments)
    if not compress(sys.stdin.buffer, sys.stdout.buffer, options.total):
        print("nothing came in; expected what docker save writes", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
