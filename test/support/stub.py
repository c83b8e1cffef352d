"""A job in this process around an ensemble that computes nothing: for tests and fuzzers of everything else in a job."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from inference import __main__ as command
from inference.contract import OUTPUT, SLUG, check_answers
from inference.manifest import load_manifest

FILES = ("adapter_config.json", "adapter_model.safetensors")
LISTING = [{"interface": {"slug": SLUG}, "image": {"name": "stack_0.tiff"}}]


def make_input(folder: Path, content: bytes, name: str = "stack.tiff", listing: Any = LISTING) -> Path:
    """A job's input folder; `listing` is what inputs.json holds (bytes as they are), None leaves it out."""
    images = folder / "images" / SLUG
    images.mkdir(parents=True, exist_ok=True)
    (images / name).write_bytes(content)
    if listing is not None:
        text = listing if isinstance(listing, bytes) else json.dumps(listing).encode()
        (folder / "inputs.json").write_bytes(text)
    return folder


def stub_manifest(folder: Path, folds: int = 1, **changes: Any) -> dict[str, Any]:
    """Write an ensemble folder with right hashes and no weights; returns the manifest, with `changes` applied."""
    hashes: dict[str, str] = {}
    for name in (*FILES, "base.safetensors"):
        hashes[name] = hashlib.sha256(name.encode()).hexdigest()
    names = [f"fold{number}" for number in range(folds)]
    for place in [folder, *(folder / name for name in names)]:
        place.mkdir(parents=True, exist_ok=True)
        for name in ("base.safetensors",) if place == folder else FILES:
            (place / name).write_bytes(name.encode())
    content = {
        "format": 1,
        "name": "stub",
        "backbone": "efficientnet-lite0",
        "pool": "avg",
        "base": {"file": "base.safetensors", "sha256": hashes["base.safetensors"]},
        "preprocess": {"crop": 80, "size": 64, "kernel": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3},
        "folds": [{"folder": name, "sha256": {file: hashes[file] for file in FILES}} for name in names],
        "tta": "none",
        "averaging": "logit",
        "temperature": 1.0,
        "threshold": 0.5,
        "precision": {"fp32": 0.0},
        "licence": {},
        "provenance": {},
    } | changes
    (folder / "ensemble.json").write_text(json.dumps(content))
    return content


class StubEnsemble:
    """Answers each crop with its mean brightness."""

    precision, device_name = "fp32", "cpu"

    def __init__(self, manifest: Any, device: str, precision: str, *, checks: Any = (), keep: bool = True) -> None:
        self.manifest, self.checks = manifest, checks
        self.members = [
            mock.Mock(about=about, precision="fp32", seconds=0.0, weights_seconds=0.0) for about in manifest.members
        ]

    @classmethod
    def load(cls, folder: Path, device: str, precision: str) -> StubEnsemble:
        return cls(load_manifest(folder), device, precision)

    def device_bytes(self) -> int:
        return 0

    def predict(self, crops: list[np.ndarray]) -> Any:
        for check in self.checks:
            check.result()
        p = np.array([float(crop.mean()) / 255 for crop in crops])
        return mock.Mock(
            p_atypical=p, member_p=p[None], fold_p=p[None], spread=0 * p, member_spread=0 * p[None], recomputed=0
        )


@dataclass(frozen=True)
class Ended:
    """How a job ended: exit code, what it printed, the files that it left in its output folder, and its answers."""

    code: int
    out: str
    err: str
    files: list[str]
    answers: Any = None


@contextlib.contextmanager
def captured(descriptor: int, stream: str) -> Iterator[io.StringIO]:
    """Collect everything written to `descriptor` and to sys.`stream` in the text that this yields."""
    text = io.StringIO()
    getattr(sys, stream).flush()
    saved = os.dup(descriptor)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), descriptor)
        try:
            with mock.patch.object(
                sys, stream, io.TextIOWrapper(os.fdopen(os.dup(descriptor), "wb"), "utf-8")
            ) as wrapper:
                yield text
                wrapper.close()
        finally:
            os.dup2(saved, descriptor)
            os.close(saved)
        file.seek(0)
        text.write(file.read().decode("utf-8"))


def run_job(input_dir: Path, output_dir: Path, weights: Path, *more: str, stub: bool = True) -> Ended:
    """`python -m inference` in this process, with stdout and stderr caught; `stub` replaces the ensemble."""
    output_dir.mkdir(exist_ok=True)
    arguments = ["--input", str(input_dir), "--output", str(output_dir), "--weights", str(weights), "--device", "cpu"]
    import inference.ensemble as module

    replaced = mock.patch.object(module, "Ensemble", StubEnsemble) if stub else contextlib.nullcontext()
    with replaced, captured(1, "stdout") as out, captured(2, "stderr") as err:
        code = command.main([*arguments, *more])
    file = output_dir / OUTPUT
    answers = json.loads(file.read_bytes()) if file.is_file() else None
    return Ended(code, out.getvalue(), err.getvalue(), sorted(os.listdir(output_dir)), answers)


def check_ended(ended: Ended) -> None:
    """AssertionError unless the job ended with answers and a silent stderr, or with one line on it and no answers."""
    if ended.code == 0:
        assert ended.err == "", ended.err
        assert ended.files == [OUTPUT], ended.files
        check_answers(ended.answers, len(ended.answers))
        assert ended.answers
    else:
        assert ended.code == 1, ended.code
        assert ended.files == [], ended.files
        assert ended.err.startswith("error: ") and ended.err.endswith("\n"), ended.err
        assert ended.err.count("\n") == 1 and ended.err[:-1].isprintable() and len(ended.err) < 1024, ended.err
        assert "error: unexpected" not in ended.err and "expect" in ended.err and ended.err.count(";") >= 2, ended.err
