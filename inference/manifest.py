"""The manifest of an ensemble folder, `ensemble.json`: everything a probability depends on, validated when loaded.

An ensemble lists members: each is a base with its folds, preprocessing, pooling and views. That is format 2, the one
that is written. Format 1 described an ensemble with one base at the top level, in the same terms: `upgraded` reads it.
Standard library only: a job reads it while PyTorch is still being imported.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .fields import check, is_number, is_plain_name, is_sha256, is_share, is_side, is_title, is_triple
from .files import read_json
from .head import HeadLayer, read_head

FILE = "ensemble.json"
FORMATS = (1, 2)
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
# Shared by all ensembles of this tree. Where the package is installed (then as midog_lora.inference) its own folder may
# be read-only and goes with the next version, so there they belong to the user.
BASES = WEIGHTS / "bases"
if __name__.partition(".")[0] != "inference":
    BASES = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share", "midog-lora", "bases")
MODEL_TARBALL = Path("/opt/ml/model")  # where the platform unpacks an uploaded model
BUNDLED = WEIGHTS / "default"
MAX_MEMBERS, MAX_FOLDS = 8, 64
PICKLES = (".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".p", ".pickle", ".pkl", ".pt", ".pt2", ".pth")

POOLS = ("token", "avg", "token+avg")
KERNELS = ("bilinear", "bicubic")
TTA_VIEWS = {"none": 1, "rot4": 4, "d4": 8}  # d4: the eight symmetries of the square
AVERAGING = ("logit", "probability")
PRECISIONS = ("fp32", "fp16", "bf16")
# How learned positions are resampled to another grid: as timm does it, also where a manifest does not say it, or
# without antialiasing, as `transformers` does.
POSITIONS = ("antialiased", "plain")

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
    "name": (str, is_title),
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
    positions: how learned positions are resampled to the input's grid, one of POSITIONS
    head: the layers of a head that is more than one linear layer, else ()
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
    positions: str = POSITIONS[0]
    head: tuple[HeadLayer, ...] = ()


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


def ensemble_folder(name: str | Path) -> Path:
    """The folder that a user names: a path, or the name of a bundled ensemble where no path has it, such as "fast"."""
    folder = Path(name)
    bundled = WEIGHTS / folder
    return bundled if len(folder.parts) == 1 and not folder.exists() and holds_ensemble(bundled) else folder


def holds_ensemble(folder: Path) -> bool:
    return (folder / FILE).is_file()


def load_manifest(folder: Path, *, with_bases: bool = True) -> Manifest:
    """Read and validate `folder`/ensemble.json; no other file is opened. UserError says what is wrong and where.

    with_bases: refuse it unless the base weights are here too; without, a base is where it would lie in the folder
    """
    file = folder / FILE
    try:
        content = read_json(file, "export the ensemble again")
    except FileNotFoundError:
        raise UserError(
            f"no {FILE} in {folder}; expected an ensemble folder; make one with 'training export'"
        ) from None
    if not isinstance(content, dict) or content.get("format") not in FORMATS:
        version = content.get("format") if isinstance(content, dict) else type(content).__name__
        wanted = " or ".join(map(str, FORMATS))
        raise UserError(f"{file} has format {version!r:.80}; expected {wanted}; export the ensemble again")
    content = upgraded(content)
    for key, (kind, accepts) in _WHOLE.items():
        check(file, key, content.get(key), kind, accepts)
    members = _members(folder, file, content, with_bases)
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


def upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """A manifest's content in format 2: that of format 1 as one member, called like its backbone."""
    if content["format"] != 1:
        return content
    entry = {"name": content.get("backbone")} | {key: content[key] for key in _MEMBER if key in content}
    whole = {key: content[key] for key in _WHOLE if key in content}
    provenance = whole.get("provenance")
    if isinstance(provenance, dict) and {"recipe", "data"} <= provenance.keys():
        scores = provenance.get("out_of_fold", {})
        auc = scores.get("same_crops", scores).get("auc")  # versions before nested scores had but one
        of_member = {"recipe": provenance["recipe"], "data": provenance["data"], "auc": auc}
        others = {key: value for key, value in provenance.items() if key not in ("recipe", "data")}
        whole["provenance"] = {"members": {str(entry["name"]): of_member}} | others
    return {"format": 2, "members": [entry], "weights": [1.0]} | whole


