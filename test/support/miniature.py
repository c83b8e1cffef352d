"""Miniature ensembles with random weights, for tests: real architectures, reduced, and real PEFT adapters."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from inference.backbones import BACKBONES, build, lookup
from training.fit.lora import Lora, lora_model


def overrides(backbone: str) -> dict[str, Any]:
    """What makes `backbone` small: two blocks, and 16 channels for each of its attention heads."""
    row = BACKBONES[backbone]
    return dict(depth=2, embed_dim=16 * row.heads) if row.heads else {}


def random_base(backbone: str, file: Path, seed: int = 0) -> Path:
    """A base with random weights of plausible size: every tensor matters to the answer, none overflows."""
    torch.manual_seed(seed)
    state = build(lookup(backbone), 0, **overrides(backbone)).state_dict()
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
    model = lora_model(backbone, base, Lora(4, 8.0, targets=targets, **lora), pool, **overrides(backbone)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.05)
    model.save_pretrained(folder)
    return model


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def make_member(
    folder: Path,
    backbone: str,
    targets: str | None = None,
    pool: str | None = None,
    folds: int = 3,
    *,
    base: str = "base.safetensors",
    prefix: str = "",
    seed: int = 1,
    **entries: Any,
) -> tuple[dict[str, Any], list[torch.nn.Module]]:
    """Write a member's base (unless it is there) and folds; returns what a manifest says of it, and its PEFT models.

    `entries` override the manifest's; "preprocess" is merged key by key.
    """
    row = lookup(backbone)
    pool = pool or row.pool
    file = folder / base
    if not file.exists():
        random_base(backbone, file)
    names = [f"{prefix}fold{number}" for number in range(folds)]
    targets = targets or next(iter(row.targets))
    models = [random_fold(backbone, file, folder / name, targets, pool, n) for n, name in enumerate(names, seed)]
    files = ("adapter_config.json", "adapter_model.safetensors")
    size = row.size if row.heads else 64
    preprocess = {"crop": 80, "size": size, "kernel": "bicubic", "mean": list(row.mean), "std": list(row.std)}
    content = {
        "backbone": backbone,
        "pool": pool,
        "base": {"file": base, "sha256": sha256(file)},
        "folds": [{"folder": name, "sha256": {file: sha256(folder / name / file) for file in files}} for name in names],
        "tta": "none",
        "precision": {"fp32": 0.0, "bf16": 0.1, "fp16": None},
        "licence": {"base": "random weights"},
    }
    return content | entries | {"preprocess": preprocess | entries.get("preprocess", {})}, models


WHOLE = {
    "name": "miniature",
    "averaging": "logit",
    "temperature": 1.0,
    "threshold": 0.5,
    "provenance": {"made by": "test/support/miniature.py"},
}


def make_ensemble(
    folder: Path,
    backbone: str = "efficientnet-lite0",
    targets: str | None = None,
    pool: str | None = None,
    folds: int = 3,
    **manifest: Any,
) -> list[torch.nn.Module]:
    """Write an ensemble folder of one member, base included; returns its PEFT models. `manifest` overrides entries."""
    content, models = make_member(folder, backbone, targets, pool, folds)
    (folder / "ensemble.json").write_text(json.dumps({"format": 1} | content | WHOLE | manifest))
    return models


def make_members(folder: Path, members: dict[str, dict[str, Any]], **manifest: Any) -> list[list[torch.nn.Module]]:
    """Write an ensemble folder of members (name: arguments of `make_member`); returns the PEFT models of each.

    Members of one backbone share its base. `manifest` overrides entries of the whole.
    """
    entries, models = [], []
    for number, (name, options) in enumerate(members.items()):
        base = f"{options['backbone']}.safetensors"
        chosen: dict[str, Any] = {"base": base, "prefix": f"{name}-", "seed": 1 + 100 * number} | options
        content, made = make_member(folder, **chosen)
        entries.append({"name": name} | content)
        models.append(made)
    weights = [1 / len(entries)] * len(entries)
    content = {"format": 2, "members": entries, "weights": weights} | WHOLE | manifest
    (folder / "ensemble.json").write_text(json.dumps(content))
    return models
