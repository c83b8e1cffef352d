"""The tensors of a base with the adapters of its folds fused in, as the forward passes ask for them.

Only a tensor that an adapter changes exists once per fold.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from .adapters import Adapter, open_safetensors, read_adapter
from .errors import UserError
from .head import HeadLayer
from .manifest import POSITIONS

T = TypeVar("T")


def fuse(
    base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, magnitude: torch.Tensor | None = None
) -> None:
    """Add scale * B A to `base`, in place: linear (O, I) or convolution (O, I, K, K) weights in fp32.

    magnitude: DoRA's (O,), the norms that the rows of the sum are scaled to
    """
    rows = base.flatten(1)  # a view
    rows.addmm_(b.flatten(1), a.flatten(1), alpha=scale)
    if magnitude is not None:
        rows.mul_((magnitude / torch.linalg.norm(rows, dim=1))[:, None])


class Weights:
    """The tensors of a base and its folds by timm's names, read, fused and converted when first asked for.

    A tensor that an adapter changes has a leading fold axis (F, ...).
    """

    def __init__(
        self,
        base: Path,
        folds: list[Path],
        device: torch.device,
        dtype: torch.dtype,
        shared: dict[Any, Any] | None = None,
        positions: str = POSITIONS[0],
        head: Sequence[HeadLayer] = (),
    ) -> None:
        """shared: holds the tensors that no fold changes, for other members with the same base, device and dtype.

        positions: how learned positions are resampled, one of POSITIONS; head: its layers, none for a linear one
        """
        self.device, self.dtype, self.positions, self.head = device, dtype, positions, head
        self._file = base
        self._base = open_safetensors(base)
        self.names = frozenset(self._base.keys())
        layers = [name.removesuffix(".weight") for name in sorted(self.names) if name.endswith(".weight")]
        layers = [layer for layer in layers if len(self.shape(f"{layer}.weight")) in (2, 4)]
        self.adapters = [read_adapter(folder, layers, head) for folder in folds]
        self.adapted = {f"{layer}.weight" for adapter in self.adapters for layer in adapter.lora}
        self.adapted |= {f"{layer}.bias" for adapter in self.adapters for layer in adapter.bias}
        for folder, adapter in zip(folds, self.adapters, strict=True):
            self._check_shapes(folder, adapter)
        self._kept: dict[Any, Any] = {}
        self._shared: dict[Any, Any] = {} if shared is None else shared
        self.seconds = 0.0  # spent on reading, fusing and converting, during the first forward pass

    def _check_shapes(self, folder: Path, adapter: Adapter) -> None:
        for layer, (a, b) in adapter.lora.items():
            shape = self.shape(f"{layer}.weight")
            if (len(b), *a.shape[1:]) != shape:
                raise UserError(
                    f"{folder}: {layer} changes {(len(b), *a.shape[1:])}; expected {shape} as in the base; "
                    "choose the base that it was trained on"
                )
            if layer in adapter.bias and f"{layer}.bias" not in self.names:
                raise UserError(f"{folder}: {layer} has a bias; expected none as in the base; choose its own base")
        own, first = (next(iter(one.head.values())).shape[-1] for one in (adapter, self.adapters[0]))
        if own != first:
            raise UserError(f"{folder}: head takes {own} features; expected {first} as fold 0; export")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._base.get_slice(name).get_shape())

    def convert_to(self, dtype: torch.dtype) -> Weights:
        """The same weights in another precision, sharing what was read."""
        converted = copy.copy(self)
        converted.dtype, converted._kept, converted._shared = dtype, {}, {}
        return converted

    def _read(self, name: str) -> torch.Tensor:
        """As stored, on the device."""
        if name not in self.names:
            raise UserError(
                f"{self._file}: no tensor {name}; expected one for the backbone; make it with 'training base'"
            )
        # through its own handle: a shared one would keep every page that was ever read mapped, as a second copy
        stored: torch.Tensor = open_safetensors(self._file).get_tensor(name)
        return stored.to(self.device)

    def base(self, name: str) -> torch.Tensor:
        """The base's own tensor in fp32, without any adapter."""
        return self._read(name).float()

    def _exact(self, name: str) -> torch.Tensor:
        """In fp32, with a fold axis where an adapter changes it."""
        if name.startswith("head."):
            return torch.stack([adapter.head[name.removeprefix("head.")] for adapter in self.adapters]).to(self.device)
        return self._fused(name, torch.float32) if name in self.adapted else self._read(name).float()

    def _fused(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """All folds (F, ...) of an adapted tensor: each fused in fp32 and rounded once, into its place.

        The memory used for fusing is kept: fresh pages for every layer took longer than the arithmetic.
        """
        base = self._read(name)
        out = torch.empty(len(self.adapters), *base.shape, dtype=dtype, device=self.device)
        if ("scratch", base.shape) not in self._kept:
            self._kept["scratch", base.shape] = torch.empty(base.shape, device=self.device)
        for fold, adapter in zip(out, self.adapters, strict=True):
            exact = fold if dtype == torch.float32 else self._kept["scratch", base.shape]
            exact.copy_(base)
            layer, _, kind = name.rpartition(".")
            if kind == "bias":
                exact.copy_(adapter.bias.get(layer, base))
            elif layer in adapter.lora:
                a, b = (factor.to(self.device) for factor in adapter.lora[layer])
                magnitude = adapter.magnitude.get(layer)
                fuse(exact, a, b, adapter.scale, None if magnitude is None else magnitude.to(self.device))
            if exact is not fold:
                fold.copy_(exact)
        return out

    def _once(self, key: Any, name: str, make: Callable[[], T]) -> T:
        """What `make` returns for tensor `name`, made when first asked for; `seconds` adds up the time."""
        kept = self._kept if name in self.adapted or name.startswith("head.") else self._shared
        if key not in kept:
            start = time.perf_counter()
            kept[key] = make()
            self.seconds += time.perf_counter() - start
        found: T = kept[key]
        return found

    def __getitem__(self, name: str) -> torch.Tensor:
        """In the computing precision."""
        if name in self.adapted:
            return self._once(name, name, lambda: self._fused(name, self.dtype))
        return self._once(name, name, lambda: self._read(name).to(self.dtype))

    def get(self, name: str) -> torch.Tensor | None:
        return self[name] if name in self.names else None

    def fp32(self, name: str) -> torch.Tensor:
        return self._once(("fp32", name), name, lambda: self._exact(name))

    def convolution(self, conv: str, norm: str, eps: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of a convolution with the batch normalisation behind it folded in, in fp32."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            mean, variance = self._exact(f"{norm}.running_mean"), self._exact(f"{norm}.running_var")
            gain = self._exact(f"{norm}.weight") * torch.rsqrt(variance + eps)
            weight = self._exact(f"{conv}.weight") * gain.view(-1, 1, 1, 1)
            bias = self._exact(f"{norm}.bias") - mean * gain
            memory = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
            return weight.to(self.dtype, memory_format=memory), bias.to(self.dtype)

        return self._once(("conv", conv), f"{conv}.weight", make)
