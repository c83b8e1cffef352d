"""Miniature ensembles with random weights, for tests: real architectures, reduced, and real PEFT adapters."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from inference.backbones import BACKBONES, build, lookup
from training.lora import lora_model


def overrides(backbone: str) -> dict[str, Any]:
    """What makes `backbone` small: two blocks, and 16 channels for each of its attention heads."""
    row = BACKBONES[backbone]
    return dict(depth=2, embed_dim=16 * row.heads) if row.heads else {}


def random_base(backbone: str, file: Path, seed: int = 0) -> Path:
    """A base with random weights of plausible size: every tensor matters to the answer, none overflows."""
    torch.manual_seed(seed)
    state = build(backbone, 0, **overrides(backbone)).state_dict()
    for name, value in state.items():
        if "gamma" in name or name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point() and value.ndim < 2:
            value.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
    save_file({name: value.contiguous() for name, value in state.items()}, file)
    return file


def random_fold(
    backbone: str, base: Path, folder: Path, targets: str, pool: str, seed: int, **lora: Any
) -> torch.nn.Module:
    """A random adapter saved by PEFT to `folder`; returns the PEFT model, unmerged, in evaluation mode."""
    model = lora_model(backbone, base, 4, 8.0, 0.0, targets, pool, **overrides(backbone), **lora).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.05)
    model.save_pretrained(folder)
    return model


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def make_ensemble(
    folder: Path, backbone: str = "efficientnet-lite0", targets: str | None = None, pool: str | None = None,
    folds: int = 3, **manifest: Any,
) -> list[torch.nn.Module]:  # fmt: skip
    """Write an ensemble folder, base included; returns its PEFT models. `manifest` overrides its entries."""
    row = lookup(backbone)
    pool = pool or row.pool
    base = random_base(backbone, folder / "base.safetensors")
    names = [f"fold{number}" for number in range(folds)]
    targets = targets or next(iter(row.targets))
    models = [random_fold(backbone, base, folder / name, targets, pool, seed) for seed, name in enumerate(names, 1)]
    files = ("adapter_config.json", "adapter_model.safetensors")
    size = row.size if row.heads else 64
    content = {
        "format": 1, "name": "miniature", "backbone": backbone, "pool": pool,
        "base": {"file": base.name, "sha256": sha256(base)},
        "preprocess": {"crop": 80, "size": size, "kernel": "bicubic", "mean": list(row.mean), "std": list(row.std)},
        "folds": [{"folder": name, "sha256": {file: sha256(folder / name / file) for file in files}} for name in names],
        "tta": "none", "averaging": "logit", "temperature": 1.0, "threshold": 0.5,
        "precision": {"fp32": 0.0, "bf16": 0.1, "fp16": None},
        "licence": {"base": "random weights"}, "provenance": {"made by": "test/support/miniature.py"},
    }  # fmt: skip
    (folder / "ensemble.json").write_text(json.dumps(content | manifest))
    return models
