"""Where an image's bytes come from: a file, or memory that acts like one."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True)
class Blob:
    """The content of an image file from a table, an archive or an object store.

    It has the methods of a Path that the readers call. `name` is shown in messages; its suffix identifies `.mha`.
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
