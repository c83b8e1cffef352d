"""The settings of a training run, from a TOML file. Comments there mark each value as the paper's or ours.

pydantic checks names, types and ranges, and reads the docstring below each field, which `fit --help` prints.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from inference.backbones import lookup
from inference.errors import UserError
from inference.preprocess import Preprocess

from ..augment.strengths import Augment, Share
from ..data.crop import Crop
from ..data.splits import Kind, split
from .lora import Lora
from .losses import Weighting

FOLDER = Path(__file__).parents[1] / "recipes"
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Recipe:
    """Everything that determines a run, apart from the crops. `python -m training fit --set NAME=VALUE` changes one."""

    backbone: str
    """Name of the backbone in inference/backbones.py."""

    # input
    crop: Annotated[int, Field(ge=0)] = 0
    """Side in pixels of the central square that the network sees; 0: the largest square of the crop."""
    size: Count = 224
    """Side in pixels to which that square is resized: the network's input."""
    kernel: Literal["bilinear", "bicubic"] = "bicubic"
    """Kernel of that resizing."""
    pool: str = ""
    """How a vision transformer's tokens become features: token or token+avg; empty: as the backbone's table says."""

    # LoRA
    rank: Count = 8
    """Rank of each adapter."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """LoRA's scale: an adapter's product is multiplied by alpha / rank."""
    dropout: Share = 0.0
    """Dropout at the input of each adapter."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead."""
    targets: str = "qkv"
    """Which layers are adapted: one of the backbone's target sets."""

    # loss
    gamma: Annotated[float, Field(ge=0)] = 0.0
    """Exponent of the focal loss; 0: binary cross-entropy."""
    class_weighting: Weighting = "inverse"
    """Loss weights by how often a class occurs."""
    domain_weighting: Weighting = "none"
    """Loss weights by how often a domain occurs."""
    domain_by_class: bool = False
    """Count domain x class in `domain_weighting`, in place of the domain alone."""
    soft_labels: Share = 0.0
    """How far the target moves from the label to the share of expert votes: 0 is the label, 1 the votes."""

    sampling: Literal["shuffle", "class", "domain"] = "shuffle"
    """Each crop once an epoch, or drawn so that classes, or domain x class, occur equally often."""

    # optimisation: AdamW, cosine with warm-up
    epochs: Count = 10
    """Passes over a fold's training crops."""
    batch: Count = 32
    """Crops computed at once."""
    accumulate: Count = 1
    """Batches in a step of the optimizer, whose gradients are added up: half the batch and twice this take the same
    steps in less memory."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of the adapters."""
    head_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """Peak learning rate of the head; 0: the same."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    warmup: Share = 0.1
    """Share of the steps in which the learning rate rises linearly, before half a cosine to zero."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0: any."""
    drop: Share = 0.0
    """Dropout before the head."""
    ema: Share = 0.0
    """Decay per step of the averaged weights, which are kept; 0: the last weights are kept."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Epochs without a better AUC before a fold stops and keeps its best; 0: never. An eighth of the training crops, by
    whole groups, judges instead of training: the crops that the fold is scored on choose nothing."""
    checkpointing: bool = False
    """Compute activations twice to save memory."""
    tta: Literal["none", "rot4", "d4"] = "d4"
    """Views of a finished fold's held-out logits, of which calibration can choose."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the computation; auto: the hardware's fast one, but not fp16 where the backbone overflows in it."""

    # split
    split: Kind = "grouped"
    """grouped: slides whole; random: crops anywhere; domain: folds of whole domains; leave-one-out: a domain a fold."""
    split_by: str = "domain"
    """A domain in the last two: domain, tumour, scanner, origin, a product as "tumour x origin", or eight-groups."""
    folds: Annotated[int, Field(ge=2)] = 3
    """Number of folds."""
    exam: Annotated[int, Field(ge=0)] = 0
    """8: an eighth of the slides of every domain stays out of all folds; 0: no exam."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the split and of everything random in training."""
    seeds: Count = 1
    """Trainings of each fold, with this many seeds from `seed` on; the fold is the mean of their adapters."""

    augment: Augment = Field(default_factory=Augment)
    """Strengths of the augmentations."""

    def preprocess(self) -> Preprocess:
        row = lookup(self.backbone)
        return Preprocess(self.crop or None, self.size, self.kernel, row.mean, row.std)

    def lora(self) -> Lora:
        return Lora(self.rank, self.alpha, self.dropout, self.targets, self.rslora)

    def split_of(self, crops: Sequence[Crop]) -> np.ndarray:
        """The validating fold of each crop (N,); see `splits.split`."""
        return split(crops, self.split, self.folds, self.seed, self.split_by, self.exam)


def load_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in file `name`, or of that name in training/recipes, with `changes` such as "augment.hed=0.1"."""
    file = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not file.exists():
        known = ", ".join(sorted(f.stem for f in FOLDER.glob("*.toml")))
        raise UserError(f"recipe {name} was not found; expected a .toml file or one of {known}")
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {file} is not valid TOML: {error}") from None
    for change in changes:
        key, _, value = change.partition("=")
        inner, _, leaf = key.rpartition(".")
        (table.setdefault(inner, {}) if inner else table)[leaf] = value
    return from_dict(table)


def from_dict(table: dict[str, Any]) -> Recipe:
    """The recipe with the settings of `table`; UserError for an unknown name, and a value not of its type or range."""
    try:
        return Recipe(**table)
    except (ValidationError, TypeError) as error:
        if isinstance(error, TypeError):  # a name that Python's own signature does not know
            raise UserError(f"recipe: {error}; change it") from None
        problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [field.name for field in fields(Augment if "." in name else Recipe)]
        raise UserError(f"recipe: {name} is not a setting; expected one of {', '.join(known)}")
    raise UserError(f"recipe: {name} = {problem['input']!r}; {problem['msg'].lower()}; change it")


def settings_help() -> str:
    """Every setting with its default and docstring, as `fit --help` prints them."""
    lines = ["settings of a recipe, for --set NAME=VALUE:"]
    for prefix, kind in (("", TypeAdapter(Recipe)), ("augment.", TypeAdapter(Augment))):
        for name, field in kind.json_schema()["properties"].items():
            if name != "augment":
                facts = [str(field["default"])] if field.get("default", "") != "" else []
                facts += [f"one of {', '.join(field['enum'])}"] if "enum" in field else []
                shown = f" ({'; '.join(facts)})" if facts else ""
                lines.append(f"  {prefix}{name}{shown}: {' '.join(field['description'].split())}")
    return "\n".join(lines)
