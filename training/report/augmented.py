"""Draw a picture of augmented crops: each row is a plain crop, followed by what training could make of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from inference.errors import UserError
from inference.preprocess import to_batch

from ..augment.batch import Batch, augment, mixup
from ..augment.warp import canvases
from ..data.crop import Crop
from ..fit.command import add_inputs, load_inputs
from ..fit.feed import generator, load_crops
from ..fit.recipe import Recipe, load_recipe

GAP = 2  # pixels between pictures


def configure(parser: argparse.ArgumentParser) -> None:
    add_inputs(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("augmented.png"), help="PNG to write (default augmented.png)"
    )
    parser.add_argument("--rows", type=int, default=6, help="crops, from as many domains as there are (default 6)")
    parser.add_argument("--columns", type=int, default=9, help="augmented versions of each (default 9)")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> None:
    from PIL import Image

    recipe = load_recipe(options.recipe, options.set)
    crops = load_inputs(options, ungrouped=True)
    if not 0 < options.rows <= len(crops) or options.columns < 1:
        raise UserError(f"--rows {options.rows} --columns {options.columns}; expected 1 to {len(crops)} and 1 or more")
    chosen = choose(crops, options.rows, options.seed)
    images = load_crops([crops[n] for n in chosen])
    pixels = grid(recipe, images, options.columns, options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(options.output)
    for n in chosen:
        print(f"{'atypical' if crops[n].label else 'normal':>8}  {crops[n].domain}  {crops[n].name}")
    print(f"{options.output}: the first column is the plain input, {recipe.size} x {recipe.size}")


def choose(crops: Sequence[Crop], rows: int, seed: int) -> list[int]:
    """Indices of `rows` crops: from each domain in turn, alternating atypical and normal while there are both."""
    order = np.random.default_rng(seed).permutation(len(crops)).tolist()
    domains = sorted({crop.domain for crop in crops})
    chosen: list[int] = []
    for row in range(rows):
        left = [n for n in order if n not in chosen]
        left.sort(key=lambda n: (crops[n].domain != domains[row % len(domains)], crops[n].label == row % 2))
        chosen.append(left[0])
    return chosen


def grid(recipe: Recipe, images: list[np.ndarray], columns: int, seed: int) -> np.ndarray:
    """uint8 (H, W, 3): a row per image, the plain input first, then `columns` augmented ones; MixUp mixes the rows."""
    preprocess, rng = recipe.preprocess(), generator(seed)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    around = canvases(images, recipe.crop)
    shown = [to_batch(images, preprocess) * std + mean]
    for _ in range(columns):
        rgb = augment(around, preprocess, recipe.augment, rng)
        if recipe.augment.mixup:
            unlabelled = Batch(rgb, torch.zeros(len(rgb)), torch.ones(len(rgb)))
            rgb = mixup(unlabelled, recipe.augment.mixup, rng).rgb
        shown.append(rgb)
    table = torch.stack(shown, dim=1)  # (N, 1 + columns, 3, S, S)
    table = torch.nn.functional.pad(table, (GAP, GAP, GAP, GAP), value=1.0)
    rows, width, _, side, _ = table.shape
    pixels = table.permute(0, 3, 1, 4, 2).reshape(rows * side, width * side, 3)
    return (pixels.clamp(0, 1) * 255).round().byte().numpy()
