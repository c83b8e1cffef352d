"""Weights into which adapters were merged: the difference to the base is a pair of matrices again, if its rank is low.

The rank is that beyond which nothing but the rounding of fp32 is left. Weights that were merged in half precision,
DoRA, and layers that were trained as a whole differ from the base in every direction, and are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from inference.errors import UserError

from .names import Shapes, rows
from .pairs import Pair, Stored

ROUNDING = 2.0**-23  # of fp32, relative, of a sum
MOST = 256


def unmerged(
    file: Path, changed: Stored, read_base: Callable[[str], torch.Tensor], shapes: Shapes
) -> tuple[list[Pair], dict[str, torch.Tensor]]:
    """The pairs whose sum with the base the changed tensors are, and these tensors in timm's names; prints the ranks.

    UserError where a tensor is changed that no pair can stand for, or by more than a low rank.
    """
    merged: dict[str, torch.Tensor] = {}
    pairs, worst = [], 0.0
    biases = {name.removesuffix(".bias"): value for name, (_, kind, value) in changed.items() if kind == "bias"}
    for name, (where, kind, value) in changed.items():
        own = f"{where.name}.{kind}"
        if own not in shapes or len(shapes[f"{where.name}.weight"]) not in (2, 4) or kind not in ("weight", "bias"):
            raise UserError(
                f"{file}: {name:.100} is not that of the base; expected changes in linear layers alone; name the base "
                "that it was trained on, or train nothing but adapters and the head"
            )
        whole = merged.setdefault(own, read_base(own).float().clone())
        chosen = rows(where, len(whole))
        if kind == "weight":
            a, b, error = factors(value, whole[chosen])
            if not len(a) or len(a) > min(MOST, min(value.flatten(1).shape) // 4):
                raise UserError(
                    f"{file}: {name:.100} differs from the base by rank {len(a)} or more; expected a low rank, of "
                    "adapters merged in fp32; import the adapters themselves, or merge them in fp32"
                )
            module = name.removesuffix(".weight")
            pairs.append(Pair(module, where, a, b, 1.0, None, biases.pop(module, None)))
            worst = max(worst, error)
        whole[chosen] = value
    if biases or not pairs:
        names = ", ".join(biases) or "nothing"
        raise UserError(
            f"{file} has neither adapters nor merged ones ({names:.200} differs from the base); expected either; save "
            "the adapters, or check --base"
        )
    ranks = sorted({len(pair.a) for pair in pairs})
    print(
        f"{file}: {len(pairs)} layers differ from the base by rank {ranks[0]} to {ranks[-1]}; what is left out is at "
        f"most {worst:.1e} of a layer's weights"
    )
    return pairs, merged


def factors(weight: torch.Tensor, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (r, ...) and B (O, r, ...) whose product is the difference to the base but for rounding, and what is left out.

    The last relative to the weight, in Frobenius norms.
    """
    difference = (weight.double() - base.double()).flatten(1)
    u, s, v = torch.linalg.svd(difference, full_matrices=False)
    left = torch.cat([s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1)]).sqrt()  # without the first r
    size = weight.double().norm()
    rank = int((left > ROUNDING * size).sum())
    root = s[:rank].sqrt()
    a, b = (v[:rank] * root[:, None]).float(), (u[:, :rank] * root).float()
    spatial = [1] * (weight.ndim - 2)
    return a.view(rank, *weight.shape[1:]), b.view(len(weight), rank, *spatial), float(left[rank] / size)
