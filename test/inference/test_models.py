"""The job's own forward passes against timm and PEFT, backbone by backbone."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shared_pass import operations
from inference.backbones import BACKBONES, Backbone, build
from inference.ensemble import Ensemble
from inference.models import logits
from inference.preprocess import to_batch
from inference.weights import Weights
from test.support.miniature import make_ensemble, overrides, random_base

# parameter counts without a head, as published (model cards; timm for the rest)
PUBLISHED = {
    "virchow": 631_229_184,
    "virchow2": 631_239_424,
    "uni": 303_350_784,
    "uni2-h": 681_394_176,
    "h-optimus-0": 1_134_774_272,
    "dinov3-vith16plus": 840_509_440,
    "efficientnet-lite0": 3_371_008,
}


@pytest.mark.parametrize("name", BACKBONES)
def test_full_size_has_the_published_parameters_and_targets(name):
    row = BACKBONES[name]
    with torch.device("meta"):
        model = build(row, 0)
    assert sum(p.numel() for p in model.parameters()) == row.params == PUBLISHED.get(name, row.params)
    layers = [layer for layer, _ in model.named_modules()]
    for targets, pattern in row.targets.items():
        found = sum(bool(re.fullmatch(pattern, layer)) for layer in layers)
        per_block = {"qkv": 1, "qv": 1, "attn": 2, "all": 5 if "blocks.0.mlp.fc1_g" in layers else 4}
        assert found == (row.depth * per_block[targets] if row.depth else found) > 0


# the siblings of a size run the same code: once each, with their own pooling
SIBLINGS = ("dinov2-vitb14", "dinov2-vitl14", "dinov3-vits16", "dinov3-vitb16", "dinov3-vitl16")
SIBLINGS += ("dinov2-vitb14-reg", "dinov2-vitl14-reg", *(name for name in BACKBONES if "qkvb" in name))
CASES = [
    (name, pool)
    for name, row in BACKBONES.items()
    for pool in ((row.pool,) if "lite" in name or name in SIBLINGS else ("token", "avg", "token+avg"))
]


@pytest.mark.parametrize(("name", "pool"), CASES)
def test_fused_folds_equal_peft(name, pool, tmp_path):
    """Largest target set, native and another input size: logits within 1e-5 of merge_and_unload.

    Where fp32 itself is coarser than that for these random weights (PEFT's own merge, against itself in fp64), within
    twice its error.
    """
    row = BACKBONES[name]
    models = make_ensemble(tmp_path, name, targets=list(row.targets)[-1], pool=pool)
    folds = [tmp_path / f"fold{f}" for f in range(3)]
    weights = Weights(tmp_path / "base.safetensors", folds, torch.device("cpu"), torch.float32)
    merged = [model.merge_and_unload() for model in models]
    torch.manual_seed(0)
    patch = 14 if "14" in row.timm else 16
    batches = [torch.randn(2, 3, size, size) for size in (row.size, row.size + 2 * patch)]
    with torch.inference_mode():
        found = [logits(x, weights, row, pool) for x in batches]
        plain = [torch.stack([model(x)[:, 0] for model in merged]) for x in batches]
        exact = [torch.stack([model.double()(x.double())[:, 0] for model in merged]) for x in batches]
    for ours, theirs, true in zip(found, plain, exact, strict=True):
        assert ours.shape == (3, 2)
        assert true.std() > 1e-3  # the random ensemble does tell crops and folds apart
        allowed = max(1e-5 * max(1.0, float(true.abs().max())), 2 * float((theirs - true).abs().max()))
        assert (ours - true).abs().max() <= allowed


def test_any_other_backbone_runs_through_timm(tmp_path, monkeypatch):
    row = Backbone(
        timm="convnext_atto",
        family="other",
        pool="avg",
        size=64,
        params=0,
        licence="",
        source="",
        targets={"mlp": r"stages\.\d+\.blocks\.\d+\.mlp\.fc[12]"},
        head="head.fc",
    )
    monkeypatch.setitem(BACKBONES, "convnext-atto", row)
    models = make_ensemble(tmp_path, "convnext-atto")
    crops = [np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)] * 2
    ensemble = Ensemble.load(tmp_path, "cpu", "fp32")
    with torch.inference_mode():
        expected = torch.stack([model(to_batch(crops, ensemble.members[0].preprocess))[:, 0] for model in models])
    assert np.allclose(ensemble.predict(crops).logits[0][:, 0], expected, atol=1e-5)


def random_adapter(folder: Path, base: Path, layers: list[str], width: int, seed: int) -> Path:
    """A plain LoRA adapter of rank 2 on exactly these layers, with a head for `width` features."""
    draw = torch.Generator().manual_seed(seed)
    folder.mkdir()
    # logits of ordinary size: at 70, as from a head of unit weights, P is flat and shows no difference
    head = torch.randn(1, width, generator=draw) / width**0.5
    state = {"head.weight": head, "head.bias": torch.randn(1, generator=draw)}
    with safe_open(base, "pt") as stored:
        for layer in layers:
            out, *rest = stored.get_slice(f"{layer}.weight").get_shape()
            state[f"{layer}.lora_A.weight"] = torch.randn(2, *rest, generator=draw) * 0.05
            state[f"{layer}.lora_B.weight"] = torch.randn(out, 2, *[1] * (len(rest) - 1), generator=draw) * 0.5
    save_file(
        {f"base_model.model.{name}": value for name, value in state.items()}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": layers, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("backbone", ["virchow2", "uni", "dinov3-vith16plus", "efficientnet-lite0"])
def test_what_no_fold_changes_is_computed_once_whatever_is_adapted(backbone, tmp_path):
    """Random layers, others for each fold: P(atypical) as from each fold alone, and no more work than for two."""
    row, draw = BACKBONES[backbone], random.Random(backbone)
    base = random_base(backbone, tmp_path / "base.safetensors")
    with safe_open(base, "pt") as stored:
        shapes = {name.removesuffix(".weight"): stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    layers = sorted(name for name, shape in shapes.items() if len(shape) in (2, 4) and f"{name}.weight" not in shapes)
    layers = [name for name in layers if any(part in name for part in ("attn", "mlp", "conv", "patch_embed"))]
    width = 1280 if not row.heads else 16 * row.heads
    side = 64 if not row.heads else 4 * (14 if "14" in row.timm else 16)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    pool = "avg" if not row.heads else "token"
    for trial in range(3):
        chosen = [draw.sample(layers, draw.choice((1, 2, len(layers) // 2))) for _ in range(2)]
        folds = [
            random_adapter(tmp_path / f"{trial}-{n}", base, names, width, 10 * trial + n)
            for n, names in enumerate(chosen)
        ]
        open_weights = lambda some: Weights(base, some, torch.device("cpu"), torch.float32)  # noqa: E731
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            fused = logits(x, open_weights(folds), row, pool)
        together = counter.get_total_flops()
        for n, fold in enumerate(folds):
            with torch.inference_mode(), FlopCounterMode(display=False) as counter:
                alone = logits(x, open_weights([fold]), row, pool)[0].sigmoid()
            assert (fused[n].sigmoid() - alone).abs().max() <= 1e-6
        assert together <= 2 * counter.get_total_flops()


@pytest.mark.parametrize("first", [0, 1, 2])
def test_blocks_below_the_first_adapted_one_cost_as_much_as_for_one_fold(first):
    """Of three blocks: a pass takes the operations of the shared part and three times those of the rest."""
    one, three, alone = (operations("uni", first, folds, depth=3) for folds in (1, 3, 1))
    assert one == alone
    block = operations("uni", 0, 1, depth=3) - operations("uni", 0, 1, depth=2)
    last = (operations("uni", 2, 3, depth=3) - one) / 2  # only the class token passes through the whole of it
    assert last < block
    assert three - one == pytest.approx(2 * ((2 - first) * block + last), rel=1e-3)


def test_miniatures_are_small():
    assert all("depth" in overrides(name) for name in BACKBONES if "lite" not in name)
