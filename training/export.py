"""Write a finished run as an ensemble folder: adapters, manifest with hashes and provenance, model card."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from inference.backbones import lookup
from inference.checksums import sha256
from inference.commandline import DEVICES
from inference.ensemble import Ensemble
from inference.errors import UserError
from inference.files import write_whole
from inference.manifest import BASES, FILE, load_manifest
from inference.progress import Progress

from .calibrate import METRICS, calibrate, describe, read_out_of_fold
from .data import Crop
from .feed import load_crops
from .fit import find_base, read_recipe

FILES = ("adapter_config.json", "adapter_model.safetensors")
DRIFT_CROPS = 32
DRIFT_STEP = 4  # crops between two updates of the progress
DRIFT_ALLOWED = 0.02  # of P(atypical): a precision that moves a probability further is not allowed


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a finished run folder of 'training fit'")
    parser.add_argument("--output", type=Path, required=True, help="ensemble folder to write, such as weights/mine")
    parser.add_argument("--name", help="name of the ensemble (default: the folder's)")
    parser.add_argument("--base", type=Path, help="base weights (default weights/bases/<backbone>.safetensors)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="to measure the precisions on (default auto)")
    parser.add_argument("--include-base", action="store_true", help="copy the base into the folder too")


def run(options: argparse.Namespace) -> None:
    recipe = read_recipe(options.run)
    settings = dataclasses.asdict(recipe)
    row = lookup(recipe.backbone)
    base = find_base(recipe, options.base)
    calibration = calibrate(read_out_of_fold(options.run))
    if base.parent not in (BASES, options.output) and not options.include_base:
        raise UserError(f"{base} would not be found; expected it in {BASES}; use --include-base, or move it there")
    sources = sorted(options.run.glob("fold*"), key=lambda f: int(f.name[4:]))
    left_over = {folder.name for folder in options.output.glob("fold*")} - {source.name for source in sources}
    if left_over:
        raise UserError(
            f"{options.output} holds {', '.join(sorted(left_over))} of another ensemble; expected none; remove them, "
            "or choose another --output"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    folds = []
    for source in sources:
        target = options.output / source.name
        target.mkdir(exist_ok=True)
        for name in FILES:
            shutil.copyfile(source / name, target / name)
        shift_head(target / FILES[1], calibration["shift"])
        clean_config(target / FILES[0], row.source)
        folds.append({"folder": source.name, "sha256": {name: sha256(target / name) for name in FILES}})
    if options.include_base:
        shutil.copyfile(base, options.output / base.name)
    preprocess = vars(recipe.preprocess())
    manifest: dict[str, Any] = {
        "format": 1, "name": options.name or options.output.name, "backbone": recipe.backbone,
        "pool": recipe.pool or row.pool, "base": {"file": base.name, "sha256": sha256(base)},
        "preprocess": preprocess | {"mean": list(preprocess["mean"]), "std": list(preprocess["std"])},
        "folds": folds, "tta": calibration["tta"], "averaging": calibration["averaging"],
        "temperature": round(calibration["temperature"], 4), "threshold": round(calibration["threshold"], 4),
        "precision": {"fp32": 0.0, "bf16": None, "fp16": None},
        "licence": {"base": row.licence, "base_source": row.source, "adapters": "Apache-2.0"},
        "provenance": provenance(options.run, settings, calibration),
    }  # fmt: skip
    write(options.output, manifest)
    manifest["precision"] = measure_drift(options.output, options.run, options.device)
    write(options.output, manifest)
    load_manifest(options.output)
    print(f"{options.output}: {len(folds)} folds, threshold {manifest['threshold']}, tta {manifest['tta']}, "
          f"leave one fold out: {describe(calibration)}")  # fmt: skip
    print(f"largest change of P(atypical) to fp32: {manifest['precision']}")


def write(folder: Path, manifest: dict[str, Any]) -> None:
    write_whole(folder / FILE, json.dumps(manifest, indent=1) + "\n")


def clean_config(file: Path, source: str) -> None:
    """PEFT's configuration, with the base's public name in place of a local one, keys in a fixed order."""
    config = json.loads(file.read_text()) | {"base_model_name_or_path": source, "inference_mode": True}
    file.write_text(json.dumps(dict(sorted(config.items())), indent=1) + "\n")


def shift_head(file: Path, shift: float) -> None:
    """Add calibration's shift to the bias of an adapter's head."""
    tensors = load_file(file)
    bias = next(name for name, value in tensors.items() if name.endswith(".bias") and value.shape == (1,))
    tensors[bias] = tensors[bias] + shift
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors writes for the owner alone, and an image's user is another


def provenance(run: Path, settings: dict[str, Any], calibration: dict[str, Any]) -> dict[str, Any]:
    packages = ("torch", "timm", "peft", "numpy")
    keep = (
        "crops",
        "atypical",
        *METRICS,
        "balanced_accuracy_interval",
        "auc_interval",
        "same_crops",
        "balanced_accuracy_at_half",
        "threshold_interval",
        "shift",
    )
    data = run / "data.json"
    return {
        "recipe": settings,
        "data": json.loads(data.read_text()) if data.exists() else {},
        "out_of_fold": {key: calibration[key] for key in keep},
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }


def measure_drift(folder: Path, run: Path, device: str) -> dict[str, float | None]:
    """The largest change of P(atypical) against fp32 on crops of the run; None for a precision that is not allowed.

    A precision that overflows is not allowed: inference would compute such crops again in fp32, and take twice as long.
    """
    with (run / "split.csv").open(newline="") as lines:
        paths = [Path(row["path"]) for row in csv.DictReader(lines)]
    chosen = np.random.default_rng(0).permutation(len(paths))[:DRIFT_CROPS]
    crops = load_crops([Crop(paths[n], 0, "", "") for n in chosen])
    exact, _ = predict(folder, crops, device, "fp32")
    drift: dict[str, float | None] = {"fp32": 0.0}
    fp16_safe = all(lookup(member.backbone).fp16_safe for member in load_manifest(folder).members)
    for precision in ("bf16", "fp16"):
        if precision == "fp16" and not fp16_safe:
            drift[precision] = None
            continue
        found, recomputed = predict(folder, crops, device, precision)
        largest = float(np.abs(found - exact).max())
        drift[precision] = round(largest, 5) if largest <= DRIFT_ALLOWED and not recomputed else None
    return drift


def predict(folder: Path, crops: list[np.ndarray], device: str, precision: str) -> tuple[np.ndarray, int]:
    """P(atypical) (N,) and how many crops overflowed; on a terminal, with a line that says how far it is."""
    ensemble = Ensemble.load(folder, device, precision)
    print(f"measuring {precision} on {len(crops)} crops", flush=True)
    progress, parts, recomputed = Progress(len(crops), f"crops in {precision}"), [], 0
    for start in range(0, len(crops), DRIFT_STEP):
        answer = ensemble.predict(crops[start : start + DRIFT_STEP])
        parts.append(answer.p_atypical)
        recomputed += answer.recomputed
        done = min(start + DRIFT_STEP, len(crops))
        progress.show(done, done, done)
    progress.clear()
    return np.concatenate(parts), recomputed
