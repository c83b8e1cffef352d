"""Another phase is another file: a made-up one, with swapped classes, through build, harness and job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from inference.checks import docker
from inference.errors import UserError
from inference.phase import DEFAULT, VARIABLE, load_phase
from test.support.programs import make_stack

ROOT = Path(__file__).resolve().parents[2]
OTHER = ROOT / "test/sample/phase.json"


def run_local(stack: Path, output: Path, weights: Path, phase: Path = DEFAULT) -> subprocess.CompletedProcess[str]:
    options = ["--engine", "native", "--no-build", "--weights", weights, "--input", stack, "--output", output]
    command = [sys.executable, "-m", "test.harness", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {VARIABLE: str(phase)}, capture_output=True, text=True)


def test_harness_and_job_follow_the_file(tmp_path: Path, miniature: Path) -> None:
    stack = make_stack(tmp_path / "stack.tiff")
    for name, phase in (("ours", DEFAULT), ("theirs", OTHER)):
        done = run_local(stack, tmp_path / name, miniature, phase)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"phase {load_phase(phase).name}" in (tmp_path / name / "stdout.log").read_text()
    ours = json.loads((tmp_path / "ours" / load_phase(DEFAULT).output).read_text())
    theirs = json.loads((tmp_path / "theirs/other-answers.json").read_text())
    assert [answer["confidence"] for answer in theirs] == [1 - answer["confidence"] for answer in ours]
    words = {"normal": "typical", "atypical": "unusual"}
    assert [answer["class"] for answer in theirs] == [words[answer["class"]] for answer in ours]
    done = run_local(make_stack(tmp_path / "long.tiff", 6), tmp_path / "long", miniature, OTHER)
    assert done.returncode == 1 and "has 6 pages; expected 2 to 5 in a made-up phase" in done.stdout


def test_build_puts_the_file_into_the_image(tmp_path: Path) -> None:
    """With a client that keeps what it is given."""
    client = tmp_path / "docker"
    client.write_text(
        "#!/bin/sh\n"
        f'case "$*" in "build --platform"*) echo "$*" >{tmp_path}/call; cat >{tmp_path}/context.tar ;; esac\n'
    )
    client.chmod(0o755)
    command = [str(ROOT / "build.sh"), "--engine", "docker", "--ensemble", "weights/lite0"]
    environment = os.environ | {"DOCKER": str(client), VARIABLE: "test/sample/phase.json"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--build-arg PHASE=test/sample/phase.json" in (tmp_path / "call").read_text()
    with tarfile.open(tmp_path / "context.tar") as context:
        content = context.extractfile("test/sample/phase.json")
        assert content is not None and content.read() == OTHER.read_bytes()
    done = subprocess.run(command, env=environment | {VARIABLE: "/etc/phase.json"}, capture_output=True, text=True)
    assert done.returncode == 1 and "lies outside" in done.stderr


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.skipif(docker() is None, reason="no Docker engine answers (release/engine.sh start)")
def test_an_image_built_for_it_runs(tmp_path: Path) -> None:
    """Only the last layers are new."""
    image = f"midog-lora-phase-{os.getpid()}"
    environment = os.environ | {VARIABLE: "test/sample/phase.json", "IMAGE": image}
    stack = make_stack(tmp_path / "stack.tiff")
    try:
        build = [str(ROOT / "build.sh"), "--engine", "docker"]
        subprocess.run(build, env=environment, check=True, capture_output=True)
        options = ["--image", image, "--input", str(stack), "--output", str(tmp_path / "out")]
        command = [sys.executable, "-m", "test.harness", *options]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    finally:
        subprocess.run([str(docker()), "image", "rm", "--force", image], capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = json.loads((tmp_path / "out/other-answers.json").read_text())
    assert {answer["class"] for answer in answers} <= {"typical", "unusual"}
    assert "phase a made-up phase" in (tmp_path / "out/stdout.log").read_text()


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("output", "classes", ["a", "b", "c"], "expected two words"),
        ("output", "classes", ["a", "a"], "expected two words"),
        ("output", "classes", 3, "expected two words"),
        ("output", "positive", "c", "expected one of the classes"),
        ("output", "file", "../answers.json", "without /"),
        ("input", "slug", ".hidden", "without /"),
        ("input", "slug", ["x"], "one line of text"),
        ("input", "pages", [5, 2], "fewest and the most"),
        ("input", "pages", [True, 2], "fewest and the most"),
        ("input", "suffixes", [], "a list such as"),
        ("input", "suffixes", "tiff", "a list such as"),
        ("input", "more", 1, "other keys in input"),
    ],
)
def test_a_wrong_phase_is_refused_in_one_line(tmp_path: Path, section: str, key: str, value: Any, message: str) -> None:
    content = json.loads(OTHER.read_text())
    content[section][key] = value
    (tmp_path / "phase.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        load_phase(tmp_path / "phase.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [None, "[]", "{", "{}"])
def test_a_job_without_its_phase_ends_in_one_line(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "phase.json").write_text(text)
    environment = os.environ | {VARIABLE: str(tmp_path / "phase.json")}
    done = subprocess.run(
        [sys.executable, "-m", "inference"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
