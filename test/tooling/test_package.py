"""The wheel in an empty environment: the command, the extras, and `from inference import Ensemble`."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import inference
from inference.__main__ import COMMANDS as INFERENCE
from training.__main__ import COMMANDS as TRAINING

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = """
from pathlib import Path
import sys
import inference
assert "torch" not in sys.modules  # the package alone is light
from inference import Ensemble
from inference.imageio.stack import read_stack

prediction = Ensemble.load(Path(sys.argv[1]), device="cpu").predict(read_stack(Path(sys.argv[2])))
print(inference.__file__)
print(prediction.p_atypical.shape, prediction.spread.shape)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("inference", "training", "requirements", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", ROOT / name, folder], check=True)  # the build writes beside its sources
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [file] = (folder / "dist").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment that holds the wheel; what it depends on is borrowed from this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    target = folder / "lib/python3.11/site-packages"
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (target / "borrowed.pth").write_text("\n".join(borrowed))
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, "--no-index", wheel], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def test_what_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [about] = [archive.read(name).decode() for name in names if name.endswith("METADATA")]
    for folder in ("inference", "training"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".pyc":
                assert path.relative_to(ROOT).as_posix() in names
    assert not any(name.startswith(("test/", "benchmarks/", "weights/")) for name in names)
    assert f"Version: {inference.__version__}\n" in about
    assert "Requires-Dist: torch==2.10.0\n" in about


def test_extras_are_the_requirement_files() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, packages in extras.items():
        lines = (ROOT / f"requirements/{name}.in").read_text().splitlines()
        assert packages == [line for line in lines if line and not line.startswith(("#", "-"))]


def test_the_command_has_all_commands(installed: Path, tmp_path: Path) -> None:
    assert not INFERENCE.keys() & TRAINING.keys()
    shown = subprocess.run([installed / "midog-lora"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for name in (*INFERENCE, *TRAINING):
        assert re.search(rf"^    {name}\s", shown.stdout, re.MULTILINE), name
    listed = subprocess.run([installed / "midog-lora", "datasets"], cwd=tmp_path, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    wrong = subprocess.run(
        [installed / "midog-lora", "score", "none.png"], cwd=tmp_path, capture_output=True, text=True
    )
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: ")


def test_the_sample_is_scored(installed: Path, miniature: Path, tmp_path: Path) -> None:
    stack, table = ROOT / "test/sample/stack_0.tiff", tmp_path / "scores.csv"
    command = [installed / "midog-lora", "score", stack, "--csv", table, "--weights", miniature, "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(table.read_text().splitlines()) == 17
    done = subprocess.run(
        [installed / "python", "-c", SAMPLE, miniature, stack], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    place, shapes = done.stdout.splitlines()
    assert Path(place).is_relative_to(installed.parent)  # not this repository
    assert shapes == "(16,) (16,)"
