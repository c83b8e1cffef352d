"""Finished runs of miniature networks, without their training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from test.support.miniature import random_base, random_fold
from training.data.splits import split
from training.data.table import describe, load_data
from training.fit.recipe import load_recipe
from training.run import RunFolder


def make_run(
    folder: Path, table: Path, bases: Path, backbone: str, seed: int = 0, adapters: bool = True, **changes: Any
) -> Path:
    """A finished run without the training: real adapters with random weights, made-up logits that know the labels."""
    recipe = load_recipe(
        "default",
        [f"backbone={backbone}", "size=32", "crop=0", "pool=", *(f"{name}={value}" for name, value in changes.items())],
    )
    crops = load_data([table], lambda line: None)
    folds = split(crops, recipe.split, recipe.folds, recipe.seed)
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe)))
    (folder / "data.json").write_text(json.dumps(describe(crops)))
    RunFolder(folder).write_split(crops, folds)
    base = bases / f"{backbone}.safetensors"
    if not base.exists():
        base.parent.mkdir(exist_ok=True)
        random_base(backbone, base)
    targets = {"efficientnet-lite0": "late", "uni": "qkv"}[backbone]
    labels = np.array([crop.label for crop in crops])
    g = np.random.default_rng(seed)
    logits = 1.5 * (2 * labels - 1) + g.normal(size=len(crops)) + g.normal(scale=0.5, size=(8, len(crops)))
    for fold in range(recipe.folds):
        (folder / f"fold{fold}").mkdir()
        if adapters:
            random_fold(
                backbone, base, folder / f"fold{fold}", targets, {"uni": "token"}.get(backbone, "avg"), seed + fold
            )
        index = np.flatnonzero(folds == fold)
        np.savez(folder / f"fold{fold}" / "oof.npz", index=index, logits=logits[:, index].astype(np.float32))
    return folder