def _members(folder: Path, file: Path, content: dict[str, Any], with_bases: bool) -> tuple[Member, ...]:
    entries, weights = content.get("members"), content.get("weights")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_MEMBERS:
        raise UserError(f"{file}: members is {entries!r:.80}; expected a list of 1 to {MAX_MEMBERS}; export again")
    if (
        not isinstance(weights, list)
        or len(weights) != len(entries)
        or not all(map(is_share, weights))
        or (not math.isclose(sum(weights), 1, abs_tol=1e-6))
    ):
        raise UserError(
            f"{file}: weights is {weights!r:.80}; expected a positive number for each member, 1 in all; export again"
        )
    members = []
    for number, (entry, weight) in enumerate(zip(entries, weights, strict=True)):
        where = f"members[{number}]"
        check(file, where, entry, dict, None)
        check(file, f"{where}.name", entry.get("name"), str, is_plain_name)
        members.append(_member(folder, file, entry, weight / sum(weights), f"{where}.", with_bases))
    if len({member.name for member in members}) < len(members):
        raise UserError(f"{file}: two members have the same name; expected different names; export again")
    folders = [fold for member in members for fold in member.folds]
    if len(set(folders)) < len(folders):
        raise UserError(f"{file}: two members share a fold's folder; expected a separate one for each; export again")
    digests: dict[Path, str] = {}
    for member in members:
        if digests.setdefault(member.base, member.base_sha256) != member.base_sha256:
            raise UserError(f"{file}: {member.base.name} has two hashes; expected one; export again")
    return tuple(members)


def _member(folder: Path, file: Path, entry: dict[str, Any], weight: float, where: str, with_bases: bool) -> Member:
    """One member; messages put `where` before its keys."""
    for key, (kind, accepts) in _MEMBER.items():
        check(file, where + key, entry.get(key), kind, accepts)
    positions = entry.get("positions", POSITIONS[0])
    check(file, f"{where}positions", positions, str, POSITIONS)
    base = entry["base"]
    check(file, f"{where}base.file", base.get("file"), str, lambda v: is_plain_name(v) and v.endswith(".safetensors"))
    check(file, f"{where}base.sha256", base.get("sha256"), str, is_sha256)
    if not 1 <= len(entry["folds"]) <= MAX_FOLDS:
        raise UserError(
            f"{file}: {where[:-1]} has {len(entry['folds'])} folds; expected 1 to {MAX_FOLDS}; export it again"
        )
    _check_preprocess(file, where, entry["preprocess"])
    folds: list[Path] = []
    files: dict[Path, str] = {}
    for number, fold in enumerate(entry["folds"]):
        of_fold = f"{where}folds[{number}]"
        check(file, of_fold, fold, dict, None)
        check(file, f"{of_fold}.folder", fold.get("folder"), str, is_plain_name)
        check(file, f"{of_fold}.sha256", fold.get("sha256"), dict, None)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            check(file, f"{of_fold}.sha256[{name!r}]", fold["sha256"].get(name), str, is_sha256)
            files[folder / fold["folder"] / name] = fold["sha256"][name]
        if folder / fold["folder"] in folds:
            raise UserError(f"{file}: folder {fold['folder']} is listed twice; expected one fold each; export again")
        folds.append(folder / fold["folder"])
    for name, drift in entry["precision"].items():
        if name not in PRECISIONS or not (drift is None or is_number(drift)):
            raise UserError(
                f"{file}: {where}precision {name!r:.40}: {drift!r:.40} is not valid; expected fp32, bf16 or fp16 "
                "with a number; export again"
            )
    return Member(
        name=entry["name"],
        weight=weight,
        backbone=entry["backbone"],
        pool=entry["pool"],
        base=_find_base(folder, base["file"]) if with_bases else folder / base["file"],
        base_sha256=base["sha256"],
        preprocess=entry["preprocess"],
        folds=tuple(folds),
        files=files,
        tta=entry["tta"],
        precision=entry["precision"],
        licence=entry["licence"],
        positions=positions,
        head=read_head(file, f"{where}head", entry.get("head")),
    )


def _refuse_pickles(folders: list[Path]) -> None:
    """UserError for what may be a pickle: we never open one, but another tool might, and a pickle runs code."""
    for folder in folders:
        for entry in folder.iterdir() if folder.is_dir() else ():
            if entry.suffix.lower() in PICKLES:
                raise UserError(
                    f"{entry} may be a pickle; expected safetensors and nothing else; remove it or convert it"
                )


def _check_preprocess(file: Path, where: str, preprocess: dict[str, Any]) -> None:
    rules: dict[str, Callable[[Any], bool]] = {
        "crop": lambda v: v is None or is_side(v),
        "size": is_side,
        "kernel": lambda v: v in KERNELS,
        "mean": is_triple,
        "std": lambda v: is_triple(v) and min(v) > 0,
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
    for file in (folder / name, BASES / name):
        if file.is_file():
            return file
    command = f"python -m training base {name.removesuffix('.safetensors')}"
    raise UserError(f"base weights {name} not found; expected them in {folder} or {BASES}; make them with '{command}'")
