"""Fit one fold: LoRA on the shared base, a checkpoint per epoch, out-of-fold logits at the end.

Everything random in epoch e of fold k comes from (seed, k, e) alone, so a run
that was killed and resumed ends in exactly the same adapters. Several processes share each batch and
average their gradients: the same steps as in one process, except for rounding and dropout, which each draws itself.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object

from inference.backbones import lookup
from inference.device import DTYPES
from inference.errors import UserError
from inference.manifest import TTA_VIEWS
from inference.metrics import roc_auc
from inference.preprocess import to_batch, views

from ..augment.batch import Batch
from ..data.crop import Crop
from ..data.splits import inner_holdout
from ..run import RunFolder, finish, is_finished
from .averaged import average_adapters
from .feed import Feed, loss_shares, parts_of_a_step, step_size
from .log import Log
from .lora import freeze_statistics, lora_model, plain_model, store_base_as, trainable
from .losses import focal
from .processes import on_main, progress, say
from .recipe import Recipe
from .state import State

if TYPE_CHECKING:
    from peft import PeftModel

VIEWS_AT_ONCE = {"efficientnet": 512, "vit": 64, "dinov3": 64}  # in a forward pass without gradients


@dataclass(frozen=True)
class Training:
    """What the folds of a run share while they are trained.

    images: of all crops, each uint8 (H, W, 3)
    workers: threads that augment batches ahead
    overrides: timm arguments that make miniatures for tests
    """

    recipe: Recipe
    folder: Path
    crops: Sequence[Crop]
    images: Sequence[np.ndarray]
    base: Path | None
    accelerator: Accelerator
    workers: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)

    def say(self, line: str) -> None:
        say(self.accelerator, line)


class Network(NamedTuple):
    """One network to be trained: of fold `number`, in `folder`, called `name` in what is printed."""

    number: int
    name: str
    folder: Path


def adapted_model(training: Training, number: int) -> PeftModel:
    """The recipe's backbone with its base and a fresh adapter, always the same for a fold number and seed."""
    recipe = training.recipe
    torch.manual_seed(recipe.seed * 1000 + number)
    extra = training.overrides | ({"drop_rate": recipe.drop} if recipe.drop else {})  # timm: dropout before the head
    model = lora_model(recipe.backbone, training.base, recipe.lora(), recipe.pool or None, **extra)
    if recipe.checkpointing:  # timm's is not re-entrant: it needs no gradient at the input, and frozen stems give none
        model.get_base_model().set_grad_checkpointing(True)  # type: ignore[operator]
    return stored_for(recipe, model)


def stored_for(recipe: Recipe, model: PeftModel) -> PeftModel:
    """The model with its base in the recipe's precision, and its memory as convolutions like it."""
    store_base_as(model, DTYPES[recipe.precision])
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fit_fold(training: Training, fold: np.ndarray, number: int) -> None:
    """Train fold `number` in <run>/fold<number>, resuming where it stopped; a finished fold is left alone.

    fold: the validating fold of each crop (N,)
    With several seeds it is the mean of their adapters, and its out-of-fold logits are those of this mean.
    """
    recipe, accelerator, run = training.recipe, training.accelerator, RunFolder(training.folder)
    train = np.flatnonzero((fold >= 0) & (fold != number)).tolist()
    held_out = np.flatnonzero(fold == number).tolist()
    if on_main(accelerator, lambda: run.is_finished(number)):
        training.say(f"fold {number}: finished")
        return
    networks = run.networks(number, recipe.seeds)
    for seed, folder in enumerate(networks):
        name = f"fold {number}" if len(networks) == 1 else f"fold {number} seed {seed}"
        seeded = dataclasses.replace(training, recipe=dataclasses.replace(recipe, seed=recipe.seed + seed))
        fit_network(seeded, Network(number, name, folder), train, held_out)
    if len(networks) > 1:
        training.say(f"fold {number}: the mean of {len(networks)} adapters")
        average_seeds(training, networks, run.fold(number), held_out)


