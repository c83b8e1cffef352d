"""One GPU with a T4's memory is imitated by what a job is given; a script plays the machine's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from test.harness import gpus
from test.support.programs import WRITE, run_program


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `nvidia-smi` prints, one GPU a line."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin/nvidia-smi"
    script.write_text(f"#!/bin/sh\ncat {tmp_path}/listed\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "listed"


@pytest.mark.parametrize(
    ("memory", "limit"), [("81559\n81559\n", 0.1758), ("24564\n", 0.5836), ("14000\n", None), ("[N/A]\n", None)]
)
def test_pytorch_gets_a_t4s_memory(listed: Path, memory: str, limit: float | None) -> None:
    listed.write_text(memory)
    wanted = {} if limit is None else {"PYTORCH_ALLOC_CONF": f"per_process_memory_fraction:{limit}"}
    assert gpus.environment("auto") == wanted
    assert gpus.environment("all") == gpus.environment("none") == {}


def test_a_job_sees_one_gpu_and_the_limit(listed: Path, tmp_path: Path) -> None:
    listed.write_text("81559\n81559\n")
    names = "[os.environ.get(k) for k in ('CUDA_VISIBLE_DEVICES', 'PYTORCH_ALLOC_CONF')]"
    ended, _, _ = run_program(tmp_path, WRITE + f"print({names})")
    assert ended.stdout == b"['0', 'per_process_memory_fraction:0.1758']\n"


def test_which_gpu(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed.write_text("81559\n")
    assert gpus.visible("auto", "3,1") == {"CUDA_VISIBLE_DEVICES": "3"}
    assert gpus.visible("all", None) == {}
    assert gpus.visible("none", "3") == {"CUDA_VISIBLE_DEVICES": ""}
    listed.unlink()
    assert gpus.visible("auto", None) == {}
    monkeypatch.setattr(gpus, "engine_has_gpus", lambda: True)
    options = {name: gpus.container_options(name) for name in ("auto", "all", "none")}
    assert options == {"auto": ["--gpus", "1"], "all": ["--gpus", "all"], "none": []}
    monkeypatch.setattr(gpus, "engine_has_gpus", lambda: False)
    assert gpus.container_options("auto") == []


def test_the_pinned_pytorch_knows_the_setting() -> None:
    """A name that it does not know is refused when it is set."""
    program = "import sys, torch; torch._C._accelerator_setAllocatorSettings(sys.argv[1])"
    codes = []
    for name in ("per_process_memory_fraction", "per_process_memory"):
        done = subprocess.run([sys.executable, "-c", program, f"{name}:0.2"], capture_output=True)
        codes.append(done.returncode)
    assert codes == [0, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_limit_holds_on_a_real_gpu() -> None:
    program = (
        "import torch; torch.zeros(1, device='cuda'); print(torch.cuda.get_per_process_memory_fraction())\n"
        "try: torch.empty(torch.cuda.get_device_properties(0).total_memory // 4, dtype=torch.uint8, device='cuda')\n"
        "except torch.OutOfMemoryError: print('out of memory')"
    )
    given = os.environ | {"PYTORCH_ALLOC_CONF": "per_process_memory_fraction:0.2"}
    done = subprocess.run([sys.executable, "-c", program], env=given, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["0.2", "out of memory"], done.stderr
