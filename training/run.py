"""A run folder of `training fit`: the one place that knows which files it holds, and what they must look like.

recipe.json   every setting of the run
base.sha256   hash of the base weights; runs of earlier versions have none
data.json     counts and hash of its crops, as `data.table.describe` gives them
split.csv     path, label, group, domain, fold, name, votes and pixel hash of each crop, in the order of the table
exam.csv      path, label, group and domain of the crops that no fold sees, where there are any; for `inference score`
fold<k>/      adapter in PEFT's format, metrics.csv, TensorBoard scalars, checkpoint.pt while it trains, and
              oof.npz, the logits of the crops that it held out, which says that the fold is finished
fold<k>/seed<n>/  with several seeds the same of each; the fold's own adapter is their mean, and so are its logits
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inference.checksums import sha256
from inference.errors import UserError
from inference.files import read_json, replacing, write_whole

from .data.crop import Crop
from .data.splits import EXAM
from .data.table import describe, same_data
from .fit.recipe import Recipe, from_dict

ADVICE = "expected a run folder; make one with 'training fit'"


@dataclass(frozen=True)
class OutOfFold:
    """Logits (V, N) of the recipe's views from the fold that did not train on the crop; all other fields (N,)."""

    logits: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    domains: np.ndarray
    folds: np.ndarray

    def part(self, chosen: np.ndarray) -> OutOfFold:
        """The crops that `chosen` (N,) selects, by index or as a mask."""
        columns = (values[chosen] for values in (self.labels, self.groups, self.domains, self.folds))
        return OutOfFold(self.logits[:, chosen], *columns)

    @property
    def both_classes(self) -> bool:
        return len(np.unique(self.labels)) == 2