def average_seeds(training: Training, networks: Sequence[Path], fold: Path, held_out: list[int]) -> None:
    """Write the mean of the adapters in `networks` to the folder `fold`, then its logits of the crops `held_out`."""
    from peft import PeftModel

    recipe, accelerator, base = training.recipe, training.accelerator, training.base
    assert base is not None  # only miniatures have none
    on_main(accelerator, lambda: average_adapters(networks, fold, base, recipe.backbone))
    model = plain_model(recipe.backbone, base, recipe.pool or None, **training.overrides)
    mean = stored_for(recipe, PeftModel.from_pretrained(model, str(fold))).to(accelerator.device)
    z = predict(mean, [training.images[n] for n in held_out], recipe, recipe.tta, accelerator)
    if accelerator.is_main_process:
        finish(fold, held_out, z.numpy())
    accelerator.wait_for_everyone()


def fit_network(training: Training, network: Network, train: list[int], held_out: list[int]) -> None:
    """Train one network, resuming where it stopped; a finished one is left alone.

    train, held_out: indices of the crops that train it, and of those that are scored by it
    """
    recipe, accelerator = training.recipe, training.accelerator
    finished, saved = on_main(
        accelerator, lambda: look_into(network.folder, accelerator.num_processes, recipe, len(train))
    )
    if finished:
        training.say(f"{network.name}: finished")
        return
    watched = held_out
    if recipe.patience:  # the crops that choose the epoch must not be those that the fold is scored on
        inner = inner_holdout([training.crops[n] for n in train], recipe.split, recipe.seed)
        watched = [n for n, chooses in zip(train, inner, strict=True) if chooses]
        train = [n for n, chooses in zip(train, inner, strict=True) if not chooses]
    feed = feed_of(training, train, network.number)
    state = State(adapted_model(training, network.number), recipe, feed.steps * recipe.epochs, accelerator, saved)
    introduce(training, network.name, state, feed, len(watched), len(held_out))
    labels, images = np.array([training.crops[n].label for n in watched]), [training.images[n] for n in watched]

    log = Log(network.folder, state.epoch) if accelerator.is_main_process else None
    while not state.finished:
        start = time.perf_counter()
        loss = train_epoch(state, feed, network.name)
        with state.averaged() as model:
            z = predict(model, images, recipe, "none", accelerator)[0]
        auc = roc_auc(labels, z.numpy())  # the same in every process, so that all stop at once
        state.judge(auc)
        state.epoch += 1
        training.say(f"{network.name} epoch {state.epoch}/{recipe.epochs}: loss {loss:.4f}, AUC {auc:.4f}")
        if log is not None:
            values = {
                "loss": loss,
                "validation_loss": float(F.binary_cross_entropy_with_logits(z, torch.tensor(labels).float())),
                "auc": auc,
                "learning_rate": float(state.schedule.get_last_lr()[0]),
                "seconds": time.perf_counter() - start,
            }
            log.write(state.epoch, values)
            state.save(network.folder / "checkpoint.pt")
        accelerator.wait_for_everyone()

    z = predict(state.load_result(), [training.images[n] for n in held_out], recipe, recipe.tta, accelerator)
    if accelerator.is_main_process:
        store(network.folder, state.plain, held_out, z)
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # otherwise this fold's base would stay in memory beside the next one's


def look_into(network: Path, processes: int, recipe: Recipe, crops: int) -> tuple[bool, dict[str, Any] | None]:
    """Whether a network is finished, and its checkpoint. UserError where a batch has too few crops."""
    smallest = step_size(recipe, crops) // parts_of_a_step(recipe, crops)
    if processes > smallest:
        raise UserError(f"{processes} processes share batches of {smallest} crops; expected no more than that")
    network.mkdir(parents=True, exist_ok=True)
    file = network / "checkpoint.pt"
    saved = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None
    return is_finished(network), saved


def feed_of(training: Training, train: Sequence[int], number: int) -> Feed:
    """Batches of the crops `train`, for this process."""
    process, processes = training.accelerator.process_index, training.accelerator.num_processes
    crops, images = [training.crops[n] for n in train], [training.images[n] for n in train]
    return Feed(training.recipe, crops, images, number, process, processes, training.workers)


