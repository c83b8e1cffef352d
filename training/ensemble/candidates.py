"""What `export` chooses from: members with the logits of every crop by the fold that did not train on it.

A run folder holds these logits. For an ensemble folder they are computed again, if its provenance names recipe and
data: they determine the split, and the out-of-fold AUC that the ensemble was shipped with must be reproduced.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from inference.averaging import average
from inference.checksums import check_ensemble, sha256
from inference.ensemble import Ensemble
from inference.errors import UserError
from inference.files import replacing
from inference.imageio.stack import read_stack
from inference.manifest import TTA_VIEWS, Manifest, Member, holds_ensemble, load_manifest
from inference.metrics import roc_auc
from inference.progress import Progress
from inference.seen import pixel_hash

from ..data.crop import Crop
from ..data.splits import split
from ..data.table import describe, load_data, same_data
from ..fit.command import find_base
from ..fit.feed import load_crops
from ..run import RunFolder
from .members import describe_member

AUC_TOLERANCE = 0.005  # between the AUC in an ensemble's provenance and the one that is computed again
SPLIT = {"split": "grouped", "split_by": "domain", "folds": 3, "seed": 0, "exam": 0}  # settings that determine it
STEP = 32  # crops predicted together


@dataclass(frozen=True)
class Candidate:
    """A member to choose: its manifest entry, its folds, and logits (V, N), each crop by the fold that held it out.

    recipe, data: as its run or its ensemble's provenance has them
    """

    name: str
    recipe: dict[str, Any]
    data: dict[str, Any]
    entry: dict[str, Any]
    base: Path
    folds: tuple[Path, ...]
    logits: np.ndarray


@dataclass(frozen=True)
class StudyTable:
    """The crops that all candidates share, and the fold of each, with the settings that made them.

    data: what `describe` says of the crops; source: the run or ensemble that they are of
    """

    crops: list[Crop]
    folds: np.ndarray
    data: dict[str, Any]
    split: dict[str, Any]
    source: Path

    @cached_property
    def studied(self) -> np.ndarray:
        """The numbers (N,) of the crops that a fold judges."""
        return np.flatnonzero(self.folds >= 0)

    def pixels(self) -> list[str]:
        """The pixel hash of each crop that a fold judges, which the other folds were trained on."""
        crops = [self.crops[n] for n in self.studied]
        return [crop.pixels or pixel_hash(read_stack(crop.path)[0]) for crop in crops]  # earlier runs kept none

    @property
    def labels(self) -> np.ndarray:
        return np.array([self.crops[n].label for n in self.studied])

    @property
    def groups(self) -> np.ndarray:
        return np.array([self.crops[n].group for n in self.studied])

    @property
    def domains(self) -> np.ndarray:
        return np.array([self.crops[n].domain for n in self.studied])


@dataclass(frozen=True)
class Sources:
    """Where members and what they need are looked for.

    folders: runs and ensembles; data: the data sets, needed where no run names them; cache: keeps computed logits
    bases: base weights of the runs; tta: the most views that are computed for ensembles
    """

    folders: Sequence[Path]
    data: Sequence[Path]
    cache: Path
    bases: Path
    tta: str = "d4"


def read_candidates(sources: Sources) -> tuple[list[Candidate], StudyTable]:
    """All members of the runs and ensembles, with the table that they share; says what it does.

    Raises UserError where a folder is neither, is not finished, or splits other crops or into other folds.
    """
    for folder in sources.folders:
        if not RunFolder(folder).begun and not holds_ensemble(folder):
            raise UserError(f"{folder} is no run and no ensemble; expected a folder of 'training fit' or 'export'")
    runs = [folder for folder in sources.folders if RunFolder(folder).begun]
    table = read_table((runs or sources.folders)[0], load_data(sources.data) if sources.data else None)
    candidates: list[Candidate] = []
    for folder in sources.folders:
        candidates += [read_run(folder, table, sources)] if folder in runs else read_ensemble(folder, table, sources)
    return named_apart(candidates), table


def read_table(folder: Path, crops: list[Crop] | None) -> StudyTable:
    """The crops and folds of a run, or of an ensemble on `crops`; the crops' files are those of `crops` if given."""
    run = RunFolder(folder)
    if run.begun:
        data = run.data()
        if crops is None:
            crops = run.crops()
        elif not same_data(describe(crops), data):
            raise UserError(f"{folder} was fitted on other crops than --data; expected the same; name its data sets")
        return StudyTable(crops, run.split(), data, split_settings(dataclasses.asdict(run.recipe())), folder)
    if crops is None:
        raise UserError(f"{folder} is an ensemble and holds no crops; expected its data; add --data PATH")
    manifest = load_manifest(folder)
    chosen = split_settings(origin(manifest, manifest.members[0])["recipe"])
    return StudyTable(crops, split_by(crops, chosen), describe(crops), chosen, folder)


