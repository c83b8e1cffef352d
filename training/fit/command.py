"""Train the folds of a recipe in a run folder, or resume where they stopped."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from inference.backbones import lookup
from inference.device import keep_freed_memory, native_precision
from inference.errors import UserError
from inference.manifest import BASES
from inference.metrics import group_bootstrap, roc_auc

from ..data.crop import Crop
from ..data.datasets import GROUP_HELP
from ..data.splits import EXAM, SET_ASIDE
from ..data.table import Report, load_data
from ..run import RunFolder
from .feed import load_crops
from .loop import Training, fit_fold
from .processes import die_with_parent, fit_in_parallel, on_main, say
from .recipe import Recipe, from_dict, load_recipe, settings_help

RESAMPLES = 200  # of slides, for the interval of the AUC at the end


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """The options of every command that takes a recipe and data."""
    parser.add_argument("--recipe", default="default", help="a name in training/recipes or a .toml file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of the recipe"
    )
    parser.add_argument(
        "--data", type=Path, action="append", required=True, help="a data set's folder or CSV; repeatable"
    )
    parser.add_argument("--group", default="", metavar="COLUMN|PATTERN", help=GROUP_HELP)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = settings_help()


def load_inputs(options: argparse.Namespace, ungrouped: bool, report: Report = print) -> list[Crop]:
    """The crops that `add_inputs` asked for; ungrouped: whether a crop of no known slide may count as one."""
    return load_data(options.data, report, group=options.group, ungrouped=ungrouped)


def configure(parser: argparse.ArgumentParser) -> None:
    add_inputs(parser)
    parser.add_argument("--run", type=Path, help="run folder (default runs/<recipe>)")
    parser.add_argument("--base", type=Path, help="base weights (default weights/bases/<backbone>.safetensors)")
    parser.add_argument("--fold", type=int, action="append", help="only this fold; repeatable")
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="N", help="folds at once, each on a GPU of its own (default 1)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="threads that augment batches ahead, with the same result (default: 0 on a CPU, up to 8 for a GPU)",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="write nothing; print parameters, steps, memory, FLOPs and, from ten measured steps, hours; on a GPU also "
        "the batch and accumulate that fit its memory with the same steps",
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="with --plan: for a GPU of that memory that is not here; estimated, without the base's weights and hours",
    )
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # the process that runs --parallel


def run(options: argparse.Namespace) -> None:
    if options.parent:
        die_with_parent()
        if os.getppid() != options.parent:  # it had ended already
            raise SystemExit(1)
    folder = options.run or Path("runs") / Path(options.recipe).stem
    if options.gpu_memory is not None:
        return plan_elsewhere(options)
    recipe = settle_precision(load_recipe(options.recipe, options.set), folder)
    base = None if options.plan and unknown_base(recipe, options.base) else find_base(recipe, options.base)
    workers = count_workers(options.workers)
    if options.parallel != 1 and base is not None and not options.plan:
        return run_parallel(options, recipe, folder, base)
    accelerator = make_accelerator(recipe)
    crops = load_inputs(
        options, recipe.split == "random", lambda line: None if options.parent else say(accelerator, line)
    )
    training = Training(recipe, folder, crops, load_crops(crops), base, accelerator, workers)
    if options.plan:
        from .plan import plan

        if base is None:
            print(f"the weights of {recipe.backbone} are not here: planned with random ones, which cost the same")
        return plan(training, options.fold)
    fit(training, options.fold)
    if accelerator.is_main_process and not options.parent:
        conclude(RunFolder(folder))


def plan_elsewhere(options: argparse.Namespace) -> None:
    """`--plan --gpu-memory GIB`: on the CPU whatever this machine has, in the precision of a GPU."""
    from .plan import plan

    if not options.plan or options.gpu_memory < 1:
        raise UserError(f"--gpu-memory {options.gpu_memory:g}; expected it with --plan, and 1 GiB or more")
    recipe = load_recipe(options.recipe, options.set)
    if recipe.precision != "fp32":  # fp16 takes as much, and only a GPU's Accelerator allows it
        recipe = dataclasses.replace(recipe, precision="bf16")
    crops = load_inputs(options, recipe.split == "random")
    accelerator = Accelerator(cpu=True)
    plan(Training(recipe, Path(), crops, [], None, accelerator), options.fold, options.gpu_memory)


def run_parallel(options: argparse.Namespace, recipe: Recipe, folder: Path, base: Path) -> None:
    """Train each fold in its own process. This process prepares the run folder, and holds no images and no model."""
    if options.parallel < 1:
        raise UserError(f"--parallel {options.parallel}; expected the number of folds at once, 1 or more")
    if "LOCAL_RANK" in os.environ:
        raise UserError(
            "--parallel under a launcher of several processes; expected one or the other; start the launcher once for "
            "each fold, with --fold and without --parallel"
        )
    crops = load_inputs(options, recipe.split == "random")
    numbers = choose(RunFolder(folder).begin(recipe, crops), options.fold)
    RunFolder(folder).begin_on(base)
    left = [number for number in numbers if not RunFolder(folder).is_finished(number)]
    if len(left) < len(numbers):
        print(f"finished: {len(numbers) - len(left)} of {len(numbers)} folds")
    words = {
        "--recipe": [options.recipe],
        "--set": [*options.set, f"precision={recipe.precision}"],
        "--data": options.data,
        "--group": [options.group] if options.group else [],
        "--run": [folder],
        "--base": [base],
        "--workers": [] if options.workers is None else [options.workers],
    }
    if left:
        fit_in_parallel(left, options.parallel, [f"{k}={v}" for k, values in words.items() for v in values])
    conclude(RunFolder(folder))


def conclude(run: RunFolder) -> None:
    """Print the out-of-fold AUC of the finished folds, with its interval, and the next command."""
    numbers = run.numbers()
    finished = [number for number in numbers if run.is_finished(number)]
    if not finished:
        return
    oof = run.out_of_fold(finished)
    done = f"{len(finished)} of {len(numbers)} folds are finished"
    if oof.both_classes:
        z = oof.logits.mean(axis=0)
        drawn = [index for index in group_bootstrap(oof.groups, RESAMPLES) if len(set(oof.labels[index])) == 2]
        low, high = np.quantile([roc_auc(oof.labels[index], z[index]) for index in drawn] or [np.nan], [0.025, 0.975])
        leaky = ", which is too good: slides lie on both sides of the split" if run.recipe().split == "random" else ""
        auc = f"AUC {roc_auc(oof.labels, z):.3f} (95% {low:.3f} to {high:.3f})"
        print(f"{done}; out of fold on {len(z):,} crops: {auc}{leaky}")
    else:
        print(f"{done}; their crops are of one class, so there is no score")
    if len(finished) < len(numbers):
        print("next: the same command without --fold, for the other folds")
    else:
        print(f"next: python -m training report {run.path}")
        print(f"      python -m training export {run.path} --output weights/NAME")
        if run.exam.exists():
            print(f"      python -m inference score {run.exam} --weights weights/NAME, once nothing is left to choose")


def fit(training: Training, only: Sequence[int] | None = None) -> None:
    """Train all folds of a run, or `only` those numbers; finished folds are kept."""
    fold = prepare(training)
    if (fold < 0).any():
        exam, aside = int((fold == EXAM).sum()), int((fold == SET_ASIDE).sum())
        training.say(f"in no fold: {exam:,} crops of the exam, {aside:,} near a cut that divides inferred slides")
    for number in choose(fold, only):
        fit_fold(training, fold, number)


def choose(fold: np.ndarray, only: Sequence[int] | None) -> Sequence[int]:
    """The numbers of a split's folds, or `only` those; UserError where the split has no such fold."""
    numbers = sorted(set(fold[fold >= 0].tolist()))
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
    if recipe.precision != "auto":
        return recipe
    if RunFolder(folder).begun:
        chosen: str = RunFolder(folder).recipe().precision
        why = "as the run began"
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chosen, why = native_precision(device), "the fast precision of this hardware"
        if chosen == "fp16" and not lookup(recipe.backbone).fp16_safe:
            chosen, why = "fp32", f"the fast precision of this hardware, fp16, overflows in {recipe.backbone}"
    if os.environ.get("RANK", "0") == "0":
        print(f"precision {chosen}: {why}", flush=True)
    return from_dict(dataclasses.asdict(recipe) | {"precision": chosen})


def unknown_base(recipe: Recipe, asked: Path | None) -> bool:
    """Whether no base was named and that of the backbone, which may be gated, is not there."""
    return asked is None and not (BASES / f"{recipe.backbone}.safetensors").exists()


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


def prepare(training: Training) -> np.ndarray:
    """The folds of the run folder, in every process."""

    def begin() -> np.ndarray:
        fold = RunFolder(training.folder).begin(training.recipe, training.crops)
        if training.base is not None:
            RunFolder(training.folder).begin_on(training.base)
        return fold

    return on_main(training.accelerator, begin)
