"""docs/architecture.md against the code: its arrows are the rooms' imports, and the files that it names exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()
CORE = "inference"
TOPS = ("inference", "training", "release")


def imports(file: Path) -> Iterator[str]:
    """What a file imports anywhere in it, as dotted names from the top."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    """The deepest folder that a dotted name leads into; "" for what is not ours."""
    parts = name.split(".")
    while parts and not (ROOT.joinpath(*parts).is_dir() and parts[0] in (*TOPS, "test")):
        parts.pop()
    return "/".join(parts)


def arrows_in_the_code() -> set[tuple[str, str]]:
    pairs = set()
    for top in TOPS:
        for file in (ROOT / top).rglob("*.py"):
            room = file.parent.relative_to(ROOT).as_posix()
            pairs |= {(room, target) for name in imports(file) if (target := room_of(name)) not in ("", room)}
    return pairs


def arrows_on_the_page() -> set[tuple[str, str]]:
    chart = PAGE.split("```mermaid")[1].split("```")[0]
    rooms = dict(re.findall(r'^ *(\w+)\["([\w/]+)', chart, re.MULTILINE))
    pairs = set()
    for sources, targets in re.findall(r"^ *([\w &]+?) --> ([\w &]+)$", chart, re.MULTILINE):
        pairs |= {(rooms[a], rooms[b]) for a in sources.split(" & ") for b in targets.split(" & ")}
    return pairs


def test_the_arrows_are_the_imports() -> None:
    code = {(room, target) for room, target in arrows_in_the_code() if target != CORE}
    drawn = arrows_on_the_page()
    assert code - drawn == set(), "imports that docs/architecture.md does not draw"
    assert drawn - code == set(), "arrows of docs/architecture.md that no import has"


def test_the_way_is_one_way() -> None:
    for room, target in arrows_in_the_code():
        top, other = room.split("/")[0], target.split("/")[0]
        assert other in (top, CORE), f"{room} imports {target}"


def test_every_room_is_drawn() -> None:
    chart = PAGE.split("```mermaid")[1].split("```")[0]
    rooms = {file.parent.relative_to(ROOT).as_posix() for top in TOPS for file in (ROOT / top).rglob("__init__.py")}
    assert rooms == set(re.findall(r'\["([\w/]+)', chart))


def test_every_file_that_the_pages_name_exists() -> None:
    for page in ("docs/architecture.md", "CONTRIBUTING.md"):
        for name in re.findall(r"`([\w/.]+/[\w.]+\.(?:py|sh|css|md|toml))`", (ROOT / page).read_text()):
            if "NAME" not in name:
                places = (ROOT, ROOT / "inference")
                assert any((place / name).exists() for place in places), f"{page} names {name}"


def test_every_name_that_the_page_gives_is_in_its_file() -> None:
    """Names in backticks in the parentheses behind a file."""
    for name, words in re.findall(r"`([\w/]+\.py)` \(([^)]*)\)", PAGE):
        for word in re.findall(r"`(\w+)`", words):
            text = (ROOT / name).read_text()
            assert re.search(rf"\b(def|class) {word}\b|^{word}\b", text, re.MULTILINE), f"no {word} in {name}"