def split_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    return {name: recipe.get(name, default) for name, default in SPLIT.items()}


def split_by(crops: Sequence[Crop], chosen: dict[str, Any]) -> np.ndarray:
    names = ("split", "folds", "seed", "split_by", "exam")
    return split(crops, *(chosen[name] for name in names))


def origin(manifest: Manifest, member: Member) -> dict[str, Any]:
    """What the provenance says of a member: recipe, data and AUC. UserError where it does not name the first two."""
    entry = manifest.provenance.get("members", {}).get(member.name, {})
    recipe, data = entry.get("recipe"), entry.get("data")
    if not isinstance(recipe, dict) or not isinstance(data, dict) or "sha256" not in data or "split" not in recipe:
        raise UserError(
            f"{manifest.folder}: its provenance names no recipe and data for {member.name}; expected both, as "
            "'training export' writes them; give the run folder instead"
        )
    return dict(entry)


def check_same(
    folder: Path, table: StudyTable, data: dict[str, Any], folds: np.ndarray, recipe: dict[str, Any]
) -> None:
    """UserError, with the command that helps, unless `folder` has the table's crops in the table's folds."""
    wanted = " ".join(f"--set {name}={value}" for name, value in table.split.items())
    command = f"python -m training fit --data DATA {wanted} --set backbone={recipe['backbone']} --run NEW"
    if not same_data(data, table.data):
        raise UserError(f"{folder} was fitted on other crops than {table.source}; expected the same; run '{command}'")
    if not np.array_equal(folds, table.folds):
        raise UserError(
            f"{folder} and {table.source} split their crops differently; expected one split; run '{command}'"
        )


def read_run(folder: Path, table: StudyTable, sources: Sources) -> Candidate:
    """The member that a finished run makes."""
    run = RunFolder(folder)
    recipe, data, logits = run.recipe(), run.data(), run.out_of_fold().logits
    settings = dataclasses.asdict(recipe)
    check_same(folder, table, data, run.split(), settings)
    base = find_base(recipe, sources.bases / f"{recipe.backbone}.safetensors")
    run.check_base(base)
    print(f"{folder}: {recipe.backbone}, {logits.shape[1]:,} out-of-fold logits of {len(logits)} views", flush=True)
    entry = describe_member(recipe, base)
    return Candidate(recipe.backbone, settings, data, entry, base, tuple(run.folds()), logits)


def read_ensemble(folder: Path, table: StudyTable, sources: Sources) -> list[Candidate]:
    """The members of an ensemble folder, their out-of-fold logits computed again or read from the cache."""
    manifest = load_manifest(folder)
    check_ensemble(manifest)
    candidates = []
    for member in manifest.members:
        named = origin(manifest, member)
        chosen = split_settings(named["recipe"])
        folds = table.folds if chosen == table.split else split_by(table.crops, chosen)
        check_same(folder, table, named["data"], folds, named["recipe"])
        numbers = np.unique(folds[table.studied])
        if len(member.folds) != len(numbers):
            raise UserError(
                f"{folder}: {member.name} has {len(member.folds)} folds; expected {len(numbers)} as its recipe says; "
                "give the run folder instead"
            )
        tta = max(sources.tta, member.tta, key=TTA_VIEWS.__getitem__)
        logits = cached_logits(manifest, member, table, sources.cache, tta)
        check_auc(manifest, member, logits, table.labels)
        entry = {
            "backbone": member.backbone,
            "pool": member.pool,
            "base": {"file": member.base.name, "sha256": member.base_sha256},
            "preprocess": member.preprocess,
            "licence": member.licence,
        }
        logits = logits[: TTA_VIEWS[sources.tta]]
        candidates.append(
            Candidate(member.backbone, named["recipe"], named["data"], entry, member.base, member.folds, logits)
        )
    return candidates


