"""The report of a run: one HTML file, opened from disk, with every crop, its answer and a summary of the ensemble.

It loads nothing (its content security policy forbids it), so it can be mailed, archived and opened on a closed network.
It is assembled from report.html, page.css, report.css, report.js and charts.js in this folder and two blocks of JSON.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..answers import Answer
from ..errors import UserError
from ..files import write_whole
from ..manifest import TTA_VIEWS

if TYPE_CHECKING:
    from ..manifest import Manifest, Member
    from .attribution import Attribution

HERE = Path(__file__).parent
SIDE = 128  # pixels of a picture's longer side: the challenge's crops keep their size
QUALITY = 70  # of WebP: 2 kB a crop, with no visible loss


@dataclass(frozen=True)
class Picture:
    """A crop as the report keeps it: WebP bytes of at most SIDE pixels a side, and the crop's own width and height."""

    webp: bytes
    width: int
    height: int


def picture(crop: np.ndarray) -> Picture:
    """Compress a crop, uint8 (H, W, 3), for the report: about 25 times smaller."""
    from PIL import Image

    image = Image.fromarray(crop)
    width, height = image.size
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=QUALITY, method=2)
    return Picture(stream.getvalue(), width, height)


def is_report(file: Path) -> bool:
    """Whether `file` starts like a report of ours, which may be overwritten. Raises OSError if it cannot be read."""
    head = read("report.html").partition("@@")[0].encode()
    with file.open("rb") as stream:
        return stream.read(len(head)) == head


def write_report(
    rows: Sequence[Answer],
    crops: Iterable[np.ndarray | Picture],
    manifest: Manifest | None,
    file: Path,
    *,
    title: str = "",
    threshold: float | None = None,
    settings: dict[str, str] | None = None,
    attributions: Sequence[Attribution | None] | None = None,
    overview: str = "",
) -> Path:
    """Write the report of `rows` to `file`, completely or not at all.

    crops: one for each row, in the same order; an iterator is read once, so they need not fit into memory
    manifest: of the ensemble that answered; None if it is not available, and then `threshold` is required
    title: of the page, such as the folder's name; settings: more lines for the summary ("device": "cpu")
    attributions: for each row one from `inference.report.attribution`, or None
    overview: HTML of a section above the crops; an element in it with data-crop="N" opens crop N
    """
    if not rows:
        raise UserError("the report has no crops; expected one or more; check the input")
    threshold = manifest.threshold if manifest and threshold is None else threshold
    if threshold is None:
        raise UserError("the report has no threshold; expected a manifest or a threshold; pass one of them")
    pictures = [crop if isinstance(crop, Picture) else picture(crop) for crop in crops]
    if len(pictures) != len(rows):
        raise ValueError(f"{len(pictures)} crops for {len(rows)} rows")
    domains = sorted({row.domain for row in rows if row.domain})
    data: dict[str, Any] = {
        "threshold": threshold,
        "kept": widest_crop(manifest) if manifest else None,
        "domains": domains,
        "path": [row.path for row in rows],
        "page": [row.page for row in rows],
        "p": [row.p_atypical for row in rows],
        "folds": [list(row.fold_p) for row in rows],
        "members": [{"name": member.name, "folds": len(member.folds)} for member in manifest.members]
        if manifest and len(manifest.members) > 1
        else [],
        "member": [list(row.member_p) for row in rows],
        "label": [row.label for row in rows],
        "domain": [domains.index(row.domain) if row.domain else -1 for row in rows],
        "size": [(one.width, one.height) for one in pictures],
        "maps": [one and one.packed() for one in attributions] if attributions else [],
    }
    images = [base64.b64encode(one.webp).decode() for one in pictures]
    title = title or "Crops"
    parts = {
        "TITLE": escape(title),
        "STYLE": read("page.css") + read("report.css"),
        "CARD": card(manifest, threshold, settings or {}),
        "NAME": escape(manifest.name if manifest else "not known"),
        "SUMMARY": escape(summary(manifest) if manifest else ""),
        "OVERVIEW": overview,
        "DATA": as_script(data),
        "IMAGES": as_script(images),
        "SCRIPT": read("charts.js") + read("report.js"),
    }
    page = "".join(  # split first, so that inserted text is never searched for placeholders
        parts[piece] if number % 2 else piece for number, piece in enumerate(read("report.html").split("@@"))
    )
    try:
        write_whole(file, page)
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror}); expected a writable folder; name another") from None
    return file


def read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def escape(text: object) -> str:
    """For HTML text and attributes."""
    import html

    return html.escape(str(text))


def as_script(content: Any) -> str:
    """JSON that cannot close its <script> element, whatever a file is called."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def card(manifest: Manifest | None, threshold: float, settings: dict[str, str]) -> str:
    """The ensemble's summary as the items of a <dl>: what it is, how it was configured, how well it did out of fold."""
    lines: list[tuple[str, str]] = []
    if manifest:
        lines = [("Ensemble", manifest.name)]
        for member in manifest.members:
            lines += describe_member(member) if len(manifest.members) == 1 else [in_one_line(member)]
        lines.append(("Averaging", f"mean {manifest.averaging}, temperature {manifest.temperature:g}"))
    lines.append(("Threshold", f"{threshold:g} (atypical at or above it)"))
    lines += describe_out_of_fold(manifest.provenance.get("out_of_fold")) if manifest else []
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


VIEWS = {"none": "1", "rot4": "4 (rotations)", "d4": "8 (rotations and mirror images)"}


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
    about = f"weight {member.weight:.3g}; {backbone}; {describe_input(member.preprocess)}; {folds}, {views}"
    return f"Member {member.name}", about


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
