"""run_local checks the image that it runs, and starts it once with its own command; the engine is played here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from inference.checks import Check
from test.harness import __main__ as command_line
from test.harness import engines, images, served
from test.support.programs import WRITE, make_stack

ABOUT = {"Architecture": "amd64", "Config": {"User": "user", "Entrypoint": ["python", "-m", "inference"]}}


@pytest.mark.parametrize("details", [True, False])
def test_the_command_is_the_images_own_unless_details_are_asked_for(
    details: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def run(image: str, folder: Path, job: dict[str, Any], *_: object) -> tuple[float, int, str]:
        given.update(job)
        return 0.0, 1, ""

    monkeypatch.setattr(engines, "inspect", lambda image: ABOUT)
    monkeypatch.setattr(engines, "run_container", run)
    engines.run_docker("ours", tmp_path, "pk", None, engines.Limits(), details)
    assert given["command"] == ["python", *engines.OURS, *details * ["--details", "/tmp/details.json"]]


@pytest.mark.parametrize(
    ("finding", "code"), [(Check("PASS", "architecture amd64"), 0), (Check("FAIL", "the container runs as root"), 1)]
)
def test_a_failed_check_of_the_image_fails_the_run(
    finding: Check, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []

    def run(_: str, folder: Path, pk: str, weights: None, limits: engines.Limits, details: bool) -> engines.Run:
        asked.append(details)
        return engines.run_native(
            folder, pk, weights, limits, [sys.executable, "-c", WRITE, "{input}", "{output}", "{tmp}"]
        )

    monkeypatch.setattr(engines, "docker", lambda: "docker")
    monkeypatch.setattr(engines, "run_docker", run)
    monkeypatch.setattr(images, "check", lambda image: [finding])
    monkeypatch.setattr(served, "api_method", lambda image: "exec")
    stack = make_stack(tmp_path / "stack_0.tiff")
    options = ["--engine", "docker", "--image", "theirs", "--input", str(stack), "--output", str(tmp_path / "out")]
    assert command_line.main(options) == code
    said = capsys.readouterr().out
    assert str(finding) in said and "the image's own command, with nothing added, answers stack_0.tiff" in said
    assert asked == [False, True]


def test_an_image_that_only_starts_with_details_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: str, folder: Path, pk: str, weights: None, limits: engines.Limits, details: bool) -> engines.Run:
        program = WRITE if details else "raise SystemExit('details are needed')"
        return engines.run_native(
            folder, pk, weights, limits, [sys.executable, "-c", program, "{input}", "{output}", "{tmp}"]
        )

    monkeypatch.setattr(engines, "docker", lambda: "docker")
    monkeypatch.setattr(engines, "run_docker", run)
    monkeypatch.setattr(images, "check", lambda image: [])
    monkeypatch.setattr(served, "api_method", lambda image: "exec")
    stack = make_stack(tmp_path / "stack_0.tiff")
    options = ["--engine", "docker", "--image", "theirs", "--input", str(stack), "--output", str(tmp_path / "out")]
    assert command_line.main(options) == 1
    assert "exit code 1: details are needed" in capsys.readouterr().out


def test_two_stacks_of_one_name_keep_their_answers_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engines.run_native

    def run(folder: Path, pk: str, weights: None, limits: engines.Limits) -> engines.Run:
        return real(folder, pk, weights, limits, [sys.executable, "-c", WRITE, "{input}", "{output}", "{tmp}"])

    monkeypatch.setattr(engines, "run_native", run)
    for name in ("stack_0.tif", "stack_0.tiff"):
        make_stack(tmp_path / name)
    options = ["--engine", "native", "--no-build", "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    assert command_line.main(options) == 0
    folders = {file.parent.name for file in (tmp_path / "out").rglob("multiple*.json")}
    assert folders == {"stack_0.tif", "stack_0.tiff"}


def test_truth_of_one_class_fails_as_in_the_evaluator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engines.run_native

    def run(folder: Path, pk: str, weights: None, limits: engines.Limits) -> engines.Run:
        return real(folder, pk, weights, limits, [sys.executable, "-c", WRITE, "{input}", "{output}", "{tmp}"])

    monkeypatch.setattr(engines, "run_native", run)
    stack, truth = make_stack(tmp_path / "stack_0.tiff"), tmp_path / "truth.json"
    for labels, code in ((["normal"] * 3, 1), (["normal", "atypical", "normal"], 0)):
        entry = f'[{{"image": "stack_0.tiff", "labels": {labels}, "tumordomains": ["a", "a", "a"]}}]'
        truth.write_text(entry.replace("'", '"'))
        options = ["--engine", "native", "--no-build", "--input", str(stack), "--output", str(tmp_path / "out")]
        assert command_line.main([*options, "--truth", str(truth)]) == code
