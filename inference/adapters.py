"""LoRA adapters in PEFT's file format, fused in fp32 into a base that all folds share.

What a fold adapts is checked exactly: the layers in its file are those that its configuration's targets match in the
base, no more and no fewer. Only a tensor that an adapter changes exists once per fold.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import UserError

PREFIX = "base_model.model."
HEADS = ("head", "classifier")  # timm's names of a linear head
# PEFT settings that change what an adapter computes, and the only values that are read
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {},
    "alpha_pattern": {}, "layers_to_transform": None, "lora_bias": False, "exclude_modules": None,
    "target_parameters": None,
}  # fmt: skip


def open_safetensors(file: Path) -> Any:
    """The file memory-mapped; UserError where it is not safetensors. Nothing else is ever opened: no pickle."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{file} is not readable as safetensors ({error}); export the ensemble again") from None


@dataclass(frozen=True)
class Adapter:
    """One fold: lora[layer] = (A, B) with delta W = scale * B A; head weight (1, C) and bias (1,), all fp32."""

    lora: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float
    head_weight: torch.Tensor
    head_bias: torch.Tensor


def read_adapter(folder: Path, layers: list[str]) -> Adapter:
    """Read the adapter in `folder` for a base with the given layer names; UserError where the two do not fit exactly."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank, alpha, target = config["r"], config["lora_alpha"], config["target_modules"]
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError) as error:
        raise UserError(f"{folder}/adapter_config.json is not a LoRA configuration ({error!r}); export again") from None
    for key, plain in _PLAIN.items():
        if (config.get(key) or plain) != plain:
            raise UserError(f"{folder}: {key} is {config[key]!r:.80}; expected plain LoRA ({plain!r}); train it without")
    file = folder / "adapter_model.safetensors"
    stored = open_safetensors(file)
    tensors = {name.removeprefix(PREFIX): stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118
    expected = matching_layers(layers, target)
    found = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    if not expected or found != expected:
        extra = sorted(found ^ expected)[:3] or "nothing at all"
        raise UserError(f"{file}: adapts {len(found)} layers, its targets match {len(expected)} ({extra}); export again")
    head = next((name for name in HEADS if f"{name}.weight" in tensors), None)
    if head is None or f"{head}.bias" not in tensors:
        raise UserError(f"{file}: no head; expected head.weight and head.bias; train with modules_to_save=['head']")
    head_weight, head_bias = tensors.pop(f"{head}.weight"), tensors.pop(f"{head}.bias")
    if head_weight.ndim != 2 or len(head_weight) != 1 or head_bias.shape != (1,):
        raise UserError(f"{file}: head is {tuple(head_weight.shape)}; expected one logit, P(atypical); train it so")
    lora = {}
    for layer in sorted(found):
        a, b = tensors.pop(f"{layer}.lora_A.weight"), tensors.pop(f"{layer}.lora_B.weight", None)
        if b is None or a.ndim not in (2, 4) or b.ndim != a.ndim or not len(a) == b.shape[1] == rank:
            raise UserError(f"{file}: {layer} has no matching pair of rank {rank}; export the adapter again")
        lora[layer] = (a, b)
    if tensors:
        raise UserError(f"{file}: {next(iter(tensors))} is not part of plain LoRA with a head; export the adapter again")
    return Adapter(lora, float(scale), head_weight, head_bias)


def matching_layers(layers: list[str], target: Any) -> set[str]:
    """The layers that PEFT's `target_modules` selects: a regular expression matched whole, or a list of name endings."""
    if isinstance(target, str):
        return {layer for layer in layers if re.fullmatch(target, layer)}
    return {layer for layer in layers if any(layer == name or layer.endswith(f".{name}") for name in target)}


