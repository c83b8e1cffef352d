"""Fit ranks x splits x backbones; write a table and a figure of their out-of-fold scores, as arXiv 2509.16935 has them.

Each combination is a run folder like any other, so a sweep that was stopped resumes where it was, and `report` or
`export` take any of its runs. Table and figure are written again after each, with all finished runs of the folder;
those on other crops, or with other settings than what a sweep varies, are in tables of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Collection
from pathlib import Path
from typing import Any

from inference.backbones import BACKBONES, lookup
from inference.errors import UserError
from inference.manifest import BASES

from ..data.splits import KINDS
from ..data.table import describe, same_data
from ..fit.command import add_inputs, find_base, fit, load_inputs, make_accelerator, settle_precision
from ..fit.feed import load_crops
from ..fit.loop import Training
from ..fit.processes import say
from ..fit.recipe import Recipe, load_recipe
from ..run import RunFolder
from .sweeptable import draw, summarise, write_tables

VARIED = ("backbone", "split", "rank")


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
    given = {change.partition("=")[0] for change in options.set}
    for name in VARIED:
        if name in given:
            raise UserError(f"--set {name}=… would change nothing; a sweep goes through several; use --{name} instead")
    shared = settle_precision(load_recipe(options.recipe, options.set), options.run)
    names = options.backbone or [name for name in BACKBONES if (options.bases / f"{name}.safetensors").exists()]
    if not names:
        raise UserError(
            f"{options.bases} holds no base weights; expected one or more; run 'python -m training base NAME'"
        )
    recipes = {
        f"{name}-{kind}-r{rank}": variant(shared, name, kind, rank, given)
        for name, kind, rank in itertools.product(names, options.split, options.rank)
    }
    bases = {
        name: find_base(variant(shared, name, "grouped", 1), options.bases / f"{name}.safetensors") for name in names
    }
    accelerator = make_accelerator(shared)
    crops = load_inputs(options, options.split == ["random"], lambda line: say(accelerator, line))
    images = load_crops(crops)
    rows = []
    if accelerator.is_main_process:
        rows = finished(options.run, recipes, shared, given, describe(crops))
    for number, (name, recipe) in enumerate(recipes.items(), 1):
        say(accelerator, f"{number} of {len(recipes)}: {name}")
        fit(Training(recipe, options.run / name, crops, images, bases[recipe.backbone], accelerator))
        if accelerator.is_main_process:
            rows.append(summarise(RunFolder(options.run / name)))
            write_tables(options.run, rows)
            draw(options.run / "sweep.svg", [row for row in rows if not row["apart"]])
    say(accelerator, f"{options.run / 'sweep.md'}, sweep.csv and sweep.svg: {len(rows)} runs")


def finished(
    folder: Path, ahead: Collection[str], shared: Recipe, given: Collection[str], data: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of the finished runs in `folder` that earlier sweeps made; `ahead`: names of those that this sweep fits."""
    rows = []
    for file in sorted(folder.glob("*/recipe.json")):
        if file.parent.name not in ahead:
            try:
                run = RunFolder(file.parent)
                recipe, described = run.recipe(), run.data()
                apart = difference(recipe, variant(shared, recipe.backbone, recipe.split, recipe.rank, given))
                if not same_data(described, data):
                    apart = [f"other crops ({described['crops']:,})", *apart]
                rows.append(summarise(run, ", ".join(apart)))
            except UserError as error:
                print(f"not in the table: {error}", flush=True)
    return rows


def difference(recipe: Recipe, expected: Recipe) -> list[str]:
    """The settings in which a recipe differs from what this sweep would have given it, such as "epochs 5"."""
    pairs = [(dataclasses.asdict(recipe), dataclasses.asdict(expected), "")]
    pairs.append((pairs[0][0].pop("augment"), pairs[0][1].pop("augment"), "augment."))
    return [
        f"{prefix}{name} {mine[name]}" for mine, other, prefix in pairs for name in mine if mine[name] != other[name]
    ]


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
