"""`python -m training COMMAND`: from labelled crops to an ensemble folder that inference opens; see --help."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from inference.commandline import Command, run
from inference.errors import UserError
from inference.exits import FAILED

DESCRIPTION = "From labelled crops to an ensemble folder that inference opens."
COMMANDS = {
    "base": Command("training.base", "fetch a backbone's base weights and convert them to safetensors"),
    "datasets": Command("training.datasets", "list the known data sets, and check those that are here"),
    "augmented": Command("training.augmented", "draw a picture of augmented crops, to look at"),
    "fit": Command("training.fit", "train the folds of a recipe; resumes a run that was stopped"),
    "calibrate": Command("training.calibrate", "choose TTA, averaging, temperature and threshold, out of fold"),
    "export": Command("training.export", "write an ensemble folder that inference opens"),
    "verify": Command("training.verify", "compare an ensemble with timm and PEFT, fold by fold"),
    "combine": Command("training.combine", "make one ensemble of the members of several runs and ensembles"),
    "publish": Command("training.publish", "share an ensemble on the Hugging Face hub, in one commit"),
    "hubcard": Command("training.hubcard", "write the hub's part of the cards of ensembles again"),
    "report": Command("training.report", "write the report of a run"),
    "sweep": Command("training.sweep", "fit ranks x splits x backbones and write one table"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return run("python -m training", DESCRIPTION, COMMANDS, sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except ModuleNotFoundError as error:  # a .venv with a job's requirements only
        advice = "run ./build.sh --engine native --requirements requirements/train.txt"
        print(f"error: package {error.name} is not installed; training needs it; {advice}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
