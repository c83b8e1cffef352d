"""What a run will cost, before it is started: parameters, steps, memory, FLOPs and hours, from ten measured steps."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from inference.errors import UserError
from inference.manifest import TTA_VIEWS

from .loop import Run, adapted_model, backward, feed_of, predict
from .lora import freeze_statistics, trainable
from .splits import split
from .state import State

MEASURED = 10  # steps
JUDGED = 64  # crops of the validation pass that is timed


def plan(run: Run, only: Sequence[int] | None = None) -> None:
    """Print what the folds, or `only` those, will take on this machine in this process. Writes nothing."""
    recipe, accelerator = run.recipe, run.accelerator
    if accelerator.num_processes > 1:
        raise UserError("--plan measures one process; found several; start it without the launcher")
    fold = split(run.crops, recipe.split, recipe.folds, recipe.seed, recipe.split_by)
    numbers = list(only) if only else np.unique(fold).tolist()
    number = numbers[0]
    feed = feed_of(run, np.flatnonzero(fold != number).tolist(), number)
    updates = math.ceil(feed.steps / recipe.accumulate) * recipe.epochs
    state = State(adapted_model(run, number), recipe, updates, accelerator, None)
    freeze_statistics(state.model)
    batches = feed.epoch(0)
    with FlopCounterMode(display=False) as counter:  # also a warm-up
        backward(state, next(batches))
        state.step()
    begin, done = time.perf_counter(), 0
    for batch in batches:
        backward(state, batch)
        state.step()
        done += 1
        if done == MEASURED:
            break
    a_step = (time.perf_counter() - begin) / max(done, 1) if done else math.nan
    images = run.images[:JUDGED]
    begin = time.perf_counter()
    predict(state.plain, images, recipe, "none", accelerator)
    a_crop = (time.perf_counter() - begin) / len(images)

    counts, total = trainable(state.plain), sum(p.numel() for p in state.plain.parameters())
    held = sum(p.numel() * p.element_size() for p in state.plain.parameters())
    held_out = len(run.crops) / len(np.unique(fold))
    seconds = recipe.epochs * (feed.steps * a_step + held_out * a_crop) + TTA_VIEWS[recipe.tta] * held_out * a_crop
    if accelerator.device.type == "cuda":
        device = torch.cuda.get_device_name(accelerator.device)
        peak = torch.cuda.max_memory_allocated(accelerator.device)
    else:
        device, peak = (
            f"CPU, {torch.get_num_threads()} threads",
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        )
    for line in (
        f"device: {device}, precision {recipe.precision}",
        f"parameters: {total:,}, of which train {counts['adapters']:,} in adapters and {counts['head']:,} in the head",
        f"memory: weights {held / 2**30:.2f} GiB, peak of the {'GPU' if device[:3] != 'CPU' else 'process'} "
        f"{peak / 2**30:.2f} GiB with batches of {min(recipe.batch, len(feed.crops))}",
        f"steps: {feed.steps:,} an epoch, {feed.steps * recipe.epochs:,} a fold in at most {recipe.epochs} epochs",
        f"FLOPs: {counter.get_total_flops() / 1e12:.3g} T a step, "
        f"{counter.get_total_flops() * feed.steps * recipe.epochs / 1e15:.3g} P a fold",
        f"time: {a_step:.2f} s a step (mean of {done}), {1000 * a_crop:.1f} ms a crop to validate; "
        f"{seconds / 3600:.2f} h a fold, {len(numbers) * seconds / 3600:.2f} h for {len(numbers)} one after another",
    ):
        run.say(line)
