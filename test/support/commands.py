"""Run a command of `python -m inference` in this process; a UserError passes through, as tests want to see it."""

from __future__ import annotations

import csv
from pathlib import Path

from inference.__main__ import COMMANDS
from inference.commandline import run


def inference(*arguments: object) -> int:
    """Exit code. SystemExit for options that argparse refuses."""
    return run("python -m inference", "", COMMANDS, [str(argument) for argument in arguments], "job")


def slides(weights: Path, *arguments: object) -> int:
    """`slides` on the CPU in fp32."""
    return inference("slides", *arguments, "--weights", weights, "--device", "cpu", "--precision", "fp32")


def rows_of(file: Path) -> list[dict[str, str]]:
    """A CSV file's rows by column."""
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))
