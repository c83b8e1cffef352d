"""Miniature checkpoints with the tensor names of the original publications, and backbones of the same small size.

`transformers` writes its own names itself (`save_pretrained` gives those of the hub, not its present modules'). Meta's
are spelled out from the keys of the published `.pth` files, as timm's filter and facebookresearch/dinov3 issue 195 show
them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inference.backbones import BACKBONES, build
from test.support.miniature import overrides


def shrink(monkeypatch: pytest.MonkeyPatch, name: str) -> torch.nn.Module:
    """Put a two-block `name` into the table, for tests of whole commands; returns it, random, without a head."""
    row = BACKBONES[name]
    kwargs = dict(row.kwargs) | overrides(name)
    monkeypatch.setitem(BACKBONES, name, replace(row, kwargs=kwargs, depth=2, base_sha256=""))
    torch.manual_seed(0)
    model = build(BACKBONES[name], 0).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if "gamma" in key:
                value.uniform_(0.5, 1.5)
            elif value.ndim == 1:
                value.normal_(1.0 if key.endswith("weight") else 0.0, 0.1)
            if row.qkv_bias and key.endswith("attn.qkv.bias"):
                value.tensor_split(3)[1].zero_()  # nobody's DINOv3 has a bias of keys
    return model


def meta_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's tensors of a DINOv2 or DINOv3 under the names of Meta's own `.pth`, with all else that they hold."""
    width = state["cls_token"].shape[-1]
    out = {"mask_token": torch.zeros(1, width)}
    if "pos_embed" in state:  # DINOv2; with registers the class token has a position of its own
        out |= state
        if "reg_token" in state:
            half = state["cls_token"] / 2
            out |= {"cls_token": half, "pos_embed": torch.cat([half, state["pos_embed"]], dim=1)}
            out["register_tokens"] = out.pop("reg_token")
        return out
    out["rope_embed.periods"] = torch.ones(width // 4, dtype=torch.bfloat16)
    gated = "blocks.0.mlp.fc1_g.weight" in state
    rules = [(r"gamma_(\d)", r"ls\1.gamma"), ("reg_token", "storage_tokens")]
    rules += [(r"mlp\.fc1_g", "mlp.w1"), (r"mlp\.fc1_x", "mlp.w2"), (r"mlp\.fc2", "mlp.w3")] if gated else []
    for key, value in state.items():
        for pattern, theirs in rules:
            key = re.sub(pattern, theirs, key)
        out[key] = value
        if key.endswith("attn.qkv.weight"):
            out[key.replace("weight", "bias")] = torch.zeros(3 * width)
            out[key.replace("weight", "bias_mask")] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(width)
    return out


def timm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a DINOv3 with biases under the names of timm's own model, which has none of keys."""
    out = {name: value for name, value in state.items() if not name.endswith("attn.qkv.bias")}
    for name in state.keys() - out.keys():
        query, _, value = state[name].tensor_split(3)
        out |= {name.replace("qkv.bias", "q_bias"): query.clone(), name.replace("qkv.bias", "v_bias"): value.clone()}
    return out


def transformers_model(name: str, folder: Path) -> torch.nn.Module:
    """A random `transformers` model of the shape that `shrink` gives `name`, saved to `folder`/model.safetensors."""
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        DINOv3ViTConfig,
        DINOv3ViTModel,
        ViTConfig,
        ViTModel,
    )
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    row = BACKBONES[name]
    width = 16 * row.heads
    shape = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": row.heads, "image_size": row.size}
    torch.manual_seed(1)
    if name == "vit-b16":
        model = ViTModel(ViTConfig(**shape, intermediate_size=4 * width), add_pooling_layer=False)
    elif name.endswith("-reg"):
        config = Dinov2WithRegistersConfig(**shape | {"image_size": 518, "patch_size": 14, "layerscale_value": 0.7})
        model = Dinov2WithRegistersModel(config)
    elif row.family == "vit":
        model = Dinov2Model(Dinov2Config(**shape | {"image_size": 518, "patch_size": 14, "layerscale_value": 0.7}))
    else:
        gated = "plus" in name
        hidden = build(BACKBONES[name], 0).get_submodule("blocks.0.mlp.fc2").in_features
        model = DINOv3ViTModel(
            DINOv3ViTConfig(
                **shape,
                intermediate_size=hidden,
                num_register_tokens=4,
                use_gated_mlp=gated,
                hidden_act="silu" if gated else "gelu",
                layerscale_value=0.7,
            )
        )
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.ndim == 1 and "norm" in key:
                value.normal_(1.0 if key.endswith("weight") else 0.0, 0.1)
            elif "register" in key or "position" in key or "cls_token" in key or ("mlp" in key and value.ndim == 1):
                value.normal_(0.0, 0.1)
            elif row.qkv_bias and key.endswith(("q_proj.bias", "v_proj.bias")):
                value.normal_(0.0, 0.5)
    model.save_pretrained(folder)
    return model.eval()
