"""The challenge's phase that a job answers: its sockets, as phase.json says them. Standard library only.

Another phase is another file, named by the environment variable MIDOG_LORA_PHASE: build.sh puts it into the image in
place of this folder's, and what runs without an image reads it where it is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import read_json

VARIABLE = "MIDOG_LORA_PHASE"
DEFAULT = Path(__file__).with_name("phase.json")
KEYS = {"input": {"slug", "suffixes", "pages"}, "output": {"file", "classes", "positive"}}


@dataclass(frozen=True)
class Phase:
    """What a phase sends and expects."""

    name: str
    slug: str
    """Of the stack's socket; its folder below /input/images."""
    suffixes: tuple[str, ...]
    """Of the stack, in lower case."""
    pages: tuple[int, int]
    """Fewest and most pages of a stack."""
    output: str
    """File name of the answers, at the top of /output."""
    classes: tuple[str, str]
    """Its words for a normal and an atypical figure, in this order."""
    positive: str
    """The class whose probability each answer's confidence is."""

    def confidence(self, p_atypical: float) -> float:
        return float(p_atypical if self.positive == self.classes[1] else 1 - p_atypical)

    def class_of(self, confidence: float, threshold: float) -> str:
        """threshold: of P(atypical)"""
        return self.classes[int(self.confidence(confidence) >= threshold)]


def load_phase(file: Path) -> Phase:
    """The phase in `file`. UserError where it is missing, damaged, or has other keys or more than two classes."""
    do = "see inference/phase.json and docs/another-challenge.md"
    try:
        content = read_json(file, do)
    except FileNotFoundError:
        raise UserError(f"no {file}; expected a phase, as {VARIABLE} names it; {do}") from None

    def check(good: bool, found: str, expected: str) -> None:
        if not good:
            raise UserError(f"{file} has {found:.200}; expected {expected}; {do}")

    sections = {"name", *KEYS}
    check(isinstance(content, dict) and set(content) == sections, "other keys", ", ".join(sorted(sections)))
    for section, keys in KEYS.items():
        value = content[section]
        check(isinstance(value, dict) and set(value) == keys, f"other keys in {section}", ", ".join(sorted(keys)))
    values: dict[str, Any] = content["input"] | content["output"]
    for key, text in {"name": content["name"], **{key: values[key] for key in ("slug", "file", "positive")}}.items():
        check(isinstance(text, str) and text.isprintable() and text != "", f"{key} {text!r}", "one line of text")
    for key in ("slug", "file"):
        check(
            "/" not in values[key] and values[key][0] != ".", f"{key} {values[key]!r}", "a name without / and first dot"
        )
    suffixes, pages, classes = values["suffixes"], values["pages"], values["classes"]
    good = isinstance(suffixes, list) and suffixes and all(isinstance(s, str) and s[:1] == "." for s in suffixes)
    check(bool(good), f"suffixes {suffixes!r}", 'a list such as [".tif", ".mha"]')
    good = isinstance(pages, list) and len(pages) == 2 and all(type(page) is int for page in pages)
    check(good and 1 <= pages[0] <= pages[1], f"pages {pages!r}", "the fewest and the most, from 1 on")
    good = isinstance(classes, list) and all(isinstance(word, str) and word for word in classes)
    check(good and len(set(classes)) == len(classes) == 2, f"classes {classes!r}", "two words, normal before atypical")
    check(values["positive"] in classes, f"positive {values['positive']!r}", f"one of the classes {classes!r}")
    return Phase(
        name=content["name"],
        slug=values["slug"],
        suffixes=tuple(suffix.lower() for suffix in suffixes),
        pages=(pages[0], pages[1]),
        output=values["file"],
        classes=(classes[0], classes[1]),
        positive=values["positive"],
    )


PHASE = load_phase(Path(os.environ.get(VARIABLE) or DEFAULT))
