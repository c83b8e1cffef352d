"""`midog-lora COMMAND`: the commands of `python -m inference` and of `python -m training` under one name."""

from __future__ import annotations

import sys

from inference.__main__ import COMMANDS as INFERENCE
from inference.__main__ import main as inference_main
from inference.commandline import run

from .__main__ import COMMANDS as TRAINING
from .__main__ import main as training_main

DESCRIPTION = "Atypical or normal: train an ensemble of LoRA folds, and classify mitotic figures with it."


def main() -> int:
    """Pass the command to the program that has it; no name is in both."""
    if sys.argv[1:] in ([], ["-h"], ["--help"], ["--version"]):
        return run("midog-lora", DESCRIPTION, INFERENCE | TRAINING, sys.argv[1:] or ["--help"])
    return training_main() if sys.argv[1] in TRAINING else inference_main()
