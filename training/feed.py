"""What a training step is fed: crops in memory, canvases to augment, targets, weights, and the order of an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from inference.imageio.stack import read_stack
from inference.preprocess import normalise

from .augment import augment, mixup
from .data import Crop
from .losses import weights_by
from .recipe import Recipe

CANVAS = 1.6  # canvas side over crop side: room for rotation, shift and magnification without padding


class Batch(NamedTuple):
    """rgb: the network's input (B, 3, S, S); target: in [0, 1] (B,); weight: of the loss (B,)."""

    rgb: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


def load_crops(crops: Sequence[Crop]) -> list[np.ndarray]:
    """Every crop as uint8 RGB (H, W, 3); the first page where a file has several."""
    return [read_stack(crop.path)[0] for crop in crops]


def canvases(images: Sequence[np.ndarray], crop: int) -> torch.Tensor:
    """The middle of every image, mirrored outwards where it is smaller, as one uint8 tensor (N, 3, C, C)."""
    side = max(min(image.shape[:2]) for image in images)
    side = min(side, math.ceil(crop * CANVAS)) if crop else side
    out = torch.empty(len(images), 3, side, side, dtype=torch.uint8)
    for n, image in enumerate(images):
        pad = [(max(0, -(-(side - length) // 2)),) * 2 for length in image.shape[:2]]
        image = np.pad(image, [*pad, (0, 0)], mode="symmetric")
        top, left = ((length - side) // 2 for length in image.shape[:2])
        out[n] = torch.tensor(image[top : top + side, left : left + side]).permute(2, 0, 1)
    return out


def generator(*numbers: int) -> torch.Generator:
    """A generator whose stream depends on all of `numbers` and nothing else."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def epoch_order(crops: Sequence[Crop], sampling: str, g: torch.Generator) -> torch.Tensor:
    """Indices of one epoch: each crop once, or drawn so that every class or domain x class comes equally often."""
    if sampling == "shuffle":
        return torch.randperm(len(crops), generator=g)
    keys = [crop.label if sampling == "class" else (crop.domain, crop.label) for crop in crops]
    return torch.multinomial(weights_by(keys, "inverse"), len(crops), replacement=True, generator=g)


def batches(n: int, recipe: Recipe, order: torch.Tensor) -> Iterator[torch.Tensor]:
    """The epoch's batches of crop indices; a last one that is not full is dropped, unless it is the only one."""
    size = min(recipe.batch, n)
    for start in range(0, n - size + 1, size):
        yield order[start : start + size]


def loss_weights(recipe: Recipe, crops: Sequence[Crop]) -> torch.Tensor:
    """The loss weight of each crop (N,), mean 1."""
    by_class = weights_by([crop.label for crop in crops], recipe.class_weighting)
    keys = [(crop.domain, crop.label) if recipe.domain_by_class else crop.domain for crop in crops]
    weights = by_class * weights_by(keys, recipe.domain_weighting)
    return weights / weights.mean()


def targets(recipe: Recipe, crops: Sequence[Crop]) -> torch.Tensor:
    """The target of each crop (N,): its label, mixed with the share of expert votes where the recipe says so."""
    votes = [sum(crop.votes) / len(crop.votes) if crop.votes else crop.label for crop in crops]
    labels = torch.tensor([float(crop.label) for crop in crops])
    return labels + recipe.soft_labels * (torch.tensor(votes) - labels)


@dataclass
class Feed:
    """The training crops of fold `number` as batches; `rank` of `world` processes takes its share of each."""

    recipe: Recipe
    crops: Sequence[Crop]
    images: Sequence[np.ndarray]
    number: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        self.canvas = canvases(self.images, self.recipe.crop)
        self.target, self.weight = targets(self.recipe, self.crops), loss_weights(self.recipe, self.crops)
        self.preprocess = self.recipe.preprocess()

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return max(1, len(self.crops) // min(self.recipe.batch, len(self.crops)))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch, drawn from (seed, fold, epoch) alone.

        Every process draws the whole batch and takes its share: the same crops whatever the number of processes.
        """
        recipe, g = self.recipe, generator(self.recipe.seed, self.number, epoch)
        order = epoch_order(self.crops, recipe.sampling, g)
        for index in batches(len(self.crops), recipe, order):
            side = recipe.crop or self.canvas.shape[-1]
            rgb = augment(self.canvas[index].float() / 255, side, recipe.size, recipe.augment, g)
            target, weight = self.target[index], self.weight[index]
            if recipe.augment.mixup:
                rgb, target, weight = mixup(rgb, target, weight, recipe.augment.mixup, g)
            share = slice(self.rank, None, self.world)
            rgb = normalise(rgb[share], self.preprocess)
            # shares of a batch may differ by one crop: their mean losses count by their size
            yield Batch(rgb, target[share], weight[share] * (len(rgb) * self.world / len(index)))
