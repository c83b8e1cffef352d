"""Train the folds of a recipe in a run folder, or resume where they stopped."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from inference.backbones import lookup
from inference.device import keep_freed_memory, native_precision
from inference.errors import UserError
from inference.files import read_json, replacing, write_whole
from inference.manifest import BASES, PRECISIONS

from .data import Crop, describe, load_data
from .feed import load_crops
from .loop import Run, fit_fold
from .processes import die_with_parent, fit_in_parallel, on_main, say
from .recipe import Recipe, from_dict, load_recipe
from .splits import read_split, split, write_split


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """The options of every command that takes a recipe and data."""
    parser.add_argument("--recipe", default="default", help="a name in training/recipes or a .toml file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of the recipe"
    )
    parser.add_argument(
        "--data", type=Path, action="append", required=True, help="a data set's folder or CSV; repeatable"
    )


def configure(parser: argparse.ArgumentParser) -> None:
    add_inputs(parser)
    parser.add_argument("--run", type=Path, help="run folder (default runs/<recipe>)")
    parser.add_argument("--base", type=Path, help="base weights (default weights/bases/<backbone>.safetensors)")
    parser.add_argument("--fold", type=int, action="append", help="only this fold; repeatable")
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="N", help="folds at once, each on a GPU of its own (default 1)"
    )
    about = "threads that augment batches ahead, with the same result (default: 0 on a CPU, up to 8 for a GPU)"
    parser.add_argument("--workers", type=int, metavar="N", help=about)
    about = "print parameters, memory, steps, FLOPs and hours, from a measurement of ten steps, and write nothing"
    parser.add_argument("--plan", action="store_true", help=about)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # the process that runs --parallel


def run(options: argparse.Namespace) -> None:
    if options.parent:
        die_with_parent()
        if os.getppid() != options.parent:  # it had ended already
            raise SystemExit(1)
    folder = options.run or Path("runs") / Path(options.recipe).stem
    recipe = settle_precision(load_recipe(options.recipe, options.set), folder)
    base = find_base(recipe, options.base)
    workers = count_workers(options.workers)
    if options.parallel != 1 and not options.plan:
        return run_parallel(options, recipe, folder, base)
    accelerator = make_accelerator(recipe)
    crops = load_data(options.data, lambda line: None if options.parent else say(accelerator, line))
    what = Run(recipe, folder, crops, load_crops(crops), base, accelerator, workers)
    if options.plan:
        from .plan import plan

        return plan(what, options.fold)
    fit(what, options.fold)


def run_parallel(options: argparse.Namespace, recipe: Recipe, folder: Path, base: Path) -> None:
    """Train each fold in its own process. This process prepares the run folder, and holds no images and no model."""
    if options.parallel < 1:
        raise UserError(f"--parallel {options.parallel}; expected the number of folds at once, 1 or more")
    if "LOCAL_RANK" in os.environ:
        raise UserError(
            "--parallel under a launcher of several processes; expected one or the other; start the launcher once for "
            "each fold, with --fold and without --parallel"
        )
    crops = load_data(options.data)
    numbers = choose(write_run(folder, recipe, crops), options.fold)
    left = [number for number in numbers if not (folder / f"fold{number}" / "oof.npz").exists()]
    if len(left) < len(numbers):
        print(f"finished: {len(numbers) - len(left)} of {len(numbers)} folds")
    words = {
        "--recipe": [options.recipe],
        "--set": [*options.set, f"precision={recipe.precision}"],
        "--data": options.data,
        "--run": [folder],
        "--base": [base],
        "--workers": [] if options.workers is None else [options.workers],
    }
    if left:
        fit_in_parallel(left, options.parallel, [f"{k}={v}" for k, values in words.items() for v in values])


def fit(run: Run, only: Sequence[int] | None = None) -> None:
    """Train all folds of a run, or `only` those numbers; finished folds are kept."""
    fold = prepare(run)
    for number in choose(fold, only):
        fit_fold(run, fold, number)


def choose(fold: np.ndarray, only: Sequence[int] | None) -> Sequence[int]:
    """The numbers of a split's folds, or `only` those; UserError where the split has no such fold."""
    numbers = sorted(set(fold.tolist()))
    for number in only or numbers:
        if number not in numbers:
            raise UserError(
                f"fold {number} is not one of this split's ({numbers[0]} to {numbers[-1]}); choose one of them"
            )
    return list(dict.fromkeys(only)) if only else numbers


