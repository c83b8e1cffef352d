"""Calibrate an ensemble on labelled crops that none of its folds has seen: temperature, shift and threshold.

An ensemble that was imported has no out-of-fold logits. Its scores are cross-fitted: crops are judged with what was
fitted on the other slides' crops, in five parts; intervals are from resampled slides, each of which chooses its
thresholds again. What is shipped is fitted on all. The AUC compares no answers of different fits: their scales differ,
which would cost some of it.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inference.averaging import average
from inference.checksums import check_ensemble, sha256
from inference.ensemble import Ensemble
from inference.errors import UserError
from inference.manifest import FILE, Manifest, load_manifest
from inference.metrics import best_threshold, group_bootstrap, roc_auc
from inference.seen import load_seen

from ..data.crop import Crop
from ..data.splits import split
from ..data.table import describe, load_data
from ..fit.averaged import FILES
from ..fit.feed import load_crops
from .calibrate import describe as in_one_line
from .hubcard import CARD, FRONT_MATTER, STAMP, plain, write_card
from .joint import METRICS, RESAMPLES, metrics
from .members import DRIFT_CROPS, adjust_head, measure_drift, write_manifest
from .scaling import Scale, fit_scale, smooth_threshold

PARTS = 5
FEWEST = 20  # crops of each class
STEP = 32  # crops of a pass
OF = "a held-out set, not out of fold"


def calibrate_on(folder: Path, data: Sequence[Path], device: str = "auto", ungrouped: bool = False) -> dict[str, Any]:
    """Calibrate the ensemble in `folder` on the data sets, in place; returns what its provenance says of it.

    UserError where the crops are those it was trained on, too few, or of one class in what is left without a part.
    """
    manifest = load_manifest(folder)
    if json.loads((folder / FILE).read_text("utf-8-sig"))["format"] != 2:
        raise UserError(f"{folder / FILE} has format 1; expected 2; export the ensemble again")
    check_ensemble(manifest)
    crops = load_data(data, ungrouped=ungrouped)
    described = describe(crops)
    for member, origin in manifest.provenance.get("members", {}).items():
        if origin.get("data", {}).get("sha256") == described["sha256"]:
            raise UserError(f"{member} was trained on these crops; expected crops that it has not seen; name others")
    if min(described["atypical"], described["crops"] - described["atypical"]) < FEWEST or described["groups"] < PARTS:
        raise UserError(
            f"{described['atypical']} of {described['crops']} crops are atypical, of {described['groups']} slides; "
            f"expected {FEWEST} of each class and {PARTS} slides; name more data"
        )
    check_unseen(manifest, crops)
    parts = split(crops, "grouped", PARTS, 0)
    crops = [crop for crop, part in zip(crops, parts, strict=True) if part >= 0]  # slides near a cut are in none
    parts = parts[parts >= 0]
    labels, groups = np.array([crop.label for crop in crops]), np.array([crop.group for crop in crops])
    logits = predict(manifest, crops, device)
    scale, threshold = fit(logits, manifest, labels, groups, np.ones(len(labels), bool))
    facts = scores(logits, manifest, labels, groups, parts)
    facts = {"of": OF, "data": described, **facts}
    if scale.bounded:
        print("warning: the temperature ended at a bound: these logits hardly depend on the labels, or separate them")
    write(manifest, scale, threshold, facts, crops[:: max(1, len(crops) // DRIFT_CROPS)][:DRIFT_CROPS], device)
    return facts | {"temperature": scale.temperature, "shift": scale.shift, "threshold": threshold}


def check_unseen(manifest: Manifest, crops: Sequence[Crop]) -> None:
    """UserError where the ensemble was trained on one of the crops, known by its pixels."""
    seen = load_seen(manifest)
    if seen is None:
        print("whether the ensemble was trained on some of these crops is not known: its folder does not say")
        return
    known = [crop.path for crop in crops for image in load_crops([crop]) if image in seen]
    if known:
        raise UserError(
            f"the ensemble was trained on {len(known):,} of {len(crops):,} crops, such as {known[0]}; expected crops "
            "that it has not seen; leave these out, or name others"
        )


def describe_scores(facts: dict[str, Any]) -> str:
    """What a calibration found, in one line."""
    return (
        f"temperature {facts['temperature']:.6g}, shift {facts['shift']:+.4f}, threshold {facts['threshold']:.4f}; "
        f"on {facts['crops']:,} held-out crops of {facts['slides']:,} slides, cross-fitted: {in_one_line(facts)}"
    )


def predict(manifest: Manifest, crops: Sequence[Crop], device: str) -> list[np.ndarray]:
    """Logits (F, V, N) of each member in fp32."""
    ensemble, parts = Ensemble(manifest, device, "fp32"), []
    for begin in range(0, len(crops), STEP):
        parts.append(ensemble.predict(load_crops(list(crops[begin : begin + STEP]))).logits)
        if begin // STEP % 10 == 9:
            print(f"  {begin + STEP:,} of {len(crops):,} crops", flush=True)
    return [np.concatenate(member, axis=2) for member in zip(*parts, strict=True)]


def fit(
    logits: Sequence[np.ndarray], manifest: Manifest, labels: np.ndarray, groups: np.ndarray, used: np.ndarray
) -> tuple[Scale, float]:
    """The scale of the members' mean and the threshold, by the crops that `used` (N,) selects, rounded as shipped."""
    weights = [member.weight for member in manifest.members]
    scale = fit_scale([z[:, :, used] for z in logits], labels[used], manifest.averaging, weights)
    scale = scale._replace(temperature=rounded(scale.temperature, scale.temperature))
    p = answers([z[:, :, used] for z in logits], manifest, scale)
    threshold = smooth_threshold(labels[used], p, groups[used])
    return scale, rounded(threshold, min(threshold, 1 - threshold))


