"""The answers of a run so far, for the next run of the same command: one line per batch, objects by content.

An object's key consists of everything that its answer depends on: the slide's content, the place, how the crop is cut,
the ensemble and the precision. So no answer can be stale: one that no longer applies is never found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from ..answers import Answer
from ..errors import UserError
from ..files import claim


def key(*what: object) -> str:
    return sha256(json.dumps([str(part) for part in what]).encode()).hexdigest()[:32]


class Journal:
    """`known` holds what earlier runs answered; `add` writes more, and flushes it at once."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, Answer] = {}
        self.stream = file.open("a+b")
        try:
            claim(self.stream, file)
        except UserError:
            self.stream.close()
            raise
        self.stream.seek(0)
        if self.stream.read(2) not in (b"", b"[", b"[["):
            self.stream.close()
            raise UserError(f"{file} holds something else; expected the answers of an earlier run; move it away")
        self.stream.seek(0)
        end = 0
        for line in self.stream:
            try:
                if not line.endswith(b"\n"):
                    break
                batch: dict[str, Answer] = {}
                for name, p, folds, members in json.loads(line):
                    batch[str(name)] = Answer("", 0, float(p), tuple(map(float, folds)), tuple(map(float, members)))
                self.known |= batch
            except (ValueError, TypeError):
                break  # cut off by a stop or a full disk: ignore the rest
            end += len(line)
        self.stream.truncate(end)

    def add(self, answers: Sequence[tuple[str, Answer]]) -> None:
        """A batch: after a crash all of it is known, or nothing."""
        if answers:
            batch = [(name, answer.p_atypical, answer.fold_p, answer.member_p) for name, answer in answers]
            self.stream.write(json.dumps(batch).encode() + b"\n")
            self.stream.flush()

    def remove(self) -> None:
        """Delete the file, after a run that has tried everything."""
        self.file.unlink(missing_ok=True)


@contextmanager
def journal(output: Path) -> Iterator[Journal]:
    """The journal beside `output`, locked for this run; without an answer nothing is left of it."""
    file = output.with_name(f".{output.name}.journal")
    try:
        opened = Journal(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); expected a writable folder") from None
    with opened.stream:
        try:
            yield opened
        finally:
            if not os.fstat(opened.stream.fileno()).st_size:
                opened.remove()
