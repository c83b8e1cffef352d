"""The input of training steps: the crops of a fold, augmented in batches, with targets and loss weights."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from inference.errors import UserError
from inference.imageio.stack import read_stack
from inference.preprocess import normalise
from inference.seen import pixel_hash

from ..augment.batch import Batch, augment, mixup
from ..augment.warp import canvases
from ..data.crop import Crop
from .losses import weights_by
from .recipe import Recipe


def load_crops(crops: Sequence[Crop]) -> list[np.ndarray]:
    """Every crop as uint8 RGB (H, W, 3); the first page where a file has several.

    UserError where a crop no longer has the pixels that a run folder holds the hash of.
    """
    images = []
    for crop in crops:
        image = read_stack(crop.path)[0]
        if crop.pixels and crop.pixels != pixel_hash(image):
            raise UserError(
                f"{crop.path} has other pixels than when its run began; expected the same; bring the file back, or "
                "start a new run"
            )
        images.append(image)
    return images


def generator(*numbers: int) -> torch.Generator:
    """A generator whose stream depends on all of `numbers` and nothing else; trailing zeros do not count."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def epoch_order(crops: Sequence[Crop], sampling: str, rng: torch.Generator) -> torch.Tensor:
    """Indices of one epoch: each crop once, or drawn so that every class or domain x class occurs equally often."""
    if sampling == "shuffle":
        return torch.randperm(len(crops), generator=rng)
    return torch.multinomial(draw_weights(crops, sampling), len(crops), replacement=True, generator=rng)


def draw_weights(crops: Sequence[Crop], sampling: str) -> torch.Tensor:
    """How often each crop (N,) is drawn in an epoch, on average."""
    if sampling == "shuffle":
        return torch.ones(len(crops))
    return weights_by([crop.label if sampling == "class" else (crop.domain, crop.label) for crop in crops], "inverse")


def step_size(recipe: Recipe, n: int) -> int:
    """Crops in a step of the optimizer, out of n that train."""
    return min(recipe.batch * recipe.accumulate, n)


def steps_in_an_epoch(recipe: Recipe, n: int) -> int:
    """Steps of the optimizer on n crops that train."""
    return max(1, n // step_size(recipe, n))


def parts_of_a_step(recipe: Recipe, n: int) -> int:
    """Batches, of equal size or one crop more, that a step is computed in."""
    return math.ceil(step_size(recipe, n) / recipe.batch)


def steps_of(n: int, recipe: Recipe, order: torch.Tensor) -> Iterator[torch.Tensor]:
    """The crop indices of each step of an epoch; a last one that is not full is dropped, unless it is the only one."""
    size = step_size(recipe, n)
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
    """The training crops of fold `number` as steps of one or more batches; `rank` of `world` processes takes its share
    of each batch.

    workers: threads that augment steps ahead; 0 augments each on demand. The batches are the same.
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
        """Steps of the optimizer in an epoch."""
        return steps_in_an_epoch(self.recipe, len(self.crops))

    def epoch(self, epoch: int) -> Iterator[list[Batch]]:
        """The batches of each step, drawn from (seed, fold, epoch, step) alone, so any thread may draw them."""
        numbers = (self.recipe.seed, self.number, epoch)
        order = epoch_order(self.crops, self.recipe.sampling, generator(*numbers))
        # from 1: SeedSequence ignores trailing zeros
        work = [
            (index, (*numbers, step)) for step, index in enumerate(steps_of(len(self.crops), self.recipe, order), 1)
        ]
        if not self.workers:
            yield from (self._step(index, generator(*seed)) for index, seed in work)
            return
        ahead: deque[Future[list[Batch]]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:  # PyTorch and OpenCV compute without the interpreter's lock
            try:
                for index, seed in work:
                    ahead.append(pool.submit(self._step, index, generator(*seed)))
                    if len(ahead) > 2 * self.workers:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for left in ahead:
                    left.cancel()

    def _step(self, index: torch.Tensor, rng: torch.Generator) -> list[Batch]:
        """Draw the whole step, then cut it into batches and these into shares: the same crops, augmented and mixed in
        the same way, whatever `batch`, `accumulate` and the number of processes that compute it."""
        recipe = self.recipe
        rgb = augment([self.canvases[n] for n in index.tolist()], self.preprocess, recipe.augment, rng)
        step = Batch(rgb, self.target[index], self.weight[index])
        if recipe.augment.mixup:
            step = mixup(step, recipe.augment.mixup, rng)
        parts = torch.arange(len(index)).tensor_split(parts_of_a_step(recipe, len(self.crops)))
        return [self._share(step, part[self.rank :: self.world], self.world * len(parts)) for part in parts]

    def _share(self, step: Batch, chosen: torch.Tensor, shares: int) -> Batch:
        """The crops `chosen` of a step that is divided into `shares`."""
        # shares may differ by one crop, so their mean losses are weighted by size
        weight = step.weight[chosen] * (len(chosen) * shares / len(step.weight))
        return Batch(normalise(step.rgb[chosen], self.preprocess), step.target[chosen], weight)
