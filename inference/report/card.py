"""What a report says of the ensemble: members, input, averaging, threshold, scores out of fold, licences."""

from __future__ import annotations

from datetime import date
from html import escape
from typing import Any

from .. import __version__
from ..manifest import TTA_VIEWS, Manifest, Member

VIEWS = {"none": "1", "rot4": "4 (rotations)", "d4": "8 (rotations and mirror images)"}


def card(source: Manifest | float, settings: dict[str, str]) -> str:
    """The ensemble's summary as the items of a <dl>: what it is, how it was configured, how well it did out of fold.

    source: as for `write_report`; settings: further lines
    """
    manifest, threshold = (source, source.threshold) if isinstance(source, Manifest) else (None, source)
    lines: list[tuple[str, str]] = []
    if manifest:
        lines = [("Ensemble", manifest.name)]
        for member in manifest.members:
            lines += describe_member(member) if len(manifest.members) == 1 else [in_one_line(member)]
        lines.append(("Averaging", f"mean {manifest.averaging}, temperature {manifest.temperature:g}"))
    lines.append(("Threshold", f"{threshold:g} (atypical at or above it)"))
    lines += describe_out_of_fold(manifest.provenance.get("out_of_fold")) if manifest else []
    lines.append(("Inference", f"version {__version__}, {date.today().isoformat()}"))
    lines += [(name.capitalize(), value) for name, value in settings.items()]
    if manifest:
        licences = {item for member in manifest.members for item in member.licence.items()}
        lines += [(f"Licence: {key.replace('_', ' ')}", str(value)) for key, value in sorted(licences)]
    return "\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in lines)


def summary(manifest: Manifest) -> str:
    return "; ".join(f"{member.backbone}, {len(member.folds)} folds" for member in manifest.members)


def widest_crop(manifest: Manifest) -> int | None:
    """Side in pixels of the largest central square that a member sees; None if any member sees the whole crop."""
    crops = [member.preprocess["crop"] for member in manifest.members]
    return max(crops) if all(crops) else None


def describe_member(member: Member) -> list[tuple[str, str]]:
    """An ensemble's only member, as lines of the summary."""
    return [
        ("Backbone", f"{member.backbone}, {member.pool} pooling"),
        ("Folds", str(len(member.folds))),
        ("Input", describe_input(member.preprocess)),
        ("Views", VIEWS[member.tta]),
    ]


def in_one_line(member: Member) -> tuple[str, str]:
    """One of several members, as a line of the summary."""
    backbone = f"{member.backbone}, {member.pool} pooling"
    folds = f"{len(member.folds)} folds" if len(member.folds) > 1 else "1 fold"
    views = f"{TTA_VIEWS[member.tta]} views" if TTA_VIEWS[member.tta] > 1 else "1 view"
    description = f"weight {member.weight:.3g}; {backbone}; {describe_input(member.preprocess)}; {folds}, {views}"
    return f"Member {member.name}", description


def describe_input(preprocess: dict[str, Any]) -> str:
    kept = f"central {preprocess['crop']} pixels" if preprocess["crop"] else "central square"
    return f"{kept} of a crop, resized to {preprocess['size']} ({preprocess['kernel']})"


def describe_out_of_fold(scores: Any) -> list[tuple[str, str]]:
    """Lines from the manifest's provenance, which has no fixed schema: missing entries are left out."""
    if not isinstance(scores, dict):
        return []
    text = []
    for key, name in (("balanced_accuracy", "balanced accuracy"), ("auc", "AUC")):
        if isinstance(scores.get(key), float):
            text.append(f"{name} {scores[key]:.3f}")
            interval = scores.get(f"{key}_interval")
            if isinstance(interval, list) and len(interval) == 2:
                text[-1] += f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    if isinstance(scores.get("crops"), int):
        text.append(f"{scores['crops']:,} crops")
    return [("Out of fold", ", ".join(text))] if text else []
