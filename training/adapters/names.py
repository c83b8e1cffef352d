"""Where a tensor of another program's model lies in timm's: a tensor of its own, or a block of rows of a fused one.

`transformers` has named its layers in two ways: 4 says `encoder.layer.0.attention.attention.query`, 5 says
`attention.q_proj` (and ViT `layers.0`, DINOv3 `model.layer.0`), while files on the hub keep the older names. All are
read. Whatever wraps the backbone in a training program stands before these names, and is left aside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

Shapes = Mapping[str, tuple[int, ...]]


class Place(NamedTuple):
    """A layer or tensor in timm's names.

    name: timm's; part, parts: which of how many equal blocks of its rows; prefix: what stood before the library's names
    library: whose names these are, "timm" or "transformers"
    """

    name: str
    part: int
    parts: int
    prefix: str
    library: str


_BLOCK = re.compile(r"(?P<prefix>(?:.*\.)?)(?:encoder\.layer|model\.layer|layers|layer)\.(?P<number>\d+)\.(?P<rest>.+)")
_REST = {
    r"attention\.(?:attention\.)?(?:query|q_proj)": ("attn.qkv", 0, 3),
    r"attention\.(?:attention\.)?(?:key|k_proj)": ("attn.qkv", 1, 3),
    r"attention\.(?:attention\.)?(?:value|v_proj)": ("attn.qkv", 2, 3),
    r"attention\.(?:output\.dense|o_proj)": ("attn.proj", 0, 1),
    r"mlp\.fc1|mlp\.weights_in|intermediate\.dense": ("mlp.fc1", 0, 1),
    r"mlp\.(?:fc2|down_proj|weights_out)|output\.dense": ("mlp.fc2", 0, 1),
    r"norm1|layernorm_before": ("norm1", 0, 1),
    r"norm2|layernorm_after": ("norm2", 0, 1),
}
_OUTSIDE = {
    r"embeddings\.patch_embeddings(?:\.projection)?": "patch_embed.proj",
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.register_tokens": "reg_token",
    r"layernorm|norm": "norm",
}


def place(name: str, shapes: Shapes) -> Place | None:
    """Where the layer or parameter `name` lies in the base with tensors of `shapes`; None if it is no part of it."""
    known = {tensor.removesuffix(".weight").removesuffix(".bias") for tensor in shapes} | set(shapes)
    for at in [0, *(n + 1 for n, letter in enumerate(name) if letter == ".")]:
        if name[at:] in known and not re.search(r"(^|\.)(layer|layers)\.\d+\.$", name[:at]):
            return Place(name[at:], 0, 1, name[:at], "timm")
    elsewhere = _in_a_block(name, shapes) or _bias_apart(name) or _outside(name)
    return elsewhere if elsewhere and elsewhere.name in known else None


def _in_a_block(name: str, shapes: Shapes) -> Place | None:
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    block = f"blocks.{match['number']}."
    where = match["prefix"], "transformers"
    scale = re.fullmatch(r"layer_scale([12])\.lambda1", match["rest"])
    if scale:
        names = (f"{block}ls{scale[1]}.gamma", f"{block}gamma_{scale[1]}")
        return Place(next((own for own in names if own in shapes), names[0]), 0, 1, *where)
    gate = re.fullmatch(r"mlp\.(gate|up)_proj", match["rest"])
    if gate:  # timm has gate and value in layers of their own, or the gate's rows first in one; or there is no gate
        number = int(gate[1] == "up")
        if f"{block}mlp.fc1_g.weight" in shapes:
            return Place(f"{block}mlp.{('fc1_g', 'fc1_x')[number]}", 0, 1, *where)
        rows, columns = (shapes.get(f"{block}mlp.{layer}.weight", (0, 0)) for layer in ("fc1", "fc2"))
        return Place(f"{block}mlp.fc1", *((number, 2) if rows[0] == 2 * columns[1] else (0, 1)), *where)
    for pattern, (layer, part, parts) in _REST.items():
        if re.fullmatch(pattern, match["rest"]):
            return Place(block + layer, part, parts, *where)
    return None


def _bias_apart(name: str) -> Place | None:
    """The biases that timm's own DINOv3 with biases keeps apart are rows of one."""
    match = re.fullmatch(r"((?:.*\.)?)(blocks\.\d+\.attn\.)([qv])_bias", name)
    return Place(f"{match[2]}qkv.bias", "q v".index(match[3]), 3, match[1], "timm") if match else None


def _outside(name: str) -> Place | None:
    for pattern, own in _OUTSIDE.items():
        match = re.fullmatch(rf"((?:.*\.)?)(?:{pattern})", name)
        if match:
            return Place(own, 0, 1, match[1], "transformers")
    return None


def rows(place: Place, count: int) -> slice:
    """The rows of a fused tensor of `count` rows that a place stands for."""
    size = count // place.parts
    return slice(place.part * size, (place.part + 1) * size)
