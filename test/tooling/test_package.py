"""The wheel in an empty environment and an empty folder: the command, the extras, and the library."""

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
import midog_lora
assert "torch" not in sys.modules  # the package alone is light
from midog_lora import Ensemble
from midog_lora.inference.imageio.stack import read_stack

prediction = Ensemble.load(sys.argv[1], device="cpu").predict(read_stack(Path(sys.argv[2])))
print(midog_lora.__file__)
print(prediction.p_atypical.shape, prediction.spread.shape)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("inference", "training", "release", "requirements", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", ROOT / name, folder], check=True)  # the build writes beside its sources
    subprocess.run(["cp", ROOT / "setup.py", ROOT / "MANIFEST.in", folder], check=True)
    (folder / "weights").mkdir()
    subprocess.run(["cp", "-r", ROOT / "weights/default", folder / "weights"], check=True)
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
    for folder in ("inference", "training", "release", "weights/default"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".pyc", ".sh"):
                assert f"midog_lora/{path.relative_to(ROOT).as_posix()}" in names
    assert {name.partition("/")[0] for name in names} == {"midog_lora", f"midog_lora-{inference.__version__}.dist-info"}
    assert not any(name.startswith("midog_lora/weights/bases") for name in names)
    assert wheel.stat().st_size < 25e6
    assert f"Version: {inference.__version__}\n" in about
    assert "Requires-Dist: torch==2.10.0\n" in about


def test_no_common_name_is_claimed(installed: Path, tmp_path: Path) -> None:
    for name in ("inference", "training", "release"):
        done = subprocess.run(
            [installed / "python", "-c", f"import {name}"], cwd=tmp_path, capture_output=True, text=True
        )
        assert f"No module named '{name}'" in done.stderr
    every = "import pkgutil, importlib, midog_lora as m\n" + (
        "for p in pkgutil.walk_packages(m.__path__, 'midog_lora.'):\n"
        "    if not p.name.endswith('__main__'): importlib.import_module(p.name)"
    )
    done = subprocess.run([installed / "python", "-c", every], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_bundled_ensemble_has_a_name(installed: Path, tmp_path: Path) -> None:
    shown = subprocess.run([installed / "midog-lora", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.stdout == f"midog-lora {inference.__version__}\n"
    home = {"XDG_DATA_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [installed / "midog-lora", "score", ROOT / "test/sample/stack_0.tiff", "--csv", "scores.csv"]
    without = subprocess.run(command, cwd=tmp_path, env=home, capture_output=True, text=True)
    assert without.returncode == 1 and "make them with 'midog-lora base" in without.stderr
    (tmp_path / "midog-lora").mkdir()
    (tmp_path / "midog-lora/bases").symlink_to(ROOT / "weights/bases")
    stack = str(ROOT / "test/sample/stack_0.tiff")
    done = subprocess.run(
        [installed / "python", "-c", SAMPLE, "default", stack], cwd=tmp_path, env=home, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_extras_are_the_requirement_files() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, packages in extras.items():
        file = "project" if name == "train" else name
        lines = (ROOT / f"requirements/{file}.in").read_text().splitlines()
        named = [line for line in lines if line and not line.startswith(("#", "-"))]
        assert packages == [line for line in named if line != "SimpleITK"]  # the harness has it, which is not installed


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
