"""Every form in which base weights are published comes out as timm's tensors, and computes what it computed before."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.backbones import BACKBONES, build
from inference.models import vit
from inference.weights import Weights
from test.support.miniature import overrides
from test.support.published import meta_names, shrink, timm_names, transformers_model
from training.__main__ import main

DINOS = [name for name in BACKBONES if name.startswith("dino")]
QKVB = [name for name, row in BACKBONES.items() if row.qkv_bias]


def convert(name: str, file: Path, folder: Path) -> dict[str, torch.Tensor]:
    assert main(["base", name, "--file", str(file), "--dtype", "fp32", "--output", str(folder)]) == 0
    return load_file(folder / f"{name}.safetensors")


def refuse(name: str, state: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture) -> str:
    torch.save(state, folder / "wrong.pth")
    assert main(["base", name, "--file", str(folder / "wrong.pth"), "--output", str(folder / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "wrong.pth" in error and not list(folder.glob("out/*"))
    return error


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", [name for name in BACKBONES if BACKBONES[name].heads])
def test_timms_names_in_either_file_of_the_hub(name, form, tmp_path, monkeypatch):
    """Virchow, UNI, H-optimus-0 and timm's mirrors; some with a head, which is left out."""
    expected = shrink(monkeypatch, name).state_dict()
    state = expected | {"head.weight": torch.ones(2, 3), "head.bias": torch.ones(2)}
    save_file(state, tmp_path / form) if form.endswith("safetensors") else torch.save(state, tmp_path / form)
    found = convert(name, tmp_path / form, tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", DINOS)
def test_metas_own_file(name, tmp_path, monkeypatch, capsys):
    expected = shrink(monkeypatch, name).state_dict()
    torch.save(meta_names(expected), tmp_path / "pretrain.pth")
    found = convert(name, tmp_path / "pretrain.pth", tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("name", DINOS)
def test_the_transformers_form_computes_the_same_features(name, tmp_path, monkeypatch):
    row = BACKBONES[name]
    shrink(monkeypatch, name)
    reference = transformers_model(name, tmp_path)
    model = build(BACKBONES[name], 0, "token").eval()
    model.load_state_dict(convert(name, tmp_path / "model.safetensors", tmp_path / "out"))
    side = 518 if row.family == "vit" else row.size  # elsewhere DINOv2's positions are resampled, each library its way
    x = torch.randn(2, 3, side, side, generator=torch.manual_seed(0))
    with torch.inference_mode():
        theirs = reference(x).last_hidden_state
        ours = model.forward_features(x)
    assert ours.shape == theirs.shape and theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_transformers_classifier_gives_its_backbone(tmp_path, monkeypatch):
    from transformers import Dinov2Config, Dinov2ForImageClassification

    expected = shrink(monkeypatch, "dinov2-vits14").state_dict()
    config = Dinov2Config(hidden_size=96, num_hidden_layers=2, num_attention_heads=6, image_size=518, patch_size=14)
    Dinov2ForImageClassification(config).save_pretrained(tmp_path)
    assert convert("dinov2-vits14", tmp_path / "model.safetensors", tmp_path / "out").keys() == expected.keys()


@pytest.mark.parametrize("form", ["meta", "transformers", "timm"])
def test_biases_that_the_backbone_has_no_place_for_are_refused(form, tmp_path, monkeypatch, capsys):
    """DINOv3's query and value biases are published as zeros; trained ones would be lost without a word."""
    key = "blocks.1.attn.qkv.bias"
    if form == "transformers":
        shrink(monkeypatch, "dinov3-vits16")
        transformers_model("dinov3-vits16", tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        state["layer.1.attention.v_proj.bias"][-1] = 0.5
    else:
        state = shrink(monkeypatch, "dinov3-vits16-qkvb").state_dict()
        for name in ("blocks.0.attn.qkv.bias", key):
            state[name].zero_()
        state[key][-1] = 0.5
        state = meta_names(state) if form == "meta" else timm_names(state)
        shrink(monkeypatch, "dinov3-vits16")
    error = refuse("dinov3-vits16", state, tmp_path, capsys)
    assert f"{key} is not zero" in error and "'-qkvb' after its name" in error


def test_a_keys_bias_may_be_anything(tmp_path, monkeypatch):
    """Meta masks it, whatever the file holds."""
    for name in ("dinov3-vits16", "dinov3-vits16-qkvb"):
        expected = shrink(monkeypatch, name).state_dict()
        state = {key: value.clone() for key, value in meta_names(expected).items()}
        state["blocks.0.attn.qkv.bias"][96:192] = torch.nan
        torch.save(state, tmp_path / "pretrain.pth")
        found = convert(name, tmp_path / "pretrain.pth", tmp_path / "out")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", QKVB)
def test_timms_own_models_with_biases(name, tmp_path, monkeypatch):
    """timm keeps the biases of query and value apart; ours are one of the fused layer, and compute the same."""
    import timm

    row = BACKBONES[name]
    ours = shrink(monkeypatch, name)
    theirs = timm.create_model(f"{row.timm}_qkvb", num_classes=0, global_pool="token", **overrides(name)).eval()
    theirs.load_state_dict(timm_names(ours.state_dict()))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    found = convert(name, tmp_path / "model.safetensors", tmp_path / "out")
    assert all(torch.equal(found[key], value) for key, value in ours.state_dict().items())
    weights = Weights(tmp_path / "out" / f"{name}.safetensors", [], torch.device("cpu"), torch.float32)
    x = torch.randn(2, 3, row.size, row.size, generator=torch.manual_seed(0))
    with torch.inference_mode():
        expected = theirs(x)
        torch.testing.assert_close(vit(x, weights, row, "token")[0], expected, atol=1e-5, rtol=1e-5)
        for block in theirs.blocks:
            block.attn.q_bias.zero_(), block.attn.v_bias.zero_()
        assert (theirs(x) - expected).abs().max() > 0.1  # the biases do matter to the answer


def test_nothing_is_resampled(tmp_path, monkeypatch, capsys):
    """timm's filters would fit another grid of positions, or patches of another size, without a word."""
    state = meta_names(shrink(monkeypatch, "dinov2-vits14").state_dict())
    other = state | {"pos_embed": state["pos_embed"][:, : 1 + 16**2]}
    assert "pos_embed is (1, 257, 96)" in refuse("dinov2-vits14", other, tmp_path, capsys)
    state = meta_names(shrink(monkeypatch, "dinov3-vits16").state_dict())
    other = state | {"patch_embed.proj.weight": torch.zeros(96, 3, 14, 14)}
    assert "patch_embed.proj.weight is (96, 3, 14, 14)" in refuse("dinov3-vits16", other, tmp_path, capsys)


@pytest.mark.parametrize("name", ["dinov2-vits14", "dinov3-vits16"])
def test_a_file_cut_short_names_what_is_missing(name, tmp_path, monkeypatch, capsys):
    shrink(monkeypatch, name)
    transformers_model(name, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    key = next(
        key for key in state if key.endswith(("1.attention.v_proj.weight", "1.attention.attention.value.weight"))
    )
    del state[key]
    assert f"lacks tensor {key}" in refuse(name, state, tmp_path, capsys)


def test_another_size_or_variant_is_refused(tmp_path, monkeypatch, capsys):
    shrink(monkeypatch, "dinov2-vits14")
    larger = meta_names(shrink(monkeypatch, "dinov2-vitb14").state_dict())
    assert "dinov2-vits14 needs" in refuse("dinov2-vits14", larger, tmp_path, capsys)
    registers = meta_names(shrink(monkeypatch, "dinov2-vits14").state_dict())
    registers |= {"register_tokens": torch.zeros(1, 4, 96)}
    assert "unknown tensor reg_token" in refuse("dinov2-vits14", registers, tmp_path, capsys)


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x07"])
def test_a_broken_graph_is_refused_in_one_line(content, tmp_path, capsys):
    (tmp_path / "model.onnx").write_bytes(content)
    arguments = ["base", "dinov2-vits14", "--file", str(tmp_path / "model.onnx"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "model.onnx" in error


def test_a_training_checkpoint_gives_its_only_state_dict(tmp_path, monkeypatch):
    """As DistributedDataParallel and the usual scripts save it: `module.` before names, options beside the weights."""
    expected = shrink(monkeypatch, "dinov2-vits14").state_dict()
    wrapped = {f"module.{name}": value for name, value in expected.items()}
    torch.save({"model": wrapped, "args": Namespace(lr=0.1), "epoch": 3, "ema": {}}, tmp_path / "checkpoint.pth")
    found = convert("dinov2-vits14", tmp_path / "checkpoint.pth", tmp_path / "out")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda state: {"student": state, "teacher": state}, "holds several state dicts, student, teacher; expected"),
        (lambda state: {"epoch": 3}, "holds no named tensors; expected one state dict"),
        (lambda state: state | {"config": Path("x")}, r"holds a pathlib\.\w+; expected tensors alone"),
    ],
)
def test_a_checkpoint_without_one_state_dict_is_refused(content, message, tmp_path, capsys):
    assert re.search(message, refuse("dinov2-vits14", content({"a": torch.ones(2)}), tmp_path, capsys))
