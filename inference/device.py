"""Choose the device and the precision that a job computes in."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import torch

from .errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def gpu_is_present() -> bool:
    """Whether this machine has an NVIDIA device, usable by PyTorch or not."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/proc/driver/nvidia/gpus").is_dir()


def keep_freed_memory() -> None:
    """Make glibc keep freed memory: fresh pages cost a millisecond per megabyte, and every layer would need them."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too


def choose_device(asked: str) -> torch.device:
    """`auto` takes the GPU if there is one. A GPU that PyTorch cannot use is an error, not a reason for a slow run."""
    if asked == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        # fp32 means fp32: by default convolutions round their inputs to TF32's ten bits on Ampere and later
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        return torch.device("cuda")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # both are ways to ask for the CPU
    if asked == "cuda" or (gpu_is_present() and not hidden):
        found = "a GPU that PyTorch cannot use" if gpu_is_present() else "no GPU"
        raise UserError(
            f"found {found}; expected one with a driver for CUDA {torch.version.cuda}; "
            "update the driver, run the container with --gpus all, or choose --device cpu"
        )
    return torch.device("cpu")


def native_precision(device: torch.device) -> str:
    """The hardware's fast precision: on GPUs fp16 below capability 8.0 (a T4 only emulates bf16), else bf16.

    On CPUs bf16 with AVX512-BF16 or AMX, else fp32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast = flags.get("avx512_bf16") or flags.get("amx_bf16") or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast or torch.cpu._is_amx_tile_supported() else "fp32"


def choose_precision(asked: str, device: torch.device, allowed: dict[str, float | None], fp16_safe: bool) -> str:
    """`asked`, or for `auto` the hardware's fast precision if manifest and backbone allow it, else fp32."""
    if asked != "auto":
        return asked
    native = native_precision(device)
    if native == "fp32" or allowed.get(native) is None or (native == "fp16" and not fp16_safe):
        return "fp32"
    return native
