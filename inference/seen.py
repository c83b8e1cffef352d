"""Which crops an ensemble was trained on, known by their pixels: `seen.txt` in its folder, 13 bytes a crop.

Its first line names the table of crops as `data.sha256` of the manifest's provenance does, so that a list of other data
is not taken for this ensemble's. Then follows the start of each crop's `pixel_hash`, sorted. A copy that was saved
again without loss is known, one that was turned, resized or compressed is not. Standard library only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError
from .files import write_whole
from .manifest import Manifest

if TYPE_CHECKING:
    import numpy as np

SEEN = "seen.txt"
DIGITS = 12  # two of a million crops agree in them once in 500 such sets
HEAD = "pixels of the crops of table "


def pixel_hash(crop: np.ndarray) -> str:
    """SHA-256 of a crop's size and pixels, uint8 (H, W, 3), whatever file it was read from."""
    return hashlib.sha256(repr(crop.shape).encode() + crop.tobytes()).hexdigest()


def write_seen(folder: Path, table: str, pixels: Iterable[str]) -> None:
    """table: SHA-256 of the table of crops; pixels: the `pixel_hash` of each."""
    lines = sorted({digest[:DIGITS] for digest in pixels})
    write_whole(folder / SEEN, "\n".join([HEAD + table, *lines]) + "\n")


class Seen:
    """The crops that an ensemble was trained on."""

    def __init__(self, starts: frozenset[str]) -> None:
        """starts: of their pixel hashes"""
        self.starts = starts

    def __contains__(self, crop: np.ndarray) -> bool:
        return pixel_hash(crop)[:DIGITS] in self.starts

    def __len__(self) -> int:
        return len(self.starts)


def load_seen(manifest: Manifest) -> Seen | None:
    """None where the ensemble's folder does not say. UserError where it says so of other data, or is damaged."""
    file = manifest.folder / SEEN
    try:
        head, *lines = file.read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); expected a list of crops; copy the ensemble again") from None
    members = manifest.provenance.get("members", {}).values()
    tables = {HEAD + str(member.get("data", {}).get("sha256")) for member in members}
    if head not in tables:
        raise UserError(f"{file} is of other crops than {manifest.name}; expected its own; copy the ensemble again")
    if not all(re.fullmatch(rf"[0-9a-f]{{{DIGITS}}}", line) for line in lines):
        raise UserError(f"{file} is damaged; expected {DIGITS} hexadecimal digits a line; copy the ensemble again")
    return Seen(frozenset(lines))