def introduce(training: Training, name: str, state: State, feed: Feed, watched: int, held_out: int) -> None:
    """Print the network's state before the first epoch of this call."""
    if state.epoch:
        training.say(f"{name} resumes after epoch {state.epoch}/{training.recipe.epochs}")
        return
    counts = trainable(state.plain)
    choose = f", {watched} choose the epoch" if training.recipe.patience else ""
    shared = f"; {feed.world} processes share each batch" if feed.world > 1 else ""
    training.say(
        f"{name}: {len(feed.crops)} crops train{choose}, {held_out} validate; trainable parameters: "
        f"{counts['adapters']:,} in adapters, {counts['head']:,} in the head{shared}"
    )
    for shares in loss_shares(training.recipe, feed.crops):
        if len(shares) > 1:
            training.say(
                f"{name}: the loss is made up of: " + ", ".join(f"{key} {value:.1%}" for key, value in shares.items())
            )


def train_epoch(state: State, feed: Feed, name: str) -> float:
    """One pass over the network's training crops; the mean loss."""
    recipe, epoch, accelerator = state.recipe, state.epoch, state.accelerator
    torch.manual_seed(recipe.seed * 1_000_000 + feed.number * 1000 + epoch + feed.rank * 1_000_000_007)  # dropout
    freeze_statistics(state.model)
    losses = []
    steps = f"steps of {name} epoch {epoch + 1}/{recipe.epochs}"
    for batches in progress(feed.epoch(epoch), accelerator, steps, feed.steps):
        losses += take_step(state, batches)
    mean = torch.tensor(np.mean(losses), device=accelerator.device, dtype=torch.float32)
    return float(accelerator.reduce(mean, "mean"))


def take_step(state: State, batches: Sequence[Batch]) -> list[float]:
    """One step of the optimizer; the batches' losses."""
    losses = [backward(state, batch, len(batches)) for batch in batches]
    state.step()
    return losses


def backward(state: State, batch: Batch, group: int = 1) -> float:
    """Add the gradients of one batch out of the `group` of a step; returns the batch's loss."""
    device = state.accelerator.device
    x = batch.rgb.to(device, memory_format=torch.channels_last)
    with state.accelerator.autocast():
        logits = state.model(x).float().flatten()
    loss = focal(logits, batch.target.to(device), batch.weight.to(device), state.recipe.gamma)
    state.accelerator.backward(loss / group)
    return loss.item()


def predicted_at_once(recipe: Recipe, views: int) -> int:
    """Crops in a forward pass without gradients, each in so many views."""
    return max(1, min(64, VIEWS_AT_ONCE[lookup(recipe.backbone).family] // views))


@torch.no_grad()
def predict(
    model: torch.nn.Module, crops: Sequence[np.ndarray], recipe: Recipe, tta: str, accelerator: Accelerator
) -> torch.Tensor:
    """Logits (V, N) in fp32 of crops, each uint8 (H, W, 3); every process computes its share and gets all."""
    model.eval()
    v, preprocess = TTA_VIEWS[tta], recipe.preprocess()
    logits = torch.empty(v, len(crops))
    size = predicted_at_once(recipe, v)
    world = accelerator.num_processes
    mine = [torch.empty(v, 0)]
    starts = range(accelerator.process_index, len(crops), size * world)
    for start in progress(starts, accelerator, "batches of held-out crops", len(starts)):
        chunk = to_batch(crops[start : start + size * world : world], preprocess).to(accelerator.device)
        with accelerator.autocast():
            out = model(views(chunk, tta))
        mine.append(out.float().view(v, len(chunk)).cpu())
    for rank, share in enumerate(gather_object([torch.cat(mine, dim=1)])):
        logits[:, rank::world] = share
    return logits


def store(network: Path, model: torch.nn.Module, held_out: list[int], logits: torch.Tensor) -> None:
    """Write the adapter in PEFT's format, then the logits, which say that the network is finished."""
    model.save_pretrained(str(network))  # type: ignore[operator]
    (network / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    finish(network, held_out, logits.numpy())
    (network / "checkpoint.pt").unlink(missing_ok=True)
