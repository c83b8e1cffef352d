"""The manifest of an ensemble folder, `ensemble.json`: everything a probability depends on, validated when loaded.

Standard library only: a job reads and hashes its files while PyTorch is still being imported.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .jsonfile import read_json

FILE = "ensemble.json"
FORMAT = 1
BASES = Path(__file__).resolve().parent.parent / "weights" / "bases"  # shared by all ensembles of this tree
MAX_FOLDS = 64
PICKLES = (".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".p", ".pickle", ".pkl", ".pt", ".pt2", ".pth")

# key: (type, accepts)
_SCHEMA: dict[str, tuple[Any, Any]] = {
    "name": (str, lambda v: v.isprintable() and 0 < len(v) <= 100),  # it is printed into logs
    "backbone": (str, None),
    "pool": (str, ("token", "avg", "token+avg")),
    "base": (dict, None),
    "preprocess": (dict, None),
    "folds": (list, None),
    "tta": (str, ("none", "rot4", "d4")),
    "averaging": (str, ("logit", "probability")),
    "temperature": (float, lambda v: 0 < v < math.inf),
    "threshold": (float, lambda v: 0 < v < 1),
    "precision": (dict, None),
    "licence": (dict, None),
    "provenance": (dict, None),
}


@dataclass(frozen=True)
class Manifest:
    """One ensemble. Paths are absolute, hashes SHA-256 in hex.

    preprocess: crop (pixels or None), size, kernel, mean, std, as `inference.preprocess.Preprocess` takes them
    temperature: the averaged logit is divided by it; threshold: on the resulting P(atypical)
    precision: by name, the largest difference of P(atypical) to fp32 that was measured, or None where it is not allowed
    """

    folder: Path
    name: str
    backbone: str
    pool: str
    base: Path
    base_sha256: str
    preprocess: dict[str, Any]
    folds: tuple[Path, ...]
    files: dict[Path, str]  # every file but the base, with its hash
    tta: str
    averaging: str
    temperature: float
    threshold: float
    precision: dict[str, float | None]
    licence: dict[str, Any]
    provenance: dict[str, Any]


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
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{file} has format {found!r:.80}; expected {FORMAT}; export the ensemble again")
    for key, (kind, accepts) in _SCHEMA.items():
        _check(file, key, content.get(key), kind, accepts)
    base, preprocess = content["base"], content["preprocess"]
    _check(file, "base.file", base.get("file"), str, lambda v: _is_plain_name(v) and v.endswith(".safetensors"))
    _check(file, "base.sha256", base.get("sha256"), str, _is_sha256)
    if not 1 <= len(content["folds"]) <= MAX_FOLDS:
        raise UserError(f"{file}: {len(content['folds'])} folds; expected 1 to {MAX_FOLDS}; export the ensemble again")
    _check_preprocess(file, preprocess)
    folds, files = [], {}
    for number, fold in enumerate(content["folds"]):
        where = f"folds[{number}]"
        _check(file, where, fold, dict, None)
        _check(file, f"{where}.folder", fold.get("folder"), str, _is_plain_name)
        _check(file, f"{where}.sha256", fold.get("sha256"), dict, None)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            _check(file, f"{where}.sha256[{name!r}]", fold["sha256"].get(name), str, _is_sha256)
            files[folder / fold["folder"] / name] = fold["sha256"][name]
        if folder / fold["folder"] in folds:
            raise UserError(f"{file}: folder {fold['folder']} is listed twice; expected one fold each; export again")
        folds.append(folder / fold["folder"])
    _refuse_pickles([folder, *folds])
    for name, drift in content["precision"].items():
        if name not in ("fp32", "bf16", "fp16") or not (drift is None or _is_number(drift)):
            raise UserError(
                f"{file}: precision {name!r:.40}: {drift!r:.40} is not valid; expected fp32, bf16 or fp16 "
                "with a number; export again"
            )
    return Manifest(
        folder, content["name"], content["backbone"], content["pool"], _find_base(folder, base["file"]), base["sha256"],
        preprocess, tuple(folds), files, content["tta"], content["averaging"], float(content["temperature"]),
        float(content["threshold"]), content["precision"], content["licence"], content["provenance"],
    )  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_plain_name(name: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name))  # never a way out of the folder


def _refuse_pickles(folders: list[Path]) -> None:
    """Nothing here would open one, but other tools that are pointed at the folder may, and a pickle runs code."""
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


def _check_preprocess(file: Path, preprocess: dict[str, Any]) -> None:
    side = lambda value: isinstance(value, int) and not isinstance(value, bool) and 8 <= value <= 4096  # noqa: E731
    triple = lambda value: isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))  # noqa: E731
    rules = {
        "crop": lambda v: v is None or side(v),
        "size": side,
        "kernel": lambda v: v in ("bilinear", "bicubic"),
        "mean": triple,
        "std": lambda v: triple(v) and min(v) > 0,
    }
    for key in sorted(rules.keys() ^ preprocess.keys()):
        raise UserError(
            f"{file}: preprocess.{key:.40} is missing or not known; expected {', '.join(rules)}; export again"
        )
    for key, accepts in rules.items():
        if not accepts(preprocess[key]):
            raise UserError(f"{file}: preprocess.{key} is {preprocess[key]!r:.80}; expected a valid one; export again")


def _find_base(folder: Path, name: str) -> Path:
    places = [folder / name, BASES / name]
    for place in places:
        if place.is_file():
            return place
    command = f"python -m training base {name.removesuffix('.safetensors')}"
    raise UserError(f"base weights {name} not found; expected them in {folder} or {BASES}; make them with '{command}'")


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hex, as one call on the mapped file.

    A call holds the interpreter lock only when it begins and ends; block by block, beside the import of PyTorch, the
    lock would be waited for at each block.
    """
    with file.open("rb") as stream:
        if not os.fstat(stream.fileno()).st_size:  # nothing to map
            return hashlib.sha256().hexdigest()
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return hashlib.sha256(content).hexdigest()


def check_hashes(files: Iterable[tuple[Path, str]]) -> None:
    """UserError where a file is missing or is not the one that the manifest names."""
    for file, expected in files:
        try:
            found = sha256(file)
        except OSError as error:
            raise UserError(
                f"{file} cannot be read ({error.strerror}); expected it as the manifest says; copy it again"
            ) from None
        if found != expected:
            raise UserError(f"{file} has SHA-256 {found}; the manifest expects {expected}; copy the ensemble again")


def start_hash_check(manifest: Manifest) -> Future[None]:
    """Check all hashes in a thread; returns a future whose `result()` raises UserError where one is wrong."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(check_hashes, [*manifest.files.items(), (manifest.base, manifest.base_sha256)])
    pool.shutdown(wait=False)
    return future
