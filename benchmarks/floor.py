"""The floor under a cold start on this machine: import PyTorch, read once, multiply at full rate."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from inference.backbones import BACKBONES, build
from inference.device import DTYPES


def import_seconds(repeats: int = 3) -> float:
    """Wall time of `python -c "import torch"` in a fresh process, best of `repeats`."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        times.append(time.perf_counter() - start)
    return min(times)


def read_rate(file: Path) -> float:
    """Bytes per second of reading `file` again, as warm in the cache as for the runs that it is compared with."""
    buffer = bytearray(16 << 20)
    start = time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    return file.stat().st_size / (time.perf_counter() - start)


def multiply_adds(backbone: str, size: int, pool: str) -> int:
    """Floating point operations (two per multiply-add) of one view through one fold, counted on the meta device."""
    with torch.device("meta"):
        model = build(BACKBONES[backbone], 1, pool)
        batch = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        model(batch)
    return counter.get_total_flops()


def matrix_rate(backbone: str, rows: int, precision: str, device: str, seconds: float = 2.0) -> float:
    """Operations per second of the backbone's own four matrix products over `rows` tokens in `precision`."""
    row = BACKBONES[backbone]
    with torch.device("meta"):
        state = build(row, 0).state_dict()
    names = [n for n in state if n.startswith("blocks.0.") and state[n].ndim == 2] if row.depth else []
    shapes = [tuple(state[name].shape) for name in names] or [(1280, 1280)]
    dtype = DTYPES[precision]
    work = [
        (torch.randn(rows, i, device=device).to(dtype), torch.randn(o, i, device=device).to(dtype)) for o, i in shapes
    ]
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    best = 0.0
    with torch.inference_mode():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or not best:
            sync()
            start = time.perf_counter()
            for x, weight in work:
                torch.nn.functional.linear(x, weight)
            sync()
            best = max(best, sum(2 * rows * o * i for o, i in shapes) / (time.perf_counter() - start))
    return best
