"""Both programs' command lines: every command is listed, only what is asked for is imported, a job needs no command."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from inference.__main__ import COMMANDS as INFERENCE
from training.__main__ import COMMANDS as TRAINING

PROGRAMS = {"inference": INFERENCE, "training": TRAINING}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_lists_every_command_with_its_line(program: str) -> None:
    said = " ".join(python("-m", program, "--help").stdout.split())
    for name, command in PROGRAMS[program].items():
        assert f"{name} {' '.join(command.line.split())}" in said


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_takes_options_and_runs(program: str) -> None:
    for command in PROGRAMS[program].values():
        module = importlib.import_module(command.module)
        assert callable(module.configure) and callable(module.run)


def test_a_command_imports_its_own_module_only() -> None:
    program = (
        "import sys; sys.argv = ['x', 'doctor', '--help']; import inference.__main__ as m\n"
        "try: m.main()\nexcept SystemExit: pass\n"
        "print(*sorted(n for n in sys.modules if n.startswith('inference.')), file=sys.stderr)"
    )
    loaded = python("-c", program).stderr.split()
    assert "inference.doctor" in loaded
    assert not {"inference.serve", "inference.scoring.command", "inference.slides.crops", "torch"} & set(loaded)


def test_without_a_command_it_is_a_job() -> None:
    done = python("-m", "inference", "--input", "/nonexistent", "--output", "/nonexistent", "--weights", "/nonexistent")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert python("-m", "inference", "--nothing").returncode == 2
    assert python("-m", "training").returncode == 2


BARE = """
import sys
from importlib import import_module
sys.path.insert(0, "")
program, command = sys.argv[1:]
import_module(program + ".__main__").main([command, "--help"])
"""


@pytest.mark.parametrize(("program", "command"), [(p, c) for p, commands in PROGRAMS.items() for c in commands])
def test_help_needs_nothing_but_python(program: str, command: str) -> None:
    """-I -S: no site-packages, so neither numpy nor torch can be imported."""
    done = python("-I", "-S", "-c", BARE, program, command)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("usage: ") and "--help" in done.stdout
