"""Every form in which base weights are published comes out as timm's tensors, and computes what it computed before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.backbones import BACKBONES, build
from test.support.published import meta_names, shrink, transformers_model
from training.__main__ import main

DINOS = [name for name in BACKBONES if name.startswith("dino")]


def convert(name: str, file: Path, folder: Path) -> dict[str, torch.Tensor]:
    assert main(["base", name, "--file", str(file), "--dtype", "fp32", "--output", str(folder)]) == 0
    return load_file(folder / f"{name}.safetensors")


def refuse(name: str, state: dict[str, torch.Tensor], folder: Path, capsys: pytest.CaptureFixture) -> str:
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


@pytest.mark.parametrize("form", ["meta", "transformers"])
def test_biases_that_the_backbone_has_no_place_for_are_refused(form, tmp_path, monkeypatch, capsys):
    """DINOv3's query and value biases are published as zeros; other ones would be lost without a word."""
    state = meta_names(shrink(monkeypatch, "dinov3-vits16").state_dict())
    key = "blocks.1.attn.qkv.bias"
    if form == "transformers":
        transformers_model("dinov3-vits16", tmp_path)
        state, key = load_file(tmp_path / "model.safetensors"), "layer.1.attention.v_proj.bias"
    state[key][-1] = 0.5
    assert f"{key} is not zero" in refuse("dinov3-vits16", state, tmp_path, capsys)


def test_a_keys_bias_may_be_anything(tmp_path, monkeypatch):
    """Meta masks it: it would add the same to every score of a query."""
    expected = shrink(monkeypatch, "dinov3-vits16").state_dict()
    state = meta_names(expected)
    state["blocks.0.attn.qkv.bias"][96:192] = torch.nan
    torch.save(state, tmp_path / "pretrain.pth")
    assert convert("dinov3-vits16", tmp_path / "pretrain.pth", tmp_path / "out").keys() == expected.keys()


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
    assert "unknown tensor register_tokens" in refuse("dinov2-vits14", registers, tmp_path, capsys)


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x07"])
def test_a_broken_graph_is_refused_in_one_line(content, tmp_path, capsys):
    (tmp_path / "model.onnx").write_bytes(content)
    arguments = ["base", "dinov2-vits14", "--file", str(tmp_path / "model.onnx"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "model.onnx" in error