def fused(base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """base + scale * B A in fp32, for linear (O, I) and convolution (O, I, K, K) weights alike."""
    return torch.addmm(base.flatten(1), b.flatten(1), a.flatten(1), alpha=scale).view(base.shape)


class Weights:
    """The tensors of a base and its folds by timm's names, read, fused and converted when first asked for.

    A tensor that an adapter changes has a leading fold axis (F, ...). `seconds` tells what reading and fusing took.
    """

    def __init__(self, base: Path, folds: list[Path], device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._file = base
        self._base = open_safetensors(base)
        self.names = frozenset(self._base.keys())
        layers = [name.removesuffix(".weight") for name in sorted(self.names) if name.endswith(".weight")]
        layers = [layer for layer in layers if len(self.shape(f"{layer}.weight")) in (2, 4)]
        self.adapters = [read_adapter(folder, layers) for folder in folds]
        self._adapted = {f"{layer}.weight" for adapter in self.adapters for layer in adapter.lora}
        for folder, adapter in zip(folds, self.adapters, strict=True):
            self._check_shapes(folder, adapter)
        self._kept: dict[str, Any] = {}

    def _check_shapes(self, folder: Path, adapter: Adapter) -> None:
        for layer, (a, b) in adapter.lora.items():
            shape = self.shape(f"{layer}.weight")
            if (len(b), *a.shape[1:]) != shape:
                raise UserError(f"{folder}: {layer} changes {(len(b), *a.shape[1:])}, the base has {shape}; wrong base")
        width = self.adapters[0].head_weight.shape[1]
        if adapter.head_weight.shape[1] != width:
            raise UserError(f"{folder}: head takes {adapter.head_weight.shape[1]} features, fold 0 {width}; export again")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._base.get_slice(name).get_shape())

    def convert_to(self, dtype: torch.dtype) -> Weights:
        """The same weights in another precision, sharing what was read."""
        other = object.__new__(Weights)
        other.__dict__ = self.__dict__ | {"dtype": dtype, "_kept": {}}
        return other

    def _read(self, name: str) -> torch.Tensor:
        """As stored, on the device."""
        if name not in self.names:
            raise UserError(f"{self._file}: no tensor {name}; the backbone needs it; make the base with 'training base'")
        return self._base.get_tensor(name).to(self.device)

    def _exact(self, name: str) -> torch.Tensor:
        """In fp32, with a fold axis where an adapter changes it."""
        if name in ("head.weight", "head.bias"):
            return torch.stack([getattr(adapter, name.replace(".", "_")) for adapter in self.adapters]).to(self.device)
        base = self._read(name).float()
        if name not in self._adapted:
            return base
        pairs = [(adapter.lora.get(name.removesuffix(".weight")), adapter.scale) for adapter in self.adapters]
        return torch.stack([fused(base, *(t.to(self.device) for t in ab), scale) if ab else base for ab, scale in pairs])

    def __getitem__(self, name: str) -> torch.Tensor:
        """In the computing precision."""
        if name not in self._kept:
            direct = name in self.names and name not in self._adapted
            self._kept[name] = (self._read(name) if direct else self._exact(name)).to(self.dtype)
        return self._kept[name]

    def get(self, name: str) -> torch.Tensor | None:
        return self[name] if name in self.names else None

    def fp32(self, name: str) -> torch.Tensor:
        if ("fp32", name) not in self._kept:
            self._kept["fp32", name] = self._exact(name)
        return self._kept["fp32", name]

    def convolution(self, conv: str, norm: str, eps: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of a convolution with the batch normalisation behind it folded in, in fp32, then converted."""
        if ("conv", conv) not in self._kept:
            mean, variance = self._exact(f"{norm}.running_mean"), self._exact(f"{norm}.running_var")
            gain = self._exact(f"{norm}.weight") * torch.rsqrt(variance + eps)
            weight = self._exact(f"{conv}.weight") * gain.view(-1, 1, 1, 1)
            bias = self._exact(f"{norm}.bias") - mean * gain
            memory = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
            self._kept["conv", conv] = weight.to(self.dtype, memory_format=memory), bias.to(self.dtype)
        return self._kept["conv", conv]
