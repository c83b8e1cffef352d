"""LoRA on the backbones: published parameter counts, exact targets, and a base that is what it says."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.backbones import BACKBONES
from inference.errors import UserError
from test.support.miniature import overrides, random_base
from training.lora import freeze_statistics, lora_model, store_base_as, trainable

# rank x (inputs + outputs), summed over the layers that the set names
COUNTS = [
    ("virchow", "qkv", 8, 1_310_720, 2560), ("virchow2", "qkv", 8, 1_310_720, 2560),
    ("dinov3-vith16plus", "qkv", 8, 1_310_720, 1280), ("dinov3-vith16plus", "qkv", 4, 655_360, 1280),
    ("virchow", "attn", 8, 1_966_080, 2560), ("virchow", "all", 8, 5_244_928, 2560), ("uni", "qkv", 8, 786_432, 1024),
    ("uni", "all", 8, 3_145_728, 1024), ("uni2-h", "all", 8, 4_718_592, 1536),
    ("h-optimus-0", "qkv", 8, 1_966_080, 1536), ("h-optimus-0", "all", 8, 7_864_320, 1536),
]  # fmt: skip


@pytest.mark.parametrize(("backbone", "targets", "rank", "adapters", "features"), COUNTS)
def test_full_size_has_the_published_number_of_trainable_parameters(backbone, targets, rank, adapters, features):
    with torch.device("meta"):
        model = lora_model(backbone, None, rank, 16, 0.0, targets)
    assert trainable(model) == {"adapters": adapters, "head": features + 1}


def test_only_the_named_layers_are_adapted():
    model = lora_model("virchow", None, 4, 8, 0.0, "all", **overrides("virchow"))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(adapted) == 2 * 4  # not the patch embedding, whose name ends in "proj" too
    assert not any("patch_embed" in name for name in adapted)
    dino = lora_model("dinov3-vith16plus", None, 4, 8, 0.0, "all", **overrides("dinov3-vith16plus"))
    assert len({name for name, _ in dino.named_parameters() if "lora_A" in name}) == 2 * 5
    with pytest.raises(UserError, match="no LoRA target set 'fc9'; expected one of qkv, attn, all"):
        lora_model("uni", None, 4, 8, 0.0, "fc9", **overrides("uni"))


def test_a_base_must_fit_tensor_by_tensor(tmp_path):
    file = random_base("uni", tmp_path / "base.safetensors")
    state = load_file(file)
    model = lora_model("uni", file, 4, 8, 0.0, "qkv", **overrides("uni"))
    stored = model.get_base_model().blocks[0].attn.qkv.base_layer.weight
    assert torch.equal(stored, state["blocks.0.attn.qkv.weight"])
    save_file({name: value for name, value in state.items() if name != "norm.weight"}, file)
    with pytest.raises(UserError, match=r"norm\.weight is in only one of base and backbone"):
        lora_model("uni", file, 4, 8, 0.0, "qkv", **overrides("uni"))
    save_file(state | {"norm.weight": torch.ones(3)}, file)
    with pytest.raises(UserError, match=r"norm.weight is \(3,\), the backbone needs \(256,\)"):
        lora_model("uni", file, 4, 8, 0.0, "qkv", **overrides("uni"))


def test_batch_normalisation_keeps_the_bases_statistics():
    model = freeze_statistics(lora_model("efficientnet-lite0", None, 2, 4, 0.0, "late"))
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("backbone", ["virchow", "dinov3-vith16plus", "efficientnet-lite0"])
def test_a_base_in_low_precision_computes_what_autocast_does(backbone):
    torch.manual_seed(0)
    model = lora_model(backbone, None, 2, 4, 0.0, next(iter(BACKBONES[backbone].targets)), **overrides(backbone)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    x = torch.randn(2, 3, 32, 32) if "14" not in BACKBONES[backbone].timm else torch.randn(2, 3, 28, 28)
    results = []
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            z = model(x).float()
        z.sum().backward()
        results.append([z.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        store_base_as(model, torch.bfloat16)
    assert len(results[0]) > 2
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    assert weights < 2.7 * sum(p.numel() for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("backbone", ["virchow", "dinov3-vith16plus", "efficientnet-lite0"])
def test_checkpointing_gives_the_same_gradients(backbone):
    torch.manual_seed(0)
    model = lora_model(backbone, None, 2, 4, 0.0, next(iter(BACKBONES[backbone].targets)), **overrides(backbone))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    freeze_statistics(model)
    x = torch.randn(2, 3, 32, 32) if "14" not in BACKBONES[backbone].timm else torch.randn(2, 3, 28, 28)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.get_base_model().set_grad_checkpointing(checkpointing)
        model(x).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name
    assert max(float(g.abs().max()) for g in gradients[1].values()) > 0


@pytest.mark.parametrize("backbone", ["uni", "dinov3-vith16plus", "efficientnet-lite0"])
def test_drop_is_dropout_before_the_head_and_nowhere_else(backbone):
    targets = next(iter(BACKBONES[backbone].targets))
    model = lora_model(backbone, None, 2, 4, 0.0, targets, drop_rate=0.5, **overrides(backbone))
    rates = {name: layer.p for name, layer in model.named_modules() if isinstance(layer, torch.nn.Dropout) and layer.p}
    base = model.get_base_model()
    assert [name.split(".")[-1] for name in rates] == ([] if "lite" in backbone else ["head_drop"])
    assert getattr(base, "drop_rate", 0.5) == 0.5
    freeze_statistics(model)
    with torch.no_grad():  # the head starts at zero: without weights, dropout would not show
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.fill_(1.0)
    x = torch.randn(1, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
