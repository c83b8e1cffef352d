"""A backbone with its base weights, LoRA through PEFT, and a head of one logit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from inference.backbones import build, lookup
from inference.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


@dataclass(frozen=True)
class Lora:
    """The adapters of one fold.

    targets: one of the backbone's target sets; "qv" adapts query and value of the fused qkv layer, each with `rank`, as
        one adapter of twice the rank and the same scale (see `separate_query_and_value`)
    rslora: scale by alpha / sqrt(rank), not by alpha / rank
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: str = "qkv"
    rslora: bool = False

    def config(self, layers: str, head: str) -> LoraConfig:
        """PEFT's form of it, for the layers whose names match the pattern `layers`."""
        from peft import LoraConfig

        double = self.targets == "qv"
        same_scale = 2**0.5 if self.rslora else 2  # the scale is over the rank, or its root
        return LoraConfig(
            r=2 * self.rank if double else self.rank,
            lora_alpha=self.alpha * same_scale if double else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=layers,
            modules_to_save=[head],
            use_rslora=self.rslora,
        )


def adapted_layers(model: torch.nn.Module, pattern: str) -> list[str]:
    """Names of the linear and convolution layers that `pattern` fully matches."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return [name for name, layer in model.named_modules() if re.fullmatch(pattern, name) and isinstance(layer, kinds)]


def load_base(model: torch.nn.Module, file: Path, head: str) -> None:
    """Copy a base's weights into `model`, except the head; no key may be missing, unknown or of another shape."""
    state = load_file(file)
    needed = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{head}.")}
    for name in sorted(needed.keys() ^ state.keys()):
        raise UserError(
            f"{file}: tensor {name} is in only one of base and backbone; make the base with 'training base'"
        )
    for name, value in needed.items():
        if state[name].shape != value.shape:
            raise UserError(f"{file}: {name} is {tuple(state[name].shape)}, the backbone needs {tuple(value.shape)}")
    model.load_state_dict(state, strict=False)


def plain_model(backbone: str, base: Path | None, pool: str | None = None, **overrides: Any) -> torch.nn.Module:
    """`backbone` in timm with a head of zeros for one logit; the arguments are those of `lora_model`."""
    row = lookup(backbone)
    model = build(row, 1, pool, **overrides)
    with torch.no_grad():  # timm draws a head for 1,000 classes, far too large for one logit
        for parameter in model.get_submodule(row.head).parameters():
            parameter.zero_()
    if base is not None:
        load_base(model, base, row.head)
    return model


def lora_model(backbone: str, base: Path | None, lora: Lora, pool: str | None = None, **overrides: Any) -> PeftModel:
    """`backbone` with LoRA on its layers; only adapters and head are trainable.

    base: a safetensors file made by `training base`, or None for random weights
    pool: how tokens become features; None: as the backbone's table says
    overrides: timm arguments
    UserError where the backbone has no such target set.
    """
    from peft import get_peft_model

    row = lookup(backbone)
    if lora.targets not in row.targets:
        raise UserError(f"{backbone} has no LoRA target set {lora.targets!r}; expected one of {', '.join(row.targets)}")
    model = plain_model(backbone, base, pool, **overrides)
    expected = set(adapted_layers(model, row.targets[lora.targets]))
    wrapped = get_peft_model(model, lora.config(row.targets[lora.targets], row.head))
    adapted = {n.removeprefix("base_model.model.") for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    if adapted != expected or not adapted:
        raise RuntimeError(f"PEFT adapted {sorted(adapted ^ expected)} beside what {lora.targets!r} names")
    if lora.targets == "qv":
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                separate_query_and_value(parameter)
    return wrapped


def separate_query_and_value(b: torch.nn.Parameter) -> None:
    """Turn an adapter of rank 2r on a fused qkv into two of rank r, on q and on v, by training only these parts of B.

    B (3C, 2r) begins at zero; q rows see the first r ranks, v rows the last r, k rows none. Without a gradient, AdamW
    leaves a zero as it is, so a plain adapter is saved, which PEFT merges like any other.
    """
    width, rank = b.shape[0] // 3, b.shape[1] // 2

    def mask(gradient: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros_like(gradient)
        kept[:width, :rank] = gradient[:width, :rank]
        kept[2 * width :, rank:] = gradient[2 * width :, rank:]
        return kept

    b.register_hook(mask)
    b.trained_entries = 2 * width * rank  # type: ignore[attr-defined]


def store_base_as(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Keep frozen linear and convolution weights in the precision that autocast computes them in anyway.

    The results are the same, the base takes half the memory, and no step has to convert it. Norms and embeddings
    stay in fp32.
    """
    for layer in model.modules():
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        if isinstance(layer, kinds) and not any(parameter.requires_grad for parameter in layer.parameters()):
            layer.to(dtype)


def trainable(model: torch.nn.Module) -> dict[str, int]:
    """Trainable parameters: {"adapters": ..., "head": ...}."""
    counts = {"adapters": 0, "head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            entries = getattr(parameter, "trained_entries", parameter.numel())
            counts["adapters" if "lora_" in name else "head"] += entries
    return counts


def freeze_statistics(model: torch.nn.Module) -> torch.nn.Module:
    """Set training mode, but keep the base's batch-normalisation statistics, which are not part of an adapter."""
    model.train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.eval()
    return model


def unfuse_attention(model: torch.nn.Module) -> None:
    """Compute attention by plain matrix products, for a CPU, where the backward pass of PyTorch's fused kernel is slow.

    A step of ViT-S with 32 crops of 145 tokens takes 0.79 of the time without it (torch 2.10, bf16, one thread).
    """
    for layer in model.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = False  # type: ignore[assignment]
