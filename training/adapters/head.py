"""The head of a source: its layers in their order, and what is exactly as much with one logit in fewer.

A state dict has tensors and names. The order of layers is that of the numbers of a `torch.nn.Sequential`, or the only
one in which their sizes fit each other. What has no tensors (activations, dropout) and a normalisation's eps are not in
it, and are asked where they may matter; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from pathlib import Path
from typing import NamedTuple

import torch

from inference.errors import UserError
from inference.head import ACTIVATIONS, MAX_LAYERS, MAX_WIDTH, HeadLayer

from ..fit.checkpoints import State

BATCH_NORM, NONE = "batch_norm", "none"
STATISTICS = {"running_mean", "running_var"}
_NUMBER = re.compile(r"[0-9]{1,6}")
MOST_UNORDERED = 6  # layers without numbers, whose orders are tried


class Said(NamedTuple):
    """What a state dict does not say of a head.

    activations: of ACTIVATIONS or "none" (nothing, or dropout), for each place in which there may be one, in order
    eps: what its normalisations add to the variance; None where nobody says it
    """

    activations: tuple[str, ...] = ()
    eps: float | None = None


class Part(NamedTuple):
    """A layer with its tensors in fp32; besides the manifest's kinds, "batch_norm" with running mean and variance."""

    layer: HeadLayer
    tensors: State


@dataclass(frozen=True)
class Head:
    """Layers from pooled features to one or two logits, as the source has them."""

    parts: tuple[Part, ...]

    @property
    def features(self) -> int:
        first = self.parts[0].layer
        return first.inputs or first.features

    @property
    def logits(self) -> int:
        return self.parts[-1].layer.outputs

    def __str__(self) -> str:
        return ", ".join(str(part.layer) for part in self.parts)

    def one_logit(self, positive: int) -> list[Part]:
        """The same with one logit, of the class `positive` (0 or 1), and all that is linear in one layer.

        A softmax of two is exactly the sigmoid of their difference; a single logit is that of class 1.
        """
        sign = 1 if positive else -1
        difference = [[float(sign)]] if self.logits == 1 else [[-float(sign), float(sign)]]
        folded: list[Part] = []
        for part in (*self.parts, linear(torch.tensor(difference), torch.zeros(1))):
            if part.layer.kind == "linear":
                part = linear(part.tensors["weight"], part.tensors["bias"])
            elif part.layer.kind == BATCH_NORM:
                gain = part.tensors["weight"] * torch.rsqrt(part.tensors["running_var"].double() + part.layer.eps)
                part = linear(torch.diag(gain), part.tensors["bias"] - part.tensors["running_mean"] * gain)
            if folded and part.layer.kind == folded[-1].layer.kind == "linear":
                first, then = folded.pop().tensors, part.tensors
                part = linear(then["weight"] @ first["weight"], then["weight"] @ first["bias"] + then["bias"])
            folded.append(part)
        return [Part(layer, {name: value.float() for name, value in own.items()}) for layer, own in folded]


def linear(weight: torch.Tensor, bias: torch.Tensor) -> Part:
    """The linear layer (O, I), (O,), in fp64 so that several are multiplied without rounding."""
    layer = HeadLayer("linear", inputs=weight.shape[1], outputs=len(weight))
    return Part(layer, {"weight": weight.double(), "bias": bias.double()})


def named(parts: Sequence[Part]) -> State:
    """The tensors of a folded head by their names in it: "weight" and "bias" of one layer, else "0.weight", ..."""
    prefixes = [f"{n}." for n in range(len(parts))] if len(parts) > 1 else [""]
    of_part = zip(prefixes, parts, strict=True)
    return {prefix + name: value.contiguous() for prefix, part in of_part for name, value in part.tensors.items()}


def read_head(file: Path, rest: State, said: Said) -> Head | None:
    """The head that `rest` is, all that a source holds besides its backbone and adapters; None if it is none.

    UserError where an order, an activation or an eps is not said.
    """
    modules: dict[str, State] = {}
    for name, value in rest.items():
        module, _, kind = name.rpartition(".")
        modules.setdefault(module, {})[kind] = value
    parts = {}
    for module, tensors in modules.items():
        part = _part(module, tensors, said.eps)
        if part is None:
            return None
        parts[module] = part
    order = _order(file, parts)
    if order is None:
        return None
    normalised = any(part.layer.features for part in parts.values())
    if normalised and said.eps is None:
        raise UserError(
            f"{file}: the head has a normalisation, whose eps is not in the file; expected it; give --norm-eps "
            "(PyTorch's own is 1e-5)"
        )
    if said.eps is not None and not normalised:
        raise UserError(f"{file}: --norm-eps for a head without a normalisation; expected none; leave it out")
    between = _between(file, order, parts, said.activations)
    layers = [parts[order[0]]]
    for module in order[1:]:
        layers += [*([Part(HeadLayer(between[module]), {})] if module in between else []), parts[module]]
    return Head(tuple(layers))


