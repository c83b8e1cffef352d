"""The command line of the training side: `python -m training COMMAND`.

Each command is a module with `configure(parser)` and `run(options)`, imported only when asked for.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from inference.errors import UserError

COMMANDS = {
    "base": "bring a backbone's base weights and convert them to safetensors",
    "datasets": "list the known data sets, and check those that are here",
    "augmented": "draw a picture of augmented crops, to look at",
    "fit": "train the folds of a recipe; goes on where it stopped",
    "calibrate": "choose TTA, averaging, temperature and threshold on out-of-fold logits",
    "export": "write an ensemble folder that inference opens",
    "report": "write the report of a run",
    "sweep": "fit ranks x splits x backbones and write one table",
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:  # .venv of a job's requirements alone
        advice = "run ./build.sh --engine native --requirements requirements/train.txt"
        print(f"error: package {error.name} is not installed; training needs it; {advice}", file=sys.stderr)
        return 1
    return 0


def run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if arguments[:1] == [name]:
            importlib.import_module(f".{name}", __package__).configure(sub)
    options = parser.parse_args(arguments)
    importlib.import_module(f".{options.command}", __package__).run(options)


if __name__ == "__main__":
    sys.exit(main())
