"""`python -m inference`: one job as the platform starts it, or one of the other commands; see --help."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from . import job  # noqa: F401  (the clock of a job starts here)
from .commandline import Command, run
from .exits import FAILED, INTERRUPTED, describe

DESCRIPTION = """Atypical or normal: classify mitotic figures with an ensemble of LoRA folds.

Without a command, `job` takes the options: python -m inference --input DIR --output DIR"""
COMMANDS = {
    "job": Command("inference.job", "answer the stack in /input with a JSON file in /output, as the platform asks"),
    "score": Command("inference.scoring.command", "P(atypical) of any crops, as a CSV file and as a page to look at"),
    "crops": Command("inference.slides.command", "cut crops from whole slides, one PNG file for each detection"),
    "slides": Command("inference.slides.classify", "classify detections on whole slides, from QuPath and for QuPath"),
    "serve": Command("inference.serve", "keep the ensemble loaded and answer tasks over HTTP"),
    "doctor": Command("inference.doctor", "check this machine and an ensemble; each problem comes with its fix"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return run(
            "python -m inference", DESCRIPTION, COMMANDS, sys.argv[1:] if arguments is None else arguments, "job"
        )
    except Exception as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)  # without PyTorch's teardown, which took 0.3 s of every job; the answer is on disk
