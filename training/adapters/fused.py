"""A fold of any naming as one adapter of timm's layers in PEFT's format: exact, at the price of a larger rank.

Query, key and value adapters become one of the fused layer: the A stacked, each B in its own rows and ranks, zeros
elsewhere. Every scale goes into its B, and every layer gets the same rank by zeros, so that the file needs no patterns.
DoRA scales each row of a weight to a magnitude of its own; rows that no adapter changes get the norm that they have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from inference.adapters import PREFIX
from inference.backbones import Backbone

from ..fit.averaged import FILES
from .fold import Fold, Pair
from .head import named
from .names import Shapes, rows


def write_fold(
    fold: Fold, folder: Path, row: Backbone, shapes: Shapes, read_base: Callable[[str], torch.Tensor], positive: int
) -> None:
    """Write `fold` to a new `folder` as `training fit` would have; its head gives one logit, of P(atypical)."""
    from peft import LoraConfig

    layers: dict[str, list[Pair]] = {}
    for pair in fold.pairs:
        layers.setdefault(pair.place.name, []).append(pair)
    rank = max(sum(len(pair.a) for pair in pairs) for pairs in layers.values())
    dora = any(pair.magnitude is not None for pair in fold.pairs)
    biased = any(pair.bias is not None for pair in fold.pairs)
    tensors = {}
    for layer, pairs in sorted(layers.items()):
        shape, name = shapes[f"{layer}.weight"], PREFIX + layer
        a, b = joined(pairs, shape, rank)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
        if dora:
            tensors[f"{name}.lora_magnitude_vector"] = magnitudes(pairs, read_base(f"{layer}.weight"))
        if biased and f"{layer}.bias" in shapes:
            bias = read_base(f"{layer}.bias").float().clone()
            for pair in pairs:
                if pair.bias is not None:
                    bias[rows(pair.place, len(bias))] = pair.bias
            tensors[f"{name}.base_layer.bias"] = bias
    tensors |= {f"{PREFIX}{row.head}.{name}": value for name, value in named(fold.head.one_logit(positive)).items()}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # a scale of 1
        modules_to_save=[row.head],
        bias="lora_only" if biased else "none",
        use_dora=dora,
        inference_mode=True,
    )
    folder.mkdir()
    content = config.to_dict() | {"target_modules": sorted(layers)}  # PEFT would write a set, in any order
    (folder / FILES[0]).write_text(json.dumps(content))
    save_file(tensors, folder / FILES[1], metadata={"format": "pt"})


def joined(pairs: list[Pair], shape: tuple[int, ...], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, ...) and B (O, rank, ...) of a layer's weight of `shape` (O, ...), with a scale of 1."""
    a = torch.zeros(rank, *shape[1:])
    b = torch.zeros(shape[0], rank, *[1] * (len(shape) - 2))
    start = 0
    for pair in pairs:
        end = start + len(pair.a)
        a[start:end] = pair.a
        b[rows(pair.place, shape[0]), start:end] = pair.b * pair.scale
        start = end
    return a, b


def magnitudes(pairs: list[Pair], base: torch.Tensor) -> torch.Tensor:
    """The norms (O,), or (1, O, 1, 1) of a convolution, that DoRA scales the rows of a layer to."""
    norms = torch.linalg.norm(base.float().flatten(1), dim=1)
    for pair in pairs:
        assert pair.magnitude is not None  # `read_fold` has looked: all pairs have one, or none
        norms[rows(pair.place, len(norms))] = pair.magnitude.flatten()
    return norms if base.ndim == 2 else norms.view(1, -1, 1, 1)
