"""What `combine` chooses from: members with the logits of every crop by the fold that did not train on it.

A run folder holds these logits. For an ensemble folder they are computed again, if its provenance names recipe and
data: they determine the split, and the out-of-fold AUC that the ensemble was shipped with must be reproduced.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inference.averaging import average
from inference.checksums import check_ensemble, sha256
from inference.ensemble import Ensemble
from inference.errors import UserError
from inference.files import read_json, replacing
from inference.manifest import TTA_VIEWS, Manifest, Member, holds_ensemble, load_manifest
from inference.metrics import roc_auc

from .calibrate import read_out_of_fold
from .data import Crop, load_data, table_hash
from .feed import load_crops
from .fit import find_base, read_recipe
from .members import describe_member, fold_folders
from .splits import split

AUC_TOLERANCE = 0.005  # between the AUC in an ensemble's provenance and the one that is computed again
SPLIT = ("split", "split_by", "folds", "seed")  # the settings of a recipe that determine its split
STEP = 32  # crops between two lines of the log


@dataclass(frozen=True)
class Candidate:
    """A member to choose: its manifest entry, its folds, and logits (8, N), each crop by the fold that held it out."""

    name: str
    place: Path
    settings: dict[str, Any]
    data: dict[str, Any]
    entry: dict[str, Any]
    base: Path
    folds: tuple[Path, ...]
    logits: np.ndarray


@dataclass(frozen=True)
class Table:
    """The crops that all candidates share, the fold (N,) that judges each, and the settings that made the split."""

    crops: list[Crop]
    folds: np.ndarray
    sha256: str
    split: dict[str, Any]
    place: Path

    @property
    def labels(self) -> np.ndarray:
        return np.array([crop.label for crop in self.crops])

    @property
    def groups(self) -> np.ndarray:
        return np.array([crop.group for crop in self.crops])


def read_candidates(
    places: Sequence[Path], data: Sequence[Path], cache: Path, bases: Path
) -> tuple[list[Candidate], Table]:
    """All members of the runs and ensembles in `places`, with the table that they share; says what it does.

    data: the data sets, needed where `places` has no run; cache: keeps computed logits; bases: of the runs' backbones
    Raises UserError where a place is neither, is not finished, or splits other crops or into other folds.
    """
    runs = [place for place in places if (place / "split.csv").is_file()]
    for place in places:
        if place not in runs and not holds_ensemble(place):
            raise UserError(f"{place} is no run and no ensemble; expected a folder of 'training fit' or 'export'")
    table = read_table(runs[0] if runs else places[0], load_data(data) if data else None)
    found: list[Candidate] = []
    for place in places:
        found += [read_run(place, table, bases)] if place in runs else read_ensemble(place, table, cache)
    return named_apart(found), table


def read_table(place: Path, crops: list[Crop] | None) -> Table:
    """The crops and folds of a run, or of an ensemble on `crops`; the crops' files are those of `crops` if given."""
    if not holds_ensemble(place):
        known, folds = read_split_table(place)
        settings, data = dataclasses.asdict(read_recipe(place)), read_data(place)
        if crops is None:
            crops = known
        elif table_hash(crops) != data["sha256"]:
            raise UserError(f"{place} was fitted on other crops than --data; expected the same; name its data sets")
        return Table(crops, folds, data["sha256"], split_settings(settings), place)
    if crops is None:
        raise UserError(f"{place} is an ensemble and holds no crops; expected its data; add --data PATH")
    settings, data = origin(place, load_manifest(place), 0)
    chosen = split_settings(settings)
    folds = split(crops, chosen["split"], chosen["folds"], chosen["seed"], chosen["split_by"])
    return Table(crops, folds, table_hash(crops), chosen, place)


def read_data(run: Path) -> dict[str, Any]:
    """What a run's data.json says. UserError where it is missing."""
    try:
        return dict(read_json(run / "data.json", "fit the run again"))
    except FileNotFoundError:
        raise UserError(f"{run} has no data.json; expected a run folder; make one with 'training fit'") from None


