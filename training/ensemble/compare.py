"""Compare two ensembles, or the answers of two runs of `score --csv`, on the same labelled crops.

Differences are B less A, paired: intervals are bootstrapped over slides where the crops have them. DeLong's test of the
AUC and McNemar's of the calls take crops as independent, so slides with many crops make them too sure.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inference.answers import Answer, asked_for, computing, content_of
from inference.assessment import NAMES, Labelled, labelled
from inference.commandline import DEVICES
from inference.errors import UserError
from inference.imageio.listing import FOLDER, Item, list_crops
from inference.labels import CLASSES
from inference.manifest import ensemble_folder, load_manifest
from inference.metrics import group_bootstrap, interval, scores_of_calls
from inference.scoring.run import ScoreRun
from inference.scoring.table import AnswerTable
from inference.seen import load_seen

RESAMPLES = 2000


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    about = "an ensemble folder, 'default', or a CSV file of 'python -m inference score --csv'"
    add("a", type=ensemble_folder, metavar="A", help=about)
    add("b", type=ensemble_folder, metavar="B", help="the same: the differences are B less A")
    help_ = "labelled crops: a CSV with path and label, and slides in a column slide, case or group; or a folder"
    add("--data", type=Path, required=True, metavar="CROPS", help=help_)
    add("--labels", metavar="COLUMN", help=f"of the table (default: label), or {FOLDER} for a crop's folder name")
    add("--device", choices=DEVICES, default="auto")


@dataclass(frozen=True)
class Side:
    """One of the two: rows, with labels, in the order of both; called (N,): which are called atypical."""

    name: str
    rows: list[Answer]
    called: np.ndarray

    def trained_on(self) -> str:
        """How many of the crops, where that is known."""
        unknown = any(row.seen is None for row in self.rows)
        return "not known" if unknown else f"{sum(bool(row.seen) for row in self.rows):,}"

    def part(self, chosen: Sequence[int]) -> Side:
        return Side(self.name, [self.rows[n] for n in chosen], self.called[list(chosen)])


@dataclass(frozen=True)
class Difference:
    """A score of A, of B, and B less A with its 95% interval, NaN where there is none."""

    name: str
    a: float
    b: float
    low: float
    high: float


def run(options: argparse.Namespace) -> None:
    if options.a.resolve() == options.b.resolve():
        raise UserError(f"{options.a} is compared with itself; expected two; name another")
    items = list_crops([options.data], options.labels)
    if all(item.label is None for item in items):  # known before minutes of computing
        raise UserError(
            f"{options.data} has no labels; expected a column label, or crops in the folders Atypical and Normal with "
            f"--labels {FOLDER}; name the labels with --labels"
        )
    a, b = (read_side(operand, items, options.device) for operand in (options.a, options.b))
    keys = [[(row.content, row.page) for row in side.rows] for side in (a, b)]
    if keys[0] != keys[1]:
        raise UserError(f"{options.a} and {options.b} answer other crops; expected the same; score them again")
    chosen = [n for n, row in enumerate(a.rows) if row.label is not None]
    a, b = a.part(chosen), b.part(chosen)
    print(f"A {a.name}\nB {b.name}")
    print("\n".join(compare(a, b)))
    print(f"\nof these crops in the training data of A: {a.trained_on()}, of B: {b.trained_on()}")
    others = [n for n in range(len(chosen)) if not (a.rows[n].seen or b.rows[n].seen)]
    if others and len(others) < len(chosen):
        print("without them:")
        print("\n".join(compare(a.part(others), b.part(others))))


def read_side(source: Path, items: list[Item], device: str) -> Side:
    """The answers of an ensemble, computed now, or of a CSV, to the crops. UserError where one has none."""
    if source.is_dir():
        manifest = load_manifest(source)
        computed = computing(manifest, asked_for(manifest, device, "auto"))
        running = ScoreRun(
            device, "auto", False, manifest, AnswerTable(None, manifest, computed), items, load_seen(manifest)
        )
        running.score()
        if running.failed:
            raise UserError(f"{running.failed:,} crops cannot be read; expected all; correct the data")
        called = np.array([row.p_atypical >= manifest.threshold for row in running.rows])
        return Side(f"{manifest.name} ({source})", running.rows, called)
    answers = read_answers(source)
    rows: list[Answer] = []
    calls: list[bool] = []
    for item in items:
        content = content_of(Path(item.path))
        if content not in answers:
            raise UserError(f"{source} has no answer for {item.path}; expected one; score it again")
        count, pages = answers[content]
        for page in range(count) if item.page is None else [item.page]:
            if page not in pages:
                raise UserError(f"{source} has no answer for page {page} of {item.path}; expected one; score it again")
            p, atypical = pages[page]
            rows.append(Answer(item.path, page, p, (), label=item.label, content=content, slide=item.slide))
            calls.append(atypical)
    return Side(str(source), rows, np.array(calls))


def read_answers(file: Path) -> dict[str, tuple[int, dict[int, tuple[float, bool]]]]:
    """By content: how many pages the file has; by page P(atypical), and whether the crop is called so.

    UserError where it is no such file.
    """
    wanted = {"content", "page", "pages", "p_atypical", "class"}
    found: dict[str, tuple[int, dict[int, tuple[float, bool]]]] = {}
    try:
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
            reader = csv.DictReader(stream)
            if not wanted <= set(reader.fieldnames or ()):
                raise UserError(f"{file} holds no answers; expected the file of 'score --csv', or an ensemble folder")
            for row in reader:
                answer = float(row["p_atypical"]), row["class"] == CLASSES[1]
                found.setdefault(row["content"], (int(row["pages"]), {}))[1][int(row["page"])] = answer
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read ({error}); expected what 'score --csv' writes; do so again") from None
    return found


def compare(a: Side, b: Side) -> list[str]:
    """The lines of the comparison: a row for each score, then the two tests."""
    known = labelled(a.rows), labelled(b.rows)
    labels = known[0].labels
    atypical = int(labels.sum())
    lines = [f"{len(labels):,} crops ({atypical:,} atypical); 95% intervals over {known[0].resampled}"]
    lines.append(f"{'':20}{'A':>8}{'B':>8}{'B - A':>9}   95% interval")
    for each in differences(known, (a.called, b.called)):
        between = "" if math.isnan(each.low) else f"   {each.low:+.4f} to {each.high:+.4f}"
        lines.append(f"{each.name:20}{each.a:8.4f}{each.b:8.4f}{each.b - each.a:+9.4f}{between}")
    if 0 < atypical < len(labels):
        low, high, chance = delong(labels, known[0].p, known[1].p)
        if not math.isnan(chance):
            lines.append(f"DeLong: AUC {low:+.4f} to {high:+.4f}, p {chance:.3g}")
    for name, part in (("all", labels >= 0), ("atypical", labels == 1), ("normal", labels == 0)):
        only_a, only_b, chance = mcnemar(labels[part], a.called[part], b.called[part])
        lines.append(f"McNemar, {name}: {only_a:,} right in A alone, {only_b:,} in B alone, p {chance:.3g}")
    return lines


def differences(
    found: tuple[Labelled, Labelled], called: tuple[np.ndarray, np.ndarray], resamples: int = RESAMPLES
) -> list[Difference]:
    """Each score of both, and the interval of B less A over resamples that both share."""
    a, b = found
    labels, groups = a.labels, np.unique(a.groups, return_inverse=True)[1]
    first, second = scores_of_calls(labels, a.p, called[0]), scores_of_calls(labels, b.p, called[1])
    drawn: dict[str, list[float]] = {name: [] for name in NAMES}
    for i in group_bootstrap(groups, resamples):
        of_a, of_b = scores_of_calls(labels[i], a.p[i], called[0][i]), scores_of_calls(labels[i], b.p[i], called[1][i])
        for name in NAMES:
            drawn[name].append(of_b[name] - of_a[name])
    result = []
    for name, text in NAMES.items():
        low, high = interval(np.array(drawn[name])) if groups.max() > 0 else (math.nan, math.nan)
        result.append(Difference(text, first[name], second[name], low, high))
    return result


def delong(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """95% interval of AUC(b) - AUC(a) and the two-sided p of no difference. DeLong et al., Biometrics 44 (1988) 837.

    NaN where there is no test: with one crop of a class, or a difference that all crops share, whose variance is 0.
    With midranks, as Sun and Xu do it (IEEE Signal Processing Letters 21, 2014), so that N crops take N log N.
    """
    from scipy.stats import norm, rankdata

    positive, negative = labels == 1, labels == 0
    m, n = int(positive.sum()), int(negative.sum())
    below, above = [], []  # counts in halves, which floats hold exactly: a variance of 0 is found
    for p in (a, b):
        everywhere = rankdata(p)
        below.append(everywhere[positive] - rankdata(p[positive]))  # of each atypical crop, the normal ones below it
        above.append(everywhere[negative] - rankdata(p[negative]))  # of each normal crop, the atypical ones below it
    if min(m, n) < 2:
        return math.nan, math.nan, math.nan
    difference = float((below[1] - below[0]).mean()) / n
    v10, v01 = (float(np.var(counts[1] - counts[0], ddof=1)) for counts in (below, above))
    variance = v10 / n**2 / m + v01 / m**2 / n
    if variance == 0:  # no difference at all, or one that has no error
        return (0.0, 0.0, 1.0) if difference == 0 else (math.nan, math.nan, math.nan)
    error = math.sqrt(variance)
    width = float(norm.ppf(0.975)) * error
    return difference - width, difference + width, float(2 * norm.sf(abs(difference) / error))


def mcnemar(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[int, int, float]:
    """(crops that A alone calls rightly, those of B alone, exact two-sided p of an even chance)."""
    from scipy.stats import binomtest

    right_a, right_b = a == labels, b == labels
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return only_a, only_b, float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
