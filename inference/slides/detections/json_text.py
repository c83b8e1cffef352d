"""JSON of which only a part is in memory: GeoJSON features are parsed one by one, when they are asked for.

Each value is parsed by the standard library's decoder, so the same is accepted as by `json.loads`, NaN (QuPath before
0.5) and lone surrogates among it, which strict parsers refuse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

DECODER = json.JSONDecoder()
SPACE, BLANK = re.compile(r"[ \t\n\r]*"), re.compile(r"[ \t]*")
GROWTH = 8  # times what is left of the text: so that a value as large as the file is parsed little more than once
TAIL = 3  # characters behind a value: 1 may be the beginning of 1e+5
HEAD = 10  # values of an array by which it is told what it holds


class Features(Iterable[Any]):
    """The features of a GeoJSON file, to be asked for once. ValueError, while they are, where the file is no JSON."""

    def __init__(self, values: Iterable[Any]) -> None:
        self.values = iter(values)

    def __iter__(self) -> Iterator[Any]:
        return self.values


def parse(pieces: Iterable[str]) -> Any:
    """A document, or the list of those on each line (NDJSON); Features where it is a collection or list of features.

    pieces: a text that begins with a bracket. ValueError or RecursionError where it is no JSON.
    """
    text = Text(pieces)
    if text.next() == "[":
        return listed(closed(text, text.elements()))
    document: dict[str, Any] = {}
    for key in text.members():
        if key == "features" and document.get("type") == "FeatureCollection" and text.next() == "[":
            return Features(closed(text, collected(text)))
        document[key] = text.value()
    others = lines(text)
    return document if (second := next(others, None)) is None else listed(chain([document, second], others))


def closed(text: Text, values: Iterator[Any]) -> Iterator[Any]:
    """The values, behind which the text ends."""
    yield from values
    if text.next():
        raise text.wrong("Extra data")


def collected(text: Text) -> Iterator[Any]:
    """The features of a collection, behind which no member may say otherwise than those in front of them."""
    yield from text.elements()
    for key in text.more_members():
        value = text.value()
        if key == "features" or (key == "type" and value != "FeatureCollection"):
            raise text.wrong(f"Another {key!r} behind the features")


def lines(text: Text) -> Iterator[dict[str, Any]]:
    """The objects of NDJSON behind the first, each on a line of its own."""
    while (found := text.next(BLANK)) and found in "\r\n" and text.next():
        if text.next() != "{":
            raise text.wrong("Expecting an object on each line")
        yield text.value()
    if found and found not in "\r\n":
        raise text.wrong("Extra data")


def listed(values: Iterator[Any]) -> list[Any] | Features:
    """The values, as features where the first ones are."""
    head = list(islice(values, HEAD))
    some = chain(head, values)
    if head and all(isinstance(value, dict) and value.get("type") == "Feature" for value in head):
        return Features(some)
    return list(some)


class Text:
    """A text that is read in pieces, and the place in it up to which it has been parsed."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self.pieces = iter(pieces)
        self.text, self.at = "", 0
        self.before = 0  # characters in front of `text`, which are gone

    def extend(self) -> bool:
        """Read on, and forget what has been parsed. False at the end."""
        left = self.text[self.at :]
        added, size = [left], 0
        while size < max(1, (GROWTH - 1) * len(left)) and (piece := next(self.pieces, None)) is not None:
            added.append(piece)
            size += len(piece)
        self.before += self.at
        self.text, self.at = "".join(added), 0
        return size > 0

    def wrong(self, reason: str, at: int | None = None) -> ValueError:
        return ValueError(f"{reason}: character {self.before + (self.at if at is None else at) + 1:,}")

    def next(self, space: re.Pattern[str] = SPACE) -> str:
        """The next character that is no white space, or "" at the end."""
        while True:
            self.at = space.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches anything
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.extend():
                return ""

    def take(self, expected: str) -> str:
        """The next character, which is one of those."""
        found = self.next()
        if not found or found not in expected:
            raise self.wrong(f"Expecting {' or '.join(map(repr, expected))}")
        self.at += 1
        return found

    def value(self) -> Any:
        """The value that begins next."""
        self.next()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if end + TAIL <= len(self.text):
                    self.at = end
                    return value
                wrong = None
            except json.JSONDecodeError as error:
                wrong = self.wrong(error.msg, error.pos)
            length = end - self.at if wrong is None else 0
            if self.extend():
                continue
            if wrong:
                raise wrong
            self.at = length
            return value

    def elements(self) -> Iterator[Any]:
        """The values of the array that begins next."""
        self.take("[")
        if self.next() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def members(self) -> Iterator[str]:
        """The keys of the object that begins next; each one's value is to be read before the next is asked for."""
        self.take("{")
        if self.next() == "}":
            self.at += 1
            return
        yield self.key()
        yield from self.more_members()

    def more_members(self) -> Iterator[str]:
        """The keys that follow a value in an object."""
        while self.take(",}") == ",":
            yield self.key()

    def key(self) -> str:
        if self.next() != '"':
            raise self.wrong("Expecting property name enclosed in double quotes")
        key: str = self.value()
        self.take(":")
        return key
