"""DoRA and trained biases: fused as PEFT merges them, and their mean over folds is one adapter of the same kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from inference.adapters import read_adapter
from inference.backbones import BACKBONES, build, lookup
from inference.errors import UserError
from inference.models import logits
from inference.weights import Weights
from test.support.foreign import adapt
from test.support.miniature import overrides, random_base
from training.fit.averaged import average_adapters
from training.fit.lora import load_base

CPU = torch.device("cpu")


def make_folds(name: str, folder: Path, kinds: list[dict]) -> list[torch.nn.Module]:
    """A random base and a fold of each kind, saved by PEFT; returns its models."""
    row, models = lookup(name), []
    base = random_base(name, folder / "base.safetensors")
    for number, kind in enumerate(kinds):
        model = build(row, 1, **overrides(name))
        load_base(model, base, row.head)
        targets = next(iter(row.targets.values()))
        models.append(adapt(model, targets, row.head, number, **kind))
        models[-1].save_pretrained(folder / f"fold{number}")
    return models


DORA, BIAS, PLAIN = {"use_dora": True}, {"bias": "lora_only"}, {}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("uni", [DORA, DORA | BIAS, BIAS]),
        ("efficientnet-lite0", [DORA, PLAIN, DORA]),
        ("dinov3-vits16plus", [DORA | {"use_rslora": True}, DORA]),
    ],
)
def test_folds_and_their_mean_are_what_peft_merges(name, kinds, tmp_path):
    row = BACKBONES[name]
    models = make_folds(name, tmp_path, kinds)
    base, folds = tmp_path / "base.safetensors", [tmp_path / f"fold{n}" for n in range(len(kinds))]
    x = torch.randn(2, 3, 64, 64)
    merged = [model.merge_and_unload() for model in models]
    with torch.inference_mode():
        found = logits(x, Weights(base, folds, CPU, torch.float32), row, row.pool)
        expected = torch.stack([model(x)[:, 0] for model in merged])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)

    average_adapters(folds, tmp_path / "mean", base, name)
    mean = Weights(base, [tmp_path / "mean"], CPU, torch.float32)
    states = [model.state_dict() for model in merged]
    for tensor in mean.adapted:
        wanted = torch.stack([state[tensor] for state in states]).mean(0)
        torch.testing.assert_close(mean.fp32(tensor)[0], wanted, atol=1e-5, rtol=1e-5)
    assert {tensor for tensor in mean.adapted if tensor.endswith("weight")}
    again = build(row, 1, **overrides(name))
    load_base(again, base, row.head)
    again = PeftModel.from_pretrained(again, tmp_path / "mean").merge_and_unload().eval()
    with torch.inference_mode():
        torch.testing.assert_close(logits(x, mean, row, row.pool)[0], again(x)[:, 0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("ending", "value", "message"),
    [
        ("lora_magnitude_vector", None, "expected 768"),
        ("lora_magnitude_vector", torch.ones(4), "has 4 magnitudes"),
        ("base_layer.bias", torch.ones(4), "has 4 magnitudes or biases"),
        ("base_layer.weight", torch.ones(4), "is left over"),
    ],
)
def test_a_magnitude_or_bias_of_another_length_is_refused(ending, value, message, tmp_path):
    make_folds("uni", tmp_path, [DORA | BIAS])
    file = tmp_path / "fold0" / "adapter_model.safetensors"
    state = load_file(file) | {f"base_model.model.blocks.0.attn.qkv.{ending}": value}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(state, file)
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "fold0", ["blocks.0.attn.qkv", "blocks.1.attn.qkv"])


def test_magnitudes_below_zero_have_no_mean(tmp_path):
    make_folds("uni", tmp_path, [DORA])
    file = tmp_path / "fold0" / "adapter_model.safetensors"
    state = load_file(file)
    save_file({name: -value if "magnitude" in name else value for name, value in state.items()}, file)
    with pytest.raises(UserError, match="leave the folds apart"):
        average_adapters([tmp_path / "fold0"], tmp_path / "mean", tmp_path / "base.safetensors", "uni")
