"""Run a command of `python -m inference` in this process; a UserError passes through, as tests want to see it."""

from __future__ import annotations

from inference.__main__ import COMMANDS
from inference.commandline import run


def inference(*arguments: object) -> int:
    """Exit code. SystemExit for options that argparse refuses."""
    return run("python -m inference", "", COMMANDS, [str(argument) for argument in arguments], "job")
