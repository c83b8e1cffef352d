"""How much of a pass all folds share: `python -m benchmarks.shared_pass [BACKBONE] [--seconds]`.

Folds that adapt only the upper blocks of a transformer share everything below. The operations of one pass with three
folds, and of three separate passes, are counted on PyTorch's meta device, which needs no weights and computes nothing.
--seconds also measures both on the CPU with random weights, which takes the memory of three folds.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from inference.backbones import BACKBONES, build, lookup
from inference.models import logits

FOLDS = 3


class RandomWeights:
    """Stands for inference.weights.Weights: random tensors (none on the meta device), `adapted` ones for each fold."""

    def __init__(self, backbone: str, first: int, folds: int, device: str, **overrides: Any) -> None:
        """first: the lowest block whose attention and MLP are adapted."""
        with torch.device("meta"):
            state = build(lookup(backbone), 0, "token", **overrides).state_dict()
        self.dtype, self.names, self.positions = torch.float32, frozenset(state), "antialiased"
        self.head = ()  # one linear layer
        parts = (
            "attn.qkv.weight",
            "attn.proj.weight",
            "mlp.fc1.weight",
            "mlp.fc1_g.weight",
            "mlp.fc1_x.weight",
            "mlp.fc2.weight",
        )
        self.adapted = {
            name for name in state if name.endswith(parts) and int(name.removeprefix("blocks.").split(".")[0]) >= first
        }
        shapes = {name: ((folds, *t.shape) if name in self.adapted else tuple(t.shape)) for name, t in state.items()}
        width = state["norm.weight"].shape[0]
        shapes |= {"head.weight": (folds, 1, width), "head.bias": (folds, 1)}
        self.base = {name: tuple(value.shape) for name, value in state.items()}
        self.tensors = {name: torch.randn(shape, device=device) * 0.02 for name, shape in shapes.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    fp32 = __getitem__

    def get(self, name: str) -> torch.Tensor | None:
        return self.tensors.get(name)


def run(backbone: str, first: int, folds: int, device: str, crops: int = 1, **overrides: Any) -> tuple[int, float]:
    """Operations and seconds of one pass with `folds` folds that adapt all blocks from `first` on."""
    row = lookup(backbone)
    weights: Any = RandomWeights(backbone, first, folds, device, **overrides)
    x = torch.zeros(crops, 3, row.size, row.size, device=device)
    with torch.inference_mode():
        if device == "cpu":
            logits(x, weights, row, "token")  # warm
        start = time.perf_counter()
        with FlopCounterMode(display=False) as counter:
            logits(x, weights, row, "token")
        return counter.get_total_flops(), time.perf_counter() - start


def operations(backbone: str, first: int, folds: int, **overrides: Any) -> int:
    """Floating point operations (two per multiply-add) of one pass over one crop, counted on the meta device."""
    return run(backbone, first, folds, "meta", **overrides)[0]


def shared(one: float, all_folds: float, folds: int) -> float:
    """The share of one fold's work that a pass does only once: with s shared, all = s + folds (one - s)."""
    return (folds * one - all_folds) / ((folds - 1) * one)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared_pass", description=__doc__)
    parser.add_argument(
        "backbone", nargs="?", default="virchow", choices=[n for n, row in BACKBONES.items() if row.depth]
    )
    parser.add_argument("--seconds", action="store_true", help="also measure, with random weights, on the CPU")
    parser.add_argument("--crops", type=int, default=2, help="of a measured pass (default 2)")
    options = parser.parse_args()
    depth = lookup(options.backbone).depth
    print(f"{options.backbone}, {FOLDS} folds, random weights; ratio: one pass to {FOLDS} separate ones")
    for first in (0, depth // 2, depth - depth // 4):
        one, fused = (operations(options.backbone, first, folds) for folds in (1, FOLDS))
        line = f"blocks {first} to {depth - 1} adapted: {shared(one, fused, FOLDS):.1%} of the work is shared, "
        line += f"ratio of operations {fused / (FOLDS * one):.2f}"
        if options.seconds:
            alone, together = (run(options.backbone, first, f, "cpu", options.crops)[1] for f in (1, FOLDS))
            line += f", of seconds {together / (FOLDS * alone):.2f} ({together:.2f} s for {options.crops} crops)"
        print(line)


if __name__ == "__main__":
    main()
