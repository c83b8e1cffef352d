"""Checks of the values in `ensemble.json`: each says whether a value is right, or raises the one-line error.

Standard library only: a job reads the manifest while PyTorch is still being imported.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from .errors import UserError


def check(file: Path, key: str, value: Any, kind: Any, accepts: Any) -> None:
    """UserError unless `value` is a `kind` that `accepts`, a predicate or a tuple of what is allowed, lets through."""
    right = is_number(value) if kind is float else isinstance(value, kind)
    if right and callable(accepts):
        right = accepts(value)
    elif right and accepts:
        right = value in accepts
    if not right:
        wanted = f"one of {', '.join(accepts)}" if isinstance(accepts, tuple) else f"a valid {kind.__name__}"
        raise UserError(f"{file}: {key} is {value!r:.80}; expected {wanted}; export the ensemble again")


def is_title(text: str) -> bool:
    """Whether an ensemble may be called so: it is printed in logs, and names the files of an export."""
    return text.isprintable() and 0 < len(text) <= 100 and "/" not in text and not text.startswith(".")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_share(value: Any) -> bool:
    return is_number(value) and 0 < value <= 1


def is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_side(value: Any) -> bool:
    return is_whole(value, 8, 4096)


def is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(is_number, value))


def is_plain_name(name: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name))  # cannot lead out of the folder


def is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
