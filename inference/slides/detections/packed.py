"""The objects of a slide in little memory: a million points of QuPath take some 60 MB, and 2 GB as Python's objects."""

from __future__ import annotations

import marshal
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, overload

from ...errors import UserError
from .objects import LEVEL_0, Feature, Frame

BLOCK = 512  # objects that are compressed together


class Source(NamedTuple):
    """What objects share. own_geometry: it is QuPath's and is kept; otherwise it was made here, in the file's frame."""

    file: Path
    frame: Frame = LEVEL_0
    own_geometry: bool = True


class Target(NamedTuple):
    """An object to score. x, y: its centre as its file counts (`source.frame`).

    block, at: the compressed features of some objects, and which of them is its own
    """

    source: Source
    where: str
    x: float
    y: float
    block: bytes | list[bytes]
    at: int

    @property
    def feature(self) -> Feature:
        """All that the file says about it: a new copy each time."""
        packed = self.block if isinstance(self.block, list) else unpacked(self.block)
        feature: Feature = marshal.loads(packed[self.at])
        return feature

    @property
    def file(self) -> Path:
        return self.source.file

    @property
    def frame(self) -> Frame:
        return self.source.frame

    @property
    def name(self) -> str:
        return f"{self.file}, {self.where}"

    @property
    def id(self) -> str:
        """As the file has it: no identity, for some programs give many objects the same."""
        return str(self.feature.get("id", ""))


Row = tuple[str, float, float, int]  # where, x, y, number of the source


class Targets(Sequence[Target]):
    """Objects in the order in which they are appended. Full blocks of them are compressed, their features apart."""

    def __init__(self) -> None:
        self.sources: dict[Source, int] = {}  # by number; sources differ little, so this is short
        self.source: Source | None = None  # of the last object, and its number
        self.number = 0
        self.rows: list[bytes] = []
        self.features: list[bytes] = []
        self.last_rows: list[Row] = []
        self.last_features: list[bytes] = []

    def append(self, source: Source, where: str, x: float, y: float, feature: Feature) -> None:
        """UserError where the feature is nested too deeply."""
        try:
            packed = marshal.dumps(feature)
        except ValueError as error:
            raise UserError(f"it is not as JSON allows ({error}); expected fewer levels") from None
        if source is not self.source:
            self.source, self.number = source, self.sources.setdefault(source, len(self.sources))
        self.last_rows.append((where, x, y, self.number))
        self.last_features.append(packed)
        if len(self.last_rows) == BLOCK:
            self.rows.append(compressed(self.last_rows))
            self.features.append(compressed(self.last_features))
            self.last_rows, self.last_features = [], []

    def chosen(self, numbers: Iterable[int]) -> Targets:
        """Some of them: whoever uses these alone has not to unpack all."""
        some = Targets()
        for target in map(self.__getitem__, numbers):
            some.append(target.source, target.where, target.x, target.y, target.feature)
        return some

    def __len__(self) -> int:
        return BLOCK * len(self.rows) + len(self.last_rows)

    def __iter__(self) -> Iterator[Target]:
        sources = list(self.sources)
        blocks: list[bytes | list[bytes]] = [*self.features, self.last_features]
        for n, features in enumerate(blocks):
            for at, (where, x, y, source) in enumerate(self.block(n)):
                yield Target(sources[source], where, x, y, features, at)

    def block(self, n: int) -> list[Row]:
        return unpacked(self.rows[n]) if n < len(self.rows) else self.last_rows

    @overload
    def __getitem__(self, n: int) -> Target: ...
    @overload
    def __getitem__(self, n: slice) -> list[Target]: ...
    def __getitem__(self, n: int | slice) -> Target | list[Target]:
        if isinstance(n, slice):
            return [self[each] for each in range(*n.indices(len(self)))]
        block, at = divmod(range(len(self))[n], BLOCK)
        where, x, y, source = self.block(block)[at]
        features = self.features[block] if block < len(self.features) else self.last_features
        return Target(list(self.sources)[source], where, x, y, features, at)


def compressed(values: list[Any]) -> bytes:
    return zlib.compress(marshal.dumps(values), 1)


@lru_cache(8)
def unpacked(block: bytes) -> list[Any]:
    """What was compressed; the last few blocks are kept, for objects are used in their order."""
    values: list[Any] = marshal.loads(zlib.decompress(block))
    return values