def count_workers(asked: int | None) -> int:
    """Threads that augment ahead: none on a CPU, where the forward pass keeps all cores busy; up to eight for a GPU."""
    if asked is not None:
        if asked < 0:
            raise UserError(f"--workers {asked}; expected the number of threads that augment ahead, 0 or more")
        return asked
    if not torch.cuda.is_available():
        return 0
    return min(8, max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def settle_precision(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with a precision in place of "auto": the run's own if it has begun, else the hardware's."""
    if recipe.precision not in ("auto", *PRECISIONS):
        raise UserError(
            f"recipe: precision {recipe.precision!r} is unknown; expected auto, {', '.join(PRECISIONS)}; change it"
        )
    if recipe.precision != "auto":
        return recipe
    if (folder / "recipe.json").exists():
        chosen, why = read_recipe(folder).precision, "as the run began"
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chosen, why = native_precision(device), "what this hardware multiplies natively"
        if chosen == "fp16" and not lookup(recipe.backbone).fp16_safe:
            chosen, why = "fp32", f"fp16, which this hardware multiplies natively, overflows in {recipe.backbone}"
    if os.environ.get("RANK", "0") == "0":
        print(f"precision {chosen}: {why}", flush=True)
    return dataclasses.replace(recipe, precision=chosen)


def find_base(recipe: Recipe, asked: Path | None) -> Path:
    base = asked or BASES / f"{recipe.backbone}.safetensors"
    if not base.exists():
        raise UserError(
            f"{base} is missing; it holds the base weights; run 'python -m training base {recipe.backbone}'"
        )
    return base


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Device and mixed precision of the run. `accelerate launch -m training fit ...` starts several processes."""
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("recipe: precision fp16 needs a GPU and found none; use --set precision=bf16")
    if "LOCAL_RANK" in os.environ:  # one of a launcher's processes
        die_with_parent()
    accelerator = Accelerator(mixed_precision="no" if recipe.precision == "fp32" else recipe.precision)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a run folder, from this or an earlier version. UserError where there is none."""
    do = "expected a run folder; make one with 'training fit'"
    try:
        return from_dict(read_json(folder / "recipe.json", do))
    except FileNotFoundError:
        raise UserError(f"{folder} has no recipe.json; {do}") from None


def prepare(run: Run) -> np.ndarray:
    """The folds of the run folder, in every process; see `write_run`."""
    return on_main(run.accelerator, lambda: write_run(run.folder, run.recipe, run.crops))


def write_run(folder: Path, recipe: Recipe, crops: Sequence[Crop]) -> np.ndarray:
    """The folds of the run folder, written with recipe and data if new; UserError where it belongs to another run.

    Each file appears whole or not at all, and is the same from every job, so jobs of one run may start at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe_file, data_file, split_file = (folder / name for name in ("recipe.json", "data.json", "split.csv"))
    settings, described = dataclasses.asdict(recipe), describe(crops)
    if recipe_file.exists():
        found = dataclasses.asdict(read_recipe(folder))
        changed = [name for name, value in settings.items() if found[name] != value]
        if changed:
            raise UserError(
                f"{recipe_file} differs from this call in {', '.join(changed)}; expected the same settings; "
                "choose another --run folder"
            )
    if data_file.exists() and read_json(data_file, "choose another --run folder") != described:
        raise UserError(f"{data_file} describes other data than this call; choose another --run folder")
    for file, content in ((recipe_file, settings), (data_file, described)):
        if not file.exists():
            write_whole(file, json.dumps(content, indent=1) + "\n")
    if not split_file.exists():
        fold = split(crops, recipe.split, recipe.folds, recipe.seed, recipe.split_by)
        with replacing(split_file) as partial:
            write_split(partial, crops, fold)
    return read_split(folder / "split.csv", crops)
