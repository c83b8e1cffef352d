"""Everything that fuzzing ever found, every seed, and a few changes to each, end as a job may end."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from test.fuzz.__main__ import NAMES, REGRESSIONS
from test.fuzz.targets import TARGETS, mutate_tiff


def test_the_list_of_names() -> None:
    assert tuple(TARGETS) == NAMES


READERS = """
import sys
from test.fuzz.targets import TARGETS
import inference.ensemble  # which a stub stands for
before = set(sys.modules)
for target in TARGETS.values():
    for content in target.seeds().values():
        target.run(content)
read = ("inference.", "PIL.Tiff", "PIL.Png", "PIL.Jpeg")
print(sorted(name for name in set(sys.modules) - before if name.startswith(read)))
"""


def test_everything_that_is_fuzzed_is_imported_with_the_targets() -> None:
    """The fuzzer is blind to what is imported later, when it has stopped instrumenting."""
    done = subprocess.run([sys.executable, "-c", READERS], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    "file", sorted(REGRESSIONS.glob("*/*")), ids=lambda file: f"{file.parent.name}-{file.name[:16]}"
)
def test_regressions(file: Path) -> None:
    TARGETS[file.parent.name].run(file.read_bytes())


@pytest.mark.parametrize("name", NAMES)
def test_seeds_and_near_misses(name: str) -> None:
    draw = random.Random(0)
    for content in TARGETS[name].seeds().values():
        TARGETS[name].run(content)
        damaged = bytearray(content)
        for _ in range(3):
            if damaged:
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        TARGETS[name].run(bytes(damaged))
        if name == "tiff":
            TARGETS[name].run(mutate_tiff(content, 1 << 16, draw.getrandbits(32)))
