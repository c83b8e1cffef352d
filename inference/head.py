"""A member's head where it is more than one linear layer: what `ensemble.json` says of it, layer by layer.

Its tensors lie in each fold's file under the names of a `torch.nn.Sequential` (`head.0.weight`), so that PEFT reads
them too. Standard library only, as the manifest; `inference.models` computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .fields import is_number, is_whole

ACTIVATIONS = ("gelu", "relu", "silu", "tanh")  # as torch.nn.functional calls them; gelu is the exact one
MAX_LAYERS, MAX_WIDTH = 16, 8192
_KEYS = {"linear": {"inputs", "outputs"}, "layer_norm": {"features", "eps"}} | {kind: set() for kind in ACTIVATIONS}


@dataclass(frozen=True)
class HeadLayer:
    """One layer: "linear" with inputs and outputs, "layer_norm" with features and eps, or one of ACTIVATIONS."""

    kind: str
    inputs: int = 0
    outputs: int = 0
    features: int = 0
    eps: float = 0.0

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors, by name."""
        if self.kind == "linear":
            return {"weight": (self.outputs, self.inputs), "bias": (self.outputs,)}
        return {"weight": (self.features,), "bias": (self.features,)} if self.features else {}

    @property
    def entry(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {key: value for key, value in vars(self).items() if value}

    def __str__(self) -> str:
        sizes = f" {self.inputs} to {self.outputs}" if self.inputs else f" {self.features}" if self.features else ""
        return self.kind + sizes


def tensor_shapes(layers: Sequence[HeadLayer]) -> dict[str, tuple[int, ...]]:
    """The shapes of a head's tensors by their names in it, such as "0.weight"."""
    return {f"{n}.{name}": shape for n, layer in enumerate(layers) for name, shape in layer.tensors.items()}


def read_head(file: Path, where: str, value: Any) -> tuple[HeadLayer, ...]:
    """The layers that a manifest lists, in their order; () for None, which stands for one linear layer.

    UserError where a layer is not known, two do not fit each other, or the last one does not give one logit.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or not 2 <= len(value) <= MAX_LAYERS:
        raise UserError(f"{file}: {where} is {value!r:.80}; expected a list of 2 to {MAX_LAYERS} layers; import again")
    layers, width = [], 0
    for number, entry in enumerate(value):
        if not isinstance(entry, dict) or not _is_layer(entry):
            raise UserError(
                f"{file}: {where}[{number}] is {entry!r:.80}; expected linear with inputs and outputs, layer_norm with "
                f"features and eps, or one of {', '.join(ACTIVATIONS)}; import again"
            )
        layer = HeadLayer(**entry)
        if width and (layer.inputs or layer.features or width) != width:
            raise UserError(f"{file}: {where}[{number}] is {layer}; expected {width} features; import again")
        width = layer.outputs or layer.features or width
        layers.append(layer)
    # an inner layer with one output would be no wider than the logit, whose bias is found by its one value
    if layers[-1].outputs != 1 or any(1 in (layer.outputs, layer.features) for layer in layers[:-1]):
        raise UserError(f"{file}: {where} ends in {layers[-1]}; expected one logit, at its end alone; import again")
    return tuple(layers)


def _is_layer(entry: dict[str, Any]) -> bool:
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in _KEYS or entry.keys() - {"kind"} != _KEYS[kind]:
        return False
    if "eps" in entry and not (is_number(entry["eps"]) and 0 < entry["eps"] < 1):
        return False
    return all(is_whole(entry[key], 1, MAX_WIDTH) for key in _KEYS[kind] - {"eps"})
