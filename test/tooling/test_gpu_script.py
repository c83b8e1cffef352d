"""test/run_gpu.sh without a GPU: it says so and ends; what it compares is compared on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from test import gpu

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_gpu_it_ends_with_one_line() -> None:
    given = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([ROOT / "test/run_gpu.sh"], env=given, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "no GPU that PyTorch can use; expected an NVIDIA GPU and its driver; run on such a machine\n"
    )


def test_started_in_another_way_it_ends_with_one_line() -> None:
    done = subprocess.run([sys.executable, "-I", ROOT / "test/gpu.py"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "run ./test/run_gpu.sh" in done.stderr


def test_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    crops = list(np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), np.uint8))
    for allowed, well in ((1e-3, True), (-1.0, False)):
        monkeypatch.setattr(gpu, "ALLOWED", {"fp32": allowed})
        assert gpu.compare("efficientnet-lite0", crops, "cpu") == well
        assert capsys.readouterr().out.split() == ["efficientnet-lite0", "0.00000", *["TOO", "FAR"] * (not well)]
