"""Train the folds of a recipe in a run folder, or go on where they stopped."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from inference.errors import UserError
from inference.manifest import BASES

from .data import Crop, describe, load_data
from .feed import load_crops
from .loop import fit_fold
from .recipe import Recipe, load_recipe
from .splits import read_split, split, write_split

__all__ = ["configure", "fit", "fit_fold", "load_crops", "prepare", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="default", help="a name in training/recipes or a .toml file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of the recipe"
    )
    parser.add_argument(
        "--data", type=Path, action="append", required=True, help="a data set's folder or CSV; repeatable"
    )
    parser.add_argument("--run", type=Path, help="run folder (default runs/<recipe>)")
    parser.add_argument("--base", type=Path, help="base weights (default weights/bases/<backbone>.safetensors)")
    parser.add_argument("--fold", type=int, action="append", help="only this fold; repeatable")


def run(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.set)
    folder = options.run or Path("runs") / Path(options.recipe).stem
    base = find_base(recipe, options.base)
    accelerator = make_accelerator(recipe)
    crops = load_data(options.data, accelerator.print)
    fit(recipe, folder, crops, load_crops(crops), base, accelerator, options.fold)


def fit(
    recipe: Recipe, folder: Path, crops: Sequence[Crop], images: Sequence[np.ndarray], base: Path,
    accelerator: Accelerator, only: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """All folds of a run, or `only` those numbers; finished ones are kept."""
    fold = prepare(folder, recipe, crops, accelerator)
    numbers = sorted(set(fold.tolist()))
    for number in only or numbers:
        if number not in numbers:
            raise UserError(
                f"fold {number} is not one of this split's ({numbers[0]} to {numbers[-1]}); choose one of them"
            )
    for number in only or numbers:
        fit_fold(recipe, crops, images, fold, number, folder, base, accelerator)


def find_base(recipe: Recipe, asked: Path | None) -> Path:
    base = asked or BASES / f"{recipe.backbone}.safetensors"
    if not base.exists():
        raise UserError(
            f"{base} is missing; it holds the base weights; run 'python -m training base {recipe.backbone}'"
        )
    return base


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Device and mixed precision of the run. `accelerate launch -m training fit ...` starts several processes."""
    known = ("fp32", "bf16", "fp16")
    if recipe.precision not in known:
        raise UserError(f"recipe: precision {recipe.precision!r} is not known; expected one of {', '.join(known)}")
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("recipe: precision fp16 needs a GPU and found none; use --set precision=bf16")
    return Accelerator(mixed_precision="no" if recipe.precision == "fp32" else recipe.precision)


def prepare(folder: Path, recipe: Recipe, crops: Sequence[Crop], accelerator: Accelerator) -> np.ndarray:
    """The folds of the run folder, written with recipe and data if it is new; UserError where it is another run's."""
    settings = json.dumps(dataclasses.asdict(recipe), indent=1) + "\n"
    data = json.dumps(describe(crops), indent=1) + "\n"
    table = folder / "split.csv"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in ((folder / "recipe.json", settings), (folder / "data.json", data)):
            if file.exists() and file.read_text() != content:
                raise UserError(
                    f"{file} differs from this call; expected the same run to go on; choose another --run folder"
                )
        if not table.exists():
            write_split(table, crops, split(crops, recipe.split, recipe.folds, recipe.seed))
        (folder / "recipe.json").write_text(settings)
        (folder / "data.json").write_text(data)
    accelerator.wait_for_everyone()
    return read_split(table, crops)