def rounded(value: float, size: float) -> float:
    """`value` to six digits of `size` > 0: neither a small temperature nor a threshold near 1 is rounded away."""
    return round(value, 5 - math.floor(math.log10(size)))


def answers(logits: Sequence[np.ndarray], manifest: Manifest, scale: Scale) -> np.ndarray:
    """P(atypical) (N,)."""
    weights = [member.weight for member in manifest.members]
    return average([z + scale.shift for z in logits], manifest.averaging, scale.temperature, weights)


def scores(
    logits: Sequence[np.ndarray], manifest: Manifest, labels: np.ndarray, groups: np.ndarray, parts: np.ndarray
) -> dict[str, Any]:
    """Cross-fitted metrics with intervals of resampled slides. UserError where a class is missing without some part."""
    p, called, by_part = np.empty(len(labels)), np.empty(len(labels), bool), {}
    for part in np.unique(parts).tolist():
        left = parts == part
        if len(np.unique(labels[~left])) < 2:
            raise UserError("without one part of the slides a class is missing; expected both; name more data")
        scale, threshold = fit(logits, manifest, labels, groups, ~left)
        by_part[part] = answers(logits, manifest, scale)
        p[left] = by_part[part][left]
        called[left] = p[left] >= threshold
    whole = answers(logits, manifest, fit(logits, manifest, labels, groups, np.ones(len(labels), bool))[0])

    def auc(i: np.ndarray) -> float:
        """Of the crops with these numbers. No scale changes the order of mean logits, so that no fit flatters it."""
        return roc_auc(labels[i], whole[i]) if manifest.averaging == "logit" else auc_within(labels[i], p[i], parts[i])

    of_all = auc(np.arange(len(labels)))
    if math.isnan(of_all):
        raise UserError("no part of the slides has both classes; expected one or more; name more data")
    resampled, cuts = [], []
    for i in group_bootstrap(groups, RESAMPLES):
        drawn, calls = parts[i], np.empty(len(i), bool)
        if all(len(np.unique(labels[i][drawn != k])) == 2 for k in (None, *np.unique(drawn))):
            for k in np.unique(drawn).tolist():
                left, cut_by = drawn == k, by_part[k][i]
                calls[left] = cut_by[left] >= best_threshold(labels[i][~left], cut_by[~left])[0]
            resampled.append(metrics(labels[i], p[i], calls) | {"auc": auc(i)})
            cuts.append(best_threshold(labels[i], whole[i])[0])
    enough = len(resampled) > RESAMPLES / 2
    interval = lambda values: np.nanquantile(values, (0.025, 0.975)).round(4).tolist() if enough else None  # noqa: E731
    return {
        "crops": len(labels),
        "atypical": int(labels.sum()),
        "slides": len(set(groups.tolist())),
        **metrics(labels, p, called),
        "auc": of_all,
        **{f"{name}_interval": interval([cut_by[name] for cut_by in resampled]) for name in METRICS},
        "threshold_interval": interval(cuts),
    }


