"""The CSV file that a scoring run writes as it goes, and that a rerun resumes.

The columns are those of inference/answers.py. Rows are added as they are computed: a run that is killed loses little.
A rerun reuses the rows that still hold, and leaves the file as one uninterrupted run would have written it.
"""

from __future__ import annotations

import csv
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from ..answers import CONTENT, Answer, Computed, columns, fold_columns, member_columns
from ..errors import UserError
from ..files import claim, replacing
from ..imageio.listing import Item
from ..manifest import Manifest

Key = tuple[str, int, str]  # path, page, content


def key_of(row: Answer) -> Key:
    return row.path, row.page, row.content


class AnswerTable:
    """`done` holds the rows found in the file, by path and content, then by page; `append` writes more to disk."""

    def __init__(self, file: Path | None, manifest: Manifest, computed: Computed, to_stdout: bool = False) -> None:
        """file: created, or checked and resumed if it exists; None writes nowhere, or to stdout.

        computed: of this run. UserError where the file holds anything else.
        """
        self.file = file.resolve() if file else None  # a link stays, and its target is replaced
        self.threshold = manifest.threshold
        self.columns = columns(manifest)
        self.folds = slice(5, 5 + len(fold_columns(manifest)))
        self.members = slice(self.folds.stop, self.folds.stop + len(member_columns(manifest)))
        self.computed = computed
        self.done: dict[tuple[str, str], dict[int, Answer]] = {}
        self.keys: list[Key] = []  # of all rows in the file, in its order
        self.stream: IO[str] | None = sys.stdout if to_stdout else None
        fresh = True
        if self.file is not None:
            try:
                self.stream = self._open(self.file)
                fresh = not self._cut(self.file)
                if not fresh:
                    self._read(self.file)
            except OSError as error:
                raise UserError(f"{file} cannot be written ({error.strerror}); name another file") from None
        if fresh:
            self._write([self.columns])

    def _open(self, file: Path) -> IO[str]:
        """The file, made where it does not exist, for this run alone."""
        if file.exists() and not stat.S_ISREG(file.stat().st_mode):
            raise UserError(f"{file} is not a regular file; expected a CSV file; name another")
        stream = file.open("a", newline="", encoding="utf-8", errors="surrogateescape")
        claim(stream, file)
        return stream

    def _cut(self, file: Path) -> bool:
        """Cut off a last row without an end, which a stopped run leaves; returns whether a header is left.

        Only in a file with this ensemble's own columns: any other file is refused, and left as it is.
        """
        header = (",".join(self.columns) + "\n").encode()
        end = position = quotes = 0
        with file.open("r+b") as stream:
            start = stream.read(len(header))
            if start != header[: len(start)]:
                shown = start.split(b"\n")[0].decode(errors="replace")
                raise UserError(f"{file} begins with {shown!r}; expected {header.decode()!r}; name another CSV file")
            stream.seek(0)
            for line in stream:
                position, quotes = position + len(line), quotes + line.count(b'"')
                if line.endswith(b"\n") and quotes % 2 == 0:  # a newline inside quotes is part of a file's name
                    end = position
            stream.truncate(end)
        return end > 0

    def _read(self, file: Path) -> None:
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
            lines = csv.reader(stream)
            next(lines)
            try:
                for line in lines:
                    row = self._parse(line)
                    self._expect(file, Computed(*line[-3:]))
                    self.keys.append(key_of(row))
                    self.done.setdefault((row.path, row.content), {})[row.page] = row
            except (ValueError, csv.Error) as error:
                number = len(self.keys) + 2
                raise UserError(f"{file}, row {number} is damaged ({error}); expected a result; remove it") from None

    def _parse(self, line: list[str]) -> Answer:
        """ValueError for anything but a row that `append` may have written."""
        if len(line) != len(self.columns):
            raise ValueError(f"{len(line)} fields instead of {len(self.columns)}")
        folds, members = (tuple(map(float, line[part])) for part in (self.folds, self.members))
        p, page, pages, content = float(line[3]), int(line[1]), int(line[2]), line[-4]
        if not (all(0 <= share <= 1 for share in (p, *folds, *members)) and 0 <= page < pages):
            raise ValueError("a probability or a page is out of range")
        if not CONTENT.fullmatch(content):
            raise ValueError(f"content {content!r:.80}")
        return Answer(line[0], page, p, folds, members, pages=pages, content=content)

    def _expect(self, file: Path, past: Computed) -> None:
        ours = self.computed
        if past == ours:
            return
        if past.ensemble != ours.ensemble:
            raise UserError(
                f"{file} holds answers of ensemble {past.ensemble}; expected ensemble {ours.ensemble}; name another "
                "CSV file, or choose its ensemble with --weights"
            )
        raise UserError(
            f"{file} was computed on {past.device} in {past.precision}; expected {ours.device} in {ours.precision}, "
            "as this run computes; name another CSV file, or choose them with --device and --precision"
        )

    def check_named(self, items: Sequence[Item], folders: Sequence[Path]) -> None:
        """UserError where the file holds answers that `items` do not ask for.

        Answers of a file that has gone from one of the `folders` that were read are not compared.
        """
        whole = {item.path for item in items if item.page is None}
        pages = {(item.path, item.page) for item in items}
        others = {path: page for path, page, _ in self.keys if path not in whole and (path, page) not in pages}
        for path, page in others.items():
            if os.path.lexists(path) or not any(Path(path).is_relative_to(folder) for folder in folders):
                raise UserError(
                    f"{self.file} holds answers that this command does not ask for, such as page {page} of {path}; "
                    "expected none; name these crops too, remove their rows, or name another CSV file"
                )

    def append(self, rows: Sequence[Answer]) -> None:
        self.keys += map(key_of, rows)
        self._write(map(self._cells, rows))

    def settle(self, rows: Sequence[Answer]) -> int:
        """Leave exactly `rows` in the file, in their order; returns how many rows it held that no longer apply."""
        wanted = list(map(key_of, rows))
        if self.file is not None and self.keys != wanted:
            try:
                with replacing(self.file, sync=True) as partial:
                    with partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as self.stream:
                        self._write([self.columns])
                        self._write(map(self._cells, rows))
                    partial.chmod(stat.S_IMODE(self.file.stat().st_mode))
            except OSError as error:
                raise self._unwritable(error) from None
        return len(set(self.keys).difference(wanted))

    def _unwritable(self, error: OSError) -> UserError:
        where = self.file or "stdout"
        return UserError(f"{where} cannot be written ({error.strerror}); expected a file with space left; run it again")

    def _cells(self, row: Answer) -> list[str]:
        cells = row.cells(self.threshold, self.computed)
        return [quoted(cell) if isinstance(cell, str) else repr(cell) for cell in cells]

    def _write(self, lines: Iterable[Sequence[str]]) -> None:
        if self.stream is None:
            return
        try:
            self.stream.writelines(",".join(cells) + "\n" for cells in lines)
            self.stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._unwritable(error) from None


def quoted(text: str) -> str:
    """A cell with any file's name; the csv module leaves a carriage return bare, and reads it as a row's end."""
    return '"' + text.replace('"', '""') + '"' if any(letter in text for letter in ',"\r\n') else text
