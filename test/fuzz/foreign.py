"""What is fuzzed of `training import`: adapters, checkpoints and settings that other programs wrote, each of any bytes.

Reading one must give finite matrices that fit the base, or one UserError.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import peft  # noqa: F401
import torch
import yaml  # noqa: F401
from safetensors.torch import save

from inference.errors import UserError
from inference.head import read_head
from test.fuzz.jobs import workplace
from training.adapters import settings
from training.adapters.fold import read_fold
from training.adapters.head import Said, named
from training.adapters.source import read_source

SHAPES = {f"blocks.{n}.{layer}": shape for n in range(2) for layer, shape in (("attn.qkv.weight", (12, 4)),)}
SHAPES |= {f"blocks.{n}.attn.qkv.bias": (12,) for n in range(2)} | {"norm.weight": (4,), "norm.bias": (4,)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "bias": "none"}
CONFIG |= {"rank_pattern": {}, "alpha_pattern": {"value": 8}, "modules_to_save": ["classifier"]}
PROCESSOR = {"size": {"height": 112, "width": 112}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.2] * 3}
YAML = (
    b"model: {pool: token}\ndata: &d\n  size: 112\n  crop: 64\n  kernel: bicubic\n  mean: [0.5, 0.4, 0.3]\nmore: *d\n"
)


def tensors() -> dict[str, torch.Tensor]:
    """q and v of two blocks in the names of transformers 4, a norm of the base, and a head of two logits."""
    prefix = "base_model.model."
    found = {f"{prefix}classifier.weight": torch.ones(2, 4), f"{prefix}classifier.bias": torch.ones(2)}
    found[f"{prefix}layernorm.weight"] = torch.ones(4)
    for n in range(2):
        for part in ("query", "value"):
            layer = f"{prefix}encoder.layer.{n}.attention.attention.{part}"
            found[f"{layer}.lora_A.weight"], found[f"{layer}.lora_B.weight"] = torch.ones(2, 4), torch.ones(4, 2)
    return found


def mlp() -> dict[str, torch.Tensor]:
    """The same with a head of normalisation, linear layer, activation, linear layer."""
    found = {name: value for name, value in tensors().items() if "classifier" not in name}
    shapes = {"0.weight": (4,), "0.bias": (4,), "1.weight": (3, 4), "1.bias": (3,), "3.weight": (2, 3), "3.bias": (2,)}
    return found | {f"base_model.model.classifier.{name}": torch.ones(shape) for name, shape in shapes.items()}


def pickled() -> bytes:
    """The same as a training program's checkpoint."""
    stream = io.BytesIO()
    state = {name.replace(".weight", ".default.weight", "lora_" in name): value for name, value in tensors().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, stream)
    return stream.getvalue()


@cache
def adapter() -> Path:
    folder = workplace() / "foreign"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "adapter_model.safetensors").write_bytes(save(tensors()))
    return folder


def source(content: bytes, name: str, of_head: Said = Said()) -> None:  # noqa: B008
    """Reading a fold of which the file `name` holds these bytes."""
    file = adapter() / name
    right = file.read_bytes() if file.is_file() else None
    file.write_bytes(content)
    try:
        found = read_source(file if file.suffix == ".pth" else adapter())
        fold = read_fold(found, lambda name: torch.ones(SHAPES[name]), SHAPES, {"lora_alpha": 4}, of_head)
    except UserError as error:
        check(error)
    else:
        assert all(np.isfinite(pair.scale) and pair.place.name + ".weight" in SHAPES for pair in fold.pairs)
        assert all(factor.isfinite().all() for pair in fold.pairs for factor in (pair.a, pair.b))
        logit = fold.head.one_logit(1)
        entries = [part.layer.entry for part in logit]
        assert fold.head.logits in (1, 2) and all(value.dtype == torch.float32 for value in named(logit).values())
        assert len(entries) == 1 or read_head(file, "head", entries) == tuple(part.layer for part in logit)
    finally:
        file.unlink()
        if right is not None:
            file.write_bytes(right)


def said(content: bytes, name: str) -> None:
    """Reading what a file `name` beside an adapter says of the input."""
    file = workplace() / name
    file.write_bytes(content)
    read = settings.processor if name == settings.PROCESSOR else settings.yaml_settings
    try:
        found = read(file, set(settings.EXPECTED))
    except UserError as error:
        check(error)
    else:
        assert found.keys() <= {*settings.EXPECTED, "alpha"}
        assert all(math.isfinite(part) for key in ("mean", "std") for part in found.get(key, ()))


def check(error: UserError) -> None:
    assert "\n" not in str(error) and "expect" in str(error) and str(error).count(";") >= 2, error
