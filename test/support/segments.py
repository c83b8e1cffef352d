"""Where the slides of AtNorM-MD end, inferred from colour and sharpness in the order of its crops, and a picture of it.

    python -m test.support.segments PATH/TO/AtNorM-MD [--check PATH/TO/AMi-Br_Benchmark] [--picture FILE.webp]

Compares the cuts with those in training/data/atnorm.py; --check makes cuts in MIDOG21 in the same way, whose slides are
known. --picture draws the cuts of training/data/atnorm.py and finds none.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from inference.imageio.stack import read_stack
from training.data.atnorm import DOMAINS, GROUPS, MARGIN
from training.data.source import FOLDERS

PENALTY, SHORTEST, SHORTEST_DOMAIN = 60, 5, 60
A_ROW, HEIGHT, SCALE = 400, 26, 3  # of the picture: crops in a row, pixels of a row's strip, pixels of a crop
NEAR = 3  # crops


def features(images: Sequence[np.ndarray]) -> np.ndarray:
    """What tells slides apart, (N, 13) in standard deviations: colour, its spread, stains and sharpness."""
    rows = []
    for image in images:
        rgb = image.reshape(-1, 3) / 255
        density = -np.log(np.clip(rgb, 1 / 255, 1))
        grey = (image.mean(axis=2)).astype(np.uint8)
        rows.append(
            np.concatenate(
                [
                    rgb.mean(axis=0),
                    rgb.std(axis=0),
                    np.percentile(rgb, 95, axis=0),
                    np.corrcoef(density.T)[np.triu_indices(3, 1)],
                    [cv2.Laplacian(grey, cv2.CV_64F).var() ** 0.5],
                ]
            )
        )
    table = np.array(rows)
    return (table - table.mean(axis=0)) / table.std(axis=0)


def atnorm_images(folder: Path) -> list[np.ndarray]:
    """The segmented crops of AtNorM-MD in the order of their numbers."""
    files = {int(file.stem): file for kind in FOLDERS for file in (folder / kind).glob("*.png")}
    return [read_stack(files[number])[0] for number in sorted(files) if number <= GROUPS[-1]]


def midog21_images(folder: Path) -> tuple[list[np.ndarray], list[str]]:
    """The crops of MIDOG21 in AMi-Br's training split, in the order of their numbers, and the slide of each."""
    with (folder / "amibr_train_split.csv").open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["dataset"] == "MIDOG21"]
    rows.sort(key=lambda row: int(row["uid"]))
    files = [folder / row["final_label"] / row["dataset_uid"] for row in rows]
    return [read_stack(file)[0] for file in files], [row["slide"] for row in rows]


def group_cuts(table: np.ndarray) -> list[int]:
    """The numbers of crops after which a group ends, without the last crop's."""
    import ruptures

    return [int(cut) for cut in ruptures.Pelt("l2", min_size=SHORTEST, jump=1).fit(table).predict(PENALTY)[:-1]]


def domain_cuts(table: np.ndarray, count: int) -> list[int]:
    """The same for `count` cuts between domains."""
    import ruptures

    found = ruptures.Dynp("l2", min_size=SHORTEST_DOMAIN, jump=1).fit(table).predict(count)
    return [int(cut) for cut in found[:-1]]


def strip(images: Sequence[np.ndarray]) -> np.ndarray:
    """The mean colour of each crop side by side, uint8 (H, W, 3); marks below: short for groups, long for domains."""
    colours = np.array([image.reshape(-1, 3).mean(axis=0) for image in images]).round().astype(np.uint8)
    rows = -(-len(colours) // A_ROW)
    picture = np.full((rows * (HEIGHT + 14), A_ROW * SCALE, 3), 255, np.uint8)
    for n, colour in enumerate(colours):
        top, left = n // A_ROW * (HEIGHT + 14), n % A_ROW * SCALE
        picture[top : top + HEIGHT, left : left + SCALE] = colour
        last = n + 1
        if last in GROUPS or last in DOMAINS:
            mark = 10 if last in DOMAINS else 4
            picture[top + HEIGHT : top + HEIGHT + mark, left + SCALE - 1 : left + SCALE + 1] = 0
    return picture


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m test.support.segments", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="AtNorM-MD")
    parser.add_argument("--check", type=Path, metavar="DIR", help="AMi-Br's training split, to check the method")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the strip of mean colours and stop")
    options = parser.parse_args(arguments)
    images = atnorm_images(options.folder)
    if options.picture:
        Image.fromarray(strip(images)).save(options.picture, lossless=True)
        print(f"{options.picture}: {options.picture.stat().st_size / 1000:.0f} kB")
        return 0
    table = features(images)
    domains = domain_cuts(table, len(DOMAINS) - 1)
    groups = group_cuts(table)
    print(f"cuts of PELT: {groups}\ncuts between domains: {domains}")
    for domain in domains:  # a group ends where its domain does, so a cut close by is the same one
        groups = [domain if abs(cut - domain) <= 2 * MARGIN else cut for cut in groups]
    same = (tuple(groups), tuple(domains)) == (GROUPS[:-1], DOMAINS[:-1])
    print(f"{'as' if same else 'not as'} in training/data/atnorm.py")
    if options.check:
        known, slides = midog21_images(options.check)
        true = [n for n in range(1, len(slides)) if slides[n] != slides[n - 1]]
        off = np.array([min(abs(cut - edge) for edge in true) for cut in group_cuts(features(known))])
        print(
            f"MIDOG21: {len(off)} cuts where {len(true)} slides end; {np.sum(off > 0)} not exact, "
            f"{np.sum(off > NEAR)} off by more than {NEAR}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
