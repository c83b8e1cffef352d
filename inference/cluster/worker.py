"""Scores shards on a cluster: an actor holds the ensemble and takes one shard after another.

It gets a shard as JSON (shards.py), writes its answers to one Parquet file (results.py), and returns a row to the
driver. It reads its shard as a stream, decodes in threads ahead of the network, and holds one or two chunks of crops.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..checksums import check_ensemble
from ..errors import UserError
from ..manifest import Manifest
from .records import Chunk, Read, read_shard, texts
from .results import Error, Page, Results, answers
from .shards import UNREADABLE, Shard, masked, one_line

if TYPE_CHECKING:
    import numpy as np

    from ..ensemble import Ensemble, Prediction

Decoded = tuple[Chunk, list["Future[Read]"]]


class Unusable(Exception):
    """The ensemble does not work here, whatever the shard."""


def load(manifest: Manifest, computed: tuple[str, str, str], precision: str, threads: int) -> Ensemble:
    """The ensemble in this process. UserError where this machine has another ensemble, device or precision.

    computed: device, precision and ensemble of the whole run; precision: the option's value, which may be `auto`.
    """
    import torch

    from ..ensemble import Ensemble

    torch.set_num_threads(threads)
    try:
        check_ensemble(manifest)
        ensemble = Ensemble(manifest, computed[0], precision)
    except OSError as error:
        raise UserError(
            f"the ensemble cannot be read on {platform.node()} ({one_line(error)}); copy it there"
        ) from None
    if ensemble.precision != computed[1]:
        raise UserError(
            f"{platform.node()} computes in {ensemble.precision}; expected {computed[1]}, as the others "
            "do; name one with --precision"
        )
    return ensemble


class Scorer:
    """An actor: the ensemble, loaded with its first shard."""

    def __init__(
        self, manifest: Manifest, computed: tuple[str, str, str], output: str, precision: str, threads: int
    ) -> None:
        """computed, precision: as `load`."""
        self.manifest, self.computed, self.output = manifest, computed, output
        self.precision, self.threads = precision, threads
        self.ensemble: Ensemble | None = None
        self.results: Results | None = None
        self.pool = ThreadPoolExecutor(max(2, threads))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """One shard, as JSON, to one row: crops, atypical, and the reason if the whole run has to stop."""
        shard = Shard(**json.loads(batch["shard"][0]))
        crops = atypical = 0
        stop = ""
        try:
            if self.results is None:
                self.results = Results(self.output, expected=True)
            if self.ensemble is None:
                self.ensemble = load(self.manifest, self.computed, self.precision, self.threads)
            crops, atypical = self.score(shard)
        except (UserError, Unusable) as error:
            stop = str(error)
        except OSError as error:
            stop = f"{masked(self.output)} cannot be written ({one_line(error)}); the same command resumes when it can"
        except Exception as error:  # unexpected, such as a lost GPU: another process may succeed
            traceback.print_exc()
            with contextlib.suppress(Exception):
                assert self.results is not None
                self.results.note(shard.name, [(shard.shown, None, f"{type(error).__name__}: {one_line(error)}")])
            os._exit(1)
        return {"shard": [shard.name], "crops": [crops], "atypical": [atypical], "stop": [stop]}

    def score(self, shard: Shard) -> tuple[int, int]:
        """Counts of crops and atypical ones. A shard that cannot be read to its end gets an error and no answers."""
        assert self.results is not None
        tables: list[pa.Table] = []
        errors: list[Error] = []
        try:
            for (records, metadata), futures in self.decoded(shard):
                pages: list[Page] = []
                crops, rows = [], []
                for n, (record, future) in enumerate(zip(records, futures, strict=True)):
                    try:
                        found = future.result()
                        for page, crop in found.crops:
                            pages.append(Page(record.path, page, found.pages, found.content))
                            crops.append(crop)
                            rows.append(n)
                    except UserError as error:
                        errors.append((record.path, record.page, str(error)))
                prediction = self.predict(crops) if crops else None
                tables.append(
                    answers(
                        pages,
                        prediction,
                        self.manifest,
                        self.computed,
                        metadata.take(pa.array(rows, pa.int64())) if metadata.num_columns else metadata,
                    )
                )
        except UNREADABLE as error:
            damage = f"cannot be read to its end ({one_line(error)}); expected it whole; write it again"
            reason = str(error) if isinstance(error, UserError) else damage
            self.results.note(shard.name, [*errors, (shard.shown, None, reason)])
            return 0, 0
        if not tables:  # an empty archive
            tables = [answers([], None, self.manifest, self.computed, texts([]))]
        table = pa.concat_tables(tables, promote_options="default")
        if shard.kind == "files" and not len(table):  # a folder that is not mounted here looks like this too
            self.results.note(shard.name, errors)
            return 0, 0
        self.results.finish(shard.name, table, errors)
        return len(table), sum(name == "atypical" for name in table["class"].to_pylist())

    def predict(self, crops: list[np.ndarray]) -> Prediction:
        assert self.ensemble is not None
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