def cached_logits(manifest: Manifest, member: Member, table: StudyTable, cache: Path, tta: str) -> np.ndarray:
    """Logits (V, N) of the views `tta` in fp32, each crop by the fold that did not train on it.

    They are kept under the hash of everything that they depend on: weights, preprocessing, folds, crops and files.
    """
    parts = [
        member.backbone,
        member.pool,
        member.base_sha256,
        sorted(member.preprocess.items()),
        list(member.files.values()),
        tta,
        table.data["sha256"],
        table.folds.tolist(),
        [sha256(crop.path) for crop in table.crops],
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    file = cache / f"{manifest.name}-{member.name}-{key}.npy"
    if file.is_file():
        print(f"{manifest.folder}: {member.name}, out-of-fold logits from {file}", flush=True)
        stored: np.ndarray = np.load(file)
        return stored
    logits = np.full((TTA_VIEWS[tta], len(table.crops)), np.nan)
    done = 0
    print(f"{manifest.folder}: computing the out-of-fold logits of {member.name}, {TTA_VIEWS[tta]} views", flush=True)
    with Progress(len(table.studied), "crops") as progress:
        for fold, folder in enumerate(member.folds):
            progress.show(done, done, done)
            alone = dataclasses.replace(member, folds=(folder,), weight=1.0)
            ensemble = Ensemble(dataclasses.replace(manifest, members=(alone,)), "auto", "fp32")
            index = np.flatnonzero(table.folds == fold)
            for begin in range(0, len(index), STEP):
                chosen = index[begin : begin + STEP]
                logits[:, chosen] = ensemble.predict(load_crops([table.crops[n] for n in chosen]), tta).logits[0][0]
                done += len(chosen)
                progress.show(done, done, done)
    logits = logits[:, table.studied]
    cache.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial, partial.open("wb") as stream:
        np.save(stream, logits)
    return logits


def check_auc(manifest: Manifest, member: Member, logits: np.ndarray, labels: np.ndarray) -> None:
    """UserError unless the shipped out-of-fold AUC is reproduced; otherwise its folds held out other crops."""
    shipped = origin(manifest, member).get("auc")
    views = logits[: TTA_VIEWS[member.tta]]
    auc = roc_auc(labels, average([views[None]], manifest.averaging, manifest.temperature))
    if not isinstance(shipped, float) or abs(auc - shipped) > AUC_TOLERANCE:
        raise UserError(
            f"{manifest.folder}: the out-of-fold AUC of {member.name} is {auc:.4f} on this split; its provenance says "
            f"{shipped}; expected the split that it was fitted on; give the run folder instead"
        )
    print(f"  out-of-fold AUC {auc:.4f}; {shipped:.4f} by its provenance", flush=True)


def named_apart(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with distinct names: by backbone, then also by crop and input side, then by number."""
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        sides = [candidate.entry["preprocess"] for candidate in candidates]
        names = [
            f"{name}-{side['crop'] or 'all'}-{side['size']}" if names.count(name) > 1 else name
            for name, side in zip(names, sides, strict=True)
        ]
    names = [f"{name}-{names[:n].count(name) + 1}" if names.count(name) > 1 else name for n, name in enumerate(names)]
    return [dataclasses.replace(candidate, name=name) for candidate, name in zip(candidates, names, strict=True)]
