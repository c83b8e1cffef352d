"""What an import is made of: pairs of matrices, and a source's own tensors, with their places in timm's layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from inference.errors import UserError

from .names import Place

Stored = dict[str, tuple[Place, str, torch.Tensor]]  # by the source's names: place, "weight" or "bias", value


@dataclass(frozen=True)
class Pair:
    """One adapted layer of the source: delta W = scale * B A of the rows at `place`; A (r, ...), B (O, r, ...).

    magnitude: DoRA's, (O,) or (1, O, 1, 1); bias: (O,) where it was trained; both None otherwise
    """

    name: str
    place: Place
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def check_single(file: Path, pairs: Iterable[tuple[str, Place]], changed: Stored) -> None:
    """UserError where two pairs or tensors have one place, such as those of a model and of its moving average."""
    kinds = [(name, where, "pair") for name, where in pairs]
    kinds += [(name, where, kind) for name, (where, kind, _) in changed.items()]
    known: dict[tuple[str, int, int, str], str] = {}
    for name, where, kind in kinds:
        other = known.setdefault((where.name, where.part, where.parts, kind), name)
        if other != name:
            raise UserError(
                f"{file}: {other:.100} and {name:.100} are one layer; expected one model, not also a copy such as its "
                "moving average; save one of them"
            )
