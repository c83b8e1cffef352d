"""The manifest of an ensemble folder, `ensemble.json`: everything a probability depends on, validated when loaded.

Format 2 lists members: each is a base with its folds, preprocessing, pooling and views. Format 1 describes an ensemble
with one base at the top level, in the same terms, and opens as an ensemble of one member.
Standard library only: a job reads it while PyTorch is still being imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import read_json

FILE = "ensemble.json"
FORMATS = (1, 2)
BASES = Path(__file__).resolve().parent.parent / "weights" / "bases"  # shared by all ensembles of this tree
MODEL_TARBALL = Path("/opt/ml/model")  # where the platform unpacks an uploaded model
BUNDLED = Path(__file__).resolve().parent.parent / "weights" / "default"
MAX_MEMBERS, MAX_FOLDS = 8, 64
PICKLES = (".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".p", ".pickle", ".pkl", ".pt", ".pt2", ".pth")

POOLS = ("token", "avg", "token+avg")
KERNELS = ("bilinear", "bicubic")
TTA_VIEWS = {"none": 1, "rot4": 4, "d4": 8}  # d4: the eight symmetries of the square
AVERAGING = ("logit", "probability")
PRECISIONS = ("fp32", "fp16", "bf16")

# key: (type, accepts)
_MEMBER: dict[str, tuple[Any, Any]] = {
    "backbone": (str, None),
    "pool": (str, POOLS),
    "base": (dict, None),
    "preprocess": (dict, None),
    "folds": (list, None),
    "tta": (str, tuple(TTA_VIEWS)),
    "precision": (dict, None),
    "licence": (dict, None),
}
_WHOLE: dict[str, tuple[Any, Any]] = {
    "name": (str, lambda v: is_title(v)),
    "averaging": (str, AVERAGING),
    "temperature": (float, lambda v: 0 < v < math.inf),
    "threshold": (float, lambda v: 0 < v < 1),
    "provenance": (dict, None),
}


@dataclass(frozen=True)
class Member:
    """One base with its folds. Paths are absolute, hashes SHA-256 in hex.

    weight: its share in the ensemble's mean; the members' weights add up to 1
    preprocess: crop (pixels or None), size, kernel, mean, std, as `inference.preprocess.Preprocess` takes them
    precision: for each by name, the largest measured difference of P(atypical) from fp32, or None if not allowed
    files: its folds' files with their hashes
    """

    name: str
    weight: float
    backbone: str
    pool: str
    base: Path
    base_sha256: str
    preprocess: dict[str, Any]
    folds: tuple[Path, ...]
    files: dict[Path, str]
    tta: str
    precision: dict[str, float | None]
    licence: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """One ensemble of one to eight members.

    temperature: every logit is divided by it; threshold: on the resulting P(atypical)
    """

    folder: Path
    name: str
    members: tuple[Member, ...]
    averaging: str
    temperature: float
    threshold: float
    provenance: dict[str, Any]

    @property
    def files(self) -> dict[Path, str]:
        """Every file except the bases, with its hash."""
        return {file: digest for member in self.members for file, digest in member.files.items()}

    @property
    def bases(self) -> dict[Path, str]:
        """Every base once, with its hash."""
        return {member.base: member.base_sha256 for member in self.members}


def default_ensemble() -> Path:
    """The ensemble used without --weights: the uploaded model if there is one, else the bundled one.

    Anything uploaded counts: a tarball without ensemble.json is refused, never replaced by another ensemble.
    """
    uploaded = MODEL_TARBALL.is_dir() and any(not path.name.startswith(".") for path in MODEL_TARBALL.iterdir())
    return MODEL_TARBALL if uploaded else BUNDLED


def holds_ensemble(folder: Path) -> bool:
    return (folder / FILE).is_file()


def load_manifest(folder: Path) -> Manifest:
    """Read and validate `folder`/ensemble.json; no other file is opened. UserError says what is wrong and where."""
    file = folder / FILE
    try:
        content = read_json(file, "export the ensemble again")
    except FileNotFoundError:
        raise UserError(
            f"no {FILE} in {folder}; expected an ensemble folder; make one with 'training export'"
        ) from None
    if not isinstance(content, dict) or content.get("format") not in FORMATS:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        wanted = " or ".join(map(str, FORMATS))
        raise UserError(f"{file} has format {found!r:.80}; expected {wanted}; export the ensemble again")
    for key, (kind, accepts) in _WHOLE.items():
        _check(file, key, content.get(key), kind, accepts)
    members = _members(folder, file, content)
    _refuse_pickles([folder, *(fold for member in members for fold in member.folds)])
    return Manifest(
        folder=folder,
        name=content["name"],
        members=members,
        averaging=content["averaging"],
        temperature=float(content["temperature"]),
        threshold=float(content["threshold"]),
        provenance=content["provenance"],
    )


def _members(folder: Path, file: Path, content: dict[str, Any]) -> tuple[Member, ...]:
    if content["format"] == 1:
        return (_member(folder, file, content | {"name": content.get("backbone")}, 1.0, ""),)
    entries, weights = content.get("members"), content.get("weights")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_MEMBERS:
        raise UserError(f"{file}: members is {entries!r:.80}; expected a list of 1 to {MAX_MEMBERS}; combine again")
    if (
        not isinstance(weights, list)
        or len(weights) != len(entries)
        or not all(map(_is_share, weights))
        or (not math.isclose(sum(weights), 1, abs_tol=1e-6))
    ):
        raise UserError(
            f"{file}: weights is {weights!r:.80}; expected a positive number for each member, 1 in all; combine again"
        )
    members = []
    for number, (entry, weight) in enumerate(zip(entries, weights, strict=True)):
        where = f"members[{number}]"
        _check(file, where, entry, dict, None)
        _check(file, f"{where}.name", entry.get("name"), str, _is_plain_name)
        members.append(_member(folder, file, entry, weight / sum(weights), f"{where}."))
    if len({member.name for member in members}) < len(members):
        raise UserError(f"{file}: two members have the same name; expected different names; combine again")
    folders = [fold for member in members for fold in member.folds]
    if len(set(folders)) < len(folders):
        raise UserError(f"{file}: two members share a fold's folder; expected a separate one for each; combine again")
    digests: dict[Path, str] = {}
    for member in members:
        if digests.setdefault(member.base, member.base_sha256) != member.base_sha256:
            raise UserError(f"{file}: {member.base.name} has two hashes; expected one; combine again")
    return tuple(members)


def _member(folder: Path, file: Path, entry: dict[str, Any], weight: float, where: str) -> Member:
    """One member; messages put `where` before its keys."""
    for key, (kind, accepts) in _MEMBER.items():
        _check(file, where + key, entry.get(key), kind, accepts)
    base = entry["base"]
    _check(file, f"{where}base.file", base.get("file"), str, lambda v: _is_plain_name(v) and v.endswith(".safetensors"))
    _check(file, f"{where}base.sha256", base.get("sha256"), str, _is_sha256)
    if not 1 <= len(entry["folds"]) <= MAX_FOLDS:
        raise UserError(
            f"{file}: {len(entry['folds'])} {where}folds; expected 1 to {MAX_FOLDS}; export the ensemble again"
        )
    _check_preprocess(file, where, entry["preprocess"])
    folds: list[Path] = []
    files: dict[Path, str] = {}
    for number, fold in enumerate(entry["folds"]):
        place = f"{where}folds[{number}]"
        _check(file, place, fold, dict, None)
        _check(file, f"{place}.folder", fold.get("folder"), str, _is_plain_name)
        _check(file, f"{place}.sha256", fold.get("sha256"), dict, None)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            _check(file, f"{place}.sha256[{name!r}]", fold["sha256"].get(name), str, _is_sha256)
            files[folder / fold["folder"] / name] = fold["sha256"][name]
        if folder / fold["folder"] in folds:
            raise UserError(f"{file}: folder {fold['folder']} is listed twice; expected one fold each; export again")
        folds.append(folder / fold["folder"])
    for name, drift in entry["precision"].items():
        if name not in PRECISIONS or not (drift is None or _is_number(drift)):
            raise UserError(
                f"{file}: {where}precision {name!r:.40}: {drift!r:.40} is not valid; expected fp32, bf16 or fp16 "
                "with a number; export again"
            )
    return Member(
        name=entry["name"],
        weight=weight,
        backbone=entry["backbone"],
        pool=entry["pool"],
        base=_find_base(folder, base["file"]),
        base_sha256=base["sha256"],
        preprocess=entry["preprocess"],
        folds=tuple(folds),
        files=files,
        tta=entry["tta"],
        precision=entry["precision"],
        licence=entry["licence"],
    )


def is_title(text: str) -> bool:
    """Whether an ensemble may be called so: it is printed in logs, and names the files of an export."""
    return text.isprintable() and 0 < len(text) <= 100 and "/" not in text and not text.startswith(".")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 8 <= value <= 4096


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


def _is_plain_name(name: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name))  # cannot lead out of the folder


def _refuse_pickles(folders: list[Path]) -> None:
    """UserError for what may be a pickle: we never open one, but another tool might, and a pickle runs code."""
    for folder in folders:
        for entry in folder.iterdir() if folder.is_dir() else ():
            if entry.suffix.lower() in PICKLES:
                raise UserError(
                    f"{entry} may be a pickle; expected safetensors and nothing else; remove it or convert it"
                )


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _check(file: Path, key: str, value: Any, kind: Any, accepts: Any) -> None:
    right = _is_number(value) if kind is float else isinstance(value, kind)
    if right and callable(accepts):
        right = accepts(value)
    elif right and accepts:
        right = value in accepts
    if not right:
        wanted = f"one of {', '.join(accepts)}" if isinstance(accepts, tuple) else f"a valid {kind.__name__}"
        raise UserError(f"{file}: {key} is {value!r:.80}; expected {wanted}; export the ensemble again")


def _check_preprocess(file: Path, where: str, preprocess: dict[str, Any]) -> None:
    rules: dict[str, Callable[[Any], bool]] = {
        "crop": lambda v: v is None or _is_side(v),
        "size": _is_side,
        "kernel": lambda v: v in KERNELS,
        "mean": _is_triple,
        "std": lambda v: _is_triple(v) and min(v) > 0,
    }
    for key in sorted(rules.keys() ^ preprocess.keys()):
        raise UserError(
            f"{file}: {where}preprocess.{key:.40} is missing or not known; expected {', '.join(rules)}; export again"
        )
    for key, accepts in rules.items():
        if not accepts(preprocess[key]):
            raise UserError(
                f"{file}: {where}preprocess.{key} is {preprocess[key]!r:.80}; expected a valid one; export again"
            )


def _find_base(folder: Path, name: str) -> Path:
    places = [folder / name, BASES / name]
    for place in places:
        if place.is_file():
            return place
    command = f"python -m training base {name.removesuffix('.safetensors')}"
    raise UserError(f"base weights {name} not found; expected them in {folder} or {BASES}; make them with '{command}'")
