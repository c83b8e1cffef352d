"""SHA-256 of an ensemble's files, checked against its manifest before anything is computed. Standard library only."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from .errors import UserError
from .manifest import FILE, Manifest

ID_LENGTH = 12  # characters of the manifest's hash that identify the ensemble in answers


def sha256(file: Path) -> str:
    """SHA-256 of a file in hex, computed in a single call on the mapped file.

    Such a call holds the interpreter lock only at its start and end. Hashing block by block would wait for the lock at
    every block while another thread imports PyTorch.
    """
    with file.open("rb") as stream:
        if not os.fstat(stream.fileno()).st_size:  # nothing to map
            return hashlib.sha256().hexdigest()
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return hashlib.sha256(content).hexdigest()


def ensemble_id(manifest: Manifest) -> str:
    """Identifies an ensemble in answers: the start of its manifest's SHA-256."""
    return sha256(manifest.folder / FILE)[:ID_LENGTH]


def check_hashes(files: Iterable[tuple[Path, str]]) -> None:
    """UserError if a file is missing or does not match its hash in the manifest."""
    for file, expected in files:
        try:
            found = sha256(file)
        except OSError as error:
            raise UserError(
                f"{file} cannot be read ({error.strerror}); expected the file that the manifest lists; copy it again"
            ) from None
        if found != expected:
            raise UserError(f"{file} has SHA-256 {found}; the manifest expects {expected}; copy the ensemble again")


def check_ensemble(manifest: Manifest) -> None:
    """`check_hashes` of every file of the ensemble, its bases included."""
    check_hashes([*manifest.files.items(), *manifest.bases.items()])


def start_checks(manifest: Manifest) -> list[Future[None]]:
    """Check all hashes in a thread, member by member: one future each, whose `result()` may raise UserError.

    A member's files are thus read and checked while the member before it computes.
    """
    bases = dict(manifest.bases)
    pool = ThreadPoolExecutor(1)
    futures = []
    for member in manifest.members:
        base = [(member.base, bases.pop(member.base))] if member.base in bases else []  # two members may share one
        futures.append(pool.submit(check_hashes, [*member.files.items(), *base]))
    pool.shutdown(wait=False)
    return futures
