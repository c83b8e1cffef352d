"""Answer one stack: the job that the platform starts (`python -m inference`), and each request to the server.

A job classifies the stack in /input and writes a JSON file to /output. It ends with exit code 0 and an empty stderr, or
with exit code 1, no output and one line on stderr: what was found, what was expected, what to do. PyTorch is imported
late, after the input is read and while the ensemble's files are hashed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import START
from .checksums import start_checks
from .commandline import add_ensemble_options
from .contract import check_pages, find_stack, remove_answers, write_answers
from .errors import UserError
from .exits import check_memory_limit, log, stderr_in_log
from .files import write_whole
from .labels import class_of
from .manifest import default_ensemble, load_manifest
from .phase import PHASE

if TYPE_CHECKING:
    from .ensemble import Ensemble, Prediction


class Clock:
    """Seconds of each phase, in the order in which they end."""

    def __init__(self, start: float) -> None:
        self.last = start
        self.seconds: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = round(now - self.last, 3)
        self.last = now


def answer_stack(
    input_dir: Path, output_dir: Path, ready: Callable[[], Ensemble], clock: Clock
) -> tuple[Ensemble, Prediction]:
    """Answer the stack in `input_dir` and write to `output_dir`, where an earlier job's answers have been removed.

    UserError, and no answers, if that fails. ready: waits for the ensemble; called once the stack is read
    """
    # the decoder is imported only once there is a stack to decode
    stack = find_stack(input_dir)
    from .imageio.stack import read_stack

    crops = read_stack(stack)
    check_pages(stack, len(crops))
    clock.mark("input")
    ensemble = ready()
    clock.mark("load")
    prediction = ensemble.predict(crops)
    clock.mark("predict")
    write_answers(output_dir, prediction.p_atypical.tolist(), ensemble.manifest.threshold)
    clock.mark("write")
    if prediction.recomputed:
        log(f"note: {prediction.recomputed} crops were recomputed in fp32 because their logits were not finite")
    return ensemble, prediction


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--input",
        type=Path,
        default=Path("/input"),
        metavar="DIR",
        help="holds inputs.json and images/ (default /input)",
    )
    add("--output", type=Path, default=Path("/output"), metavar="DIR", help="receives the answers (default /output)")
    add_ensemble_options(parser)
    add("--details", type=Path, metavar="FILE", help="also write members, folds, spread and seconds as JSON to FILE")


def run(options: argparse.Namespace) -> None:
    """Run one job from input folder to answers, and log what it computed with and how long each phase took."""
    clock = Clock(START)

    def ready() -> Ensemble:
        check_memory_limit()
        import torch  # noqa: F401

        clock.mark("import")
        from .ensemble import Ensemble

        return Ensemble(manifest, options.device, options.precision, checks=checks, keep=False)

    with stderr_in_log():
        remove_answers(options.output)
        manifest = load_manifest(options.weights or default_ensemble())
        checks = start_checks(manifest)  # in a thread, while this one reads the stack and imports PyTorch
        ensemble, prediction = answer_stack(options.input, options.output, ready, clock)
        log_summary(ensemble, prediction, clock)
        if options.details:
            try:
                write_whole(options.details, json.dumps(details(ensemble, prediction, clock), indent=1))
            except OSError as error:
                remove_answers(options.output)
                raise UserError(
                    f"cannot write {options.details} ({error.strerror}); expected a writable file; name another"
                ) from None


def log_summary(ensemble: Ensemble, prediction: Prediction, clock: Clock) -> None:
    manifest = ensemble.manifest
    log(
        f"ensemble {manifest.name}, device {ensemble.device_name}, pages {len(prediction.p_atypical)}, "
        f"phase {PHASE.name}"
    )
    for member in ensemble.members:
        entry = member.about
        weight = f", weight {entry.weight:g}" if len(manifest.members) > 1 else ""
        log(
            f"member {entry.name}: {entry.backbone}, {len(entry.folds)} folds, tta {entry.tta}, precision "
            f"{member.precision}{weight}, {member.seconds:.3f} seconds ({member.weights_seconds:.3f} for its weights)"
        )
    log("seconds " + ", ".join(f"{phase} {value:.3f}" for phase, value in clock.seconds.items()))


def details(ensemble: Ensemble, prediction: Prediction, clock: Clock) -> dict[str, Any]:
    """What --details writes: the run, its members, and the probabilities of each page, by member and by fold."""
    from .answers import Answer

    threshold = ensemble.manifest.threshold
    pages = [
        {
            "page": n,
            "class": class_of(answer.p_atypical, threshold),
            "p_atypical": answer.p_atypical,
            "member_p": list(answer.member_p or [answer.p_atypical]),
            "fold_p": list(answer.fold_p),
            "spread": answer.spread,
        }
        for n, answer in enumerate(Answer.of(prediction))
    ]
    members = [
        {
            "name": member.about.name,
            "backbone": member.about.backbone,
            "folds": len(member.about.folds),
            "precision": member.precision,
            "seconds": round(member.seconds, 3),
            "weights_seconds": round(member.weights_seconds, 3),
            "spread": float(spread.mean()),
        }
        for member, spread in zip(ensemble.members, prediction.member_spread, strict=True)
    ]
    return {
        "ensemble": ensemble.manifest.name,
        "device": ensemble.device_name,
        "precision": ensemble.precision,
        "threshold": threshold,
        "pages": pages,
        "members": members,
        "seconds": clock.seconds,
        "device_bytes": ensemble.device_bytes(),
    }
