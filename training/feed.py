"""The input of training steps: the crops of a fold, augmented in batches, with targets and loss weights."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from .warp import canvases


class Batch(NamedTuple):
    """rgb: the network's input (B, 3, S, S); target: in [0, 1] (B,); weight: of the loss (B,)."""

    rgb: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


def load_crops(crops: Sequence[Crop]) -> list[np.ndarray]:
    """Every crop as uint8 RGB (H, W, 3); the first page where a file has several."""
    return [read_stack(crop.path)[0] for crop in crops]


def generator(*numbers: int) -> torch.Generator:
    """A generator whose stream depends on all of `numbers` and nothing else; trailing zeros do not count."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def epoch_order(crops: Sequence[Crop], sampling: str, g: torch.Generator) -> torch.Tensor:
    """Indices of one epoch: each crop once, or drawn so that every class or domain x class occurs equally often."""
    if sampling == "shuffle":
        return torch.randperm(len(crops), generator=g)
    return torch.multinomial(draw_weights(crops, sampling), len(crops), replacement=True, generator=g)


def draw_weights(crops: Sequence[Crop], sampling: str) -> torch.Tensor:
    """How often each crop (N,) is drawn in an epoch, on average."""
    if sampling == "shuffle":
        return torch.ones(len(crops))
    return weights_by([crop.label if sampling == "class" else (crop.domain, crop.label) for crop in crops], "inverse")


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


def loss_shares(recipe: Recipe, crops: Sequence[Crop]) -> tuple[dict[str, float], dict[str, float]]:
    """How the loss is divided among the classes and among the domains, by weights and sampling; each sums to 1."""
    share = loss_weights(recipe, crops) * draw_weights(crops, recipe.sampling)
    share = share / share.sum()
    classes: dict[str, float] = {"atypical": 0.0, "normal": 0.0}
    domains: dict[str, float] = defaultdict(float)
    for crop, value in zip(crops, share.tolist(), strict=True):
        classes["atypical" if crop.label else "normal"] += value
        domains[crop.domain] += value
    return classes, dict(sorted(domains.items()))


def targets(recipe: Recipe, crops: Sequence[Crop]) -> torch.Tensor:
    """The target of each crop (N,): its label, mixed with the share of expert votes if the recipe says so."""
    votes = [sum(crop.votes) / len(crop.votes) if crop.votes else crop.label for crop in crops]
    labels = torch.tensor([float(crop.label) for crop in crops])
    return labels + recipe.soft_labels * (torch.tensor(votes) - labels)


@dataclass
class Feed:
    """The training crops of fold `number` as batches; `rank` of `world` processes takes its share of each.

    workers: threads that augment batches ahead; 0 augments each batch on demand. The batches are the same.
    """

    recipe: Recipe
    crops: Sequence[Crop]
    images: Sequence[np.ndarray]
    number: int
    rank: int = 0
    world: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        self.canvases = canvases(self.images, self.recipe.crop)
        self.target, self.weight = targets(self.recipe, self.crops), loss_weights(self.recipe, self.crops)
        self.preprocess = self.recipe.preprocess()

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return max(1, len(self.crops) // min(self.recipe.batch, len(self.crops)))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch, each drawn from (seed, fold, epoch, step) alone, so any thread may draw it."""
        numbers = (self.recipe.seed, self.number, epoch)
        order = epoch_order(self.crops, self.recipe.sampling, generator(*numbers))
        # from 1: SeedSequence ignores trailing zeros
        work = [(index, (*numbers, step)) for step, index in enumerate(batches(len(self.crops), self.recipe, order), 1)]
        if not self.workers:
            yield from (self._batch(index, generator(*seed)) for index, seed in work)
            return
        ahead: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:  # PyTorch and OpenCV compute without the interpreter's lock
            try:
                for index, seed in work:
                    ahead.append(pool.submit(self._batch, index, generator(*seed)))
                    if len(ahead) > 2 * self.workers:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for left in ahead:
                    left.cancel()

    def _batch(self, index: torch.Tensor, g: torch.Generator) -> Batch:
        """Every process draws the whole batch and takes its share: the same crops whatever the number of processes."""
        recipe = self.recipe
        rgb = augment([self.canvases[n] for n in index.tolist()], self.preprocess, recipe.augment, g)
        target, weight = self.target[index], self.weight[index]
        if recipe.augment.mixup:
            rgb, target, weight = mixup(rgb, target, weight, recipe.augment.mixup, g)
        share = slice(self.rank, None, self.world)
        rgb = normalise(rgb[share], self.preprocess)
        # shares of a batch may differ by one crop, so their mean losses are weighted by size
        return Batch(rgb, target[share], weight[share] * (len(rgb) * self.world / len(index)))
