"""The forms in which base weights are published, each turned into tensors under timm's names.

timm's own safetensors need nothing, and timm itself converts Meta's `.pth` files. Here is what timm does not read: the
`transformers` form of DINOv2, and an ONNX graph of it.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

# `transformers` names within a block of a DINOv2 model, and timm's; query, key and value become one layer
_DINOV2_BLOCK = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layer_scale2.lambda1": "ls2.gamma",
}
_DINOV2_STEM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


def from_transformers_dinov2(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A `transformers` Dinov2Model's tensors under timm's names; a name that is not known is kept as it is.

    Its mask token serves pretraining only and is left out.
    """
    state = {name.removeprefix("dinov2."): value for name, value in state.items()}
    state.pop("embeddings.mask_token", None)
    out: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if name in _DINOV2_STEM:
            out[_DINOV2_STEM[name]] = value
            continue
        found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+?)(\.weight|\.bias)?", name)
        if found is None:
            out[name] = value
            continue
        number, inner, ending = found[1], found[2], found[3] or ""
        if inner == "attention.attention.query":
            parts = [state[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            out[f"blocks.{number}.attn.qkv{ending}"] = torch.cat(parts)
        elif inner not in ("attention.attention.key", "attention.attention.value"):
            out[f"blocks.{number}.{_DINOV2_BLOCK.get(inner, inner)}{ending}"] = value
    return out


def read_onnx_dinov2(file: Path) -> dict[str, torch.Tensor]:
    """The weights of the backbone in an exported DINOv2 graph, under the names that `transformers` gives them.

    The exporter keeps the names of biases and norms below `backbone.`. A linear layer's weight is anonymous, transposed
    (in, out), and known by the node that multiplies with it; the positions were split into class token and patches.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    tensors = {entry.name: torch.tensor(numpy_helper.to_array(entry)) for entry in graph.initializer}
    prefix = "backbone."
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    for node in graph.node:
        place = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if place and node.op_type == "MatMul" and node.input[1] in tensors:
            state[place[1].replace("/", ".") + ".weight"] = tensors[node.input[1]].T.contiguous()
    width = state["embeddings.cls_token"].shape[-1]
    positions = {
        len(tensors[name][0]): tensors[name]
        for node in graph.node
        for name in node.input
        if name in tensors and tensors[name].ndim == 3 and tensors[name].shape[-1] == width
        if not name.startswith(prefix)
    }
    state["embeddings.position_embeddings"] = torch.cat([positions[n] for n in sorted(positions)], dim=1)
    return state
