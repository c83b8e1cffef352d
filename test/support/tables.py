"""Tiny generated data sets and finished runs, for the tests of training."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.table import describe
from training.fit.recipe import load_recipe
from training.run import RunFolder


def write_csv(file: Path, header: str, rows: Sequence[Sequence[object]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(header.split(","))
        writer.writerows(rows)
    return file


def write_crop(file: Path, seed: int = 0, side: int = 8, level: int = 128) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-60, 60, (side, side, 3))
    Image.fromarray((level + noise).clip(0, 255).astype(np.uint8)).save(file)
    return file


def tiny_table(folder: Path, crops: int = 24, groups: int = 8, side: int = 40) -> Path:
    """A plain CSV of noise crops: every third atypical and darker, two domains."""
    rows = []
    for n in range(crops):
        label = int(n % 3 == 0)
        write_crop(folder / "crops" / f"{n}.png", n, side, 90 if label else 160)
        rows.append([f"crops/{n}.png", label, f"slide{n % groups}", f"tumour x scanner {n % groups % 2}"])
    return write_csv(folder / "table.csv", "path,label,group,domain", rows)


def fake_run(folder: Path, crops: int = 240, seed: int = 0, strength: float = 1.5) -> Path:
    """A finished three-fold run with made-up logits of eight views, in slides of four crops and three domains."""
    g = np.random.default_rng(seed)
    labels, groups = (g.random(crops) < 0.25).astype(int), np.arange(crops) // 4
    folds, domains = groups % 3, groups // 3 % 3
    write_csv(
        folder / "split.csv",
        "path,label,group,domain,fold",
        [[f"/somewhere/{n}.png", labels[n], f"s{groups[n]}", f"domain {domains[n]}", folds[n]] for n in range(crops)],
    )
    (folder / "recipe.json").write_text(json.dumps(dataclasses.asdict(load_recipe("lite0"))))
    (folder / "data.json").write_text(json.dumps(describe(RunFolder(folder).crops())))
    signal = strength * (2 * labels - 1) + g.normal(size=crops)
    logits = signal + g.normal(scale=0.7, size=(8, crops))
    for fold in range(3):
        index = np.flatnonzero(folds == fold)
        (folder / f"fold{fold}").mkdir()
        np.savez(folder / f"fold{fold}" / "oof.npz", index=index, logits=logits[:, index].astype(np.float32))
        write_csv(
            folder / f"fold{fold}" / "metrics.csv",
            "epoch,loss,validation_loss,auc,learning_rate,seconds",
            [[epoch, 1 / epoch, 1.1 / epoch, 1 - 0.3 / epoch, 1e-3, 2.5] for epoch in (1, 2, 3)],
        )
    return folder
