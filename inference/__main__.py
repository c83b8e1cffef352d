"""The command line: `python -m inference` runs one job as the platform starts it; `python -m inference score` and the
other commands are modules of their own.

A job answers a stack in /input with a JSON file in /output. Exit code 0 with an empty stderr, or 1 with one line on
stderr that says what was found, what was expected and what to do, and no output.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
from pathlib import Path

START = time.perf_counter()

from .contract import find_stack, remove_answers, write_answers  # noqa: E402
from .errors import UserError  # noqa: E402
from .exits import check_memory_limit, describe, log, stderr_in_log  # noqa: E402
from .manifest import load_manifest, start_hash_check  # noqa: E402

MODEL_TARBALL = Path("/opt/ml/model")  # where the platform unpacks an uploaded model
BUNDLED = Path(__file__).resolve().parent.parent / "weights" / "default"
# each module has main(arguments) and is imported when it is asked for
COMMANDS = {
    "score": "inference.scoring.command",
    "serve": "inference.serve",
    "doctor": "inference.doctor",
    "crops": "inference.slides.command",
}


def default_weights() -> Path:
    """The ensemble of a command that names none: the uploaded model where there is one, else ours.

    Whatever was uploaded counts: a tarball without ensemble.json is refused, not answered with another ensemble.
    """
    uploaded = MODEL_TARBALL.is_dir() and any(not path.name.startswith(".") for path in MODEL_TARBALL.iterdir())
    return MODEL_TARBALL if uploaded else BUNDLED


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m inference", description="Classify the crops of one stack.")
    add = parser.add_argument
    add(
        "--input",
        type=Path,
        default=Path("/input"),
        metavar="DIR",
        help="holds inputs.json and images/ (default /input)",
    )
    add("--output", type=Path, default=Path("/output"), metavar="DIR", help="gets the answers (default /output)")
    add(
        "--weights",
        type=Path,
        metavar="DIR",
        help=f"ensemble folder (default: what was uploaded to {MODEL_TARBALL}, else ours)",
    )
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    add("--details", type=Path, metavar="FILE", help="also write folds, spread and seconds as JSON to FILE")
    return parser.parse_args(arguments)


def run_job(options: argparse.Namespace) -> None:
    """One job, from input folder to answer; logs to stdout what it computed with and the seconds of each phase."""
    clock = {"start": START}
    remove_answers(options.output)  # of an earlier job: a failure leaves none
    weights = options.weights or default_weights()
    manifest = load_manifest(weights)
    hashes = start_hash_check(manifest)  # in a thread, while this one imports PyTorch
    stack = find_stack(options.input)

    from .imageio.stack import read_stack

    crops = read_stack(stack)
    clock["input"] = time.perf_counter()

    check_memory_limit()
    import torch

    clock["import"] = time.perf_counter()
    from .ensemble import Ensemble

    hashes.result()
    ensemble = Ensemble(manifest, options.device, options.precision)
    clock["load"] = time.perf_counter()
    prediction = ensemble.predict(crops)
    clock["predict"] = time.perf_counter()
    p_atypical = prediction.p_atypical.tolist()
    write_answers(options.output, p_atypical, manifest.threshold)
    clock["write"] = time.perf_counter()

    times = list(clock.values())
    seconds = {
        name: round(after - before, 3) for name, before, after in zip(list(clock)[1:], times, times[1:], strict=False)
    }
    device = (
        torch.cuda.get_device_name() if ensemble.device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"
    )
    log(f"ensemble {manifest.name}: {manifest.backbone}, {len(manifest.folds)} folds, tta {manifest.tta}")
    log(f"device {device}, precision {ensemble.precision}, pages {len(crops)}")
    if ensemble.recomputed:
        log(f"note: {ensemble.recomputed} crops were recomputed in fp32, their logits were not finite")
    parts = {"predict": f" ({ensemble.weights.seconds:.3f} of it reads and fuses weights)"}
    log("seconds " + ", ".join(f"{name} {value:.3f}{parts.get(name, '')}" for name, value in seconds.items()))
    if options.details:
        pages = [
            {"page": n, "class": "atypical" if p >= manifest.threshold else "normal", "p_atypical": p,
             "fold_p": prediction.fold_p[:, n].tolist(), "spread": float(prediction.spread[n])}
            for n, p in enumerate(p_atypical)
        ]  # fmt: skip
        details = {"ensemble": manifest.name, "device": device, "precision": ensemble.precision,
                   "threshold": manifest.threshold, "pages": pages, "seconds": seconds,
                   "weights_seconds": round(ensemble.weights.seconds, 3),
                   "device_bytes": torch.cuda.max_memory_allocated() if ensemble.device.type == "cuda" else 0,
        }  # fmt: skip
        try:
            options.details.write_text(json.dumps(details, indent=1), encoding="utf-8")
        except OSError as error:
            remove_answers(options.output)
            raise UserError(
                f"cannot write {options.details} ({error.strerror}); expected a writable file; name another"
            ) from None


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] in COMMANDS:
            return importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])
        options = parse(arguments)
        with stderr_in_log():
            run_job(options)
    except Exception as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)  # without PyTorch's teardown, which took 0.3 s of every job; the answer is on disk
