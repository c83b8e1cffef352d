"""The words that data sets use for the two classes: atypical = 1 = positive, normal = 0. Standard library only."""

from __future__ import annotations

from .errors import UserError

CLASSES = ("normal", "atypical")
# AMF, NMF: atypical and normal mitotic figures (MIDOG25); OMG-Octo writes MF for a normal one
WORDS = {"atypical": 1, "amf": 1, "1": 1, "true": 1, "normal": 0, "nmf": 0, "mf": 0, "0": 0, "false": 0}


def parse_label(text: str, where: str) -> int:
    """1 or 0 for a word of WORDS in any case. UserError, beginning with `where`, for any other word."""
    word = text.strip().lower()
    if word not in WORDS:
        raise UserError(f"{where}: label is {text!r:.80}; expected one of {', '.join(WORDS)}; correct the table")
    return WORDS[word]


def class_of(p_atypical: float, threshold: float) -> str:
    return CLASSES[int(p_atypical >= threshold)]
