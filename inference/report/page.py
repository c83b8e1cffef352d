"""The report of a run: one HTML file, opened from disk, with every crop, its answer and a summary of the ensemble.

It loads nothing (its content security policy forbids it), so it can be mailed, archived and opened on a closed network.
It is assembled from the HTML, CSS and JavaScript in this folder and two blocks of JSON.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..answers import Answer
from ..assessment import NAMES, Assessment, assess, curves, in_training, unseen
from ..errors import UserError
from ..files import begins_with, write_whole
from ..manifest import Manifest
from ..resolution import MPP
from .card import card, summary, widest_crop

if TYPE_CHECKING:
    from .attribution import Attribution

HERE = Path(__file__).parent
SCRIPTS = ("charts.js", "reading.js", "report.js", "slides.js", "curves.js")
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
    return begins_with(read("report.html").partition("@@")[0], file)


@dataclass(frozen=True)
class Page:
    """What a report says beside its crops.

    title: such as the folder's name; settings: more lines for the summary ("device": "cpu")
    first, overview: HTML of a section above all others, and of one above the crops; an element with data-crop="N"
        opens crop N
    mpp: µm per pixel of the crops, for the scale bar
    """

    title: str = "Crops"
    settings: dict[str, str] = field(default_factory=dict)
    first: str = ""
    overview: str = ""
    mpp: float = MPP


def write_report(
    rows: Sequence[Answer],
    crops: Iterable[np.ndarray | Picture],
    source: Manifest | float,
    file: Path,
    page: Page,
    attributions: Sequence[Attribution | None] | None = None,
) -> Path:
    """Write the report of `rows` to `file`, completely or not at all.

    crops: one for each row, in the same order; an iterator is read once, so they need not fit into memory
    source: the manifest of the ensemble that answered, or, where it is not available, the threshold
    attributions: for each row one from `inference.report.attribution`, or None
    """
    if not rows:
        raise UserError("the report has no crops; expected one or more; check the input")
    manifest, threshold = (source, source.threshold) if isinstance(source, Manifest) else (None, source)
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
        "mpp": page.mpp,
        "key": key_of(rows, threshold),
        "assessment": assessment(rows, threshold),
        "maps": [one and one.packed() for one in attributions] if attributions else [],
    }
    images = [base64.b64encode(one.webp).decode() for one in pictures]
    parts = {
        "TITLE": escape(page.title),
        "STYLE": read("page.css") + read("report.css"),
        "CARD": card(source, page.settings),
        "NAME": escape(manifest.name if manifest else "not known"),
        "SUMMARY": escape(summary(manifest) if manifest else ""),
        "FIRST": page.first,
        "OVERVIEW": page.overview,
        "DATA": as_script(data),
        "IMAGES": as_script(images),
        "SCRIPT": "".join(map(read, SCRIPTS)),
    }
    text = "".join(  # split first, so that inserted text is never searched for placeholders
        parts[piece] if number % 2 else piece for number, piece in enumerate(read("report.html").split("@@"))
    )
    try:
        write_whole(file, text)
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror}); expected a writable folder; name another") from None
    return file


def key_of(rows: Sequence[Answer], threshold: float) -> str:
    """16 hexadecimal digits, the same for the same crops, answers and labels; a reader's verdicts are kept under it."""
    identity = [[row.path, row.page, row.content, row.p_atypical, row.label] for row in rows]
    return hashlib.sha256(json.dumps([threshold, identity]).encode()).hexdigest()[:16]


def assessment(rows: Sequence[Answer], threshold: float) -> dict[str, Any] | None:
    """What curves.js shows of the labelled rows; None where there are none."""

    def column(name: str, part: Assessment) -> dict[str, Any]:
        values = [
            [text, *(None if math.isnan(value) else value for value in (part.scores[key], *part.intervals[key]))]
            for key, text in NAMES.items()
        ]
        note = f"{len(part.labelled.labels):,} crops; intervals over {part.labelled.resampled}"
        return {"name": name, "note": note, "scores": values}

    everything = assess(rows, threshold)
    if everything is None:
        return None
    others = unseen(rows)
    new = assess(others, threshold) if others else None
    sets = [column("all labelled crops", everything), *([column("without the training crops", new)] if new else [])]
    return {"sets": sets, "seen": in_training(rows), "curves": curves(everything.labelled)}


def read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def as_script(content: Any) -> str:
    """JSON that cannot close its <script> element, whatever a file is called."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
