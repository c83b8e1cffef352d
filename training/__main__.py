"""`python -m training COMMAND`: from labelled crops to an ensemble folder that inference opens; see --help."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from inference.commandline import Command, run
from inference.errors import UserError
from inference.exits import FAILED

DESCRIPTION = "From labelled crops to an ensemble folder that inference opens."
PACKAGE = __package__  # "midog_lora.training" where it is installed
COMMANDS = {
    "base": Command(f"{PACKAGE}.fit.base", "fetch a backbone's base weights and convert them to safetensors"),
    "datasets": Command(f"{PACKAGE}.data.datasets", "list the known data sets, and check those that are here"),
    "augmented": Command(f"{PACKAGE}.report.augmented", "draw a picture of augmented crops, to look at"),
    "fit": Command(f"{PACKAGE}.fit.command", "train the folds of a recipe; resumes a run that was stopped"),
    "calibrate": Command(
        f"{PACKAGE}.ensemble.calibrate",
        "choose threshold, temperature and more: a run's out of fold, an ensemble's on held-out crops",
    ),
    "export": Command(f"{PACKAGE}.ensemble.export", "make an ensemble folder of runs and other ensembles"),
    "import": Command(f"{PACKAGE}.adapters.command", "make an ensemble folder of adapters that other programs trained"),
    "verify": Command(f"{PACKAGE}.ensemble.verify", "compare an ensemble with timm and PEFT, fold by fold"),
    "compare": Command(f"{PACKAGE}.ensemble.compare", "compare two ensembles, or their answers, on labelled crops"),
    "publish": Command(f"{PACKAGE}.ensemble.publish", "share an ensemble on the Hugging Face hub, in one commit"),
    "hubcard": Command(f"{PACKAGE}.ensemble.hubcard", "write the hub's part of the cards of ensembles again"),
    "report": Command(f"{PACKAGE}.report.page", "write the report of a run"),
    "sweep": Command(f"{PACKAGE}.report.sweep", "fit ranks x splits x backbones and write one table"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return run("python -m training", DESCRIPTION, COMMANDS, sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except ModuleNotFoundError as error:  # a .venv with a job's requirements only
        advice = f"run 'pip install {error.name}', or ./build.sh --engine native in a clone"
        print(f"error: package {error.name} is not installed; training needs it; {advice}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