def auc_within(labels: np.ndarray, p: np.ndarray, parts: np.ndarray) -> float:
    """The mean of the AUCs within parts, each weighing as many as it has pairs of an atypical and a normal crop.

    NaN where no part has both classes.
    """
    each = [labels[parts == part] for part in np.unique(parts)]
    pairs = np.array([of_part.sum() * (1 - of_part).sum() for of_part in each])
    aucs = np.array([roc_auc(of_part, p[parts == part]) for of_part, part in zip(each, np.unique(parts), strict=True)])
    both = pairs > 0
    return float(np.average(aucs[both], weights=pairs[both])) if both.any() else math.nan


def write(
    manifest: Manifest, scale: Scale, threshold: float, facts: dict[str, Any], crops: Sequence[Crop], device: str
) -> None:
    """Replace the ensemble's folder by one with this calibration: the shift in its heads, precisions measured again.

    A card that somebody wrote keeps its text, without the stamp of these weights, so that `publish` asks to read it.
    """
    folder = manifest.folder.resolve()  # a link stays, and its target is replaced
    with tempfile.TemporaryDirectory(prefix=".calibrate-", dir=folder.parent) as temporary:
        old, new = Path(temporary) / "old", Path(temporary) / "new"
        shutil.copytree(folder, new)
        content = json.loads((new / FILE).read_text("utf-8-sig"))
        for entry in content["members"]:
            for fold in entry["folds"]:
                adjust_head(new / fold["folder"] / FILES[1], Scale(1.0, scale.shift))
                fold["sha256"][FILES[1]] = sha256(new / fold["folder"] / FILES[1])
        content |= {"temperature": scale.temperature, "threshold": threshold}
        content["provenance"].pop("out_of_fold", None)  # its scores are of another threshold
        content["provenance"]["calibration"] = facts
        write_manifest(new, content)
        for entry, measured in zip(
            content["members"], measure_drift(new, load_crops(list(crops)), device), strict=True
        ):
            entry["precision"] = measured
        write_manifest(new, content)
        ours = has_plain_card(folder)
        write_card(new, plain(new) if ours else None)
        load_manifest(new)
        try:
            folder.rename(old)
            new.rename(folder)
        except BaseException:
            if not folder.exists():  # stopped in between
                old.rename(folder)
            raise
    if not ours:
        print(
            f"{manifest.folder / CARD} keeps its text, which is of the calibration before; correct it, then run "
            f"'python -m training hubcard --read-again {manifest.folder}'"
        )


def has_plain_card(folder: Path) -> bool:
    """Whether the ensemble's card, if any, says nothing but what its manifest gives."""
    if not (folder / CARD).exists():
        return True
    text = FRONT_MATTER.sub("", (folder / CARD).read_text("utf-8"))
    return STAMP.sub("", text).strip() == plain(folder).strip()
