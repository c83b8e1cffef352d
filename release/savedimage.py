"""Reads what `docker save` wrote, in one pass over the file: manifest, configuration, files of the layers."""

from __future__ import annotations

import json
import lzma
import posixpath
import stat
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

JSON_BYTES = 8 * 2**20
UNREADABLE = (EOFError, zlib.error, OSError, lzma.LZMAError, tarfile.TarError, MemoryError)


@dataclass
class Layer:
    """Files that one layer adds ({path: tar entry}), and the text of its passwd and group."""

    files: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


@dataclass
class SavedImage:
    """Content of a tarball: all member names, the parsed JSON members, the layers by member name."""

    names: list[str] = field(default_factory=list)
    documents: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)

    def root(self, names: list[str]) -> Layer:
        """The image's file system: the named layers laid over each other, whiteouts applied."""
        root = Layer()
        for name in names:
            layer = self.layers.get(self.links.get(name, name), Layer())
            for path in layer.files:
                folder, base = posixpath.split(path)
                if base == ".wh..wh..opq":
                    hidden = f"{folder}/"
                elif base.startswith(".wh."):
                    hidden = posixpath.join(folder, base[4:])
                else:
                    continue
                for old in [old for old in root.files if old == hidden or old.startswith(hidden.rstrip("/") + "/")]:
                    del root.files[old]
            root.files |= {
                path: m for path, m in layer.files.items() if not posixpath.basename(path).startswith(".wh.")
            }
            texts = root.texts | layer.texts
            root.texts = {path: text for path, text in texts.items() if path in root.files}  # without those removed
        return root


def read_image(path: Path) -> SavedImage:
    """Reads the whole tarball, as the platform does.

    Raises: one of `UNREADABLE` when it cannot be decompressed or is cut short.
    """
    image = SavedImage()
    with tarfile.open(path, mode="r:*") as tar:
        for member in tar:
            image.names.append(member.name)
            if member.issym() or member.islnk():
                image.links[member.name] = posixpath.normpath(
                    posixpath.join(posixpath.dirname(member.name), member.linkname)
                    if member.issym()
                    else member.linkname
                )
            stream = tar.extractfile(member) if member.isreg() else None
            if stream is None:
                continue
            head = stream.read(1)
            stream.seek(0)
            if head in (b"{", b"[") and member.size < JSON_BYTES:
                try:
                    image.documents[member.name] = json.load(stream)
                except ValueError:
                    image.documents[member.name] = None
            elif member.size >= 512:
                layer = read_layer(stream)
                if layer is not None:
                    image.layers[member.name] = layer
            while stream.read(2**20):  # a truncated file is noticed here, not in the list of members
                pass
    return image


def read_layer(stream: IO[bytes]) -> Layer | None:
    """Lists a layer's files; None when the member is no tar archive (none, gzip, bz2 or xz compressed)."""
    layer = Layer()
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as tar:
            for entry in tar:
                path = entry.name.removeprefix("./").rstrip("/")
                layer.files[path] = entry
                text = tar.extractfile(entry) if path in ("etc/passwd", "etc/group") and entry.isreg() else None
                if text is not None:
                    layer.texts[path] = text.read().decode("utf-8", errors="replace")
    except tarfile.ReadError:
        if not layer.files:
            return None
        raise
    return layer


def find_file(files: dict[str, tarfile.TarInfo], path: str, depth: int = 20) -> tarfile.TarInfo | None:
    """The entry that an absolute path of the image leads to, symbolic links followed; None when there is none."""
    parts = [part for part in posixpath.normpath(path).split("/") if part]
    walked = ""
    for index, part in enumerate(parts):
        walked = posixpath.join(walked, part)
        entry = files.get(walked)
        if entry is not None and entry.issym():
            target = posixpath.join("/", posixpath.dirname(walked), entry.linkname, *parts[index + 1 :])
            return find_file(files, target, depth - 1) if depth else None
        if entry is not None and entry.islnk() and index == len(parts) - 1:
            return find_file(files, entry.linkname, depth - 1) if depth else None
    return files.get(walked)


def executable(entry: tarfile.TarInfo | None) -> bool:
    """True for a regular file that everybody may execute."""
    return entry is not None and entry.isreg() and bool(entry.mode & stat.S_IXOTH)
