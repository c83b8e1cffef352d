"""Seconds of a cold start on this machine, by member and views: real jobs on a stack of real crops."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inference.contract import SLUG
from inference.errors import UserError

from .joint import Choice

ROOT = Path(__file__).resolve().parents[2]
CROPS = 16  # of a stack
REPEATS = 3


@dataclass(frozen=True)
class Seconds:
    """start: of a job, without its members; members: by member and views."""

    start: float
    members: Sequence[dict[str, float]]

    def of(self, choice: Choice) -> float:
        """Expected seconds per stack of a choice."""
        return self.start + sum(self.members[m][tta] for m, tta in zip(choice.members, choice.tta, strict=True))


def write_job(folder: Path, crops: Sequence[np.ndarray]) -> Path:
    """A job's input folder with one stack of crops, each uint8 (H, W, 3)."""
    images = folder / "images" / SLUG
    images.mkdir(parents=True)
    pages = [Image.fromarray(crop) for crop in crops]
    pages[0].save(images / "stack.tiff", save_all=True, append_images=pages[1:])
    listing = [{"interface": {"slug": SLUG}, "image": {"name": "stack.tiff"}}]
    (folder / "inputs.json").write_text(json.dumps(listing))
    return folder


def cold_start(ensemble: Path, job: Path, device: str) -> tuple[float, dict[str, Any]]:
    """Wall seconds of a fresh process that answers the job, and its details. UserError where it fails."""
    output = job.parent / "answers"
    output.mkdir(exist_ok=True)
    details = output / "details.json"
    command = [
        sys.executable,
        "-m",
        f"{__name__.partition('training.')[0]}inference",
        f"--input={job}",
        f"--output={output}",
        f"--weights={ensemble}",
        f"--device={device}",
        f"--details={details}",
    ]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"a job with the members failed ({done.stderr.strip()}); expected answers; see what it lacks")
    return time.perf_counter() - start, json.loads(details.read_text())


def median_cold_start(ensemble: Path, job: Path, device: str) -> float:
    return float(np.median([cold_start(ensemble, job, device)[0] for _ in range(REPEATS)]))
