"""Fit ranks x splits x backbones; write a table and a figure of their out-of-fold scores, as arXiv 2509.16935 has them.

Each combination is a run folder like any other, so a sweep that was stopped resumes where it was, and `report` or
`export` take any of its runs. Table and figure are written again after each, with all finished runs of the folder.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
from collections.abc import Collection, Sequence
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
from .fit import add_inputs, find_base, fit, make_accelerator, read_recipe, settle_precision
from .loop import Run
from .processes import say
from .recipe import Recipe, load_recipe
from .splits import KINDS

COLUMNS = (
    "backbone",
    "size",
    "epochs",
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
    "auc_low",
    "auc_high",
    "threshold",
    "tta",
    "seconds",
)


def configure(parser: argparse.ArgumentParser) -> None:
    add_inputs(parser)
    parser.add_argument("--rank", type=int, nargs="+", default=[4, 8, 16], help="default: 4 8 16")
    parser.add_argument(
        "--split", nargs="+", choices=KINDS, default=["random", "grouped"], help="default: random grouped"
    )
    parser.add_argument("--backbone", nargs="+", help="default: all that have weights in --bases")
    parser.add_argument("--bases", type=Path, default=BASES, help="folder of base weights (default weights/bases)")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/sweep"), help="folder of the runs and tables (default runs/sweep)"
    )


def run(options: argparse.Namespace) -> None:
    shared = settle_precision(load_recipe(options.recipe, options.set), options.run)
    names = options.backbone or [name for name in BACKBONES if (options.bases / f"{name}.safetensors").exists()]
    if not names:
        raise UserError(
            f"{options.bases} holds no base weights; expected one or more; run 'python -m training base NAME'"
        )
    given = {change.partition("=")[0] for change in options.set}
    recipes = {
        f"{name}-{kind}-r{rank}": variant(shared, name, kind, rank, given)
        for name, kind, rank in itertools.product(names, options.split, options.rank)
    }
    bases = {
        name: find_base(variant(shared, name, "grouped", 1), options.bases / f"{name}.safetensors") for name in names
    }
    accelerator = make_accelerator(shared)
    crops = load_data(options.data, lambda line: say(accelerator, line))
    images = load_crops(crops)
    rows = [] if not accelerator.is_main_process else finished(options.run, recipes)
    for number, (name, recipe) in enumerate(recipes.items(), 1):
        say(accelerator, f"{number} of {len(recipes)}: {name}")
        fit(Run(recipe, options.run / name, crops, images, bases[recipe.backbone], accelerator))
        if accelerator.is_main_process:
            rows.append(summarise(options.run / name, recipe))
            write_tables(options.run, rows)
            draw(options.run / "sweep.svg", rows)
    say(accelerator, f"{options.run / 'sweep.md'}, sweep.csv and sweep.svg: {len(rows)} runs")


def finished(folder: Path, apart_from: Collection[str]) -> list[dict[str, Any]]:
    """Rows of the finished runs in `folder`, of earlier sweeps with other settings."""
    rows = []
    for run in sorted(folder.glob("*/recipe.json")):
        if run.parent.name not in apart_from:
            try:
                rows.append(summarise(run.parent, read_recipe(run.parent)))
            except UserError as error:
                print(f"not in the table: {error}", flush=True)
    return rows


def variant(shared: Recipe, backbone: str, split: str, rank: int, given: Collection[str] = ()) -> Recipe:
    """The shared recipe with another backbone, split and rank; alpha / rank stays, and so does the size of a step.

    A backbone of another family takes its own input side and pooling, and its first target set where the recipe's does
    not exist for it; but what the command line has `given` stays.
    """
    row = lookup(backbone)
    changes: dict[str, Any] = dict(backbone=backbone, split=split, rank=rank, alpha=shared.alpha * rank / shared.rank)
    if row.family != lookup(shared.backbone).family:
        changes |= {name: value for name, value in dict(size=row.size, pool="").items() if name not in given}
    if shared.targets not in row.targets and "targets" not in given:
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
    unknown = (float("nan"), float("nan"))
    low, high = found["balanced_accuracy_interval"] or unknown
    auc_low, auc_high = found["auc_interval"] or unknown
    return {
        "backbone": recipe.backbone,
        "size": recipe.size,
        "epochs": recipe.epochs,
        "split": recipe.split,
        "rank": recipe.rank,
        "trainable": trainable,
        "folds": len(by["fold"]),
        "low": low,
        "high": high,
        "auc_low": auc_low,
        "auc_high": auc_high,
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


def write_tables(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """sweep.csv with every column, and sweep.md to read, best first."""
    with (folder / "sweep.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    head = (
        "backbone",
        "px",
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
        "Out-of-fold metrics; each fold's threshold is chosen on the others. In brackets: 95% interval from resampled",
        "slides; folds: mean and standard deviation. Random splits leak: slides lie on both sides of them.",
        "",
        f"| {' | '.join(head)} |",
        "|---|--:|---|--:|--:|---|---|--:|--:|--:|---|--:|",
    ]
    for row in sorted(rows, key=lambda row: -row["balanced_accuracy"]):
        cells = (
            row["backbone"],
            row["size"],
            row["split"],
            row["rank"],
            f"{row['trainable']:,}",
            f"{row['balanced_accuracy']:.4f} [{row['low']:.3f}, {row['high']:.3f}]",
            f"{row['fold_mean']:.4f} ± {row['fold_sd']:.4f}",
            f"{row['worst_domain']:.3f}",
            f"{row['sensitivity']:.3f}",
            f"{row['specificity']:.3f}",
            f"{row['auc']:.4f} [{row['auc_low']:.3f}, {row['auc_high']:.3f}]",
            f"{row['seconds'] / 60:.1f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    (folder / "sweep.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Balanced accuracy and AUC with their intervals by rank, in one colour a split and one shape a backbone."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shapes = dict(zip(dict.fromkeys(row["backbone"] for row in rows), "osD^vP", strict=False))
    colours = dict(zip(KINDS, ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=True))
    series = sorted({(row["backbone"], row["split"]) for row in rows}, key=lambda one: (one[0], KINDS.index(one[1])))
    ranks = sorted({row["rank"] for row in rows})
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sweep", "font.size": 10}):
        figure = Figure((9, 4.2), layout="constrained")
        plots = figure.subplots(1, 2)
        for number, (backbone, split) in enumerate(series):
            aside = 0.6 * ((number + 0.5) / len(series) - 0.5)  # so that intervals do not cover each other
            some = sorted(
                (r for r in rows if (r["backbone"], r["split"]) == (backbone, split)), key=lambda r: r["rank"]
            )
            x = [ranks.index(row["rank"]) + aside for row in some]
            for plot, value, low, high in zip(
                plots, ("balanced_accuracy", "auc"), ("low", "auc_low"), ("high", "auc_high"), strict=True
            ):
                y = np.array([row[value] for row in some])
                reach = np.abs([y - [row[low] for row in some], [row[high] for row in some] - y])
                style = dict(
                    color=colours[split], fmt=shapes.get(backbone, "*"), markersize=5, capsize=2, linewidth=1.2
                )
                plot.errorbar(x, y, reach, label=f"{backbone}, {split}", **style)
        for plot, name in zip(plots, ("balanced accuracy", "AUC"), strict=True):
            plot.set(xlabel="rank", ylabel=name, xticks=range(len(ranks)), xticklabels=ranks)
            plot.grid(axis="y", color="#dddddd", linewidth=0.6)
            plot.spines[["top", "right"]].set_visible(False)
        figure.legend(*plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(file, metadata={"Date": None})
