"""Parts of a history of runs: an ensemble that is killed on demand, and files that are hard to tell apart."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

import inference.ensemble as module
from inference.errors import UserError
from inference.exits import INCOMPLETE
from test.support import commands
from test.support.stub import StubEnsemble


class Killed(BaseException):
    """Ends a run as a kill would: nothing catches it."""


class Stub(StubEnsemble):
    """Its answers depend on the precision and the ensemble; it is killed after `left` predicted batches."""

    left = -1

    def __init__(self, manifest: Any, device: str, precision: str, **more: Any) -> None:
        super().__init__(manifest, device, precision, **more)
        self.precision = precision
        self.shift = 0.1 * (precision == "bf16") + 0.2 * manifest.threshold

    def predict(self, crops: list[np.ndarray]) -> Any:
        if Stub.left == 0:
            raise Killed
        Stub.left -= 1
        found = super().predict(crops)
        for values in (found.p_atypical, found.member_p, found.fold_p):
            values *= 0.5
            values += self.shift
        return found


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    with mock.patch.object(module, "Ensemble", Stub):
        yield


def image(level: int, pages: int) -> bytes:
    """All files with the same number of pages have the same size: they are uncompressed, and differ in grey level."""
    images = [Image.fromarray(np.full((2, 2, 3), level + 3 * page, np.uint8)) for page in range(pages)]
    stream = io.BytesIO()
    images[0].save(stream, "TIFF", save_all=True, append_images=images[1:])
    return stream.getvalue()


def outcome(*words: object) -> tuple[int | None, str]:
    """Of a command of `python -m inference`: exit code and stderr; where it refused, None and why."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = commands.inference(*words)
        except UserError as error:
            return None, str(error)
    assert code in (0, INCOMPLETE)
    return code, said.getvalue()
