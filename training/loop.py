"""Fit one fold: LoRA on the shared base, a checkpoint per epoch, out-of-fold logits at the end.

A run folder holds recipe.json, data.json, split.csv and, for each fold, fold<k>/ with the adapter in PEFT's format,
metrics.csv, TensorBoard scalars and oof.npz. Everything random in epoch e of fold k comes from (seed, k, e) alone, so a
run that was killed and resumed ends in the very adapters of one that was not. Several processes share each batch and
average their gradients: the same steps as one process takes, up to rounding, but for dropout, which each draws itself.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from inference.backbones import lookup
from inference.errors import UserError
from inference.manifest import TTA_VIEWS
from inference.metrics import roc_auc
from inference.preprocess import Preprocess, normalise, to_batch, views

from .augment import augment, mixup
from .data import Crop
from .feed import batches, canvases, epoch_order, generator, loss_weights, targets
from .log import Log, save_atomically
from .lora import freeze_statistics, lora_model, store_base_as, trainable
from .losses import focal
from .processes import on_main, say
from .recipe import Recipe

if TYPE_CHECKING:
    from peft import PeftModel

VIEWS_AT_ONCE = {"efficientnet": 512, "vit": 64, "dinov3": 64}  # in a forward pass without gradients
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
State = dict[str, torch.Tensor]


@dataclass
class Progress:
    """Where a fold stands after `epoch` epochs: averaged weights, the best of them, its AUC, epochs since then."""

    average: State
    best_state: State
    epoch: int = 0
    best: float = -1.0
    stale: int = 0

    def judge(self, auc: float) -> None:
        """Keep the averaged weights if they are the best yet; where no AUC exists (one class only), the latest."""
        if auc > self.best or math.isnan(auc):
            self.best_state = {name: value.clone() for name, value in self.average.items()}
            self.best, self.stale = max(self.best, auc), 0  # max ignores a NaN in second place
        else:
            self.stale += 1


def learning_rate_share(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first share of the steps, then half a cosine to zero."""
    warm = max(1, round(steps * warmup))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def predict(
    model: torch.nn.Module, crops: Sequence[np.ndarray], preprocess: Preprocess, tta: str, accelerator: Accelerator,
    views_at_once: int = 512,
) -> torch.Tensor:  # fmt: skip
    """Logits (V, N) in fp32 of crops, each uint8 (H, W, 3); every process computes its share and gets all."""
    model.eval()
    logits = torch.empty(TTA_VIEWS[tta], len(crops))
    size, world = max(1, min(64, views_at_once // TTA_VIEWS[tta])), accelerator.num_processes
    mine = [torch.empty(TTA_VIEWS[tta], 0)]
    for start in range(accelerator.process_index, len(crops), size * world):
        chunk = to_batch(crops[start : start + size * world : world], preprocess).to(accelerator.device)
        with accelerator.autocast():
            out = model(views(chunk, tta))
        mine.append(out.float().view(TTA_VIEWS[tta], len(chunk)).cpu())
    for rank, share in enumerate(gather_object([torch.cat(mine, dim=1)])):
        logits[:, rank::world] = share
    return logits


def state_of(model: torch.nn.Module) -> State:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def restore(model: torch.nn.Module, state: State) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


def adapted_model(recipe: Recipe, base: Path | None, number: int, overrides: dict[str, Any] | None) -> PeftModel:
    """The recipe's backbone with its base and a fresh adapter, the same for the same fold number and seed."""
    torch.manual_seed(recipe.seed * 1000 + number)
    extra = dict(overrides or {}) | ({"drop_rate": recipe.drop} if recipe.drop else {})  # timm: dropout before the head
    model = lora_model(recipe.backbone, base, recipe.rank, recipe.alpha, recipe.dropout, recipe.targets,
                       recipe.pool or None, recipe.rslora, **extra)  # fmt: skip
    if recipe.checkpointing:  # timm's is not re-entrant: it needs no gradient at the input, which a frozen stem has not
        model.get_base_model().set_grad_checkpointing(True)  # type: ignore[operator]
    store_base_as(model, DTYPES[recipe.precision])
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fit_fold(
    recipe: Recipe, crops: Sequence[Crop], images: Sequence[np.ndarray], fold: np.ndarray, number: int, folder: Path,
    base: Path | None, accelerator: Accelerator, overrides: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Train fold `number` in `folder`/fold<number>, or go on where it stopped; nothing where it is finished."""
    out = folder / f"fold{number}"
    checkpoint = out / "checkpoint.pt"
    train = np.flatnonzero(fold != number).tolist()
    held_out = np.flatnonzero(fold == number).tolist()

    def look() -> tuple[bool, dict[str, Any] | None]:
        """Whether the fold is finished, and its checkpoint."""
        world, batch = accelerator.num_processes, min(recipe.batch, len(train))
        if world > batch:
            raise UserError(f"{world} processes share batches of {batch} crops; expected no more of them than crops")
        out.mkdir(parents=True, exist_ok=True)
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True) if checkpoint.exists() else None
        return (out / "oof.npz").exists(), saved

    finished, saved = on_main(accelerator, look)
    if finished:
        say(accelerator, f"fold {number}: finished")
        return
    train_crops, held_out_images = [crops[n] for n in train], [images[n] for n in held_out]
    labels = np.array([crops[n].label for n in held_out])
    canvas = canvases([images[n] for n in train], recipe.crop)
    target, weight = targets(recipe, train_crops), loss_weights(recipe, train_crops)
    preprocess, at_once = recipe.preprocess(), VIEWS_AT_ONCE[lookup(recipe.backbone).family]

    plain = adapted_model(recipe, base, number, overrides)
    learnt = [(name, p) for name, p in plain.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [dict(params=[p for name, p in learnt if "lora_" in name], lr=recipe.learning_rate),
         dict(params=[p for name, p in learnt if "lora_" not in name],
              lr=recipe.head_learning_rate or recipe.learning_rate)],
        weight_decay=recipe.weight_decay,
    )  # fmt: skip
    model, optimizer = accelerator.prepare(plain, optimizer)
    steps = math.ceil(max(1, len(train) // min(recipe.batch, len(train))) / recipe.accumulate) * recipe.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate_share(s, steps, recipe.warmup))
    if accelerator.scaler:  # fp16: the scale that an earlier fold reached must not reach into this one
        accelerator.scaler.load_state_dict(torch.amp.grad_scaler.GradScaler().state_dict())
    progress = Progress(state_of(plain), state_of(plain))
    if saved:
        restore(plain, saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(saved["scaler"])
        average, best_state = ({name: value.to(accelerator.device) for name, value in saved[key].items()}
                               for key in ("average", "best_state"))  # fmt: skip
        progress = Progress(average, best_state, saved["epoch"], saved["best"], saved["stale"])
        say(accelerator, f"fold {number} goes on after epoch {progress.epoch}/{recipe.epochs}")
    counts = trainable(plain)
    if progress.epoch == 0:
        shared = f"; {accelerator.num_processes} processes share each batch" if accelerator.num_processes > 1 else ""
        say(accelerator, f"fold {number}: {len(train)} crops train, {len(held_out)} validate; trainable parameters: "
                         f"{counts['adapters']:,} in adapters, {counts['head']:,} in the head{shared}")  # fmt: skip

    def train_epoch(epoch: int) -> float:
        """One pass over the fold's training crops; the mean loss."""
        g = generator(recipe.seed, number, epoch)
        order = epoch_order(train_crops, recipe.sampling, g)
        world, rank = accelerator.num_processes, accelerator.process_index
        torch.manual_seed(recipe.seed * 1_000_000 + number * 1000 + epoch + rank * 1_000_000_007)  # dropout
        freeze_statistics(model)
        losses = []
        bar = tqdm(list(batches(len(train), recipe, order)), desc=f"fold {number} epoch {epoch + 1}/{recipe.epochs}",
                   disable=None if accelerator.is_main_process else True, leave=False)  # fmt: skip
        for step, index in enumerate(bar):
            # every process draws the whole batch and takes its share: the same crops whatever the number of processes
            rgb = augment(canvas[index].float() / 255, recipe.crop or canvas.shape[-1], recipe.size, recipe.augment, g)
            t, w = target[index], weight[index]
            if recipe.augment.mixup:
                rgb, t, w = mixup(rgb, t, w, recipe.augment.mixup, g)
            share = slice(rank, None, world)
            x = normalise(rgb[share], preprocess).to(accelerator.device, memory_format=torch.channels_last)
            with accelerator.autocast():
                logits = model(x).float().flatten()
            loss = focal(logits, t[share].to(x.device), w[share].to(x.device), recipe.gamma)
            loss = loss * (len(x) * world / len(index))  # shares of a batch may differ by one crop
            in_group = min(recipe.accumulate, len(bar) - step // recipe.accumulate * recipe.accumulate)
            accelerator.backward(loss / in_group)
            losses.append(loss.item())
            if (step + 1) % recipe.accumulate and step + 1 < len(bar):
                continue
            if recipe.clip:
                accelerator.clip_grad_norm_([p for _, p in learnt], recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            if not accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose gradient overflowed
                schedule.step()
                decay = min(recipe.ema, schedule.last_epoch / (9 + schedule.last_epoch))
                for name, value in learnt:
                    progress.average[name].lerp_(value.detach(), 1 - decay)
        mean = torch.tensor(np.mean(losses), device=accelerator.device, dtype=torch.float32)
        return float(accelerator.reduce(mean, "mean"))

    log = Log(out, progress.epoch) if accelerator.is_main_process else None
    while progress.epoch < recipe.epochs and not (recipe.patience and progress.stale >= recipe.patience):
        start = time.perf_counter()
        loss = train_epoch(progress.epoch)
        current = state_of(plain)
        restore(plain, progress.average)
        z = predict(plain, held_out_images, preprocess, "none", accelerator, at_once)[0]
        restore(plain, current)
        auc = roc_auc(labels, z.numpy())  # of the same logits in every process: they agree on when to stop
        progress.judge(auc)
        progress.epoch += 1
        say(accelerator, f"fold {number} epoch {progress.epoch}/{recipe.epochs}: loss {loss:.4f}, AUC {auc:.4f}")
        if log is not None:
            held_out_loss = float(F.binary_cross_entropy_with_logits(z, torch.tensor(labels).float()))
            log.write(progress.epoch, {"loss": loss, "validation_loss": held_out_loss, "auc": auc,
                                       "learning_rate": float(schedule.get_last_lr()[0]),
                                       "seconds": time.perf_counter() - start})  # fmt: skip
            save_atomically({"model": current, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                             "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {},
                             **vars(progress)}, checkpoint)  # fmt: skip
        accelerator.wait_for_everyone()

    restore(plain, progress.best_state if recipe.patience else progress.average)
    z = predict(plain, held_out_images, preprocess, "d4", accelerator, at_once)
    if accelerator.is_main_process:
        plain.save_pretrained(str(out))
        (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        partial = out / "oof.partial.npz"
        np.savez(partial, index=np.array(held_out), logits=z.numpy())
        os.replace(partial, out / "oof.npz")
        checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # it would keep this fold's base beside the next one's
