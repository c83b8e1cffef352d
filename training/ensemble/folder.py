"""The new ensemble folder of `export` and `import`: its name, where its bases lie, how it appears whole."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inference.commandline import DEVICES
from inference.errors import UserError
from inference.fields import is_title
from inference.manifest import BASES, load_manifest


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, required=True, help="new ensemble folder to write, such as weights/mine")
    add("--name", help="name of the ensemble (default: the folder's)")
    add("--bases", type=Path, default=BASES, metavar="DIR", help="base weights (default weights/bases)")
    add("--include-base", action="store_true", help="copy the bases into the folder too")
    add("--device", choices=DEVICES, default="auto", help="to measure seconds and precisions on (default auto)")


def check_name(options: argparse.Namespace) -> str:
    """The new ensemble's name. UserError where the folder exists, or the name is none."""
    output: Path = options.output
    name: str = options.name or output.name
    if output.exists():
        raise UserError(f"{output} exists; expected a new folder, nothing is overwritten; name another or remove it")
    if not is_title(name):
        raise UserError(f"an ensemble called {name!r:.120}; expected a name without /; give another with --name")
    return name


def check_findable(base: Path, options: argparse.Namespace) -> None:
    """UserError where a job would not find the base."""
    if base.parent.resolve() != BASES.resolve() and not options.include_base:
        raise UserError(f"{base} would not be found; expected it in {BASES}; use --include-base, or move it")


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A folder to work in, on the file system of `output`; it goes with the block."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ensemble-", dir=output.parent) as work:
        yield Path(work)


def hand_over(folder: Path, options: argparse.Namespace) -> None:
    """Give a finished folder, with links to its bases, its name; the links become copies with --include-base, or go."""
    for link in folder.glob("*.safetensors"):
        base = link.resolve()
        link.unlink()
        if options.include_base:
            shutil.copyfile(base, link)
    load_manifest(folder)
    folder.rename(options.output)
