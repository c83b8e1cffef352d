"""A member's part of an ensemble folder: its folds with calibration in their heads, its entry, its precisions."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import load_file, save_file

from inference.backbones import lookup
from inference.checksums import sha256
from inference.ensemble import Ensemble, combine
from inference.files import write_whole
from inference.manifest import FILE, load_manifest
from inference.preprocess import Preprocess
from inference.progress import Progress

from ..fit.averaged import FILES, average_adapters
from ..fit.recipe import Recipe
from .joint import Calibration, Choice
from .scaling import Scale

if TYPE_CHECKING:
    from .candidates import Candidate

DRIFT_CROPS = 32
DRIFT_STEP = 4  # crops between two updates of the progress
DRIFT_ALLOWED = 0.02  # in P(atypical): a precision with a larger change is not allowed
UNMEASURED = {"fp32": 0.0, "bf16": None, "fp16": None}


def describe_member(recipe: Recipe, base: Path) -> dict[str, Any]:
    """A member's manifest entry by its recipe, without folds, views and precisions."""
    pool = recipe.pool or lookup(recipe.backbone).pool
    return member_entry(recipe.backbone, pool, base, recipe.preprocess(), "Apache-2.0")


def member_entry(backbone: str, pool: str, base: Path, preprocess: Preprocess, licence: str) -> dict[str, Any]:
    """A member's manifest entry without folds, views and precisions. licence: of its adapters."""
    row, settings = lookup(backbone), vars(preprocess)
    return {
        "backbone": backbone,
        "pool": pool,
        "base": {"file": base.name, "sha256": sha256(base)},
        "preprocess": settings | {"mean": list(settings["mean"]), "std": list(settings["std"])},
        "licence": {"base": row.licence, "base_source": row.source, "adapters": licence},
    }


def write_ensemble(
    folder: Path, name: str, candidates: Sequence[Candidate], choice: Choice, calibration: Calibration, averaged: bool
) -> dict[str, Any]:
    """Write the chosen members to a new folder, with links to their bases; returns its manifest.

    averaged: each member's folds as one adapter, their mean
    """
    folder.mkdir()
    entries = []
    for position, number in enumerate(choice.members):
        member = candidates[number]
        sources = {f"{member.name}-fold{n}": source for n, source in enumerate(member.folds)}
        if averaged:
            average_adapters(member.folds, folder / f"{member.name}-mean", member.base, member.entry["backbone"])
            sources = {f"{member.name}-mean": folder / f"{member.name}-mean"}
        folds = write_folds(folder, sources, member.entry["backbone"], calibration.heads[position])
        entries.append(
            {"name": member.name, **member.entry}
            | {"folds": folds, "tta": choice.tta[position], "precision": UNMEASURED}
        )
        if not (folder / member.base.name).exists():
            (folder / member.base.name).symlink_to(member.base.resolve())
    manifest = {
        "format": 2,
        "name": name,
        "members": entries,
        "weights": list(choice.shares),
        "averaging": choice.averaging,
        "temperature": round(calibration.temperature, 4),
        "threshold": round(calibration.threshold, 4),
        "provenance": {},
    }
    write_manifest(folder, manifest)
    return manifest


def write_folds(folder: Path, sources: dict[str, Path], backbone: str, scale: Scale) -> list[dict[str, Any]]:
    """Copy folds (by new folder name) with `scale` in their heads; returns their manifest entries."""
    entries = []
    for name, source in sources.items():
        target = folder / name
        if target != source:
            target.mkdir()
            for file in FILES:
                shutil.copyfile(source / file, target / file)
        adjust_head(target / FILES[1], scale)
        clean_config(target / FILES[0], lookup(backbone).source)
        entries.append({"folder": name, "sha256": {file: sha256(target / file) for file in FILES}})
    return entries


def adjust_head(file: Path, scale: Scale) -> None:
    """Change an adapter's head to give (logit + shift) / temperature."""
    tensors = load_file(file)
    bias = next(name for name, value in tensors.items() if name.endswith(".bias") and value.shape == (1,))
    weight = bias.removesuffix("bias") + "weight"
    tensors[weight] = tensors[weight] / scale.temperature
    tensors[bias] = (tensors[bias] + scale.shift) / scale.temperature
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors writes for the owner alone, and an image's user is another


def clean_config(file: Path, source: str) -> None:
    """PEFT's configuration, with the base's public name in place of a local one, keys in a fixed order."""
    config = json.loads(file.read_text()) | {"base_model_name_or_path": source, "inference_mode": True}
    file.write_text(json.dumps(dict(sorted(config.items())), indent=1) + "\n")


def versions() -> dict[str, str]:
    """Versions of the software that makes an ensemble, for its provenance."""
    packages = ("torch", "timm", "peft", "numpy")
    return {name: version(name) for name in packages} | {"python": platform.python_version()}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_whole(folder / FILE, json.dumps(manifest, indent=1) + "\n")


def measure_drift(folder: Path, crops: Sequence[np.ndarray], device: str) -> list[dict[str, float | None]]:
    """For each member and precision the largest change of the ensemble's P(atypical) against fp32 on `crops`.

    None for a precision that is not allowed: one in which a member, or all that may use it together, change an answer
    by more than DRIFT_ALLOWED, or overflow. (Inference computes such crops again in fp32, and takes twice as long.)
    """
    manifest = load_manifest(folder)
    everyone = range(len(manifest.members))
    drift: list[dict[str, float | None]] = [dict(UNMEASURED) for _ in everyone]
    exact, _ = predict(folder, crops, device, "fp32", everyone)
    p = combine(list(exact.values()), manifest).p_atypical

    def change(lower: dict[int, np.ndarray]) -> float:
        return float(np.abs(combine(list((exact | lower).values()), manifest).p_atypical - p).max())

    for precision in ("bf16", "fp16"):
        safe = [m for m in everyone if precision == "bf16" or lookup(manifest.members[m].backbone).fp16_safe]
        if not safe:
            continue
        rounded, overflowed = predict(folder, crops, device, precision, safe)
        alone = {m: change({m: rounded[m]}) for m in safe if m not in overflowed}
        allowed = [m for m, largest in alone.items() if largest <= DRIFT_ALLOWED]
        if change({m: rounded[m] for m in allowed}) <= DRIFT_ALLOWED:
            for m in allowed:
                drift[m][precision] = round(alone[m], 5)
    return drift


def predict(
    folder: Path, crops: Sequence[np.ndarray], device: str, precision: str, chosen: Sequence[int]
) -> tuple[dict[int, np.ndarray], set[int]]:
    """Logits (folds, V, N) of the chosen members, and the members that overflowed; shows its progress."""
    manifest = load_manifest(folder)
    part = dataclasses.replace(manifest, members=tuple(manifest.members[m] for m in chosen))
    print(f"measuring {precision} on {len(crops)} crops", flush=True)
    parts: dict[int, list[np.ndarray]] = {m: [] for m in chosen}
    with Progress(len(crops), f"crops in {precision}") as progress:
        progress.show(0, 0, 0)
        ensemble = Ensemble(part, device, precision)
        for start in range(0, len(crops), DRIFT_STEP):
            progress.show(start, start, start)
            answer = ensemble.predict(crops[start : start + DRIFT_STEP])
            for m, logits in zip(chosen, answer.logits, strict=True):
                parts[m].append(logits)
    overflowed = {m for m, member in zip(chosen, ensemble.members, strict=True) if member.recomputed}
    return {m: np.concatenate(logits, axis=2) for m, logits in parts.items()}, overflowed
