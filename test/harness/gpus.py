"""The platform's GPU, if the host has one: a single one, with no more memory for PyTorch than on a T4.

PyTorch 2.10 reads the limit from the environment, so that the job's command stays as it is. The limit does not cover
the memory that CUDA itself takes, or programs that allocate without PyTorch. `--gpus all` hands out every GPU.
"""

from __future__ import annotations

import json
import subprocess
from functools import cache

from inference.checks import docker
from inference.doctor import output_of

ALLOWED = 14 << 30  # bytes for PyTorch: a T4 has 14.6 GiB to give, of which CUDA takes some for itself


@cache
def engine_has_gpus() -> bool:
    """True when the engine can hand GPUs to a container."""
    answer = subprocess.run([docker() or "docker", "info", "--format", "{{json .}}"], capture_output=True)
    about = json.loads(answer.stdout or b"{}")
    return "nvidia" in str(about.get("Runtimes")) + str(about.get("DiscoveredDevices"))


def memory() -> int | None:
    """Bytes of the first GPU; None if there is none, or its memory cannot be read."""
    listed = output_of("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits") or ""
    first = listed.partition("\n")[0].strip()
    return int(first) << 20 if first.isdecimal() else None


def container_options(gpus: str) -> list[str]:
    """Options of `docker run`. gpus: auto, all or none, as in `engines.Limits`."""
    if gpus == "none" or (gpus == "auto" and not engine_has_gpus()):
        return []
    return ["--gpus", "all" if gpus == "all" else "1"]


def environment(gpus: str) -> dict[str, str]:
    """Variables that limit PyTorch to a T4's memory, if this machine's GPU has more."""
    total = memory() if gpus == "auto" else None
    if total is None or total <= ALLOWED:
        return {}
    return {"PYTORCH_ALLOC_CONF": f"per_process_memory_fraction:{ALLOWED / total:.4f}"}


def visible(gpus: str, given: str | None) -> dict[str, str]:
    """The same for a native run, whose processes see all of the host's GPUs. given: CUDA_VISIBLE_DEVICES so far."""
    if gpus == "none":
        return {"CUDA_VISIBLE_DEVICES": ""}
    first = "0" if given is None else given.partition(",")[0]
    return {"CUDA_VISIBLE_DEVICES": first} if gpus == "auto" and memory() is not None else {}
