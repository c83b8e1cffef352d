"""The platform's contract: where the stack lies, and what the answer must look like.

Sources: Grand Challenge's `inputs.json` (socket values) and the evaluator of MIDOG 2025 Track 2, which rejects a whole
submission over one answer of the wrong length, an unknown class or a confidence that is not a JSON float.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError

SLUG = "stacked-histopathology-roi-cropouts"
OUTPUT = "multiple-mitotic-figure-classification.json"
SUFFIXES = (".tif", ".tiff", ".mha")
CLASSES = ("normal", "atypical")


def find_stack(input_dir: Path) -> Path:
    """The one image of the job in `input_dir`, named in no way but by its folder and suffix.

    `inputs.json` is read where it exists: a list of objects whose `socket` or `interface` has a `slug`; nothing else in
    it is relied on. UserError where the socket is another, or where there is not exactly one image.
    """
    listing = input_dir / "inputs.json"
    if listing.exists():
        slugs = _slugs(listing)
        if SLUG not in slugs:
            raise UserError(f"{listing} names the sockets {slugs}; expected {SLUG}; submit to a phase with that socket")
    folder = input_dir / "images" / SLUG
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        raise UserError(f"no folder {folder}; expected it to hold the stack; check the input") from None
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    if len(images) != 1:
        found = f"{len(images)} images" if images else f"no image among {len(names)} files"
        raise UserError(f"{found} in {folder}; expected exactly one of {', '.join(SUFFIXES)}; check the input")
    return folder / images[0]


def _slugs(listing: Path) -> list[str]:
    try:
        values = json.loads(listing.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{listing} cannot be read ({error}); expected a JSON list of socket values") from None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise UserError(f"{listing} holds a {type(values).__name__}; expected a JSON list of socket values; check the input")
    sockets = [value.get("socket") or value.get("interface") for value in values]
    return [str(socket.get("slug"))[:80] for socket in sockets if isinstance(socket, dict)]


def answers(p_atypical: Sequence[float], threshold: float) -> list[dict[str, Any]]:
    """One {"class", "confidence"} per page; confidence is P(atypical) whatever the class, at full precision."""
    return [{"class": CLASSES[p >= threshold], "confidence": float(p)} for p in p_atypical]


def check_answers(found: Any, pages: int, threshold: float | None = None) -> None:
    """ValueError unless `found` is what the evaluator accepts for `pages` pages, and class follows `threshold`."""
    if not isinstance(found, list) or len(found) != pages:
        raise ValueError(f"found {len(found) if isinstance(found, list) else type(found).__name__} answers for {pages} pages")
    for page, answer in enumerate(found):
        if not isinstance(answer, dict) or set(answer) != {"class", "confidence"}:
            raise ValueError(f"page {page}: found {answer!r:.80}; expected class and confidence")
        label, p = answer["class"], answer["confidence"]
        if label not in CLASSES:
            raise ValueError(f"page {page}: class is {label!r:.80}; expected normal or atypical")
        if type(p) is not float or not math.isfinite(p) or not 0 <= p <= 1:
            raise ValueError(f"page {page}: confidence is {p!r:.80}; expected a float in [0, 1]")
        if threshold is not None and label != CLASSES[p >= threshold]:
            raise ValueError(f"page {page}: class {label} contradicts confidence {p} at threshold {threshold}")


def write_answers(output_dir: Path, p_atypical: Sequence[float], threshold: float) -> Path:
    """Check and write the answers: the whole file or none, under a name that nobody reads until it is complete."""
    content = answers(p_atypical, threshold)
    text = json.dumps(content, allow_nan=False, indent=1)
    check_answers(json.loads(text), len(p_atypical), threshold)
    file = output_dir / OUTPUT
    partial = output_dir / f".{OUTPUT}.{os.getpid()}.partial"
    try:
        try:
            with partial.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror}); expected a writable folder with space; free it") from None
    return file
