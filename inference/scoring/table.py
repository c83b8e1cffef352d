"""The CSV file that a scoring run writes as it goes, and that a rerun continues.

The columns are those of inference/answers.py. Probabilities have full precision. The last column
is the start of the manifest's SHA-256: rows of two ensembles never end up in one file unnoticed.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from ..answers import Answer, columns, fold_columns, member_columns
from ..checksums import ensemble_id
from ..errors import UserError
from ..labels import class_of
from ..manifest import Manifest


class Table:
    """`done` holds the rows found in the file, by path and page; `append` adds some and hands them to the disk."""

    def __init__(self, file: Path | None, manifest: Manifest, to_stdout: bool = False) -> None:
        """file: made where it does not exist, checked and resumed where it does; None writes nowhere, or to stdout."""
        self.threshold = manifest.threshold
        self.ensemble = ensemble_id(manifest)
        self.columns = columns(manifest)
        self.folds = slice(4, 4 + len(fold_columns(manifest)))
        self.members = slice(self.folds.stop, self.folds.stop + len(member_columns(manifest)))
        self.done: dict[str, dict[int, Answer]] = {}
        self.last = ""  # the last row's path: its file may have more pages than were written
        self.stream: IO[str] | None = sys.stdout if to_stdout else None
        fresh = True
        if file is not None:
            try:
                fresh = not file.exists() or not self._cut(file)
                if not fresh:
                    self._read(file)
                self.stream = file.open("a", newline="", encoding="utf-8", errors="surrogateescape")
            except OSError as error:
                raise UserError(f"{file} cannot be written ({error.strerror}); name another file") from None
        if fresh:
            self._write([self.columns])

    def _cut(self, file: Path) -> bool:
        """Cut off a last line without an end, which a stopped run leaves; returns whether a header is left.

        Only in a file with this ensemble's own columns: whatever else `file` may be is refused as it is.
        """
        header = (",".join(self.columns) + "\n").encode()
        with file.open("r+b") as stream:
            start = stream.read(len(header))
            if start != header[: len(start)]:
                shown = start.split(b"\n")[0].decode(errors="replace")
                raise UserError(f"{file} begins with {shown!r}; expected {header.decode()!r}; name another CSV file")
            end = stream.seek(0, os.SEEK_END) if start == header else 0
            while end:
                begin = max(0, end - 65536)
                stream.seek(begin)
                block = stream.read(end - begin)
                end = begin
                if b"\n" in block:
                    end = begin + block.rindex(b"\n") + 1
                    break
            stream.truncate(end)
        return end > 0

    def _read(self, file: Path) -> None:
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
            lines = csv.reader(stream)
            next(lines)
            for number, line in enumerate(lines, 2):
                if len(line) != len(self.columns) or line[-1] != self.ensemble:
                    raise UserError(f"{file}, row {number} ends in {line[-1:]}; expected ensemble {self.ensemble}; "
                                    "name another CSV file, or choose its ensemble with --weights")  # fmt: skip
                try:
                    folds, members = (tuple(map(float, line[part])) for part in (self.folds, self.members))
                    row = Answer(line[0], int(line[1]), float(line[2]), folds, members)
                except ValueError as error:
                    raise UserError(f"{file}, row {number} is damaged ({error}); remove that row") from None
                self.done.setdefault(row.path, {})[row.page] = row
                self.last = row.path

    def append(self, rows: Sequence[Answer]) -> None:
        lines = []
        for row in rows:
            cells: list[Any] = [row.path, row.page, repr(row.p_atypical), class_of(row.p_atypical, self.threshold)]
            members = row.member_p if self.members.stop > self.members.start else ()
            lines.append([*cells, *map(repr, (*row.fold_p, *members, row.spread)), self.ensemble])
        self._write(lines)

    def _write(self, lines: list[list[Any]]) -> None:
        if self.stream is not None:
            csv.writer(self.stream, lineterminator="\n").writerows(lines)
            self.stream.flush()
