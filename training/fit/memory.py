"""How many crops at once a GPU's memory holds, measured on it or estimated without it.

A step of the optimizer may be computed in any number of equal batches, so the choice changes memory and seconds only.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from inference.device import DTYPES
from inference.manifest import TTA_VIEWS
from inference.preprocess import views

from ..augment.batch import Batch
from .loop import backward, predicted_at_once, take_step
from .lora import freeze_statistics
from .losses import focal
from .recipe import Recipe
from .state import State

GIB = 2**30
CONTEXT = GIB // 2  # what CUDA takes for itself, where the memory of a card is all that is known of it
USED = 0.9  # of the rest; the tenth is for fragments and for the work space of kernels, which no tensor shows
PASSES = 2
COPIES = 4  # of what is trained, in a `State`: AdamW's two moments, the average and the best so far


@dataclass(frozen=True)
class Choice:
    """The largest batch that fits.

    batch: crops at once, a divisor of the crops in the recipe's step; 0 where not even one fits
    needed: bytes with each number of crops that was asked about; infinite where a GPU had too few
    available: bytes that may be used
    """

    recipe: Recipe
    batch: int
    needed: dict[int, float]
    available: float

    def settled(self) -> Recipe:
        """The recipe with this batch: the same steps."""
        accumulate = self.recipe.batch * self.recipe.accumulate // self.batch
        return dataclasses.replace(self.recipe, batch=self.batch, accumulate=accumulate)

    def lines(self, how: str) -> list[str]:
        """What needs how much, and what to set; how: "measured" or "estimated"."""
        recipe, step = self.recipe, self.recipe.batch * self.recipe.accumulate
        needs = ", ".join(
            f"{batch} crop{'s' * (batch > 1)} at once {'more' if math.isinf(size) else f'{size / GIB:.2f} GiB'}"
            for batch, size in self.needed.items()
        )
        if self.batch == recipe.batch:
            advice = f"fits: the recipe's own batch={recipe.batch} accumulate={recipe.accumulate}"
        elif self.batch:
            own = "the recipe's own fits; with fewer passes" if self.batch > recipe.batch else "fits"
            accumulate = step // self.batch
            advice = f"{own}: --set batch={self.batch} --set accumulate={accumulate}, the same steps of {step} crops"
        else:
            less = "a smaller backbone" if recipe.checkpointing else "--set checkpointing=true, which computes twice"
            advice = f"does not fit, not even one crop at once; expected a GPU with more memory; or try {less}"
        return [f"memory of the GPU, {how}: {needs}; {self.available / GIB:.2f} GiB may be used", advice]


def choose(recipe: Recipe, needs: Callable[[int], float], available: float) -> Choice:
    """The largest batch that `needs` at most `available` bytes."""
    step = recipe.batch * recipe.accumulate
    needed: dict[int, float] = {}
    for batch in (n for n in range(step, 0, -1) if step % n == 0):
        needed[batch] = needs(batch)
        if needed[batch] <= available:
            return Choice(recipe, batch, needed, available)
    return Choice(recipe, 0, needed, available)


def peak_on_gpu(device: torch.device, work: Callable[[], object]) -> float:
    """The most bytes that tensors held on the GPU during `work`; infinite where they did not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        work()
    except torch.OutOfMemoryError:
        return math.inf
    return torch.cuda.max_memory_allocated(device)


def try_step(state: State, batch: int) -> None:
    """A step of two batches of so many black crops, and the first batch of another."""
    side = state.recipe.size
    crops = Batch(torch.zeros(batch, 3, side, side), torch.zeros(batch), torch.ones(batch))
    try:
        take_step(state, [crops, crops])
        backward(state, crops)  # beside the optimizer's moments, which begin with the first step
    finally:
        state.optimizer.zero_grad()


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that exist, each memory once, and keeps the most that there were."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = WeakIdKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            self.see(tensor)

    def see(self, tensor: torch.Tensor) -> None:
        memory = tensor.untyped_storage()
        if memory not in self.known:
            self.known[memory] = True
            self.now += memory.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(memory, self.forget, memory.nbytes()).atexit = False

    def forget(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.see(value)
        return result


class Estimate:
    """Bytes and FLOPs of training, from tensors that have a shape and no values: no GPU, no weights, at any size.

    They are a CPU's tensors. A GPU keeps the same ones: attention is one kernel on both, and autocast agrees.
    flops: of a step
    """

    def __init__(self, recipe: Recipe, model: torch.nn.Module) -> None:
        """model: the recipe's, on the device "meta"; it is changed."""
        self.recipe, self.model = recipe, model
        with FakeTensorMode(allow_non_fake_inputs=True) as self.mode:
            model.to_empty(device="cpu")
        whole = recipe.batch * recipe.accumulate
        self.ends = {batch: self.step(batch) for batch in {1, whole}}
        with FlopCounterMode(display=False) as counter:  # apart: it keeps tensors
            self.step(1)
        self.flops = whole * counter.get_total_flops() / PASSES
        self.validation = self.predict()

    def needs(self, batch: int) -> float:
        """Bytes of a run with so many crops at once."""
        return max(self.training(batch), self.validation)

    def training(self, batch: int) -> float:
        """Bytes of a step: on a straight line between those of one crop and of all at once."""
        one, whole = self.ends[1], max(self.ends)
        return one + (self.ends[whole] - one) / max(1, whole - 1) * (batch - 1)

    def step(self, batch: int) -> int:
        """Most bytes of the forward and backward pass of so many crops."""
        freeze_statistics(self.model)
        with self.mode, Held(self.model) as held:
            learnt = [p for p in self.model.parameters() if p.requires_grad]
            copies = [[p.detach().clone() for p in learnt] for _ in range(COPIES)]
            for _ in range(PASSES):  # the second beside the first one's gradients
                crops = self.crops(batch)
                logits = self.forward(crops, "none").flatten()
                focal(logits, torch.zeros(batch), torch.ones(batch), self.recipe.gamma).backward()
            self.model.zero_grad()
            del copies
        return held.most

    @torch.no_grad()
    def predict(self) -> int:
        """Most bytes of a pass without gradients, with the views of a finished fold."""
        self.model.eval()
        with self.mode, Held(self.model) as held:
            self.forward(self.crops(predicted_at_once(self.recipe, TTA_VIEWS[self.recipe.tta])), self.recipe.tta)
        return held.most

    def crops(self, batch: int) -> torch.Tensor:
        return torch.zeros(batch, 3, self.recipe.size, self.recipe.size).to(memory_format=torch.channels_last)

    def forward(self, crops: torch.Tensor, tta: str) -> torch.Tensor:
        """The logits in fp32 of every view."""
        dtype = DTYPES[self.recipe.precision]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits: torch.Tensor = self.model(views(crops, tta))
        return logits.float()
