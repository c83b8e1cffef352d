"""What a fold writes while it trains: a checkpoint that a kill cannot break, and one row of scalars per epoch."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import torch


def save_atomically(value: Any, file: Path) -> None:
    partial = file.with_suffix(".partial")
    torch.save(value, partial)
    os.replace(partial, file)


class Log:
    """One row per epoch in metrics.csv and as TensorBoard scalars; rows of a killed run behind `epoch` are replaced."""

    def __init__(self, out: Path, epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.file = out / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        if self.file.exists():
            with self.file.open(newline="") as lines:
                self.rows = [dict(row) for row in csv.DictReader(lines) if int(row["epoch"]) <= epoch]
        self.writer = SummaryWriter(str(out), purge_step=epoch + 1)

    def write(self, epoch: int, values: dict[str, float]) -> None:
        self.rows.append({"epoch": epoch, **values})
        partial = self.file.with_suffix(".partial")
        with partial.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, list(self.rows[-1]), restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.file)
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()
