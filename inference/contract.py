"""The platform's contract: where to find the stack, and what the answers must look like.

Sources: Grand Challenge's `inputs.json` (socket values) and the evaluator of MIDOG 2025 Track 2, which rejects a whole
submission over one answer of the wrong length, an unknown class or a confidence that is not a JSON float.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import read_json, write_whole
from .phase import PHASE

SLUG, OUTPUT, SUFFIXES = PHASE.slug, PHASE.output, PHASE.suffixes


def find_stack(input_dir: Path) -> Path:
    """The job's one image in `input_dir`, identified only by its folder and suffix.

    If `inputs.json` exists, it must be a list of objects whose `socket` or `interface` may have a `slug`; nothing else
    in it is used. Hidden files are ignored. `input_dir` may be a link, but no link inside it may lead out of it.
    UserError if the listing names only other sockets, or if there is not exactly one image.
    """
    folder = input_dir / "images" / SLUG
    try:
        _check_socket(input_dir / "inputs.json", input_dir)
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        images = [name for name in names if name.lower().endswith(SUFFIXES)]
        if len(images) != 1:
            counted = f"{len(images)} images" if images else f"no image among {len(names)} files"
            raise UserError(f"{counted} in {folder}; expected exactly one of {', '.join(SUFFIXES)}; check the input")
        _check_inside(folder / images[0], input_dir)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror}); expected the stack in it; check the input"
        ) from None
    return folder / images[0]


def _check_inside(file: Path, input_dir: Path) -> None:
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(input_dir)):
        raise UserError(f"{file} is a link that leads out of {input_dir}; expected a file in it; copy the file")


def _check_socket(listing: Path, input_dir: Path) -> None:
    """UserError if `listing` is damaged, or names sockets but not the stack's.

    A list that names no socket is accepted: the platform has renamed the key before, and the folder identifies the
    stack just as well.
    """
    _check_inside(listing, input_dir)
    do = "check that it is the platform's"
    try:
        values = read_json(listing, do)
    except FileNotFoundError:
        return
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise UserError(f"{listing} is not a list of objects; expected one object per socket; {do}")
    sockets = [value.get(key) for value in values for key in ("socket", "interface")]
    slugs = [socket["slug"] for socket in sockets if isinstance(socket, dict) and isinstance(socket.get("slug"), str)]
    if slugs and SLUG not in slugs:
        raise UserError(
            f"{listing} names the sockets {slugs[:4]!r:.200}; expected {SLUG}; submit to a phase with that socket"
        )


def check_pages(stack: Path, pages: int) -> None:
    """UserError unless the phase allows a stack of so many pages."""
    fewest, most = PHASE.pages
    if not fewest <= pages <= most:
        raise UserError(f"{stack} has {pages} pages; expected {fewest} to {most} in {PHASE.name}; check the input")


def answers(p_atypical: Sequence[float], threshold: float) -> list[dict[str, Any]]:
    """One {"class", "confidence"} per page; confidence is the phase's P(positive), at full precision."""
    confidences = [PHASE.confidence(p) for p in p_atypical]
    return [{"class": PHASE.class_of(p, threshold), "confidence": p} for p in confidences]


def check_answers(answers: Any, pages: int, threshold: float | None = None) -> None:
    """ValueError unless the evaluator accepts `answers` for `pages` pages and each class follows from `threshold`."""
    if not isinstance(answers, list) or len(answers) != pages:
        raise ValueError(
            f"found {len(answers) if isinstance(answers, list) else type(answers).__name__} answers for {pages} pages"
        )
    for page, answer in enumerate(answers):
        if not isinstance(answer, dict) or set(answer) != {"class", "confidence"}:
            raise ValueError(f"page {page}: found {answer!r:.80}; expected class and confidence")
        label, p = answer["class"], answer["confidence"]
        if label not in PHASE.classes:
            raise ValueError(f"page {page}: class is {label!r:.80}; expected {' or '.join(PHASE.classes)}")
        if type(p) is not float or not math.isfinite(p) or not 0 <= p <= 1:
            raise ValueError(f"page {page}: confidence is {p!r:.80}; expected a float in [0, 1]")
        if threshold is not None and label != PHASE.class_of(p, threshold):
            raise ValueError(f"page {page}: class {label} contradicts confidence {p} at threshold {threshold}")


def write_answers(output_dir: Path, p_atypical: Sequence[float], threshold: float) -> Path:
    """Check the answers and write them atomically; no other file is left behind, however the process ends."""
    content = answers(p_atypical, threshold)
    text = json.dumps(content, allow_nan=False, indent=1)
    check_answers(json.loads(text), len(p_atypical), threshold)
    file = output_dir / OUTPUT
    try:
        write_whole(file, text, sync=True)
    except OSError as error:
        advice = "free some space" if error.errno == errno.ENOSPC else "create it, or make it writable"
        raise UserError(
            f"cannot write {file} ({error.strerror}); expected a writable folder with space; {advice}"
        ) from None
    return file


def remove_answers(output_dir: Path) -> None:
    """Remove an earlier job's answers, so that a failed job leaves none. UserError if they cannot be removed."""
    try:
        (output_dir / OUTPUT).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot remove the old {output_dir / OUTPUT} ({error.strerror}); expected a writable folder; remove it"
        ) from None
