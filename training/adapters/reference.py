"""An imported fold's logits by its own libraries: `transformers` or timm for the backbone, PEFT for the adapters.

The backbone is the base under the names that the installed library gives its layers, and PEFT loads the fold's own
matrices and settings for them: query, key and value apart, not fused. Merged weights are loaded as they are. Nothing of
this project's own forward pass, fusing or scaling takes part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from inference.adapters import PREFIX
from inference.backbones import Backbone, build
from inference.head import HeadLayer
from inference.preprocess import Preprocess, to_batch

from ..ensemble.verify import head_module
from ..fit.averaged import FILES
from ..fit.checkpoints import State
from .fold import Fold, Pair
from .head import BATCH_NORM
from .names import Place, Shapes, place, rows

HEAD = "imported_head"  # a name that no library uses
Features = Callable[[torch.Tensor], torch.Tensor]


def fold_logits(
    fold: Fold,
    row: Backbone,
    base: Path,
    pool: str,
    positive: int,
    crops: Sequence[np.ndarray],
    preprocess: Preprocess,
    work: Path,
) -> np.ndarray:
    """Logits (N,) of P(atypical) of single crops in fp32; `work`: an empty folder to write in."""
    from peft import PeftModel

    make = transformers_backbone if fold.library == "transformers" else timm_backbone
    state = {name: value.float() for name, value in load_file(base).items()} | fold.merged
    backbone, features = make(row, state, pool)
    backbone.add_module(HEAD, torch.nn.Sequential(*(head_layer(part.layer) for part in fold.head.parts)))
    model: torch.nn.Module = backbone
    if fold.merged:
        model.get_submodule(HEAD).load_state_dict(head_state(fold))
    else:
        write_peft(fold, work, backbone, {name: tuple(value.shape) for name, value in state.items()})
        model = PeftModel.from_pretrained(backbone, str(work)).merge_and_unload()
    model.eval()
    with torch.inference_mode():
        head = model.get_submodule(HEAD)
        answers = torch.cat([head(features(to_batch([crop], preprocess))) for crop in crops]).double()
    if answers.shape[1] == 2:
        p = answers.log_softmax(1)
        answers = p[:, 1:] - p[:, :1]
    return (answers[:, 0] if positive else -answers[:, 0]).numpy()


def head_layer(layer: HeadLayer) -> torch.nn.Module:
    """PyTorch's own module of a source's layer."""
    if layer.kind == BATCH_NORM:
        return torch.nn.BatchNorm1d(layer.features, layer.eps)
    return head_module(layer)


def head_state(fold: Fold) -> State:
    """The tensors of a source's head as those of a torch.nn.Sequential, even of one layer."""
    state: State = {}
    for n, part in enumerate(fold.head.parts):
        state |= {f"{n}.{name}": value.contiguous() for name, value in part.tensors.items()}
        if part.layer.kind == BATCH_NORM:
            state[f"{n}.num_batches_tracked"] = torch.tensor(0)  # PEFT asks for it
    return state


def timm_backbone(row: Backbone, state: State, pool: str) -> tuple[torch.nn.Module, Features]:
    """timm's module with weights of these names, and what gives a batch's features."""
    model: Any = build(row, 0, pool)
    model.load_state_dict(state)
    return model, lambda x: model.forward_head(model.forward_features(x), pre_logits=True)


