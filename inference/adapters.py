"""LoRA adapters in PEFT's file format.

What a fold adapts is checked exactly: the layers in its file are those that its configuration's targets match in the
base, no more and no fewer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from .errors import UserError
from .files import read_json
from .head import HeadLayer, tensor_shapes

PREFIX = "base_model.model."
HEADS = ("head", "classifier", "head.fc", "fc")  # timm's names of a head
# PEFT's settings that say what an adapter is, where it came from or how it was trained; any value is accepted
DESCRIPTIVE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_version",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
# every other setting may change what an adapter computes or is added to: it must be empty, or have one of these values
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", "lora_only"),
    "init_lora_weights": (True, "gaussian"),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
}


def open_safetensors(file: Path) -> Any:
    """The file memory-mapped; UserError where it is not safetensors. Nothing else is ever opened: no pickle."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{file} is not readable ({error}); expected safetensors; export the ensemble again") from None


@dataclass(frozen=True)
class Adapter:
    """One fold: lora[layer] = (A, B) with delta W = scale * B A, all fp32.

    head: "weight" (1, C) and "bias" (1,) of one linear layer, or those of several layers, as `head.tensor_shapes` has
    magnitude: DoRA's, of all adapted layers or none: W + delta W has its rows scaled to these norms (O,)
    bias: of adapted layers, in place of the base's (O,)
    """

    lora: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float
    head: dict[str, torch.Tensor]
    magnitude: dict[str, torch.Tensor] = field(default_factory=dict)
    bias: dict[str, torch.Tensor] = field(default_factory=dict)


class Config(NamedTuple):
    """What PEFT's configuration says of an adapter; target: see `matching_layers`; biased: biases were trained too."""

    rank: int
    scale: float
    target: Any
    dora: bool
    biased: bool


