"""One fold as another program stored it: its tensors, PEFT's configuration if there is one, and files beside them.

What a file is, its content says: a folder of `PeftModel.save_pretrained`, a checkpoint of a training program, or merged
weights; names of files only say how to open them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inference.backbones import BACKBONES, Backbone
from inference.errors import UserError
from inference.files import read_json

from ..fit.checkpoints import State, read_stored

CONFIG = "adapter_config.json"
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
DEPTH = 8  # of containers in a checkpoint


@dataclass(frozen=True)
class Source:
    """tensors: by their names in the file, in fp32; config: PEFT's, None where there is none; folder: it lies in."""

    file: Path
    tensors: State
    config: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        return self.file.parent


def read_source(path: Path) -> Source:
    """The fold at `path`, a file or a folder with one file of weights. UserError where it is anything else."""
    file = weights_file(path)
    tensors = finite(file, flat(read_stored(file)))
    config = None
    if (file.parent / CONFIG).is_file():
        config = read_json(file.parent / CONFIG, "save the adapter again")
        if not isinstance(config, dict):
            raise UserError(f"{file.parent / CONFIG} holds no settings; expected PEFT's; save the adapter again")
    return Source(file, tensors, config)


def check_base(source: Source, backbone: str) -> None:
    """Print which base the adapters name, if it is not known as `backbone`'s. UserError where it is another row's."""
    named = (source.config or {}).get("base_model_name_or_path")
    if not isinstance(named, str) or not named or hub_name(named) in published(BACKBONES[backbone]):
        return
    for other, row in BACKBONES.items():
        if hub_name(named) in published(row):
            raise UserError(
                f"{source.folder / CONFIG} names the base {named:.100}, which is {other}; expected that of --base "
                f"{backbone}; give --base {other}, or correct the file"
            )
    print(f"  {source.folder}: adapters name {named:.100}, --base is {backbone}")


def published(row: Backbone) -> set[str]:
    """Where a row's weights are published, as adapters name it."""
    return {hub_name(name) for name in (row.source, row.mirror) if name}


def hub_name(name: str) -> str:
    """OWNER/NAME without timm's `hf-hub:`, in lower case, as the hub compares."""
    return name.rpartition(":")[2].lower()


def weights_file(path: Path) -> Path:
    """The file itself, or the only one with weights in the folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist; expected a folder or a file with adapters; check the name")
    files = sorted(file for file in path.iterdir() if file.suffix in WEIGHTS and file.is_file())
    adapters = [file for file in files if file.stem == "adapter_model"]  # a trainer may keep its state beside PEFT's
    if len(adapters or files) != 1:
        names = ", ".join(file.name for file in adapters or files) or "none"
        raise UserError(
            f"{path} holds {len(files)} files of weights ({names:.200}); expected one fold's; name the file"
        )
    return (adapters or files)[0]


def flat(stored: Any, prefix: str = "", depth: int = 0) -> State:
    """All named tensors in nested dictionaries, names joined by dots; optimisers, which have numbers, are left out."""
    found: State = {}
    if not isinstance(stored, dict) or depth > DEPTH:
        return found
    for name, value in stored.items():
        if not isinstance(name, str):
            continue
        if isinstance(value, torch.Tensor):
            found[prefix + name] = value
        else:
            found |= flat(value, f"{prefix}{name}.", depth + 1)
    return found


def finite(file: Path, tensors: State) -> State:
    """Floating-point tensors in fp32. UserError where there are none, or one is not finite."""
    floats = {name: value.float() for name, value in tensors.items() if value.is_floating_point()}
    if not floats:
        raise UserError(f"{file} holds no named tensors; expected adapters or a state dict; check which file it is")
    for name, value in floats.items():
        if not value.isfinite().all():
            raise UserError(f"{file}: {name:.100} is not finite; expected finite weights; take another checkpoint")
    return floats
