"""Fit one fold: LoRA on the shared base, a checkpoint per epoch, out-of-fold logits at the end.

A run folder holds recipe.json, data.json, split.csv and, for each fold, fold<k>/ with the adapter in PEFT's format,
metrics.csv, TensorBoard scalars and oof.npz. Everything random in epoch e of fold k comes from (seed, k, e) alone, so a
run that was killed and resumed ends in exactly the same adapters. Several processes share each batch and
average their gradients: the same steps as in one process, except for rounding and dropout, which each draws itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from inference.backbones import lookup
from inference.device import DTYPES
from inference.errors import UserError
from inference.files import replacing
from inference.manifest import TTA_VIEWS
from inference.metrics import roc_auc
from inference.preprocess import to_batch, views

from .data import Crop
from .feed import Batch, Feed, loss_shares
from .log import Log
from .lora import freeze_statistics, lora_model, store_base_as, trainable
from .losses import focal
from .processes import on_main, say
from .recipe import Recipe
from .splits import inner_holdout
from .state import State

if TYPE_CHECKING:
    from peft import PeftModel

VIEWS_AT_ONCE = {"efficientnet": 512, "vit": 64, "dinov3": 64}  # in a forward pass without gradients


@dataclass(frozen=True)
class Run:
    """What the folds of a run share.

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


def adapted_model(run: Run, number: int) -> PeftModel:
    """The recipe's backbone with its base and a fresh adapter, always the same for a fold number and seed."""
    recipe = run.recipe
    torch.manual_seed(recipe.seed * 1000 + number)
    extra = run.overrides | ({"drop_rate": recipe.drop} if recipe.drop else {})  # timm: dropout before the head
    model = lora_model(
        recipe.backbone,
        run.base,
        recipe.rank,
        recipe.alpha,
        recipe.dropout,
        recipe.targets,
        recipe.pool or None,
        recipe.rslora,
        **extra,
    )
    if recipe.checkpointing:  # timm's is not re-entrant: it needs no gradient at the input, and frozen stems give none
        model.get_base_model().set_grad_checkpointing(True)  # type: ignore[operator]
    store_base_as(model, DTYPES[recipe.precision])
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fit_fold(run: Run, fold: np.ndarray, number: int) -> None:
    """Train fold `number` in <run>/fold<number>, resuming where it stopped; a finished fold is left alone.

    fold: the validating fold of each crop (N,)
    """
    recipe, accelerator, out = run.recipe, run.accelerator, run.folder / f"fold{number}"
    train, held_out = np.flatnonzero(fold != number).tolist(), np.flatnonzero(fold == number).tolist()
    finished, saved = on_main(accelerator, lambda: look_into(out, accelerator.num_processes, recipe.batch, len(train)))
    if finished:
        run.say(f"fold {number}: finished")
        return
    watched = held_out
    if recipe.patience:  # the crops that choose the epoch must not be those that the fold is scored on
        inner = inner_holdout([run.crops[n] for n in train], recipe.split, recipe.seed)
        watched = [n for n, chooses in zip(train, inner, strict=True) if chooses]
        train = [n for n, chooses in zip(train, inner, strict=True) if not chooses]
    feed = feed_of(run, train, number)
    steps = math.ceil(feed.steps / recipe.accumulate) * recipe.epochs
    state = State(adapted_model(run, number), recipe, steps, accelerator, saved)
    introduce(run, state, feed, len(watched), len(held_out))
    labels, images = np.array([run.crops[n].label for n in watched]), [run.images[n] for n in watched]

    log = Log(out, state.epoch) if accelerator.is_main_process else None
    while not state.finished:
        start = time.perf_counter()
        loss = train_epoch(state, feed)
        with state.averaged() as model:
            z = predict(model, images, recipe, "none", accelerator)[0]
        auc = roc_auc(labels, z.numpy())  # the same in every process, so that all stop at once
        state.judge(auc)
        state.epoch += 1
        run.say(f"fold {number} epoch {state.epoch}/{recipe.epochs}: loss {loss:.4f}, AUC {auc:.4f}")
        if log is not None:
            values = {
                "loss": loss,
                "validation_loss": float(F.binary_cross_entropy_with_logits(z, torch.tensor(labels).float())),
                "auc": auc,
                "learning_rate": float(state.schedule.get_last_lr()[0]),
                "seconds": time.perf_counter() - start,
            }
            log.write(state.epoch, values)
            state.save(out / "checkpoint.pt")
        accelerator.wait_for_everyone()

    z = predict(state.load_result(), [run.images[n] for n in held_out], recipe, recipe.tta, accelerator)
    if accelerator.is_main_process:
        store(out, state.plain, held_out, z)
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # otherwise this fold's base would stay in memory beside the next one's


