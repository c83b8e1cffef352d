"""A labelled crop, as every part of training knows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Crop:
    """One labelled image.

    label: atypical = 1, normal = 0; votes: each expert's label
    group: slide or case, which no split may divide; domain: tumour x scanner
    name: data set and file name, the same on every machine
    tumour, scanner, origin: what a split by domain can use; "" where unknown
    beside: groups that the crop may belong to instead, where groups were inferred
    pixels: SHA-256 of the image's size and pixels, in hexadecimal digits; "" before they are read
    """

    path: Path
    label: int
    group: str
    domain: str
    votes: tuple[int, ...] = ()
    name: str = ""
    tumour: str = ""
    scanner: str = ""
    origin: str = ""
    beside: tuple[str, ...] = ()
    pixels: str = ""
