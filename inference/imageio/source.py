"""Where an image's bytes come from: a file, or memory that stands in for one."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True)
class Blob:
    """The content of an image file that lies in a table, an archive or an object store instead of a folder.

    It has those methods of a path that the readers call. `name` is for messages, and its suffix for `.mha`.
    """

    name: str
    content: bytes

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def stat(self) -> os.stat_result:
        return os.stat_result((stat.S_IFREG, 0, 0, 1, 0, 0, len(self.content), 0, 0, 0))

    def open(self, mode: str = "rb") -> BinaryIO:
        return io.BytesIO(self.content)

    def read_bytes(self) -> bytes:
        return self.content


File = Path | Blob
