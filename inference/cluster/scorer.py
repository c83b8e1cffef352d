"""Scores shards: the worker of `cluster`.

It writes a shard's answers to one Parquet file (results.py) and returns their number to the driver. It reads its shard
as a stream, decodes in threads ahead of the network, and holds one or two chunks of crops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from ..answers import Answer
from ..errors import UserError
from .records import Chunk, Read, read_shard, texts
from .results import Error, Results, table_of
from .shards import UNREADABLE, Shard, masked, one_line
from .worker import Unusable, Worker

if TYPE_CHECKING:
    import numpy as np

    from ..ensemble import Prediction

Decoded = tuple[Chunk, list["Future[Read]"]]


class Counts(NamedTuple):
    """Answers of a shard."""

    crops: int
    atypical: int


class ShardScorer(Worker):
    def __init__(self, output: str, *settings: Any) -> None:
        """output: folder or URI of the run's results; settings: of `Worker`."""
        super().__init__(*settings)
        self.output = output

    @cached_property
    def results(self) -> Results:
        """Unusable where this machine does not see the run's output."""
        try:
            return Results(self.output, expected=True)
        except UserError as error:
            raise Unusable(str(error)) from None

    def work(self, piece: Shard) -> Counts:
        """Unusable where the results cannot be written."""
        try:
            return self.score(piece)
        except OSError as error:
            raise Unusable(
                f"{masked(self.output)} cannot be written ({one_line(error)}); the same command resumes when it can"
            ) from None

    def give_up(self, piece: Shard, error: Exception) -> None:
        with contextlib.suppress(Exception):
            self.results.note(piece.name, [(piece.shown, None, f"{type(error).__name__}: {one_line(error)}")])

    def score(self, shard: Shard) -> Counts:
        """A shard that cannot be read to its end gets an error and no answers."""
        tables: list[pa.Table] = []
        errors: list[Error] = []
        try:
            for (records, metadata), futures in self.decoded(shard):
                pages: list[Answer] = []
                crops, rows = [], []
                for n, (record, future) in enumerate(zip(records, futures, strict=True)):
                    try:
                        image = future.result()
                        for page, crop in image.crops:
                            pages.append(Answer(record.path, page, 0.0, (), pages=image.pages, content=image.content))
                            crops.append(crop)
                            rows.append(n)
                    except UserError as error:
                        errors.append((record.path, record.page, str(error)))
                answers = Answer.of(self.predict(crops), pages) if crops else []
                theirs = metadata.take(pa.array(rows, pa.int64())) if metadata.num_columns else metadata
                tables.append(table_of(answers, self.manifest, self.computed, theirs))
        except UNREADABLE as error:
            damage = f"cannot be read to its end ({one_line(error)}); expected it whole; write it again"
            reason = str(error) if isinstance(error, UserError) else damage
            self.results.note(shard.name, [*errors, (shard.shown, None, reason)])
            return Counts(0, 0)
        if not tables:  # an empty archive
            tables = [table_of([], self.manifest, self.computed, texts([]))]
        table = pa.concat_tables(tables, promote_options="default")
        if shard.kind == "files" and not len(table):  # a folder that is not mounted here looks like this too
            self.results.note(shard.name, errors)
            return Counts(0, 0)
        self.results.finish(shard.name, table, errors)
        return Counts(len(table), sum(name == "atypical" for name in table["class"].to_pylist()))

    def predict(self, crops: list[np.ndarray]) -> Prediction:
        try:
            return self.ensemble.predict(crops)
        except UserError as error:
            raise Unusable(str(error)) from None

    def decoded(self, shard: Shard) -> Iterator[Decoded]:
        """Chunks with futures of their crops: one is read and one decoded while the caller predicts."""
        chunks = read_shard(shard)
        coming = self.pool.submit(next, chunks, None)
        waiting: Decoded | None = None
        while (chunk := coming.result()) is not None:
            coming = self.pool.submit(next, chunks, None)
            following = chunk, [self.pool.submit(record.read) for record in chunk[0]]
            if waiting:
                yield waiting
            waiting = following
        if waiting:
            yield waiting
