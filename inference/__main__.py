"""`python -m inference`: the job that the platform starts, or another command; see --help."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from .commandline import Command, run
from .exits import FAILED, INTERRUPTED, describe

DESCRIPTION = """Atypical or normal: classify mitotic figures with an ensemble of LoRA folds.

Without a command, `job` runs: python -m inference --input DIR --output DIR"""
PACKAGE = __package__  # "midog_lora.inference" where it is installed
COMMANDS = {
    "job": Command(f"{PACKAGE}.job", "classify the stack in /input and write the platform's JSON file to /output"),
    "score": Command(f"{PACKAGE}.scoring.command", "score any crops: P(atypical) as a CSV file and an HTML report"),
    "cluster": Command(f"{PACKAGE}.cluster.command", "the same on a Ray cluster, for 10^5 crops and more"),
    "crops": Command(f"{PACKAGE}.slides.crops", "cut crops from whole slides, one PNG file per detection"),
    "slides": Command(
        f"{PACKAGE}.slides.classify", "classify detections on whole slides, with QuPath's GeoJSON in and out"
    ),
    "serve": Command(f"{PACKAGE}.serve", "keep the ensemble loaded and answer requests over HTTP"),
    "example": Command(f"{PACKAGE}.example.command", "write drawn crops, a stack and a slide to try all this with"),
    "doctor": Command(f"{PACKAGE}.doctor", "check this machine and an ensemble, with a fix for each problem"),
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
    os._exit(code)  # skips PyTorch's teardown, 0.3 s of every job; the answers are on disk
