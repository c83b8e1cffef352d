"""The mean of several adapters, of folds or seeds, as one plain adapter in PEFT's format: exact, at a larger rank.

The mean of F updates s_f B_f A_f (s_f: alpha / rank, or alpha / sqrt(rank)) is one update B A: the A_f stacked, the
s_f B_f / F side by side, r the sum of the ranks, and alpha = r, so that its scale is 1. Heads are averaged. Weights
are averaged here, not answers, as in model soups (arXiv 2203.05482).

DoRA gives each row of W + s_f B_f A_f a factor c_f. The mean, D W + sum of (c_f / F) s_f B_f A_f with D the mean
factor, is again what DoRA computes: its B is divided by D, and its magnitudes are the norms of the mean's own rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from inference.adapters import PREFIX, Adapter
from inference.backbones import lookup
from inference.errors import UserError
from inference.files import read_json
from inference.weights import Weights

FILES = ("adapter_config.json", "adapter_model.safetensors")


def average_adapters(folds: Sequence[Path], folder: Path, base: Path, backbone: str) -> None:
    """Write the mean of the adapters in `folds`, all on `base`, to `folder`.

    A layer that a fold does not adapt gets zeros for it, so that every layer has all r rows.
    """
    weights = Weights(base, list(folds), torch.device("cpu"), torch.float32)
    adapters = weights.adapters
    dora = any(adapter.magnitude for adapter in adapters)
    configs = [read_json(fold / FILES[0], "export the adapter again") for fold in folds]
    ranks = [int(config["r"]) for config in configs]
    tensors = {}
    adapted = sorted({layer for adapter in adapters for layer in adapter.lora})
    for layer in adapted:
        a_like, b_like = next(adapter.lora[layer] for adapter in adapters if layer in adapter.lora)
        stacked, beside, factors = [], [], []
        for adapter, rank in zip(adapters, ranks, strict=True):
            a, b = adapter.lora.get(layer) or (
                torch.zeros(rank, *a_like.shape[1:]),
                torch.zeros(b_like.shape[0], rank, *b_like.shape[2:]),
            )
            factors.append(row_factors(weights, adapter, layer) if dora else torch.ones(len(b)))
            stacked.append(a)
            beside.append(b * (adapter.scale / len(adapters)) * factors[-1].view(-1, *[1] * (b.ndim - 1)))
        name, a, b = f"{PREFIX}{layer}", torch.cat(stacked), torch.cat(beside, dim=1)
        if dora:
            mean = torch.stack(factors).mean(0)
            if not (mean > 0).all():
                raise UserError(f"{layer} has magnitudes below zero; expected positive ones; leave the folds apart")
            b = b / mean.view(-1, *[1] * (b.ndim - 1))
            sums = (weights.base(f"{layer}.weight").flatten(1) + b.flatten(1) @ a.flatten(1)) * mean[:, None]
            norms = torch.linalg.norm(sums, dim=1)
            tensors[f"{name}.lora_magnitude_vector"] = norms.view(1, -1, 1, 1) if b.ndim == 4 else norms
        if f"{layer}.bias" in weights.adapted:
            tensors[f"{name}.base_layer.bias"] = weights.fp32(f"{layer}.bias").mean(0)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a.contiguous(), b.contiguous()
    head = PREFIX + lookup(backbone).head
    for kind in ("weight", "bias"):
        tensors[f"{head}.{kind}"] = torch.stack([adapter.head[kind] for adapter in adapters]).mean(0)
    targets = {json.dumps(config["target_modules"]) for config in configs}
    biased = "lora_only" if any(adapter.bias for adapter in adapters) else "none"
    config = configs[0] | {"r": sum(ranks), "lora_alpha": float(sum(ranks)), "use_rslora": False}
    config |= {"use_dora": dora, "bias": biased}
    if len(targets) > 1:
        config["target_modules"] = adapted
    folder.mkdir(exist_ok=True)
    (folder / FILES[0]).write_text(json.dumps(config))
    save_file(tensors, folder / FILES[1], metadata={"format": "pt"})


def row_factors(weights: Weights, adapter: Adapter, layer: str) -> torch.Tensor:
    """What DoRA multiplies each row (O,) of the base with the adapter's update by; ones where it is no DoRA."""
    base = weights.base(f"{layer}.weight").flatten(1)
    if layer not in adapter.magnitude:
        return torch.ones(len(base))
    a, b = adapter.lora[layer]
    return adapter.magnitude[layer] / torch.linalg.norm(base + adapter.scale * b.flatten(1) @ a.flatten(1), dim=1)
