"""What a run will cost, before it is started: parameters, steps, memory, FLOPs, and hours from ten measured steps.

For a GPU it also chooses how many crops are computed at once: measured on the GPU of this machine, or estimated for one
that is not here.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from inference.errors import UserError
from inference.manifest import TTA_VIEWS

from .feed import Feed, steps_in_an_epoch
from .loop import Training, adapted_model, feed_of, predict, take_step
from .lora import freeze_statistics, trainable
from .memory import CONTEXT, GIB, USED, Choice, Estimate, choose, peak_on_gpu, try_step
from .state import State

MEASURED = 10  # steps
JUDGED = 64  # crops of the validation pass that is timed


def plan(training: Training, only: Sequence[int] | None = None, gpu_memory: float | None = None) -> None:
    """Print what the folds, or `only` those, will take in one process. Writes nothing.

    gpu_memory: GiB of a GPU that is not here, for which memory and batch are estimated; None: measure this machine
    """
    recipe = training.recipe
    if training.accelerator.num_processes > 1:
        raise UserError("--plan measures one process; found several; start it without the launcher")
    fold = recipe.split_of(training.crops)
    numbers = list(only) if only else np.unique(fold[fold >= 0]).tolist()
    train = np.flatnonzero((fold >= 0) & (fold != numbers[0])).tolist()
    if gpu_memory is not None:
        estimate_for(training, numbers[0], len(train), gpu_memory)
        return
    feed = feed_of(training, train, numbers[0])
    state = State(adapted_model(training, feed.number), recipe, feed.steps * recipe.epochs, training.accelerator, None)
    device = training.accelerator.device
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    training.say(f"device: {name}, precision {recipe.precision}")
    say_parameters(training, state.plain)
    if device.type == "cuda":
        choice = choose_here(training, state)
        for line in choice.lines("measured"):
            training.say(line)
        if not choice.batch:
            return
        training = dataclasses.replace(training, recipe=choice.settled())
        feed = feed_of(training, train, feed.number)
    measure(training, state, feed, held_out=(fold >= 0).sum() / len(np.unique(fold[fold >= 0])), folds=len(numbers))


def measure(training: Training, state: State, feed: Feed, held_out: float, folds: int) -> None:
    """Print steps, FLOPs and hours, from steps that are taken.

    held_out: crops that a fold validates on, on average
    """
    recipe = training.recipe
    freeze_statistics(state.model)
    steps = feed.epoch(0)
    with FlopCounterMode(display=False) as counter:  # also a warm-up
        take_step(state, next(steps))
    begin, done = time.perf_counter(), 0
    for batches in steps:
        take_step(state, batches)
        done += 1
        if done == MEASURED:
            break
    a_step = (time.perf_counter() - begin) / done if done else math.nan
    images = training.images[:JUDGED]
    begin = time.perf_counter()
    predict(state.plain, images, recipe, "none", training.accelerator)
    a_crop = (time.perf_counter() - begin) / len(images)
    if training.accelerator.device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        at_once = min(recipe.batch, len(feed.crops))
        training.say(f"memory: {peak / GIB:.2f} GiB, the process's peak with {at_once} crops at once")
    say_steps(training, feed.steps, counter.get_total_flops())
    network = recipe.epochs * (feed.steps * a_step + held_out * a_crop) + TTA_VIEWS[recipe.tta] * held_out * a_crop
    hours = recipe.seeds * network / 3600
    training.say(
        f"time: {a_step:.2f} s a step (mean of {done}), {1000 * a_crop:.1f} ms a crop to validate; "
        f"{hours:.2f} h a fold, {folds * hours:.2f} h for {folds} one after another"
    )


def estimate_for(training: Training, number: int, crops: int, gpu_memory: float) -> None:
    """Print what can be said of a GPU of so many GiB that is not here: all but the time.

    crops: that train fold `number`
    """
    recipe = training.recipe
    with torch.device("meta"):
        model = adapted_model(training, number)
    training.say(f"device: a GPU of {gpu_memory:g} GiB that is not here, so no time; precision {recipe.precision}")
    say_parameters(training, model)
    estimate = Estimate(recipe, model)
    say_steps(training, steps_in_an_epoch(recipe, crops), estimate.flops)
    for line in choose(recipe, estimate.needs, USED * (gpu_memory * GIB - CONTEXT)).lines("estimated"):
        training.say(line)


def choose_here(training: Training, state: State) -> Choice:
    """The largest batch that this GPU holds, beside what other programs have taken of it."""
    recipe, device = training.recipe, training.accelerator.device
    images = [training.images[n % len(training.images)] for n in range(JUDGED)]
    validation = peak_on_gpu(device, lambda: predict(state.plain, images, recipe, recipe.tta, training.accelerator))
    freeze_statistics(state.model)
    available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return choose(
        recipe, lambda batch: max(validation, peak_on_gpu(device, lambda: try_step(state, batch))), USED * available
    )


def say_parameters(training: Training, model: torch.nn.Module) -> None:
    counts, parameters = trainable(model), list(model.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    training.say(
        f"parameters: {sum(p.numel() for p in parameters):,} ({size / GIB:.2f} GiB), of which train "
        f"{counts['adapters']:,} in adapters and {counts['head']:,} in the head"
    )


def say_steps(training: Training, an_epoch: int, flops: float) -> None:
    """an_epoch: steps in it; flops: of one step"""
    recipe = training.recipe
    steps = an_epoch * recipe.epochs * recipe.seeds
    seeds = f" of each of {recipe.seeds} seeds" if recipe.seeds > 1 else ""
    training.say(f"steps: {an_epoch:,} an epoch, {steps:,} a fold in at most {recipe.epochs} epochs{seeds}")
    training.say(f"FLOPs: {flops / 1e12:.3g} T a step, {flops * steps / 1e15:.3g} P a fold")
