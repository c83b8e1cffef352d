"""Programs with several commands: used by both `python -m inference` and `python -m training`.

A command is a module with `configure(parser)` and `run(options)`; `run` returns an exit code, or None for 0. Only the
module of the requested command is imported. Standard library only.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .manifest import MODEL_TARBALL, PRECISIONS

DEVICES = ("auto", "cuda", "cpu")


class Command(NamedTuple):
    """The module that implements a command, and its line in --help."""

    module: str
    line: str


def run(
    program: str, description: str, commands: Mapping[str, Command], arguments: Sequence[str], default: str = ""
) -> int:
    """Parse `arguments`, import the command's module and run it. Without a command, `default` takes the arguments.

    Exits as argparse does for --help and, with code 2, for unknown options.
    """
    arguments = list(arguments)
    if default and (not arguments or arguments[0] not in (*commands, "-h", "--help")):
        arguments.insert(0, default)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=program, description=description, formatter_class=formatter)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, command in commands.items():
        sub = subparsers.add_parser(name, help=command.line, description=command.line)
        if arguments[:1] == [name]:
            importlib.import_module(command.module).configure(sub)
    options = parser.parse_args(arguments)
    return importlib.import_module(commands[options.command].module).run(options) or 0


def add_ensemble_options(parser: argparse.ArgumentParser, *, hub: bool = False) -> None:
    """--weights, --device and --precision, as every command that predicts takes them.

    hub: whether --weights also takes the name of an ensemble on the Hugging Face hub; see `inference.hub.local_folder`
    """
    kinds = "ensemble folder, or hf-hub:USER/NAME@REVISION" if hub else "ensemble folder"
    about = f"{kinds} (default: the model uploaded to {MODEL_TARBALL}, else the bundled ensemble)"
    parser.add_argument("--weights", type=Path, metavar="DIR", help=about)
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: the GPU if there is one")
    parser.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="auto: the hardware's fast precision if the ensemble allows it, else fp32",
    )
