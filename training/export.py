"""Write a finished run as an ensemble folder: adapters, manifest with hashes and provenance, model card."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from inference.checksums import check_ensemble
from inference.commandline import DEVICES
from inference.errors import UserError
from inference.manifest import BASES, load_manifest

from .calibrate import METRICS, calibrate, describe, read_out_of_fold
from .data import Crop
from .feed import load_crops
from .fit import find_base, read_recipe
from .hubcard import CARD, write_card
from .members import (
    DRIFT_CROPS,
    UNMEASURED,
    describe_member,
    fold_folders,
    measure_drift,
    versions,
    write_folds,
    write_manifest,
)


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
    base = find_base(recipe, options.base)
    calibration = calibrate(read_out_of_fold(options.run))
    if base.parent not in (BASES, options.output) and not options.include_base:
        raise UserError(f"{base} would not be found; expected it in {BASES}; use --include-base, or move it there")
    sources = fold_folders(options.run)
    left_over = {folder.name for folder in options.output.glob("fold*")} - {source.name for source in sources}
    if left_over:
        raise UserError(
            f"{options.output} holds {', '.join(sorted(left_over))} of another ensemble; expected none; remove them, "
            "or choose another --output"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    folds = write_folds(
        options.output, {source.name: source for source in sources}, recipe.backbone, calibration["shift"]
    )
    if options.include_base:
        shutil.copyfile(base, options.output / base.name)
    manifest: dict[str, Any] = {
        "format": 1,
        "name": options.name or options.output.name,
        **describe_member(recipe, base),
        "folds": folds,
        "tta": calibration["tta"],
        "averaging": calibration["averaging"],
        "temperature": round(calibration["temperature"], 4),
        "threshold": round(calibration["threshold"], 4),
        "precision": UNMEASURED,
        "provenance": provenance(options.run, settings, calibration),
    }
    write_manifest(options.output, manifest)
    check_ensemble(load_manifest(options.output))
    [manifest["precision"]] = measure_drift(options.output, some_crops(options.run), options.device)
    write_manifest(options.output, manifest)
    kept = (options.output / CARD).exists()
    write_card(options.output)
    print(
        f"{options.output}: {len(folds)} folds, threshold {manifest['threshold']}, tta {manifest['tta']}, "
        f"leave one fold out: {describe(calibration)}"
    )
    print(f"largest change of P(atypical) to fp32: {manifest['precision']}")
    if kept:
        print(f"{options.output / CARD}: its front matter is new, its text is not; read it again")


def provenance(run: Path, settings: dict[str, Any], calibration: dict[str, Any]) -> dict[str, Any]:
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
        "versions": versions(),
    }


def some_crops(run: Path) -> list[np.ndarray]:
    """Crops of a run for measurements, drawn from all of its folds."""
    with (run / "split.csv").open(newline="") as lines:
        paths = [Path(row["path"]) for row in csv.DictReader(lines)]
    chosen = np.random.default_rng(0).permutation(len(paths))[:DRIFT_CROPS]
    return load_crops([Crop(paths[n], 0, "", "") for n in chosen])
