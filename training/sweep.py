"""Fit ranks x splits x backbones and write one table of their out-of-fold scores, as arXiv 2509.16935 compares them.

Each combination is a run folder like any other, so a sweep that was stopped resumes where it was, and `report` or
`export` take any of its runs. The table is written again after each.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inference.adapters import open_safetensors
from inference.backbones import BACKBONES, lookup
from inference.errors import UserError
from inference.manifest import BASES
from inference.metrics import balanced_accuracy

from .calibrate import METRICS, calibrate, leave_one_fold_out, read_out_of_fold
from .data import load_data
from .feed import load_crops
from .fit import add_inputs, find_base, fit, make_accelerator, settle_precision
from .loop import Run
from .processes import say
from .recipe import Recipe, load_recipe
from .splits import KINDS

COLUMNS = (
    "backbone",
    "split",
    "rank",
    "trainable",
    "folds",
    "balanced_accuracy",
    "low",
    "high",
    "fold_mean",
    "fold_sd",
    "worst_domain",
    "sensitivity",
    "specificity",
    "auc",
    "threshold",
    "tta",
    "seconds",
)


def configure(parser: argparse.ArgumentParser) -> None:
    add_inputs(parser)
    parser.add_argument("--rank", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--split", nargs="+", choices=KINDS, default=["random", "grouped"])
    parser.add_argument("--backbone", nargs="+", help="default: all that have weights in --bases")
    parser.add_argument("--bases", type=Path, default=BASES, help="folder of base weights (default weights/bases)")
    parser.add_argument("--run", type=Path, default=Path("runs/sweep"), help="folder of the runs and tables")


def run(options: argparse.Namespace) -> None:
    shared = settle_precision(load_recipe(options.recipe, options.set), options.run)
    names = options.backbone or [name for name in BACKBONES if (options.bases / f"{name}.safetensors").exists()]
    if not names:
        raise UserError(
            f"{options.bases} holds no base weights; expected one or more; run 'python -m training base NAME'"
        )
    recipes = {
        f"{name}-{kind}-r{rank}": variant(shared, name, kind, rank)
        for name, kind, rank in itertools.product(names, options.split, options.rank)
    }
    bases = {
        name: find_base(variant(shared, name, "grouped", 1), options.bases / f"{name}.safetensors") for name in names
    }
    accelerator = make_accelerator(shared)
    crops = load_data(options.data, lambda line: say(accelerator, line))
    images = load_crops(crops)
    rows: list[dict[str, Any]] = []
    for number, (name, recipe) in enumerate(recipes.items(), 1):
        say(accelerator, f"{number} of {len(recipes)}: {name}")
        fit(Run(recipe, options.run / name, crops, images, bases[recipe.backbone], accelerator))
        if accelerator.is_main_process:
            rows.append(summarise(options.run / name, recipe))
            write_tables(options.run, rows, options.recipe)
    say(accelerator, f"{options.run / 'sweep.md'} and sweep.csv: {len(recipes)} runs")


def variant(shared: Recipe, backbone: str, split: str, rank: int) -> Recipe:
    """The shared recipe with another backbone, split and rank; alpha / rank stays, and so does the size of a step.

    A backbone of another family takes its own input side and pooling, and its first target set where the recipe's does
    not exist for it.
    """
    row = lookup(backbone)
    changes: dict[str, Any] = dict(backbone=backbone, split=split, rank=rank, alpha=shared.alpha * rank / shared.rank)
    if row.family != lookup(shared.backbone).family:
        changes |= dict(size=row.size, pool="")
    if shared.targets not in row.targets:
        changes["targets"] = next(iter(row.targets))
    return dataclasses.replace(shared, **changes)


def summarise(run: Path, recipe: Recipe) -> dict[str, Any]:
    """One row of the table from a finished run."""
    oof = read_out_of_fold(run)
    found, left = calibrate(oof), leave_one_fold_out(oof)
    if left is None:
        raise UserError(f"{run}: without one of its folds a class is missing; expected both; use fewer folds")
    by = {
        name: [balanced_accuracy(oof.labels[keys == k], left.called[keys == k]) for k in np.unique(keys)]
        for name, keys in (("fold", oof.folds), ("domain", oof.domains))
    }
    adapter = open_safetensors(run / "fold0" / "adapter_model.safetensors")
    trainable = sum(int(np.prod(adapter.get_slice(name).get_shape())) for name in adapter.keys())  # noqa: SIM118
    low, high = found["balanced_accuracy_interval"] or (float("nan"), float("nan"))
    return {
        "backbone": recipe.backbone,
        "split": recipe.split,
        "rank": recipe.rank,
        "trainable": trainable,
        "folds": len(by["fold"]),
        "low": low,
        "high": high,
        "fold_mean": float(np.nanmean(by["fold"])),
        "fold_sd": float(np.nanstd(by["fold"], ddof=1)),
        "worst_domain": float(np.nanmin(by["domain"])),
        "seconds": training_seconds(run),
        **{name: found[name] for name in (*METRICS, "threshold", "tta")},
    }


def training_seconds(run: Path) -> float:
    """Seconds of all epochs of all folds."""
    total = 0.0
    for file in run.glob("fold*/metrics.csv"):
        with file.open(newline="") as lines:
            total += sum(float(row["seconds"] or 0) for row in csv.DictReader(lines))
    return total


def write_tables(folder: Path, rows: Sequence[dict[str, Any]], recipe: str) -> None:
    """sweep.csv with every column, and sweep.md to read, best first."""
    with (folder / "sweep.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    head = (
        "backbone",
        "split",
        "rank",
        "trainable",
        "balanced accuracy",
        "folds",
        "worst domain",
        "sensitivity",
        "specificity",
        "AUC",
        "minutes",
    )
    lines = [
        f"Out-of-fold metrics, recipe `{Path(recipe).stem}`, alpha / rank constant; each fold's threshold is chosen on",
        "the others. In brackets: 95% interval from resampled slides; folds: mean and standard deviation. Random",
        "splits leak: slides lie on both sides of them.",
        "",
        f"| {' | '.join(head)} |",
        "|---|---|--:|--:|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: -row["balanced_accuracy"]):
        cells = (
            row["backbone"],
            row["split"],
            row["rank"],
            f"{row['trainable']:,}",
            f"{row['balanced_accuracy']:.4f} [{row['low']:.3f}, {row['high']:.3f}]",
            f"{row['fold_mean']:.4f} ± {row['fold_sd']:.4f}",
            f"{row['worst_domain']:.3f}",
            f"{row['sensitivity']:.3f}",
            f"{row['specificity']:.3f}",
            f"{row['auc']:.4f}",
            f"{row['seconds'] / 60:.1f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    (folder / "sweep.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