def look_into(out: Path, processes: int, batch: int, crops: int) -> tuple[bool, dict[str, Any] | None]:
    """Whether the fold in `out` is finished, and its checkpoint. UserError where a batch has too few crops."""
    if processes > min(batch, crops):
        raise UserError(f"{processes} processes share batches of {min(batch, crops)} crops; expected no more than that")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "checkpoint.pt"
    saved = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None
    return (out / "oof.npz").exists(), saved


def feed_of(run: Run, train: Sequence[int], number: int) -> Feed:
    """Batches of the crops `train`, for this process."""
    process, processes = run.accelerator.process_index, run.accelerator.num_processes
    crops, images = [run.crops[n] for n in train], [run.images[n] for n in train]
    return Feed(run.recipe, crops, images, number, process, processes, run.workers)


def introduce(run: Run, state: State, feed: Feed, watched: int, held_out: int) -> None:
    """Print the fold's state before the first epoch of this call."""
    name = f"fold {feed.number}"
    if state.epoch:
        run.say(f"{name} resumes after epoch {state.epoch}/{run.recipe.epochs}")
        return
    counts = trainable(state.plain)
    choose = f", {watched} choose the epoch" if run.recipe.patience else ""
    shared = f"; {feed.world} processes share each batch" if feed.world > 1 else ""
    run.say(
        f"{name}: {len(feed.crops)} crops train{choose}, {held_out} validate; trainable parameters: "
        f"{counts['adapters']:,} in adapters, {counts['head']:,} in the head{shared}"
    )
    for shares in loss_shares(run.recipe, feed.crops):
        if len(shares) > 1:
            run.say(f"{name}: shares of the loss: " + ", ".join(f"{key} {value:.1%}" for key, value in shares.items()))


def train_epoch(state: State, feed: Feed) -> float:
    """One pass over the fold's training crops; the mean loss."""
    recipe, epoch, accelerator = state.recipe, state.epoch, state.accelerator
    torch.manual_seed(recipe.seed * 1_000_000 + feed.number * 1000 + epoch + feed.rank * 1_000_000_007)  # dropout
    freeze_statistics(state.model)
    losses = []
    bar = tqdm(
        feed.epoch(epoch),
        desc=f"fold {feed.number} epoch {epoch + 1}/{recipe.epochs}",
        total=feed.steps,
        disable=None if accelerator.is_main_process else True,
        leave=False,
    )
    for step, batch in enumerate(bar):
        group = min(recipe.accumulate, feed.steps - step // recipe.accumulate * recipe.accumulate)  # the last is short
        losses.append(backward(state, batch, group))
        if (step + 1) % recipe.accumulate == 0 or step + 1 == feed.steps:
            state.step()
    mean = torch.tensor(np.mean(losses), device=accelerator.device, dtype=torch.float32)
    return float(accelerator.reduce(mean, "mean"))


def backward(state: State, batch: Batch, group: int = 1) -> float:
    """Add the gradients of one batch out of `group` per optimizer step; returns the batch's loss."""
    device = state.accelerator.device
    x = batch.rgb.to(device, memory_format=torch.channels_last)
    with state.accelerator.autocast():
        logits = state.model(x).float().flatten()
    loss = focal(logits, batch.target.to(device), batch.weight.to(device), state.recipe.gamma)
    state.accelerator.backward(loss / group)
    return loss.item()


@torch.no_grad()
def predict(
    model: torch.nn.Module, crops: Sequence[np.ndarray], recipe: Recipe, tta: str, accelerator: Accelerator
) -> torch.Tensor:
    """Logits (V, N) in fp32 of crops, each uint8 (H, W, 3); every process computes its share and gets all."""
    model.eval()
    v, preprocess = TTA_VIEWS[tta], recipe.preprocess()
    logits = torch.empty(v, len(crops))
    size = max(1, min(64, VIEWS_AT_ONCE[lookup(recipe.backbone).family] // v))
    world = accelerator.num_processes
    mine = [torch.empty(v, 0)]
    for start in range(accelerator.process_index, len(crops), size * world):
        chunk = to_batch(crops[start : start + size * world : world], preprocess).to(accelerator.device)
        with accelerator.autocast():
            out = model(views(chunk, tta))
        mine.append(out.float().view(v, len(chunk)).cpu())
    for rank, share in enumerate(gather_object([torch.cat(mine, dim=1)])):
        logits[:, rank::world] = share
    return logits


def store(out: Path, model: torch.nn.Module, held_out: list[int], logits: torch.Tensor) -> None:
    """Write the adapter in PEFT's format, then oof.npz, which says that the fold is finished."""
    model.save_pretrained(str(out))  # type: ignore[operator]
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    with replacing(out / "oof.npz") as partial, partial.open("wb") as file:
        np.savez(file, index=np.array(held_out), logits=logits.numpy())
    (out / "checkpoint.pt").unlink(missing_ok=True)
