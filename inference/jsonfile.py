"""Read a JSON file that somebody else wrote: bounded, regular, UTF-8. Standard library only."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from .errors import UserError

LIMIT = 8 << 20  # bytes; the platform's own files have a few thousand


def read_json(file: Path, do: str, limit: int = LIMIT) -> Any:
    """The value in `file`, a byte-order mark allowed. UserError that ends with `do` for all else that may lie there.

    FileNotFoundError passes through: what a missing file means is the caller's to say.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device never end
            raise UserError(f"{file} is not a regular file; expected JSON; {do}")
        if status.st_size > limit:
            raise UserError(f"{file} has {status.st_size:,} bytes; expected at most {limit:,}; {do}")
        return json.loads(file.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); expected UTF-8 JSON; {do}") from None
