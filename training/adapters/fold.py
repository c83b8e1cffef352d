"""One fold, read: pairs of LoRA matrices with their places in timm's layers, a head, and nothing that is not known.

PEFT's settings are applied here: each pair gets its own rank and scale (`rank_pattern`, `alpha_pattern`, rsLoRA), and
which layers have pairs is what targets, exclusions and `layers_to_transform` came to in training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from inference.adapters import DESCRIPTIVE, PLAIN, checked_target
from inference.errors import UserError

from ..fit.checkpoints import State
from .head import Head, Said, read_head
from .merged import unmerged
from .names import Place, Shapes, place, rows
from .pairs import Pair, Stored, check_single
from .source import CONFIG, Source

SUPPORTED = DESCRIPTIVE | {
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
}
UNUSED = ("mask_token", "inv_freq", "rope_embed.periods")  # endings: used in pretraining only, or computed
_PAIR = re.compile(r"(.+)\.lora_([AB])(?:\.(\w+))?\.weight")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.(?!weight$)(\w+))?(?:\.weight)?")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SAVED = re.compile(r"(.+?)\.modules_to_save\.(\w+)\.(.+)")
_OF_HEAD = re.compile(r"(.*\.)?\w*(head|classifier)\w*\.")  # a norm of such a module is not the backbone's


@dataclass(frozen=True)
class Fold:
    """One fold of a source.

    library: whose layers are adapted, "timm" or "transformers"; settings: PEFT's, or those given in their place
    merged: of a source without adapters, its backbone's changed tensors in timm's names
    """

    source: Source
    pairs: list[Pair]
    head: Head
    library: str
    settings: dict[str, Any]
    merged: State = field(default_factory=dict)


@dataclass
class _Sorted:
    """The tensors of a source by what they are; names without PEFT's own parts."""

    pairs: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    rest: dict[str, torch.Tensor] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)


def read_fold(
    source: Source,
    read_base: Callable[[str], torch.Tensor],
    shapes: Shapes,
    scales: dict[str, Any],
    of_head: Said = Said(),  # noqa: B008
) -> Fold:
    """The fold in `source` for a base with tensors of `shapes`, which `read_base` reads by timm's names.

    scales: lora_alpha and use_rslora for a source without PEFT's configuration; of_head: what no state dict says
    UserError where a tensor has no place, contradicts the base, or a setting makes it anything else than LoRA or DoRA.
    """
    config = scales | checked_config(source) if source.config is not None else scales
    tensors_of_fold = _sorted(source)
    pairs, base, rest, unknown = [], {}, {}, []
    for name, tensors in tensors_of_fold.pairs.items():
        where = place(name, shapes)
        if where is None or not {"A", "B"} <= tensors.keys():
            unknown.append(name)
        else:
            pairs.append((name, where, tensors))
    for name, value in tensors_of_fold.rest.items():
        module, _, kind = name.rpartition(".")
        where = place(module, shapes) or place(name, shapes) if not name.endswith(UNUSED) else None
        if where is not None:
            base[name] = where, kind, value
        elif not name.endswith(UNUSED):
            rest[name] = value
    blocks = {where.prefix for _, where, _ in pairs}
    blocks |= {where.prefix for where, *_ in base.values() if where.name.startswith("blocks.")}
    for name, (where, _, value) in list(base.items()):
        if _OF_HEAD.fullmatch(where.prefix) and where.prefix not in blocks:
            rest[name] = value
            del base[name]
    changed = _changed(source.file, base, read_base, shapes, tensors_of_fold.pairs.keys())
    check_single(source.file, [(name, where) for name, where, _ in pairs], changed)
    head = None if unknown else read_head(source.file, rest, of_head)
    if head is None:
        names = ", ".join(sorted({*unknown, *rest})) or "nothing else"
        raise UserError(
            f"{source.file}: {names:.300}; expected one head of linear layers and norms with one logit or two, and "
            "adapters of the base's layers; check --base, and train with modules_to_save of the head alone"
        )
    if source.config is not None:
        _check_complete(source, {name for name, *_ in pairs})
    if not pairs:
        own, merged = unmerged(source.file, changed, read_base, shapes)
        return Fold(source, own, head, own[0].place.library, {"lora_alpha": None}, merged)
    biases = {}
    for name, (_, kind, value) in changed.items():
        module = name.rpartition(".")[0]
        if module not in tensors_of_fold.pairs or kind != "bias":
            raise UserError(
                f"{source.file}: {name:.100} is not that of the base; expected frozen weights as in --base; name the "
                "base that it was trained on, or train nothing but adapters, biases of their layers, and the head"
            )
        biases[module] = value
    libraries = {where.library for _, where, _ in pairs}
    if len(libraries) > 1:
        raise UserError(f"{source.file} has layers of timm and of transformers; expected one library's; check --base")
    own = [_pair(source, config, name, where, tensors, biases.get(name), shapes) for name, where, tensors in pairs]
    dora = bool(config.get("use_dora", any(pair.magnitude is not None for pair in own)))
    if odd := [pair.name for pair in own if (pair.magnitude is not None) != dora]:
        raise UserError(
            f"{source.file}: {odd[0]:.100} and use_dora disagree; expected a magnitude of all pairs with DoRA, else of "
            "none; save again"
        )
    return Fold(source, own, head, libraries.pop(), config)


