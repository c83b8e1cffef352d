"""Long commands are never silent: one line on a terminal, and elsewhere a line every half minute."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inference import progress
from inference.progress import Progress, clock, speaking
from release.compress import compress
from test.support import commands
from test.support.processes import until


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_line_and_a_log_has_lines(eager: None) -> None:
    terminal, log = Terminal(), io.StringIO()
    for stream in (terminal, log):
        shown = Progress(10, "files", stream)
        shown.start -= 30  # half a minute ago
        shown.show(5, 5, 600)
        shown.clear()
    assert "━ 5 of 10 files" not in log.getvalue() and "5 of 10 files" in terminal.getvalue()
    assert "crops/s, 0:00:30 left" in terminal.getvalue() and terminal.getvalue().endswith("\r\x1b[K")
    assert re.fullmatch(r"5 of 10 files, (20\.0|19\.9) crops/s, 0:00:30 left\n", log.getvalue())


def test_a_log_is_told_the_latest_state_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.001)
    log = io.StringIO()
    shown = Progress(10, "maps", log, rate="maps")
    assert log.getvalue() == ""
    shown.show(0, 0, 0)
    until(lambda: "0 of 10 maps, 0.0 maps/s, 0:00:00 so far\n" in log.getvalue(), "the first line")
    shown.show(3, 3, 3)  # one step that takes long: the lines go on without another call
    until(lambda: log.getvalue().count("3 of 10 maps") > 2, "more lines")
    shown.clear()
    said = log.getvalue()
    shown.clear()
    assert log.getvalue() == said
    shown.show(4, 4, 4)
    until(lambda: "4 of 10 maps" in log.getvalue(), "a line after a pause")
    shown.clear()


def test_work_without_a_known_end_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.001)
    log = io.StringIO()
    with speaking("calibrating", log):
        until(lambda: log.getvalue().count("calibrating: 0:00:00 so far\n") > 1, "two lines")
    assert clock(3 * 3600 + 4 * 60 + 5.9) == "3:04:05"


def test_score_and_maps_speak(eager: None, miniature: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    for n, crop in enumerate(pixels):
        Image.fromarray(crop).save(tmp_path / f"{n}.png")
    report = tmp_path / "report.html"
    options = ["--weights", miniature, "--device", "cpu", "--report", report, "--attribution", 2]
    commands.inference("score", tmp_path, *options)
    said = capsys.readouterr().err
    assert "0 of 2 files, 0.0 crops/s" in said and "0 of 2 maps, 0.0 maps/s" in said


def test_compressing_an_image_speaks(eager: None, capsys: pytest.CaptureFixture[str]) -> None:
    compress(io.BytesIO(os.urandom(100)), io.BytesIO())
    assert capsys.readouterr().err == "compressing: 0:00:00 so far\n"