def read_split_table(run: Path) -> tuple[list[Crop], np.ndarray]:
    """The crops of a run, without votes and names, and their folds (N,)."""
    with (run / "split.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    crops = [Crop(Path(row["path"]), int(row["label"]), row["group"], row["domain"]) for row in rows]
    return crops, np.array([int(row["fold"]) for row in rows])


def split_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {"split_by": "domain"} | {name: settings[name] for name in SPLIT if name in settings}


def origin(place: Path, manifest: Manifest, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(recipe, data) of a member, by its ensemble's provenance. UserError where that does not name them."""
    member, about = manifest.members[number], manifest.provenance
    about = about.get("members", {}).get(member.name, about)
    settings, data = about.get("recipe"), about.get("data")
    if not isinstance(settings, dict) or not isinstance(data, dict) or "sha256" not in data or "split" not in settings:
        raise UserError(
            f"{place}: its provenance names no recipe and data for {member.name}; expected both, as 'training export' "
            "writes them; give the run folder instead"
        )
    return settings, data


def check_same(place: Path, table: Table, sha256: str, folds: np.ndarray, settings: dict[str, Any]) -> None:
    """UserError, with the command that helps, unless `place` has the table's crops in the table's folds."""
    wanted = " ".join(f"--set {name}={value}" for name, value in table.split.items())
    command = f"python -m training fit --data DATA {wanted} --set backbone={settings['backbone']} --run NEW"
    if sha256 != table.sha256:
        raise UserError(f"{place} was fitted on other crops than {table.place}; expected the same; run '{command}'")
    if len(folds) != len(table.folds) or (folds != table.folds).any():
        raise UserError(f"{place} and {table.place} split their crops differently; expected one split; run '{command}'")


def read_run(run: Path, table: Table, bases: Path) -> Candidate:
    """The member that a finished run makes."""
    recipe, data = read_recipe(run), read_data(run)
    settings = dataclasses.asdict(recipe)
    oof = read_out_of_fold(run)
    check_same(run, table, data["sha256"], oof.folds, settings)
    if len(oof.logits) < TTA_VIEWS["d4"]:
        raise UserError(
            f"{run} has out-of-fold logits of {len(oof.logits)} views; expected {TTA_VIEWS['d4']}, to choose from; "
            "export it and give the ensemble, or fit it again with --set tta=d4 --run NEW"
        )
    base = find_base(recipe, bases / f"{recipe.backbone}.safetensors")
    print(f"{run}: {recipe.backbone}, {len(oof.labels):,} out-of-fold logits", flush=True)
    entry, folds = describe_member(recipe, base), tuple(fold_folders(run))
    return Candidate(recipe.backbone, run, settings, data, entry, base, folds, oof.logits)


def read_ensemble(place: Path, table: Table, cache: Path) -> list[Candidate]:
    """The members of an ensemble folder, their out-of-fold logits computed again or read from `cache`."""
    manifest = load_manifest(place)
    check_ensemble(manifest)
    found = []
    for number, member in enumerate(manifest.members):
        settings, data = origin(place, manifest, number)
        folds = table.folds
        if split_settings(settings) != table.split:
            chosen = split_settings(settings)
            folds = split(table.crops, chosen["split"], chosen["folds"], chosen["seed"], chosen["split_by"])
        check_same(place, table, data["sha256"], folds, settings)
        if len(member.folds) != len(np.unique(folds)):
            raise UserError(
                f"{place}: {member.name} has {len(member.folds)} folds; expected {len(np.unique(folds))} as its recipe "
                "says; give the run folder instead"
            )
        logits = cached_logits(manifest, member, table, cache)
        check_auc(place, manifest, member, logits, table)
        entry = {
            "backbone": member.backbone,
            "pool": member.pool,
            "base": {"file": member.base.name, "sha256": member.base_sha256},
            "preprocess": member.preprocess,
            "licence": member.licence,
        }
        found.append(Candidate(member.backbone, place, settings, data, entry, member.base, member.folds, logits))
    return found


def cached_logits(manifest: Manifest, member: Member, table: Table, cache: Path) -> np.ndarray:
    """Logits (8, N) of the d4 views in fp32, each crop by the fold that did not train on it.

    They are kept under the hash of everything that they depend on: weights, preprocessing, folds, crops and files.
    """
    parts = [
        member.backbone,
        member.pool,
        member.base_sha256,
        sorted(member.preprocess.items()),
        list(member.files.values()),
        table.sha256,
        table.folds.tolist(),
        [sha256(file) for file in sorted({crop.path for crop in table.crops})],
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    file = cache / f"{manifest.name}-{member.name}-{key}.npy"
    if file.is_file():
        print(f"{manifest.folder}: {member.name}, out-of-fold logits from {file}", flush=True)
        return np.load(file)
    logits = np.full((TTA_VIEWS["d4"], len(table.crops)), np.nan)
    start, done = time.perf_counter(), 0
    print(f"{manifest.folder}: computing the out-of-fold logits of {member.name}", flush=True)
    for fold, folder in enumerate(member.folds):
        one = dataclasses.replace(member, folds=(folder,), weight=1.0)
        ensemble = Ensemble(dataclasses.replace(manifest, members=(one,)), "auto", "fp32")
        index = np.flatnonzero(table.folds == fold)
        for begin in range(0, len(index), STEP):
            chosen = index[begin : begin + STEP]
            logits[:, chosen] = ensemble.predict(load_crops([table.crops[n] for n in chosen]), "d4").logits[0][0]
            done += len(chosen)
        seconds = time.perf_counter() - start
        print(f"  fold {fold}: {done:,} of {len(table.crops):,} crops after {seconds:.0f} seconds", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial, partial.open("wb") as stream:
        np.save(stream, logits)
    return logits


def check_auc(place: Path, manifest: Manifest, member: Member, logits: np.ndarray, table: Table) -> None:
    """UserError unless the shipped out-of-fold AUC is reproduced; otherwise its folds held out other crops."""
    about = manifest.provenance
    out_of_fold = about.get("out_of_fold", {})
    shipped = about.get("members", {}).get(member.name, out_of_fold.get("same_crops", out_of_fold)).get("auc")
    views = logits[: TTA_VIEWS[member.tta]]
    found = roc_auc(table.labels, average([views[None]], manifest.averaging, manifest.temperature))
    if not isinstance(shipped, float) or abs(found - shipped) > AUC_TOLERANCE:
        raise UserError(
            f"{place}: the out-of-fold AUC of {member.name} is {found:.4f} on this split; its provenance says "
            f"{shipped}; expected the split that it was fitted on; give the run folder instead"
        )
    print(f"  out-of-fold AUC {found:.4f}; {shipped:.4f} by its provenance", flush=True)


def named_apart(found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with distinct names: by backbone, then also by crop and input side, then by number."""
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        sides = [one.entry["preprocess"] for one in found]
        names = [
            f"{name}-{side['crop'] or 'all'}-{side['size']}" if names.count(name) > 1 else name
            for name, side in zip(names, sides, strict=True)
        ]
    names = [f"{name}-{names[:n].count(name) + 1}" if names.count(name) > 1 else name for n, name in enumerate(names)]
    return [dataclasses.replace(one, name=name) for one, name in zip(found, names, strict=True)]
