"""The doctor says what is wrong with a machine or an ensemble, and how to fix it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from inference import doctor
from test.support import commands
from test.support.miniature import make_ensemble

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    make_ensemble(folder)
    return folder


def lines(check: object) -> list[str]:
    return [str(line) for line in check]  # type: ignore[attr-defined]


def test_a_good_ensemble_passes(ensemble: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.inference(*["doctor", "--weights", str(ensemble)]) == 0
    said = capsys.readouterr().out
    assert "PASS  ensemble miniature: 3 folds on efficientnet-lite0" in said
    assert "PASS  base weights" in said
    assert "a job would compute on " in said
    assert said.splitlines()[-1].endswith("0 FAIL")


def test_altered_and_missing_weights_fail(ensemble: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", ensemble, folder], check=True)
    (folder / "fold1/adapter_model.safetensors").write_bytes(b"x")
    assert commands.inference(*["doctor", "--weights", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "FAIL" in said
    assert "fold1/adapter_model.safetensors has SHA-256" in said
    (folder / "base.safetensors").unlink()
    assert "base weights base.safetensors not found" in lines(doctor.check_ensemble(folder))[0]
    [none] = lines(doctor.check_ensemble(tmp_path))
    assert none.startswith("FAIL  ensemble: none in")
    assert "Fix: name one with --weights" in none


@pytest.mark.parametrize(
    ("line", "cuda", "level", "part"),
    [
        (
            "Tesla T4, 535.183.01, 15360",
            "12.8",
            "PASS",
            "Tesla T4, 15 GiB, driver 535.183.01, new enough for CUDA 12.8",
        ),
        ("Tesla T4, 525.60.13, 15360", "12.8", "PASS", "new enough"),
        ("Tesla T4, 470.57.02, 15360", "12.8", "FAIL", "Fix: update the driver to 525.60 or later"),
        ("H100, 570.10, 81559", "13.0", "FAIL", "too old for CUDA 13.0"),
        ("H100, 570.10, 81559", None, "FAIL", "this PyTorch has no CUDA"),
        ("GB10, 580.95, [N/A]", "12.8", "PASS", "GB10, memory unknown, driver 580.95, new enough"),
    ],
)
def test_driver_against_the_cuda_build(line: str, cuda: str | None, level: str, part: str) -> None:
    [said] = lines(doctor.check_driver(line, cuda))
    assert said.startswith(level)
    assert part in said


@pytest.mark.parametrize(("total", "free", "level"), [(64, 60, "PASS"), (8, 6, "WARN"), (16, 1, "FAIL")])
def test_memory(total: int, free: int, level: str) -> None:
    [said] = lines(doctor.check_memory(f"MemTotal: {total << 20} kB\nMemAvailable: {free << 20} kB\n"))
    assert said.startswith(level)


@pytest.mark.parametrize(("free", "level"), [(100, "PASS"), (20, "WARN"), (2, "FAIL")])
def test_disk(free: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free * 1e9}))
    [said] = lines(doctor.check_disk())
    assert said.startswith(level)


def test_no_engine_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "docker", lambda: None)
    [said] = lines(doctor.check_engine())
    assert said.startswith("WARN  container engine: none found. Fix: start Docker")


def test_a_gpu_that_pytorch_cannot_use_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.device.gpu_is_present", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "run", lambda *_: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    said = lines(doctor.check_gpu(None))
    assert any(line.startswith("FAIL  GPU: there is a device, but nvidia-smi fails") for line in said)
    assert any(line.startswith("FAIL  a job would stop: found a GPU that PyTorch cannot use") for line in said)


def test_it_runs_without_any_package(tmp_path: Path) -> None:
    """Where nothing is installed it says so, and does not fail on an import."""
    command = [sys.executable, "-S", "-m", "inference", "doctor", "--weights", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"DOCKER": "/bin/false"})
    assert done.returncode == 1
    assert "FAIL  PyTorch: not installed" in done.stdout
    assert done.stderr == ""
