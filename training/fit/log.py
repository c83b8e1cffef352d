"""A fold's training log: one row of scalars per epoch, as CSV and for TensorBoard."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from inference.files import replacing


class Log:
    """One row per epoch in metrics.csv and as TensorBoard scalars; rows of a killed run after `epoch` are dropped."""

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
        with replacing(self.file) as partial, partial.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, list(self.rows[-1]), restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()
