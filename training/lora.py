"""A backbone with its base weights, LoRA through PEFT, and a head of one logit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from inference.backbones import build, lookup
from inference.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel


def adapted_layers(model: torch.nn.Module, pattern: str) -> list[str]:
    """Names of the linear and convolution layers that `pattern` fully matches."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return [name for name, layer in model.named_modules() if re.fullmatch(pattern, name) and isinstance(layer, kinds)]


def load_base(model: torch.nn.Module, file: Path, head: str) -> None:
    """Copy a base's weights into `model`, except the head; no key may be missing, unknown or of another shape."""
    state = load_file(file)
    ours = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{head}.")}
    for name in sorted(ours.keys() ^ state.keys()):
        raise UserError(
            f"{file}: tensor {name} is in only one of base and backbone; make the base with 'training base'"
        )
    for name, value in ours.items():
        if state[name].shape != value.shape:
            raise UserError(f"{file}: {name} is {tuple(state[name].shape)}, the backbone needs {tuple(value.shape)}")
    model.load_state_dict(state, strict=False)


def lora_model(
    backbone: str,
    base: Path | None,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str,
    pool: str | None = None,
    rslora: bool = False,
    **overrides: Any,
) -> PeftModel:
    """`backbone` with LoRA of `rank` on its layer set `targets`; only adapters and head are trainable.

    base: a safetensors file made by `training base`, or None for random weights
    targets: one of the backbone's target sets; "qv" adapts query and value of the fused qkv layer, each with `rank`,
        as one adapter of twice the rank and the same scale (see `separate_query_and_value`)
    UserError where `targets` is unknown.
    """
    from peft import LoraConfig, get_peft_model

    row = lookup(backbone)
    if targets not in row.targets:
        raise UserError(f"{backbone} has no LoRA target set {targets!r}; expected one of {', '.join(row.targets)}")
    head = row.head
    model = build(row, 1, pool, **overrides)
    with torch.no_grad():  # timm draws a head for 1,000 classes, far too large for one logit
        for parameter in model.get_submodule(head).parameters():
            parameter.zero_()
    if base is not None:
        load_base(model, base, head)
    expected = set(adapted_layers(model, row.targets[targets]))
    twice = targets == "qv"
    config = LoraConfig(
        r=2 * rank if twice else rank,
        lora_alpha=alpha * (2**0.5 if rslora else 2) if twice else alpha,  # over the rank, or its root: the same scale
        lora_dropout=dropout,
        target_modules=row.targets[targets],
        modules_to_save=[head],
        use_rslora=rslora,
    )
    wrapped = get_peft_model(model, config)
    found = {n.removeprefix("base_model.model.") for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    if found != expected or not found:
        raise RuntimeError(f"PEFT adapted {sorted(found ^ expected)} beside what {targets!r} names")
    if twice:
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
