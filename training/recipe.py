"""A training run's settings, from a TOML file. Comments there mark each value as the paper's or ours."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.backbones import lookup
from inference.errors import UserError
from inference.manifest import TTA_VIEWS
from inference.preprocess import Preprocess

from .strengths import Augment

FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run, apart from the crops. `python -m training fit --set NAME=VALUE` changes one."""

    backbone: str
    # input: crop side in pixels (0: the whole crop), input side S, resize kernel
    crop: int = 0
    size: int = 224
    kernel: str = "bicubic"
    pool: str = ""  # "" is the backbone's own
    # LoRA
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    targets: str = "qkv"
    # loss: focal with gamma (0 is BCE), weights by class and by domain, share of the expert votes in the target
    gamma: float = 0.0
    class_weighting: str = "inverse"
    domain_weighting: str = "none"
    domain_by_class: bool = False
    soft_labels: float = 0.0
    # sampling: "shuffle", "class" (classes equally often) or "domain" (domain x class equally often)
    sampling: str = "shuffle"
    # optimisation: AdamW, cosine with warm-up
    epochs: int = 10
    batch: int = 32
    accumulate: int = 1
    learning_rate: float = 1e-3
    head_learning_rate: float = 0.0  # 0: the same
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    drop: float = 0.0  # dropout before the head
    ema: float = 0.0  # decay per step of the averaged weights; 0 keeps the last weights
    # epochs without a better AUC before a fold stops and keeps its best; 0 never. An eighth of the training crops, by
    # whole groups, judges instead of training: the crops that the fold is scored on choose nothing
    patience: int = 0
    checkpointing: bool = False
    tta: str = "d4"  # views of a finished fold's held-out logits, of which calibrate can choose: none, rot4 or d4
    precision: str = "auto"  # fp32, bf16, fp16, or auto: what the hardware multiplies natively
    # split: "grouped", "random", "domain" (k folds of whole domains) or "leave-one-out" (a fold per domain)
    split: str = "grouped"
    split_by: str = "domain"  # for the last two: domain, tumour, scanner, origin, "tumour x origin", "eight-groups"
    folds: int = 3
    seed: int = 0
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        if self.tta not in TTA_VIEWS:
            raise UserError(f"recipe: tta {self.tta!r} is unknown; expected one of {', '.join(TTA_VIEWS)}; change it")

    def preprocess(self) -> Preprocess:
        row = lookup(self.backbone)
        return Preprocess(self.crop or None, self.size, self.kernel, row.mean, row.std)


def _convert(kind: str, text: Any, name: str) -> Any:
    """`text` from a command line or TOML as the field's type."""
    try:
        if kind == "bool":
            return {"true": True, "false": False}[str(text).lower()]
        return {"int": int, "float": float, "str": str}[kind](text)
    except (KeyError, ValueError):
        raise UserError(f"recipe: {name} = {text!r} is not a {kind}; change it") from None


def load_recipe(name: str, changes: list[str] | None = None) -> Recipe:
    """The recipe in file `name`, or of that name in training/recipes, with `changes` such as "augment.hed=0.1"."""
    file = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not file.exists():
        known = ", ".join(sorted(f.stem for f in FOLDER.glob("*.toml")))
        raise UserError(f"recipe {name} was not found; expected a .toml file or one of {known}")
    try:
        table = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {file} is not valid TOML: {error}") from None
    for change in changes or []:
        key, _, value = change.partition("=")
        inner, _, leaf = key.rpartition(".")
        (table.setdefault(inner, {}) if inner else table)[leaf] = value
    return from_dict(table)


def from_dict(table: dict[str, Any]) -> Recipe:
    def fill(kind: type, values: dict[str, Any], where: str) -> dict[str, Any]:
        fields = {f.name: str(f.type) for f in dataclasses.fields(kind)}
        for name in values.keys() - fields.keys():
            raise UserError(f"recipe: {where}{name} is not a setting; expected one of {', '.join(fields)}")
        return {k: _convert(fields[k], v, where + k) if fields[k] != "Augment" else v for k, v in values.items()}

    table = dict(table)
    augment = Augment(**fill(Augment, table.pop("augment", {}), "augment."))
    return Recipe(**fill(Recipe, table, ""), augment=augment)