def checked_config(source: Source) -> dict[str, Any]:
    """PEFT's settings; UserError with the name of one that makes the adapter anything else than LoRA or DoRA."""
    assert source.config is not None
    file = source.folder / CONFIG
    for key, value in source.config.items():
        if key in SUPPORTED or not value or value in PLAIN.get(key, ()):
            continue
        raise UserError(
            f"{file}: {key:.40} is {value!r:.80}; expected LoRA or DoRA whose update PEFT can merge into each layer "
            "alone; train without this setting, or merge it with merge_and_unload() and import the merged weights"
        )
    checked_target(file, source.config.get("target_modules"))
    for key in ("exclude_modules", "layers_pattern"):
        if source.config.get(key):
            checked_target(file, source.config[key])
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = source.config.get(key) or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{file}: {key} is {patterns!r:.80}; expected numbers by layer; save the adapter again")
        for pattern in patterns:
            checked_target(file, pattern)
    return source.config


def _check_complete(source: Source, names: set[str]) -> None:
    """UserError where PEFT's settings adapt a layer in another block whose matrices the file lacks."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    numbers = {match[0] for name in names if (match := _NUMBER.search(name))}
    others = {_NUMBER.sub(number, name, count=1) for name in names for number in numbers} - names
    try:
        config = LoraConfig.from_pretrained(str(source.folder))
        missing = sorted(name for name in others if check_target_module_exists(config, name))
    except Exception as error:  # PEFT's own, of many kinds
        file = source.folder / CONFIG
        raise UserError(f"{file}: {str(error)!r:.200}; expected PEFT's settings; save the adapter again") from None
    if missing:
        raise UserError(
            f"{source.file} lacks the adapter of {missing[0]:.100}, which its settings name; expected all; save "
            "it again"
        )


def _sorted(source: Source) -> _Sorted:
    sorted_tensors = _Sorted()
    for stored, value in source.tensors.items():
        name = stored.replace("base_model.model.", "")
        layer = adapter = None
        if match := _PAIR.fullmatch(name):
            layer, kind, adapter = match.groups()
        elif match := _MAGNITUDE.fullmatch(name):
            (layer, adapter), kind = match.groups(), "magnitude"
        elif match := _SAVED.fullmatch(name):
            kind, adapter = f"{match[1]}.{match[3]}", match[2]
        elif ".original_module." in name:
            continue
        else:
            kind = name.replace(".base_layer.", ".")
        if adapter:
            sorted_tensors.adapters.add(adapter)
        if len(sorted_tensors.adapters) > 1:
            names = ", ".join(sorted(sorted_tensors.adapters))
            raise UserError(f"{source.file} holds several adapters ({names:.100}); expected one; save it alone")
        known = sorted_tensors.pairs.setdefault(layer, {}) if layer else sorted_tensors.rest
        if kind in known:
            raise UserError(f"{source.file}: {stored:.100} is there twice; expected one adapter; save one of them")
        known[kind] = value
    return sorted_tensors


def _changed(
    file: Path, stored: Stored, read_base: Callable[[str], torch.Tensor], shapes: Shapes, adapted: Collection[str]
) -> Stored:
    """The tensors of a source's own copy of the backbone that are not the base's. The key's name stays the source's.

    adapted: its layers with pairs, whose biases count as trained unless they are the base's to the bit
    """
    changed = {}
    for name, (where, kind, value) in _timm_positions(stored, shapes).items():
        own = where.name if where.name in shapes else f"{where.name}.{kind}"
        if own not in shapes:  # DINOv3's biases, which timm leaves out where they are zero
            if value.any():
                raise UserError(
                    f"{file}: {name:.100} is not zero; expected zeros, as the base has no such tensor; for biases of "
                    "DINOv3's attention give --base with '-qkvb' after the name"
                )
            continue
        whole = read_base(own)
        expected = whole[rows(where, len(whole))]
        is_base = torch.equal if kind == "bias" and name.rpartition(".")[0] in adapted else same
        if value.shape != expected.shape or not is_base(value, expected.float()):
            changed[name] = where, kind, value
    return changed


def _timm_positions(stored: Stored, shapes: Shapes) -> Stored:
    """DINOv2 with registers as timm has it: the class token's position is in the token, not in the table."""
    names = {where.name: name for name, (where, _, _) in stored.items()}
    if not {"cls_token", "pos_embed"} <= names.keys():
        return stored
    (token, _, cls), (table, _, positions) = stored[names["cls_token"]], stored[names["pos_embed"]]
    if positions.ndim != 3 or positions.shape[1] != shapes["pos_embed"][1] + 1:
        return stored
    own = {names["cls_token"]: (token, "", cls + positions[:, :1]), names["pos_embed"]: (table, "", positions[:, 1:])}
    return stored | own


