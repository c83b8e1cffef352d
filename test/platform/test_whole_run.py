"""The whole run, as before a submission: 20 stacks in 20 containers, checked and scored; then a server for some."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inference.example.figures import FIGURES, draw
from test.harness import engines, served
from test.harness.layout import ANSWER
from test.support import stacks

ROOT = Path(__file__).resolve().parents[2]
IMAGE = os.environ.get("IMAGE", "midog-lora")
AMI_BR = ROOT.parent / "shared/data/ami-br"

pytestmark = [
    pytest.mark.docker,
    pytest.mark.skipif(engines.docker() is None, reason="no Docker engine answers (release/engine.sh start)"),
    pytest.mark.skipif(engines.inspect(IMAGE) is None, reason=f"no image {IMAGE} (./build.sh)"),
]


def run_local(*options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [ROOT / "test/run_local.sh", "--engine", "docker", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 stacks with their ground truth: AMi-Br where it lies beside the repository, drawn figures elsewhere."""
    folder = tmp_path_factory.mktemp("stacks")
    source = AMI_BR
    if not (source / "Atypical").is_dir():
        rng, source = np.random.default_rng(0), tmp_path_factory.mktemp("crops")
        for label, kinds in FIGURES.items():
            (source / label.capitalize()).mkdir()
            for k in range(160):
                crop = Image.fromarray(draw(list(kinds)[k % len(kinds)], rng, stain=k % 4))
                crop.save(source / label.capitalize() / f"{label}_{k}.png")
    assert stacks.main(["labelled", str(source), "--output", str(folder), "--limit", "312"]) == 0  # the last has 8
    return folder


def test_twenty_stacks_pass_and_are_scored(folder: Path, tmp_path: Path) -> None:
    truth = folder / "ground_truth.json"
    done = run_local("--image", IMAGE, "--input", folder, "--truth", truth, "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 of 20 stacks passed every check" in done.stdout
    aggregates = json.loads((tmp_path / "metrics.json").read_text())["aggregates"]
    assert aggregates["overall_roc_auc"] > 0.5
    assert [len(json.loads((tmp_path / f"stack_{k}" / ANSWER).read_text())) for k in (0, 18, 19)] == [16, 16, 8]


@pytest.fixture(scope="module")
def server_image() -> Iterator[str]:
    """The same image with the other label and command; its layers are there already."""
    tag = f"{IMAGE}-invoke-test"
    about = engines.inspect(IMAGE)
    assert about
    lines = f'FROM {IMAGE}\nLABEL {served.LABEL}=invoke\nCMD ["serve", "--host", "0.0.0.0"]\n'
    client = engines.docker() or "docker"
    subprocess.run([client, "build", "--quiet", "--tag", tag, "-"], input=lines, text=True, check=True)
    yield tag
    subprocess.run([client, "image", "rm", "--force", tag], capture_output=True)


def test_one_server_answers_as_jobs_do(server_image: str, folder: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for k in (0, 19, 1):
        (few / f"stack_{k}.tiff").symlink_to(folder / f"stack_{k}.tiff")
    answers = []
    for image in (IMAGE, server_image):
        output = tmp_path / image
        done = run_local("--image", image, "--input", few, "--output", output)
        assert done.returncode == 0, done.stdout + done.stderr
        answers.append([(output / f"stack_{k}" / ANSWER).read_bytes() for k in (0, 1, 19)])
    assert "one server for all" in done.stdout
    assert answers[0] == answers[1]


def test_the_label_decides(server_image: str) -> None:
    done = run_local("--image", server_image, "--api", "exec")
    assert done.returncode == 2
    assert f"{server_image} is labelled invoke, and the platform follows the label" in done.stderr


def test_dockerfile_pairs_label_and_command() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "FROM job AS job-exec\nLABEL org.grand-challenge.api-method=exec\n\n" in text
    assert (
        'FROM job AS job-invoke\nLABEL org.grand-challenge.api-method=invoke\nCMD ["serve", "--host", "0.0.0.0"]'
        in text
    )
    assert text.endswith("FROM job-${API_METHOD}\n")
