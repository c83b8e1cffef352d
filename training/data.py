"""One table of labelled crops out of each published layout."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from inference.errors import UserError


@dataclass(frozen=True)
class Crop:
    """path to the image; label (atypical = 1); group (slide or case); domain (tumour x scanner); votes (1 = atypical)."""

    path: Path
    label: int
    group: str
    domain: str
    votes: tuple[int, ...] = ()


def ami_br_scanner(dataset: str, slide: str) -> str:
    """The scanner of an AMi-Br slide, which the data set does not list: by its number, as MIDOG21 and TUPAC16 state."""
    number = int(re.match(r"\d+", slide)[0])
    if dataset == "MIDOG21":
        return ("Hamamatsu XR", "Hamamatsu S360", "Aperio CS2")[(number - 1) // 50]
    return "Aperio ScanScope XT" if number <= 23 else "Leica SCN400"


def ami_br(folder: Path) -> list[Crop]:
    crops = []
    with (folder / "amibr_train_split.csv").open(newline="") as lines:
        for row in csv.DictReader(lines):
            votes = tuple(int(row[f"expert{e}_atypical"] == "True") for e in (1, 2, 3))
            path = folder / row["final_label"] / row["dataset_uid"]
            scanner = ami_br_scanner(row["dataset"], row["slide"])
            crops.append(Crop(path, int(row["final_label"] == "Atypical"), f"{row['dataset']}/{row['slide']}",
                              f"human breast cancer x {scanner}", votes))
    return crops


def load_data(places: list[Path]) -> list[Crop]:
    """The merged table of all data sets in `places`."""
    return [crop for place in places for crop in ami_br(place)]
