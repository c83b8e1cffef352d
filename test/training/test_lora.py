"""LoRA on the backbones: published parameter counts, exact targets, and a base that is what it says."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.backbones import BACKBONES, build
from inference.errors import UserError
from test.support.miniature import overrides, random_base
from training.fit.lora import Lora, freeze_statistics, load_base, lora_model, store_base_as, trainable

# rank x (inputs + outputs), summed over the layers that the set names
COUNTS = [
    ("virchow", "qkv", 8, 1_310_720, 2560),
    ("virchow2", "qkv", 8, 1_310_720, 2560),
    ("dinov3-vith16plus", "qkv", 8, 1_310_720, 1280),
    ("dinov3-vith16plus", "qkv", 4, 655_360, 1280),
    ("dinov3-vith16plus", "qv", 8, 1_310_720, 1280),
    ("virchow", "qv", 8, 1_310_720, 2560),
    ("virchow", "attn", 8, 1_966_080, 2560),
    ("virchow", "all", 8, 5_244_928, 2560),
    ("uni", "qkv", 8, 786_432, 1024),
    ("uni", "all", 8, 3_145_728, 1024),
    ("uni2-h", "all", 8, 4_718_592, 1536),
    ("h-optimus-0", "qkv", 8, 1_966_080, 1536),
    ("h-optimus-0", "all", 8, 7_864_320, 1536),
]


@pytest.mark.parametrize(("backbone", "targets", "rank", "adapters", "features"), COUNTS)
def test_full_size_has_the_published_number_of_trainable_parameters(backbone, targets, rank, adapters, features):
    with torch.device("meta"):
        model = lora_model(backbone, None, Lora(rank, 16, targets=targets))
    assert trainable(model) == {"adapters": adapters, "head": features + 1}


def test_only_the_named_layers_are_adapted():
    model = lora_model("virchow", None, Lora(4, 8, targets="all"), **overrides("virchow"))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(adapted) == 2 * 4  # not the patch embedding, whose name ends in "proj" too
    assert not any("patch_embed" in name for name in adapted)
    dino = lora_model("dinov3-vith16plus", None, Lora(4, 8, targets="all"), **overrides("dinov3-vith16plus"))
    assert len({name for name, _ in dino.named_parameters() if "lora_A" in name}) == 2 * 5
    with pytest.raises(UserError, match="no LoRA target set 'fc9'; expected one of qkv, qv, attn, all"):
        lora_model("uni", None, Lora(4, 8, targets="fc9"), **overrides("uni"))


def test_a_base_must_fit_tensor_by_tensor(tmp_path):
    file = random_base("uni", tmp_path / "base.safetensors")
    state = load_file(file)
    model = lora_model("uni", file, Lora(4, 8, targets="qkv"), **overrides("uni"))
    stored = model.get_base_model().blocks[0].attn.qkv.base_layer.weight
    assert torch.equal(stored, state["blocks.0.attn.qkv.weight"])
    save_file({name: value for name, value in state.items() if name != "norm.weight"}, file)
    with pytest.raises(UserError, match=r"norm\.weight is in only one of base and backbone"):
        lora_model("uni", file, Lora(4, 8, targets="qkv"), **overrides("uni"))
    save_file(state | {"norm.weight": torch.ones(3)}, file)
    with pytest.raises(UserError, match=r"norm.weight is \(3,\), the backbone needs \(256,\)"):
        lora_model("uni", file, Lora(4, 8, targets="qkv"), **overrides("uni"))


def test_batch_normalisation_keeps_the_bases_statistics():
    model = freeze_statistics(lora_model("efficientnet-lite0", None, Lora(2, 4, targets="late")))
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("backbone", ["virchow", "dinov3-vith16plus", "efficientnet-lite0"])
def test_a_base_in_low_precision_computes_what_autocast_does(backbone):
    torch.manual_seed(0)
    model = lora_model(
        backbone, None, Lora(2, 4, targets=next(iter(BACKBONES[backbone].targets))), **overrides(backbone)
    ).eval()
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
    model = lora_model(
        backbone, None, Lora(2, 4, targets=next(iter(BACKBONES[backbone].targets))), **overrides(backbone)
    )
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
    model = lora_model(backbone, None, Lora(2, 4, targets=targets), drop_rate=0.5, **overrides(backbone))
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


class Separate(torch.nn.Module):
    """A fused qkv layer as three linear layers, which PEFT can adapt one by one."""

    def __init__(self, fused: torch.nn.Linear) -> None:
        super().__init__()
        for name, weight in zip("qkv", fused.weight.detach().chunk(3), strict=True):
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=fused.bias is not None)
            layer.weight.data.copy_(weight)
            self.add_module(name, layer)
        if fused.bias is not None:
            for name, bias in zip("qkv", fused.bias.detach().chunk(3), strict=True):
                self.get_submodule(name).bias.data.copy_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


@pytest.mark.parametrize(("backbone", "rslora"), [("dinov3-vith16plus", False), ("virchow", False), ("uni", True)])
def test_qv_trains_and_merges_as_separate_adapters_on_query_and_value(backbone, rslora, tmp_path):
    """PEFT's own adapters on q and on v, from the same start on the same crops: the same steps and merged weights."""
    from peft import LoraConfig, PeftModel, get_peft_model

    rank, alpha, size = 4, 8.0, 28 if "14" in BACKBONES[backbone].timm else 32
    base = random_base(backbone, tmp_path / "base.safetensors")
    ours = lora_model(backbone, base, Lora(rank, alpha, targets="qv", rslora=rslora), **overrides(backbone))
    plain = build(BACKBONES[backbone], 1, **overrides(backbone))
    load_base(plain, base, "head")
    torch.nn.init.zeros_(plain.head.weight)
    torch.nn.init.zeros_(plain.head.bias)
    for block in plain.blocks:
        block.attn.qkv = Separate(block.attn.qkv)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=r".*\.qkv\.[qv]", modules_to_save=["head"], use_rslora=rslora
    )
    theirs = get_peft_model(plain, config)
    for mine, other in zip(ours.get_base_model().blocks, theirs.get_base_model().blocks, strict=True):
        a = mine.attn.qkv.lora_A.default.weight.detach()
        other.attn.qkv.q.lora_A.default.weight.data.copy_(a[:rank])
        other.attn.qkv.v.lora_A.default.weight.data.copy_(a[rank:])

    torch.manual_seed(0)
    batches = torch.randn(5, 4, 3, size, size)
    losses = []
    for model in (ours, theirs):
        freeze_statistics(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        losses.append([])
        for x in batches:
            z = model(x).flatten()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(z, torch.tensor([1.0, 0, 1, 0]))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert trainable(ours) == trainable(theirs)

    ours.save_pretrained(tmp_path / "fold")  # what anyone else opens: a plain adapter of twice the rank
    saved = load_file(tmp_path / "fold" / "adapter_model.safetensors")
    fresh = build(BACKBONES[backbone], 1, **overrides(backbone))
    load_base(fresh, base, "head")
    merged = PeftModel.from_pretrained(fresh, tmp_path / "fold").merge_and_unload()
    separate = theirs.merge_and_unload()
    start = load_file(base)
    for number, (block, other) in enumerate(zip(merged.blocks, separate.blocks, strict=True)):
        b = saved[f"base_model.model.blocks.{number}.attn.qkv.lora_B.weight"]
        width = len(b) // 3
        assert not b[width : 2 * width].any() and not b[:width, rank:].any() and not b[2 * width :, :rank].any()
        assert b[:width, :rank].all() and b[2 * width :, rank:].all()
        q, k, v = block.attn.qkv.weight.chunk(3)
        assert torch.equal(k, start[f"blocks.{number}.attn.qkv.weight"].chunk(3)[1])
        for found, name in ((q, "q"), (v, "v")):
            moved = other.attn.qkv.get_submodule(name).weight
            assert (found - moved).abs().max() < 1e-3
            assert (moved - start[f"blocks.{number}.attn.qkv.weight"].chunk(3)["qkv".index(name)]).abs().max() > 1e-2
