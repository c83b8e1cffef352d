"""Programs with several commands: used by both `python -m inference` and `python -m training`.

A command is a module with `configure(parser)` and `run(options)`; `run` returns an exit code, or None for 0. Only the
module of the requested command is imported. Standard library only.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NamedTuple

from . import __version__
from .errors import UserError
from .manifest import MODEL_TARBALL, PRECISIONS, ensemble_folder

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
    if default and (not arguments or arguments[0] not in (*commands, "-h", "--help", "--version")):
        arguments.insert(0, default)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=program, description=description, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"midog-lora {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, command in commands.items():
        sub = subparsers.add_parser(name, help=command.line, description=command.line)
        if arguments[:1] == [name]:
            try:
                module = importlib.import_module(command.module)
            except ModuleNotFoundError:
                if not {"-h", "--help"} & set(arguments):
                    raise
                sys.meta_path.append(Absent())
                module = importlib.import_module(command.module)
            module.configure(sub)
    options = parser.parse_args(arguments)
    return importlib.import_module(commands[options.command].module).run(options) or 0


class Absent:
    """Finds the packages that are not installed, so that --help needs nothing but Python; it exits right after.

    The last finder that is asked. All names in what it finds are mocks, which modules may call, derive from and join.
    """

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        known = sys.stdlib_module_names | {"inference", "training", "release", __name__.partition(".")[0]}
        return None if name.partition(".")[0] in known else ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]  # a Loader's two methods

    def create_module(self, spec: ModuleSpec) -> None:
        """None: the import system makes an ordinary module."""

    def exec_module(self, module: ModuleType) -> None:
        from unittest.mock import MagicMock

        vars(module)["__getattr__"] = lambda name: MagicMock()


def add_ensemble_options(parser: argparse.ArgumentParser, *, hub: bool = False) -> None:
    """--weights, --device and --precision, as every command that predicts takes them.

    hub: whether --weights also takes the name of an ensemble on the Hugging Face hub; see `inference.hub.local_folder`
    """
    kinds = "ensemble folder or `default`" + (", or hf-hub:USER/NAME@REVISION" if hub else "")
    help_ = f"{kinds} (default: the model uploaded to {MODEL_TARBALL}, else the bundled ensemble)"
    parser.add_argument("--weights", type=ensemble_folder, metavar="DIR", help=help_)
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: the GPU if there is one")
    parser.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="auto: the hardware's fast precision if the ensemble allows it, else fp32",
    )


def add_cluster_options(parser: argparse._ActionsContainer, default: str | None = None) -> None:
    """--ray and --workers, as every command that uses a cluster takes them."""
    where = f" (default: {default})" if default else ""
    help_ = f"address of a Ray cluster, or `local`: all of this machine{where}; see docs/clusters.md"
    parser.add_argument("--ray", default=default, metavar="ADDRESS", help=help_)
    help_ = "processes (default: one per GPU; without GPUs one per four cores)"
    parser.add_argument("--workers", type=count, metavar="N", help=help_)


def count(text: str) -> int:
    """The value of an option that counts something, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a whole number, 1 or more; correct it")
    return int(text)


def require(lock: str, *packages: str) -> None:
    """UserError where a package that `requirements/LOCK.txt` lists cannot be imported."""
    for name in packages:
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:
            raise UserError(
                f"{name} is not installed ({error}); expected what requirements/{lock}.txt lists; run "
                f"./build.sh --engine native --requirements requirements/{lock}.txt in a clone, or else pip install "
                f"'midog-lora[{lock}]'"
            ) from None
