"""Unpacks a model tarball as the platform does, whose `tarfile` filter is "data".

Standard library and nothing of this project: the harness copies this file beside its stand-in for the platform's entry
shim, into images with any Python 3.
"""

from __future__ import annotations

import lzma
import os
import tarfile
import zlib


class SetupError(Exception):
    """An error before the program starts; the platform ends the job with its message."""


def leads_out(path: str) -> bool:
    """Whether a normalised relative path leaves its folder; `..data` is an ordinary name."""
    return path == ".." or path.startswith("../")


def unsafe(member: tarfile.TarInfo) -> str | None:
    """Why `filter="data"` refuses a member, or None; written out because Python before 3.11.4 has no such filter."""
    path = os.path.normpath(member.name.lstrip("/"))
    if leads_out(path):
        return f"{member.name} lies outside the destination"
    if member.issym() or member.islnk():
        target = member.linkname if member.islnk() else os.path.join(os.path.dirname(path), member.linkname)
        if os.path.isabs(member.linkname) or leads_out(os.path.normpath(target)):
            return f"{member.name} links to {member.linkname}, outside the destination"
    elif not (member.isreg() or member.isdir()):
        return f"{member.name} is a special file"
    return None


def unpack(source: str, target: str) -> None:
    """Unpacks `source`, plain or compressed with gzip or xz, into `target` as `filter="data"` does.

    Raises SetupError where that refuses it.
    """
    try:
        with tarfile.open(source) as tar:
            for member in tar:
                reason = unsafe(member)
                if reason:
                    raise tarfile.TarError(reason)
                member.name = member.name.lstrip("/")
                member.mode = member.mode & 0o755 | (0o700 if member.isdir() else 0o600)
                tar.extract(member, target)
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise SetupError(f"Could not set up model: Tarfile could not be extracted ({error})") from error