@dataclass(frozen=True)
class RunFolder:
    """The run in folder `path`. Its readers raise UserError where a file is missing or is not what it should be."""

    path: Path

    @property
    def begun(self) -> bool:
        return (self.path / "recipe.json").is_file()

    @property
    def exam(self) -> Path:
        return self.path / "exam.csv"

    def recipe(self) -> Recipe:
        """The settings, written by this or an earlier version."""
        return from_dict(self._json("recipe.json"))

    def data(self) -> dict[str, Any]:
        """What `data.table.describe` said of the crops."""
        return self._json("data.json")

    def crops(self) -> list[Crop]:
        """The crops of the split, with the columns that it holds; earlier versions kept no votes, names and pixels."""
        return [
            Crop(
                Path(row["path"]),
                int(row["label"]),
                row["group"],
                row["domain"],
                tuple(map(int, row.get("votes", "").split())),
                row.get("name", ""),
                pixels=row.get("pixels", ""),
            )
            for row in self._split()
        ]

    def split(self) -> np.ndarray:
        """The validating fold of each crop (N,): from 0, or EXAM or SET_ASIDE, see `data.splits`."""
        return np.array([int(row["fold"]) for row in self._split()])

    def numbers(self) -> list[int]:
        """The numbers of the split's folds."""
        return sorted({number for number in self.split().tolist() if number >= 0})

    def fold(self, number: int) -> Path:
        return self.path / f"fold{number}"

    def folds(self) -> list[Path]:
        """The folders of all folds, in their order."""
        return [self.fold(number) for number in self.numbers()]

    def networks(self, number: int, seeds: int) -> list[Path]:
        """The folders in which the networks of a fold are trained: its own, or one for each of several seeds below."""
        fold = self.fold(number)
        return [fold] if seeds == 1 else [fold / f"seed{n}" for n in range(seeds)]

    def is_finished(self, number: int) -> bool:
        return is_finished(self.fold(number))

    def begin(self, recipe: Recipe, crops: Sequence[Crop]) -> np.ndarray:
        """Write recipe, data and split where they are new, and return the split (N,).

        Each file appears whole or not at all, and is the same from every job, so jobs of one run may start at once.
        UserError where the folder belongs to another run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        recipe_file, data_file, split_file = (self.path / name for name in ("recipe.json", "data.json", "split.csv"))
        settings, described = dataclasses.asdict(recipe), describe(crops)
        if self.begun:
            earlier = dataclasses.asdict(self.recipe())
            changed = [name for name, value in settings.items() if earlier[name] != value]
            if changed:
                raise UserError(
                    f"{recipe_file} differs from this call in {', '.join(changed)}; expected the same settings; "
                    "choose another --run folder"
                )
        if data_file.exists() and not same_data(self.data(), described):
            raise UserError(
                f"{data_file} describes other crops than this call (their table or their pixels); expected the same; "
                "choose another --run folder"
            )
        for file, content in ((recipe_file, settings), (data_file, described)):
            if not file.exists():
                write_whole(file, json.dumps(content, indent=1) + "\n")
        if not split_file.exists():
            self.write_split(crops, recipe.split_of(crops))
        if [row["path"] for row in self._split()] != [str(crop.path) for crop in crops]:
            raise UserError(f"{split_file} lists other crops than the data; expected the same; start a new run folder")
        fold = self.split()
        if (fold == EXAM).any() and not self.exam.exists():
            self.write_exam([crop for crop, number in zip(crops, fold.tolist(), strict=True) if number == EXAM])
        return fold

    def begin_on(self, base: Path) -> None:
        """Write the hash of the base weights where it is new. UserError where the run began on others."""
        self.check_base(base)
        if not (self.path / "base.sha256").exists():
            write_whole(self.path / "base.sha256", sha256(base) + "\n")

    def check_base(self, base: Path) -> None:
        """UserError where the run is known to be of other base weights."""
        file = self.path / "base.sha256"
        if file.exists() and file.read_text().strip() != sha256(base):
            raise UserError(
                f"{file} is not of {base}; expected the base weights that the run began on; bring them back, or start "
                "a new run"
            )

    def write_split(self, crops: Sequence[Crop], fold: np.ndarray) -> None:
        with replacing(self.path / "split.csv") as partial, partial.open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerow(["path", "label", "group", "domain", "fold", "name", "votes", "pixels"])
            for c, number in zip(crops, fold.tolist(), strict=True):
                votes = " ".join(map(str, c.votes))
                writer.writerow([c.path, c.label, c.group, c.domain, number, c.name, votes, c.pixels])

    def write_exam(self, crops: Sequence[Crop]) -> None:
        with replacing(self.exam) as partial, partial.open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerow(["path", "page", "label", "group", "domain"])  # training takes the first page of a stack
            writer.writerows([crop.path.resolve(), 0, crop.label, crop.group, crop.domain] for crop in crops)

    def out_of_fold(self, only: Sequence[int] | None = None) -> OutOfFold:
        """The logits of all crops that a fold held out, or that `only` those folds did, in the order of the split."""
        rows, folds = self._split(), self.split()
        numbers = self.numbers() if only is None else list(only)
        stored = {}
        for number in numbers:
            if not self.is_finished(number):
                file = self.fold(number) / "oof.npz"
                raise UserError(
                    f"{file} is missing; fold {number} is not finished; run 'training fit' again to resume it"
                )
            stored[number] = np.load(self.fold(number) / "oof.npz")
        logits = np.full((min(len(part["logits"]) for part in stored.values()), len(rows)), np.nan)
        for part in stored.values():
            logits[:, part["index"]] = part["logits"][: len(logits)]
        studied = np.isin(folds, numbers)
        without = int(np.isnan(logits[:, studied]).any(0).sum())
        if without:
            raise UserError(f"{self.path}: {without} crops have no out-of-fold logit; fit the run again")
        column = lambda name: np.array([row[name] for row in rows])  # noqa: E731
        everything = OutOfFold(logits, column("label").astype(int), column("group"), column("domain"), folds)
        return everything.part(studied)

    def history(self, number: int) -> dict[str, list[float]]:
        """The history of a fold's network; with several seeds, of the first one's."""
        return read_history(self.networks(number, self.recipe().seeds)[0])

    def seconds(self) -> float:
        """Seconds of all epochs of all networks."""
        seeds = self.recipe().seeds
        networks = [network for number in self.numbers() for network in self.networks(number, seeds)]
        return float(sum(sum(read_history(network).get("seconds", [])) for network in networks))

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = read_json(self.path / name, ADVICE)
        except FileNotFoundError:
            raise UserError(f"{self.path} has no {name}; {ADVICE}") from None
        if not isinstance(content, dict):
            raise UserError(f"{self.path / name} holds a {type(content).__name__}; {ADVICE}")
        return content

    def _split(self) -> list[dict[str, str]]:
        file = self.path / "split.csv"
        try:
            with file.open(newline="", encoding="utf-8") as lines:
                return list(csv.DictReader(lines))
        except FileNotFoundError:
            raise UserError(f"{self.path} has no split.csv; {ADVICE}") from None


def is_finished(network: Path) -> bool:
    return (network / "oof.npz").is_file()


def finish(network: Path, held_out: Sequence[int], logits: np.ndarray) -> None:
    """Store the logits (V, N) of the crops that a network held out, given by index; this ends its training."""
    with replacing(network / "oof.npz") as partial, partial.open("wb") as file:
        np.savez(file, index=np.array(held_out), logits=logits)


def read_history(network: Path) -> dict[str, list[float]]:
    """Columns of a network's metrics.csv, a value for each epoch; empty where there is none."""
    file = network / "metrics.csv"
    if not file.exists():
        return {}
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]} if rows else {}
