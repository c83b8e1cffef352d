"""Fit one fold: LoRA on the shared base, a checkpoint per epoch, out-of-fold logits at the end.

A run folder holds recipe.json, split.csv and, for each fold, fold<k>/ with the adapter in PEFT's format, metrics.csv,
TensorBoard scalars and oof.npz. Everything random in epoch e of fold k comes from (seed, k, e) alone: a run that was
killed and resumed ends in the same adapters as one that was not, on one process or several.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from inference.errors import UserError
from inference.manifest import BASES
from inference.preprocess import TTA_VIEWS, normalise, to_batch, views
from inference.stack import read_stack

from .augment import augment, mixup
from .data import Crop, load_data
from .lora import freeze_statistics, lora_model, trainable
from .losses import focal, weights_by
from .metrics import roc_auc
from .recipe import Recipe, load_recipe
from .splits import read_split, split, write_split

CANVAS = 1.6  # canvas side over crop side: room for rotation, shift and magnification without padding


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
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def epoch_order(crops: Sequence[Crop], sampling: str, g: torch.Generator) -> torch.Tensor:
    """Indices of one epoch: each crop once, or drawn so that every class or domain x class comes equally often."""
    if sampling == "shuffle":
        return torch.randperm(len(crops), generator=g)
    keys = [crop.label if sampling == "class" else (crop.domain, crop.label) for crop in crops]
    return torch.multinomial(weights_by(keys, "inverse"), len(crops), replacement=True, generator=g)


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


def learning_rate_share(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first share of the steps, then half a cosine to zero."""
    warm = max(1, round(steps * warmup))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def predict(model: torch.nn.Module, batch: torch.Tensor, tta: str, accelerator: Accelerator, size: int = 64) -> torch.Tensor:
    """Logits (V, N) in fp32 of a normalised batch (N, 3, S, S)."""
    model.eval()
    logits = []
    for chunk in batch.split(size):
        with accelerator.autocast():
            out = model(views(chunk.to(accelerator.device), tta))
        logits.append(out.float().view(TTA_VIEWS[tta], len(chunk)).cpu())
    return torch.cat(logits, dim=1)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def restore(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


def save_atomically(value: Any, file: Path) -> None:
    partial = file.with_suffix(".partial")
    torch.save(value, partial)
    os.replace(partial, file)


def batches(n: int, recipe: Recipe, order: torch.Tensor) -> Iterator[torch.Tensor]:
    """The epoch's batches of crop indices; a last one that is not full is dropped, unless it is the only one."""
    size = min(recipe.batch, n)
    for start in range(0, n - size + 1, size):
        yield order[start : start + size]


def fit_fold(
    recipe: Recipe, crops: Sequence[Crop], images: Sequence[np.ndarray], fold: np.ndarray, number: int, folder: Path,
    base: Path | None, accelerator: Accelerator, overrides: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Train fold `number` in `folder`/fold<number>, or go on where it stopped; nothing where it is finished."""
    out = folder / f"fold{number}"
    if (out / "oof.npz").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    train = [n for n in range(len(crops)) if fold[n] != number]
    held_out = [n for n in range(len(crops)) if fold[n] == number]
    train_crops = [crops[n] for n in train]
    canvas = canvases([images[n] for n in train], recipe.crop)
    target, weight = targets(recipe, train_crops), loss_weights(recipe, train_crops)
    preprocess = recipe.preprocess()
    validation = to_batch([images[n] for n in held_out], preprocess)
    held_out_labels = np.array([crops[n].label for n in held_out])

    torch.manual_seed(recipe.seed * 1000 + number)
    extra = dict(overrides or {}) | ({"drop_rate": recipe.drop} if recipe.drop else {})
    plain = lora_model(recipe.backbone, base, recipe.rank, recipe.alpha, recipe.dropout, recipe.targets,
                       recipe.pool or None, recipe.rslora, **extra)  # fmt: skip
    if recipe.checkpointing:
        plain.base_model.model.set_grad_checkpointing(True)
    plain.to(memory_format=torch.channels_last)
    is_adapter = {True: [], False: []}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            is_adapter["lora_" in name].append(parameter)
    optimizer = torch.optim.AdamW(
        [dict(params=is_adapter[True], lr=recipe.learning_rate),
         dict(params=is_adapter[False], lr=recipe.head_learning_rate or recipe.learning_rate)],
        weight_decay=recipe.weight_decay,
    )  # fmt: skip
    model, optimizer = accelerator.prepare(plain, optimizer)
    average = state_of(plain)
    steps_per_epoch = max(1, len(train) // min(recipe.batch, len(train)))
    steps = math.ceil(steps_per_epoch / recipe.accumulate) * recipe.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate_share(s, steps, recipe.warmup))

    first, best, best_state, stale = 0, -1.0, average, 0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        restore(plain, saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        average, best_state = saved["average"], saved["best_state"]
        first, best, stale = saved["epoch"], saved["best"], saved["stale"]
    main = accelerator.is_main_process
    if main and first == 0:
        counts = trainable(plain)
        accelerator.print(f"fold {number}: {len(train)} crops train, {len(held_out)} validate; trainable parameters: "
                          f"{counts['adapters']:,} in adapters, {counts['head']:,} in the head")  # fmt: skip

    world, rank = accelerator.num_processes, accelerator.process_index
    for epoch in range(first, recipe.epochs):
        if recipe.patience and stale >= recipe.patience:
            break
        g = generator(recipe.seed, number, epoch)
        order = epoch_order(train_crops, recipe.sampling, g)
        torch.manual_seed(recipe.seed * 1_000_000 + number * 1000 + epoch)  # dropout
        freeze_statistics(model)
        total, seen = 0.0, 0
        bar = tqdm(list(batches(len(train), recipe, order)), desc=f"fold {number} epoch {epoch + 1}/{recipe.epochs}",
                   disable=None if main else True, leave=False)  # fmt: skip
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
            accelerator.backward(loss / recipe.accumulate)
            total, seen = total + loss.item(), seen + 1
            if (step + 1) % recipe.accumulate == 0 or step + 1 == len(bar):
                if recipe.clip:
                    accelerator.clip_grad_norm_([*is_adapter[True], *is_adapter[False]], recipe.clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                decay = min(recipe.ema, (1 + epoch * steps_per_epoch + step) / (10 + epoch * steps_per_epoch + step))
                for name, value in state_of(plain).items():
                    average[name].lerp_(value, 1 - decay)
        current = state_of(plain)
        restore(plain, average)
        logits = predict(plain, validation, "none", accelerator)[0].numpy()
        restore(plain, current)
        auc = roc_auc(held_out_labels, logits)
        if auc > best:
            best, best_state, stale = auc, {k: v.clone() for k, v in average.items()}, 0
        else:
            stale += 1
        if main:
            _log(out, epoch, {"loss": total / seen, "auc": auc, "learning_rate": schedule.get_last_lr()[0]})
            save_atomically({"epoch": epoch + 1, "model": current, "average": average, "best_state": best_state,
                             "best": best, "stale": stale, "optimizer": optimizer.state_dict(),
                             "schedule": schedule.state_dict()}, checkpoint)  # fmt: skip
        accelerator.print(f"fold {number} epoch {epoch + 1}/{recipe.epochs}: loss {total / seen:.4f}, AUC {auc:.4f}")
        accelerator.wait_for_everyone()

    restore(plain, best_state if recipe.patience else average)
    logits = predict(plain, validation, "d4", accelerator).numpy()
    if main:
        plain.save_pretrained(out)
        (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        partial = out / "oof.partial.npz"
        np.savez(partial, index=np.array(held_out), logits=logits)
        os.replace(partial, out / "oof.npz")
        checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()


def _log(out: Path, epoch: int, values: dict[str, float]) -> None:
    """A row of metrics.csv, replacing what a killed run wrote for this epoch and later ones."""
    file = out / "metrics.csv"
    rows = []
    if file.exists():
        with file.open(newline="") as lines:
            rows = [row for row in csv.DictReader(lines) if int(row["epoch"]) <= epoch]
    rows.append({"epoch": epoch + 1, **values})
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="default", help="a name in training/recipes or a .toml file")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting of the recipe")
    parser.add_argument("--data", type=Path, action="append", required=True, help="a data set's folder or CSV; repeatable")
    parser.add_argument("--run", type=Path, help="run folder (default runs/<recipe>)")
    parser.add_argument("--base", type=Path, help="base weights (default weights/bases/<backbone>.safetensors)")
    parser.add_argument("--fold", type=int, action="append", help="only this fold; repeatable")


def run(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.set)
    folder = options.run or Path("runs") / Path(options.recipe).stem
    base = options.base or BASES / f"{recipe.backbone}.safetensors"
    if not base.exists():
        raise UserError(f"{base} is missing; it holds the base weights; run 'python -m training base {recipe.backbone}'")
    crops = load_data(options.data)
    accelerator = Accelerator(mixed_precision="no" if recipe.precision == "fp32" else recipe.precision)
    fold = prepare(folder, recipe, crops, accelerator)
    images = load_crops(crops)
    for number in options.fold or sorted(set(fold.tolist())):
        fit_fold(recipe, crops, images, fold, number, folder, base, accelerator)


def prepare(folder: Path, recipe: Recipe, crops: Sequence[Crop], accelerator: Accelerator) -> np.ndarray:
    """The run folder with recipe and split, or the split of the run that is there; UserError where it is another's."""
    settings = json.dumps(dataclasses.asdict(recipe), indent=1) + "\n"
    file, table = folder / "recipe.json", folder / "split.csv"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if file.exists() and file.read_text() != settings:
            raise UserError(f"{file} holds other settings; expected the same run to go on; choose another --run folder")
        if not table.exists():
            write_split(table, crops, split(crops, recipe.split, recipe.folds, recipe.seed))
        file.write_text(settings)
    accelerator.wait_for_everyone()
    return read_split(table, crops)
