"""The state of a fold's training: weights, their average, optimizer, schedule, and the best epoch.

`save` writes all of it after an epoch, and `State(..., saved)` resumes from there: a run that was killed and resumed
takes exactly the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from inference.files import replacing

from .lora import unfuse_attention
from .recipe import Recipe

Tensors = dict[str, torch.Tensor]


def learning_rate_share(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate: linear warm-up over the share `warmup` of the steps, then half a cosine to zero."""
    warm = max(1, round(steps * warmup))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class State:
    """The state of one fold after `epoch` epochs.

    plain: the PEFT model; model: the same, prepared for one or several processes
    average: exponential average of the trainable weights; best_state: its copy at the best AUC so far
    best, stale: that AUC (-1 before the first), and the number of epochs since then
    """

    def __init__(
        self, plain: torch.nn.Module, recipe: Recipe, steps: int, accelerator: Accelerator, saved: dict[str, Any] | None
    ) -> None:
        """steps: optimizer steps of the whole training; saved: what `save` wrote, or None to begin."""
        self.plain, self.recipe, self.accelerator = plain, recipe, accelerator
        self.learnt = {name: p for name, p in plain.named_parameters() if p.requires_grad}
        adapters = [p for name, p in self.learnt.items() if "lora_" in name]
        head = [p for name, p in self.learnt.items() if "lora_" not in name]
        rate = recipe.learning_rate
        if accelerator.device.type == "cpu":
            unfuse_attention(plain)
        self.model, self.optimizer = accelerator.prepare(
            plain,
            torch.optim.AdamW(
                [{"params": adapters, "lr": rate}, {"params": head, "lr": recipe.head_learning_rate or rate}],
                weight_decay=recipe.weight_decay,
            ),
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_share(step, steps, recipe.warmup)
        )
        if accelerator.scaler:  # fp16: do not start with the scale that an earlier fold reached
            accelerator.scaler.load_state_dict(torch.amp.grad_scaler.GradScaler().state_dict())
        self.average, self.best_state = self.current(), self.current()
        self.epoch, self.best, self.stale = 0, -1.0, 0
        if saved:
            self._resume(saved)

    def _resume(self, saved: dict[str, Any]) -> None:
        self._load(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        for kept, key in ((self.average, "average"), (self.best_state, "best_state")):
            for name, value in saved[key].items():
                kept[name].copy_(value)
        self.epoch, self.best, self.stale = saved["epoch"], saved["best"], saved["stale"]

    def save(self, file: Path) -> None:
        content = {
            "model": self.current(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "average": self.average,
            "best_state": self.best_state,
            "epoch": self.epoch,
            "best": self.best,
            "stale": self.stale,
        }
        with replacing(file) as partial:
            torch.save(content, partial)

    def current(self) -> Tensors:
        """A copy of the trainable weights as they are now."""
        return {name: p.detach().clone() for name, p in self.learnt.items()}

    @torch.no_grad()
    def _load(self, weights: Tensors) -> None:
        for name, value in weights.items():
            self.learnt[name].copy_(value)

    def step(self) -> None:
        """Clip, let the optimizer step, follow the schedule, and update the average."""
        if self.recipe.clip:
            self.accelerator.clip_grad_norm_(list(self.learnt.values()), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose gradient overflowed
            return
        self.schedule.step()
        taken = self.schedule.last_epoch
        decay = min(self.recipe.ema, taken / (9 + taken))
        for name, value in self.learnt.items():
            self.average[name].lerp_(value.detach(), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[torch.nn.Module]:
        """The model with its averaged weights, within a `with` block."""
        current = self.current()
        self._load(self.average)
        try:
            yield self.plain
        finally:
            self._load(current)

    def judge(self, auc: float) -> None:
        """Keep the averaged weights if they are the best yet; if there is no AUC (one class only), the latest."""
        if auc > self.best or math.isnan(auc):
            self.best_state = {name: value.clone() for name, value in self.average.items()}
            self.best, self.stale = max(self.best, auc), 0  # max ignores a NaN in second place
        else:
            self.stale += 1

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or `patience` of them have passed without a better AUC."""
        patience = self.recipe.patience
        return self.epoch >= self.recipe.epochs or bool(patience and self.stale >= patience)

    def load_result(self) -> torch.nn.Module:
        """The model with its final weights: the best epoch's with patience, else the last average."""
        self._load(self.best_state if self.recipe.patience else self.average)
        return self.plain