def same(value: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are one, rounded to any of the precisions that weights are stored in."""
    if any(torch.equal(value.to(t), expected.to(t)) for t in (torch.float32, torch.float16, torch.bfloat16)):
        return True
    coarse = torch.equal(value.bfloat16().float(), value)  # then both were rounded, each in its own way
    return coarse and bool(((value - expected.float()).abs() <= value.abs() / 128 + 1e-7).all())


def _pair(
    source: Source,
    config: dict[str, Any],
    name: str,
    where: Place,
    tensors: dict[str, torch.Tensor],
    bias: torch.Tensor | None,
    shapes: Shapes,
) -> Pair:
    """One pair with its scale. UserError where shapes do not fit the base, or the rank is not the configuration's."""
    from peft.utils.other import get_pattern_key

    a, b, magnitude = tensors["A"], tensors["B"], tensors.get("magnitude")
    shape = shapes[f"{where.name}.weight"]
    wanted = (shape[0] // where.parts, *shape[1:])
    if b.ndim != a.ndim or (len(b), *a.shape[1:]) != wanted or b.shape[1] != len(a):
        raise UserError(
            f"{source.file}: {name:.100} changes {(len(b), *a.shape[1:])} by rank {len(a)}; expected {wanted} as in "
            "the base; name the base that it was trained on"
        )
    if magnitude is not None and magnitude.numel() != wanted[0]:
        raise UserError(
            f"{source.file}: {name:.100} has {magnitude.numel()} magnitudes; expected {wanted[0]}; save again"
        )
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank: Any = ranks.get(get_pattern_key(ranks, name), config.get("r", len(a)))
    alpha: Any = alphas.get(get_pattern_key(alphas, name), config.get("lora_alpha"))
    if rank != len(a) or type(alpha) not in (int, float) or not 0 < alpha <= 1e6:
        raise UserError(
            f"{source.file}: {name:.100} has rank {len(a)}, its settings rank {rank!r:.20}, alpha {alpha!r:.20}; "
            f"expected PEFT's {CONFIG} beside it, or --alpha; give what it was trained with"
        )
    return Pair(name, where, a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), magnitude, bias)
