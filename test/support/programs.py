"""Small programs that stand in for the job in tests, and a way to run one as the platform would (natively)."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

from PIL import Image

from inference.checks import Check
from test.harness import engines, layout, readout
from test.support.stacks import write_stack

GOOD = """
import json, os, sys
source, target = sys.argv[1:3]
answers = [{"class": "normal", "confidence": k / 10} for k in range(3)]
path = target + "/multiple-mitotic-figure-classification.json"
"""
WRITE = GOOD + "json.dump(answers, open(path, 'w'))\n"
Outcome = tuple[engines.Run, "list[dict[str, object]] | None", list[Check]]


def make_stack(path: Path, pages: int = 3) -> Path:
    """A stack of grey pages, 8 x 8."""
    write_stack(path, [Image.new("RGB", (8, 8), (k, k, k)) for k in range(pages)])
    return path


def run_program(folder: Path, program: str, weights: Path | None = None, **limits: float) -> Outcome:
    """Runs a Python program (arguments: input, output, tmp) on a stack of three pages, and judges it."""
    stack = make_stack(folder / "stack_12.tiff")
    pk = layout.write_input(stack, folder / "job/input", "2026", Random(0))
    command = [sys.executable, "-c", program, "{input}", "{output}", "{tmp}"]
    allowed = engines.Limits(**{"seconds": 60, **limits})  # type: ignore[arg-type]
    run = engines.run_native(folder / "job", pk, weights, allowed, command)
    return run, *readout.judge(run, layout.count_pages(stack))


def messages(findings: list[Check], level: str = "FAIL") -> str:
    """The messages of one level, a line each."""
    return "\n".join(finding.message for finding in findings if finding.level == level)
