"""The page of a local run: all answered stacks, with labels where the truth is known."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from test.harness.page import write_page
from test.harness.report import Result

SAMPLE = Path("test/sample/stack_0.tiff")


def result(answers: list[dict[str, Any]] | None) -> Result:
    details = {"threshold": 0.25, "pages": [{"fold_p": [0.1, 0.2, 0.3]}] * 16}
    return Result(SAMPLE, 16, SimpleNamespace(details=details), answers)  # type: ignore[arg-type]


def test_a_page_of_all_answered_stacks(tmp_path):
    answers = [{"class": "atypical", "confidence": n / 16} for n in range(16)]
    file = tmp_path / "report.html"
    line = write_page([result(answers), result(None)], SAMPLE.parent / "ground_truth.json", None, file)
    assert line == f"open {os.path.relpath(file)}"
    text = file.read_text()
    assert "Local run" in text
    assert "0.9375" in text  # the last page's answer


def test_no_page_without_answers(tmp_path):
    assert write_page([result(None)], None, None, tmp_path / "report.html") == "no report: no stack was answered"
    assert not (tmp_path / "report.html").exists()
