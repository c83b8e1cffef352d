"""The workloads: ensembles of the right shapes with random weights, made once, and stacks of generated crops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from inference.backbones import BACKBONES, build
from inference.checksums import sha256
from inference.example.figures import FIGURES, draw
from test.harness.layout import write_input
from test.support.stacks import write_stack

RANK, ALPHA, FOLDS = 8, 16.0, 3


def make(backbone: str, cache: Path) -> Path:
    """An ensemble folder under `cache`: a random fp16 base, three random rank-8 qkv adapters; the base in fp32 beside.

    The base's values are rounded to fp16 in both files, so that the plain path and ours compute with the same weights.
    """
    from training.fit.lora import Lora, lora_model

    folder = cache / backbone
    if (folder / "ensemble.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    row = BACKBONES[backbone]
    torch.manual_seed(0)
    with torch.device("meta"):
        state = build(row, 0).state_dict()
    for name, value in state.items():
        filled = torch.empty_like(value, device="cpu")
        if value.ndim < 2:
            filled.fill_(0.1 if "gamma" in name else float(name.endswith("weight")))
        else:
            filled.normal_(0, value[0].numel() ** -0.5 if "embed" not in name and "token" not in name else 0.02)
        state[name] = filled.half().contiguous()
    base = folder / "base.safetensors"
    save_file(state, base)
    torch.save({name: value.float() for name, value in state.items()}, cache / f"{backbone}.pth")
    del state
    folds = []
    for number in range(FOLDS):
        with torch.device("meta"):
            model = lora_model(backbone, None, Lora(RANK, ALPHA), "token")
        tensors = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = name.replace(".default", "").replace(".modules_to_save", "")
                tensors[key] = torch.randn(parameter.shape) * 0.02
        target = folder / f"fold{number}"
        target.mkdir(exist_ok=True)
        model.peft_config["default"].save_pretrained(target)
        save_file(tensors, target / "adapter_model.safetensors")
        hashes = {n: sha256(target / n) for n in ("adapter_config.json", "adapter_model.safetensors")}
        folds.append({"folder": target.name, "sha256": hashes})
    manifest = {
        "format": 1,
        "name": f"random-{backbone}",
        "backbone": backbone,
        "pool": "token",
        "base": {"file": base.name, "sha256": sha256(base)},
        "preprocess": {
            "crop": None,
            "size": row.size,
            "kernel": "bicubic",
            "mean": list(row.mean),
            "std": list(row.std),
        },
        "folds": folds,
        "tta": "none",
        "averaging": "logit",
        "temperature": 1.0,
        "threshold": 0.5,
        "precision": {"fp32": 0.0, "bf16": 1.0, "fp16": 1.0 if row.fp16_safe else None},
        "licence": {"base": "random weights"},
        "provenance": {"made by": "benchmarks"},
    }
    (folder / "ensemble.json").write_text(json.dumps(manifest, indent=1))
    return folder


def make_averaged(backbone: str, cache: Path) -> Path:
    """An ensemble folder under `cache`: that of `make` with its folds averaged into one adapter."""
    from training.fit.averaged import FILES, average_adapters

    source, folder = make(backbone, cache), cache / f"{backbone}-averaged"
    if (folder / "ensemble.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    manifest = json.loads((source / "ensemble.json").read_text())
    base = folder / manifest["base"]["file"]
    base.unlink(missing_ok=True)
    base.symlink_to((source / base.name).resolve())
    averaged = folder / "averaged"
    average_adapters([source / fold["folder"] for fold in manifest["folds"]], averaged, base, backbone)
    fold = {"folder": averaged.name, "sha256": {name: sha256(averaged / name) for name in FILES}}
    manifest |= {"name": f"random-{folder.name}", "folds": [fold]}
    (folder / "ensemble.json").write_text(json.dumps(manifest, indent=1))
    return folder


def make_mixed(backbones: Sequence[str], cache: Path) -> Path:
    """An ensemble folder under `cache` whose members are the random ensembles of `make`, as links to their files."""
    folder = cache / "+".join(backbones)
    if (folder / "ensemble.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    whole = ("averaging", "temperature", "threshold", "provenance")
    members: list[dict[str, Any]] = []
    content: dict[str, Any] = {}
    for backbone in backbones:
        source = make(backbone, cache)
        content = json.loads((source / "ensemble.json").read_text())
        name = f"{backbone}.safetensors"
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to((source / "base.safetensors").resolve())
        folds = []
        for fold in content["folds"]:
            link = folder / f"{backbone}-{fold['folder']}"
            link.unlink(missing_ok=True)
            link.symlink_to((source / fold["folder"]).resolve())
            folds.append(fold | {"folder": link.name})
        kept = {key: value for key, value in content.items() if key not in (*whole, "format", "name")}
        members.append({"name": backbone} | kept | {"folds": folds, "base": content["base"] | {"file": name}})
    mixed = {"format": 2, "name": f"random-{folder.name}"[:100], "members": members}
    mixed |= {"weights": [1 / len(members)] * len(members)} | {key: content[key] for key in whole}
    (folder / "ensemble.json").write_text(json.dumps(mixed, indent=1))
    return folder


def make_input(crops: int, cache: Path) -> Path:
    """A job's input folder with one stack of `crops` generated crops of 128 x 128 pixels."""
    folder = cache / f"input-{crops}"
    if not (folder / "inputs.json").exists():
        rng = np.random.default_rng(0)
        kinds = islice(cycle(kind for figures in FIGURES.values() for kind in figures), crops)
        stack = cache / f"stack-{crops}.tiff"
        stack.parent.mkdir(parents=True, exist_ok=True)
        write_stack(stack, [Image.fromarray(draw(kind, rng)) for kind in kinds])
        write_input(stack, folder, "2026", Random(0))
    return folder


def make_reference(cache: Path) -> Path:
    """A folder with reference.pth: an EfficientNetV2-M with one logit, as the official container loads it, random."""
    import timm

    folder = cache / "reference"
    if not (folder / "reference.pth").exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(timm.create_model("tf_efficientnetv2_m", num_classes=1).state_dict(), folder / "reference.pth")
    return folder
