"""AtNorM-Br and AtNorM-MD, which name no slides; those of AtNorM-MD are inferred from the order of its crops.

Crops are numbered in the order of their slides, and slides of one scanner and tumour follow each other: along the
numbers, colour and sharpness stay alike and then change at once. `test/support/segments.py` finds these changes (PELT
and dynamic programming of `ruptures` on the features of each crop) and checks them on MIDOG21, whose slides are known:
of 32 cuts there, 8 are not exact and 3 are off by more than three crops. None of this is published. A slide that
returned later in the order would be a leak that nobody can see.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from pathlib import Path

from inference.errors import UserError
from inference.labels import parse_label

from .crop import Crop
from .source import FOLDERS, IMAGES, Source

# the last number of each group and of each domain
GROUPS = (
    *(45, 69, 98, 103, 145, 163, 185, 285, 291, 437, 484, 564, 653, 799, 873, 878, 1044, 1149, 1167, 1179, 1239, 1337),
    *(1351, 1466, 1479, 1517, 1527, 1532, 1563),
)
DOMAINS = (437, 1167, 1563)
MARGIN = 5  # crops on each side of a cut that may belong to the other side
PUBLISHED = 2107  # crops; those after the last of GROUPS have not been segmented


def atnorm_md(source: Source) -> list[Crop]:
    """AtNorM-MD: the folders Atypical and Normal, and five votes a crop in AtNorM-MD_expert_votes.csv."""
    votes = {row["Filename"]: row for row in source.rows}
    crops = []
    for path in _in_folders(source.file.parent):
        label, row = int(path.parent.name == "Atypical"), votes.pop(path.name, None)
        answers = tuple(parse_label(row[f"Expert_{e}"], str(source.file)) for e in range(1, 6)) if row else ()
        if row and parse_label(row["Majority"], str(source.file)) != label:
            raise UserError(
                f"{path} is {row['Majority']} in {source.file.name}; expected its folder and its votes to agree; "
                "download it again"
            )
        if not path.stem.isdecimal():
            raise UserError(
                f"{path} has no number; expected names such as 17.png, as published, because their order tells the "
                "slides; download it again"
            )
        number = int(path.stem)
        crops.append(
            Crop(
                path,
                label,
                group_of(number),
                domain_of(number),
                answers,
                f"AtNorM-MD/{path.parent.name}/{path.name}",
                beside=tuple(sorted(groups_near(number) - {group_of(number)})),
            )
        )
    if votes:
        raise UserError(
            f"{source.file} names {len(votes)} crops that do not exist (first: {next(iter(votes))}); expected one file "
            "for each row; download it again"
        )
    source.note("AtNorM-MD: its slides and domains are inferred from colour, not published; see docs/training.md")
    _note_test_set(source, "AtNorM-MD")
    return crops


def atnorm_br(source: Source) -> list[Crop]:
    """AtNorM-Br: the folders Atypical and Normal. All crops are one group: any other could divide a slide."""
    domain = "human breast cancer x TCGA (mixed)"
    source.note("AtNorM-Br: its slides are not published, so it is one group and stays in one fold")
    _note_test_set(source, "AtNorM-Br")
    return [
        Crop(path, int(kind == "Atypical"), "AtNorM-Br", domain, (), f"AtNorM-Br/{kind}/{path.name}")
        for path in _in_folders(source.file)
        for kind in [path.parent.name]
    ]


def _in_folders(folder: Path) -> list[Path]:
    return sorted(p for kind in FOLDERS for p in (folder / kind).glob("*") if p.suffix.lower() in IMAGES)


def _note_test_set(source: Source, name: str) -> None:
    source.note(
        f"{name}: a held-out test set of arXiv 2506.21444; a model trained on it cannot be compared with that paper"
    )


def group_of(number: int) -> str:
    """The inferred slide of a crop, named by its first and last number."""
    first, last = _span(GROUPS, number)
    return f"AtNorM-MD/{first}-{last}"


def domain_of(number: int) -> str:
    """The inferred domain of a crop, named by its first and last number."""
    first, last = _span(DOMAINS, number)
    kind = "inferred" if number <= DOMAINS[-1] else "not segmented"
    return f"AtNorM-MD {first} to {last} ({kind})"


def groups_near(number: int) -> set[str]:
    """The groups that a crop may belong to: its own, and those whose cut is within MARGIN crops."""
    lowest, highest = max(1, number - MARGIN), min(PUBLISHED, number + MARGIN)
    return {group_of(near) for near in range(lowest, highest + 1)}


def _span(ends: tuple[int, ...], number: int) -> tuple[int, int]:
    """First and last number of the stretch that holds `number`."""
    edges = (0, *ends, PUBLISHED)
    before, last = list(pairwise(edges))[min(bisect_left(ends, number), len(ends))]
    return before + 1, last