def read_adapter(folder: Path, layers: list[str], head: Sequence[HeadLayer] = ()) -> Adapter:
    """Read the adapter in `folder` for a base with the given layer names; UserError where the two do not fit.

    head: the layers of its head, none for a linear one
    """
    config = read_config(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    tensors = _read_tensors(file)
    expected = matching_layers(layers, config.target)
    adapted = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    if not expected or adapted != expected:
        extra = ", ".join(sorted(adapted ^ expected)[:3]) or "nothing at all"
        raise UserError(
            f"{file}: adapts {len(adapted)} layers; expected {len(expected)} by its targets ({extra:.200}); "
            "export again"
        )
    adapter = Adapter({}, config.scale, _take_layers(file, tensors, head) if head else _take_linear(file, tensors))
    for layer in sorted(adapted):
        a, b = tensors.pop(f"{layer}.lora_A.weight"), tensors.pop(f"{layer}.lora_B.weight", None)
        if (
            b is None
            or a.ndim not in (2, 4)
            or b.ndim != a.ndim
            or (len(a), 1, 1)[: b.ndim - 1] != b.shape[1:]
            or len(a) != config.rank
        ):
            raise UserError(
                f"{file}: {layer} has other shapes; expected a pair of rank {config.rank}; export the adapter again"
            )
        adapter.lora[layer] = (a, b)
        if config.dora:
            adapter.magnitude[layer] = tensors.pop(f"{layer}.lora_magnitude_vector", torch.empty(0)).flatten()
        if config.biased and f"{layer}.base_layer.bias" in tensors:
            adapter.bias[layer] = tensors.pop(f"{layer}.base_layer.bias")
        for vectors in (adapter.magnitude, adapter.bias):
            if layer in vectors and vectors[layer].shape != (len(b),):
                raise UserError(
                    f"{file}: {layer} has {vectors[layer].numel()} magnitudes or biases; expected {len(b)}; "
                    "export the adapter again"
                )
    if tensors:
        raise UserError(
            f"{file}: {next(iter(tensors)):.100} is left over; expected plain LoRA and a head; export the adapter again"
        )
    return adapter


def _take_linear(file: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The head of one linear layer, out of `tensors`."""
    head = next((name for name in HEADS if f"{name}.weight" in tensors), None)
    if head is None and any(re.fullmatch(rf"({'|'.join(HEADS)})\.\d+\.\w+", name) for name in tensors):
        raise UserError(
            f"{file}: its head is not one linear layer; expected one, or a manifest that lists its layers; import it "
            "again, and leave its folds apart"
        )
    if head is None or f"{head}.bias" not in tensors:
        raise UserError(f"{file}: no head; expected head.weight and head.bias; train with modules_to_save=['head']")
    weight, bias = tensors.pop(f"{head}.weight"), tensors.pop(f"{head}.bias")
    if weight.ndim != 2 or len(weight) != 1 or bias.shape != (1,):
        raise UserError(f"{file}: head is {tuple(weight.shape)}; expected one logit, P(atypical); train it so")
    return {"weight": weight, "bias": bias}


def _take_layers(file: Path, tensors: dict[str, torch.Tensor], layers: Sequence[HeadLayer]) -> dict[str, torch.Tensor]:
    """The head of several layers, out of `tensors`."""
    shapes = tensor_shapes(layers)
    head = next((name for name in HEADS if f"{name}.{next(iter(shapes))}" in tensors), HEADS[0])
    taken = {}
    for name, shape in shapes.items():
        taken[name] = tensors.pop(f"{head}.{name}", torch.empty(0))
        if taken[name].shape != shape:
            raise UserError(
                f"{file}: {head}.{name} is missing or not {shape}; expected the head of the manifest; import it again"
            )
    return taken


def read_config(file: Path) -> Config:
    """The configuration of LoRA or DoRA; UserError where a setting may make it anything else."""
    try:
        config = read_json(file, "export the adapter again")
    except FileNotFoundError:
        raise UserError(f"no {file}; expected PEFT's configuration; export the adapter again") from None
    if not isinstance(config, dict):
        raise UserError(
            f"{file} holds a {type(config).__name__}; expected PEFT's configuration; export the adapter again"
        )
    for key, value in config.items():
        if key not in DESCRIPTIVE and value and value not in PLAIN.get(key, ()):
            raise UserError(f"{file}: {key:.40} is {value!r:.80}; expected LoRA or DoRA; train it without")
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= 4096 or type(alpha) not in (int, float) or not 0 < alpha <= 1e6:
        raise UserError(
            f"{file}: r {rank!r:.40}, lora_alpha {alpha!r:.40}; expected a rank and a positive alpha; export again"
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    target = checked_target(file, config.get("target_modules"))
    return Config(rank, scale, target, bool(config.get("use_dora")), config.get("bias") == "lora_only")


def checked_target(file: Path, target: Any) -> str | list[str]:
    """`target_modules` as a list of names, or as an expression that cannot take more than polynomial time.

    Repeated groups, or many alternatives in a row, make backtracking explode; neither is needed to name layers.
    """
    if isinstance(target, list) and len(target) <= 4096 and all(isinstance(name, str) for name in target):
        return target
    if isinstance(target, str) and len(target) <= 500 and not re.search(r"\)[*+{]|\(\?[^:]|\\[1-9A-Z]", target):
        branches, repeats = target.count("|") + target.count("?"), len(re.findall(r"[*+{]", target))
        try:
            re.compile(target)
        except (re.error, OverflowError, RecursionError):
            pass
        else:
            if branches <= 12 and repeats <= 4:
                return target
    raise UserError(
        f"{file}: target_modules is {target!r:.80}; expected a list of names, or a regular expression with at most 12 "
        "branches and 4 repeats, none of a group; list the layers"
    )


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors by timm's names, finite, in fp32."""
    stored = open_safetensors(file)
    tensors: dict[str, torch.Tensor] = {}
    for name in stored.keys():  # noqa: SIM118
        try:
            tensor = stored.get_tensor(name)
        except (SafetensorError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{file}: tensor {name:.100} is not readable ({error}); expected a whole one; export the adapter again"
            ) from None
        short = name.removeprefix(PREFIX)
        if not tensor.is_floating_point() or short in tensors or not tensor.float().isfinite().all():
            raise UserError(
                f"{file}: {name:.100} is {tensor.dtype}, stored twice or not finite; expected finite fp32; export again"
            )
        tensors[short] = tensor.float()
    return tensors


def matching_layers(layers: list[str], target: str | list[str]) -> set[str]:
    """The layers that PEFT's `target_modules` selects: an expression that matches whole names, or a list of endings."""
    if isinstance(target, str):
        return {layer for layer in layers if re.fullmatch(target, layer)}
    names = set(target)
    return {layer for layer in layers if any(layer[at:] in names for at in _ends(layer))}


def _ends(layer: str) -> list[int]:
    """The start of the whole name and of each of its endings after a dot."""
    return [0, *(at + 1 for at, letter in enumerate(layer) if letter == ".")]