def _part(module: str, tensors: State, eps: float | None) -> Part | None:
    """The layer that these tensors are: linear, a batch normalisation if there are statistics, a layer normalisation.

    None if they are none, or of timm's norm behind an average pool, which stands in place of the backbone's.
    """
    weight, kinds = tensors.get("weight"), tensors.keys()
    sizes = {value.shape for kind, value in tensors.items() if value is not weight or value.ndim < 2}
    if len(sizes) > 1 or any(len(size) != 1 or not 1 <= size[0] <= MAX_WIDTH for size in sizes):
        return None
    if weight is not None and weight.ndim == 2 and kinds <= {"weight", "bias"} and max(weight.shape) <= MAX_WIDTH:
        bias = tensors.get("bias", torch.zeros(len(weight)))
        layer = HeadLayer("linear", inputs=weight.shape[1], outputs=len(weight))
        return Part(layer, {"weight": weight, "bias": bias}) if len(bias) == len(weight) and weight.numel() else None
    width = next(iter(sizes))[0] if sizes else 0
    if module.rpartition(".")[2] == "fc_norm" or not width:
        return None
    if kinds >= STATISTICS and kinds <= STATISTICS | {"weight", "bias"} and (tensors["running_var"] >= 0).all():
        plain = {"weight": torch.ones(width), "bias": torch.zeros(width)}
        return Part(HeadLayer(BATCH_NORM, features=width, eps=eps or 0.0), plain | tensors)
    if kinds == {"weight", "bias"}:
        return Part(HeadLayer("layer_norm", features=width, eps=eps or 0.0), tensors)
    return None


def _order(file: Path, parts: Mapping[str, Part]) -> list[str] | None:
    """The modules from features to logits; None if they do not fit each other. UserError where more orders do."""
    modules = list(parts)
    if _numbered(modules):
        modules.sort(key=lambda module: int(module.rpartition(".")[2]))
        return modules if len(modules) <= MAX_LAYERS // 2 and _fits([parts[module] for module in modules]) else None
    orders = permutations(modules) if len(modules) <= MOST_UNORDERED else ()
    right = [list(order) for order in orders if _fits([parts[module] for module in order])]
    if len(right) > 1:
        raise UserError(
            f"{file}: {', '.join(sorted(modules)):.200} fit each other in {len(right)} orders; expected one; save the "
            "head as a torch.nn.Sequential, whose numbers say it"
        )
    return right[0] if right else None


def _numbered(modules: Sequence[str]) -> bool:
    """Whether these are the modules of one torch.nn.Sequential, by their names."""
    paths = [module.rpartition(".") for module in modules]
    return len({path[0] for path in paths}) == 1 and all(_NUMBER.fullmatch(path[2]) for path in paths)


def _fits(parts: Sequence[Part]) -> bool:
    """Whether each layer takes what the one before gives, and the last is linear with one logit or two."""
    widths = [(part.layer.inputs or part.layer.features, part.layer.outputs or part.layer.features) for part in parts]
    chained = all(before[1] == after[0] for before, after in pairwise(widths))
    return bool(parts) and chained and 1 <= parts[-1].layer.outputs <= 2 and all(out > 1 for _, out in widths[:-1])


def _between(file: Path, order: Sequence[str], parts: Mapping[str, Part], activations: Sequence[str]) -> dict[str, str]:
    """The activation before each module that has one. UserError where not every place's is said.

    Between two linear layers there is a place even if numbers leave no room: a ModuleList's user calls a function there
    """
    numbered, places = _numbered(order), []
    for before, after in pairwise(order):
        room = not numbered or int(after.rpartition(".")[2]) - int(before.rpartition(".")[2]) > 1
        if room or (parts[before].layer.inputs and parts[after].layer.inputs):
            places.append((before, after))
    if len(places) != len(activations):
        names = ", ".join(f"{before} and {after}" for before, after in places)
        found = f"what stands between {names:.200} is not in the file" if places else "the head has no activation"
        wanted = f"{len(places)} of {', '.join((*ACTIVATIONS, NONE))}" if places else "none said"
        advice = "give --activation" if places else "leave out --activation, or correct the file that says it"
        raise UserError(f"{file}: {found} ({len(activations)} said); expected {wanted}; {advice}")
    said = zip(places, activations, strict=True)
    return {after: activation for (_, after), activation in said if activation != NONE}