def transformers_backbone(row: Backbone, state: State, pool: str) -> tuple[torch.nn.Module, Features]:
    """The module of `transformers` with timm's weights under its names, and what gives a batch's features."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    model, extra = _empty_model(row, shapes)
    own = {}
    for name, value in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        where = place(name, shapes) or place(module, shapes)
        source = "" if where is None else where.name if where.name in shapes else f"{where.name}.{kind}"
        if where is not None and source in state:
            whole = state[source].float()
            own[name] = whole[rows(where, len(whole))] if where.parts > 1 else whole
            if name.endswith("position_embeddings") and len(own[name][0]) < value.shape[1]:
                own[name] = torch.cat([torch.zeros_like(own[name][:, :1]), own[name]], 1)  # timm's is in the token
        else:  # the mask of pretraining, and DINOv3's biases, which are zero where timm leaves them out
            own[name] = torch.zeros_like(value)
    model.load_state_dict(own)
    prefix = 1 + (shapes["reg_token"][1] if "reg_token" in shapes else 0)

    def features(x: torch.Tensor) -> torch.Tensor:
        tokens = model(pixel_values=x, **extra).last_hidden_state
        parts = {"token": tokens[:, 0], "avg": tokens[:, prefix:].mean(1)}
        return torch.cat([parts[part] for part in pool.split("+")], 1)

    return model, features


def _empty_model(row: Backbone, shapes: Shapes) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model of `transformers` with a base's shape, and more arguments of its forward pass."""
    import transformers as library

    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    gated = "blocks.0.mlp.fc1_g.weight" in shapes
    hidden = shapes["blocks.0.mlp.fc2.weight"][1]
    common: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        "num_attention_heads": row.heads,
        "patch_size": patch,
        "layer_norm_eps": row.eps,
    }
    if row.family == "dinov3":
        act = "silu" if gated else "gelu"
        registers = shapes["reg_token"][1]
        config: Any = library.DINOv3ViTConfig(
            **common, intermediate_size=hidden, num_register_tokens=registers, use_gated_mlp=gated, hidden_act=act
        )
        return library.DINOv3ViTModel(config).eval(), {}
    common["image_size"] = patch * int(shapes["pos_embed"][1] ** 0.5)
    if "blocks.0.ls1.gamma" not in shapes:
        config = library.ViTConfig(**common, intermediate_size=hidden)
        return library.ViTModel(config, add_pooling_layer=False).eval(), {"interpolate_pos_encoding": True}
    packed = shapes["blocks.0.mlp.fc1.weight"][0] == 2 * hidden  # gate and value, two thirds as wide each
    common |= {"mlp_ratio": round(hidden * (1.5 if packed else 1) / width), "use_swiglu_ffn": packed}
    if "reg_token" in shapes:
        config = library.Dinov2WithRegistersConfig(**common, num_register_tokens=shapes["reg_token"][1])
        return library.Dinov2WithRegistersModel(config).eval(), {}
    return library.Dinov2Model(library.Dinov2Config(**common)).eval(), {}


def write_peft(fold: Fold, folder: Path, backbone: torch.nn.Module, shapes: Shapes) -> None:
    """Write the fold's matrices and settings for the layers of `backbone`, by the names that they have there."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    present = {where[:3]: name for name, _ in backbone.named_modules() if (where := place(name, shapes))}
    alphas = fold.settings.get("alpha_pattern") or {}
    tensors, names, own_ranks, own_alphas = {}, [], {}, {}
    for pair in fold.pairs:
        for name, part in _present(pair, present):
            names.append(name)
            own_ranks[re.escape(name)] = len(part.a)
            own_alphas[re.escape(name)] = alphas.get(get_pattern_key(alphas, pair.name), fold.settings["lora_alpha"])
            layer = PREFIX + name
            tensors[f"{layer}.lora_A.weight"] = part.a
            tensors[f"{layer}.lora_B.weight"] = part.b.contiguous()
            if part.magnitude is not None:
                tensors[f"{layer}.lora_magnitude_vector"] = part.magnitude
            if part.bias is not None:
                tensors[f"{layer}.base_layer.bias"] = part.bias
    tensors |= {f"{PREFIX}{HEAD}.{name}": value for name, value in head_state(fold).items()}
    config = LoraConfig(
        r=max(own_ranks.values()),
        target_modules=names,
        rank_pattern=own_ranks,
        alpha_pattern=own_alphas,
        modules_to_save=[HEAD],
        use_rslora=bool(fold.settings.get("use_rslora")),
        use_dora=any(pair.magnitude is not None for pair in fold.pairs),
        bias="lora_only" if any(pair.bias is not None for pair in fold.pairs) else "none",
    )
    config.save_pretrained(str(folder))
    save_file(tensors, folder / FILES[1], metadata={"format": "pt"})


def _present(pair: Pair, present: dict[tuple[str, int, int], str]) -> list[tuple[str, Pair]]:
    """The pair by the name of its layer in the installed library, or in two where that has split the layer."""
    if pair.place[:3] in present:
        return [(present[pair.place[:3]], pair)]
    split = []
    for n in range(2):
        part = Place(pair.place.name, n, 2, "", pair.place.library)
        chosen = rows(part, len(pair.b))
        cut = lambda vector, chosen=chosen: None if vector is None else vector[chosen]  # noqa: E731
        own = replace(pair, place=part, b=pair.b[chosen], magnitude=cut(pair.magnitude), bias=cut(pair.bias))
        split.append((present[part[:3]], own))
    return split
