"""Table and figure of a sweep: one row of out-of-fold scores for each finished run."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inference.errors import UserError
from inference.metrics import balanced_accuracy

from ..data.splits import KINDS
from ..ensemble.calibrate import calibrate, leave_one_fold_out
from ..ensemble.joint import METRICS
from ..fit.lora import Lora, lora_model, trainable
from ..run import RunFolder

COLUMNS = (
    *("backbone", "size", "epochs", "learning_rate", "split", "rank", "trainable", "folds"),
    *("balanced_accuracy", "low", "high", "fold_mean", "fold_sd", "worst_domain", "sensitivity", "specificity"),
    *("auc", "auc_low", "auc_high", "threshold", "tta", "seconds", "apart"),
)
HEAD = (
    *("backbone", "px", "split", "rank", "trainable", "balanced accuracy", "folds", "worst domain"),
    *("sensitivity", "specificity", "AUC", "minutes"),
)


def summarise(run: RunFolder, apart: str = "") -> dict[str, Any]:
    """One row of the table from a finished run; apart: in what its crops and settings differ from the sweep's."""
    oof, recipe = run.out_of_fold(), run.recipe()
    calibration, left = calibrate(oof), leave_one_fold_out(oof)
    if left is None:
        raise UserError(f"{run.path}: without one of its folds a class is missing; expected both; use fewer folds")
    by = {
        name: [balanced_accuracy(oof.labels[keys == k], left.called[keys == k]) for k in np.unique(keys)]
        for name, keys in (("fold", oof.folds), ("domain", oof.domains))
    }
    unknown = (float("nan"), float("nan"))
    low, high = calibration["balanced_accuracy_interval"] or unknown
    auc_low, auc_high = calibration["auc_interval"] or unknown
    return {
        "backbone": recipe.backbone,
        "size": recipe.size,
        "epochs": recipe.epochs,
        "learning_rate": recipe.learning_rate,
        "split": recipe.split,
        "rank": recipe.rank,
        "trainable": parameters(recipe.backbone, recipe.lora()),
        "folds": len(by["fold"]),
        "low": low,
        "high": high,
        "auc_low": auc_low,
        "auc_high": auc_high,
        "fold_mean": float(np.nanmean(by["fold"])),
        "fold_sd": float(np.nanstd(by["fold"], ddof=1)),
        "worst_domain": float(np.nanmin(by["domain"])),
        "seconds": run.seconds(),
        "apart": apart,
        **{name: calibration[name] for name in (*METRICS, "threshold", "tta")},
    }


@cache
def parameters(backbone: str, lora: Lora) -> int:
    """Parameters that a fold trains, with its head. Files hold more where parts of them stay zero, as with "qv"."""
    with torch.device("meta"):
        return sum(trainable(lora_model(backbone, None, lora)).values())


def write_tables(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """sweep.csv with every column, and sweep.md to read, best first; a table for each kind of crops and settings."""
    with (folder / "sweep.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        "Out-of-fold metrics; each fold's threshold is chosen on the others. In brackets: 95% interval from resampled",
        "slides; folds: mean and standard deviation. Random splits leak: slides lie on both sides of them.",
    ]
    order = sorted(rows, key=lambda row: (row["apart"], -row["balanced_accuracy"]))
    for apart, group in groupby(order, key=lambda row: row["apart"]):
        lines += ["", f"Not comparable with the first table, with {apart}:"] if apart else []
        lines += ["", f"| {' | '.join(HEAD)} |", "|---|--:|---|--:|--:|---|---|--:|--:|--:|---|--:|"]
        lines += [f"| {' | '.join(map(str, cells(row)))} |" for row in group]
    (folder / "sweep.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def cells(row: dict[str, Any]) -> Sequence[object]:
    """A row's cells under HEAD."""
    return (
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


def draw(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Balanced accuracy and AUC with their intervals by rank, in one colour a split and one shape a backbone."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shapes = dict(zip(dict.fromkeys(row["backbone"] for row in rows), "osD^vP", strict=False))
    colours = dict(zip(KINDS, cycle(("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")), strict=False))
    series = sorted({(row["backbone"], row["split"]) for row in rows}, key=lambda pair: (pair[0], KINDS.index(pair[1])))
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
