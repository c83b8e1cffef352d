"""Ideas of the papers, each against the same training without it: `python -m benchmarks.ideas BASELINE RUN...`

Run folders of `training fit` whose recipes differ in little. Each crop is scored by the fold that did not train on it.
A domain counts once, however many crops it has, and its threshold comes from the other domains. Differences are from
the baseline's first seed, and paired: the same slides are resampled for both, of the crops that both have scored.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inference.errors import UserError
from inference.metrics import balanced_accuracy, best_threshold, group_bootstrap, interval, roc_auc
from training.data.table import same_data
from training.ensemble.domains import DomainLogits, leave_domains_out
from training.report.sweep import difference
from training.run import RunFolder

RESAMPLES = 1000
SCORES = ("AUC", "balanced accuracy", "best cut")


@dataclass(frozen=True)
class Scored:
    """What a run, or one seed of it, gives the crops that it held out.

    keys: of the crops, pixel hash or path (N,)
    called: by the threshold of the other domains (N,)
    """

    name: str
    keys: list[str]
    logits: DomainLogits
    called: np.ndarray

    def part(self, chosen: np.ndarray) -> Scored:
        keys = [self.keys[n] for n in chosen.tolist()]
        return dataclasses.replace(self, keys=keys, logits=self.logits.part(chosen), called=self.called[chosen])

    def values(self) -> np.ndarray:
        """The mean over domains of each of SCORES; a domain without both classes does not count."""
        rows = []
        for domain in np.unique(self.logits.domains):
            of = self.logits.domains == domain
            labels, z = self.logits.labels[of], self.logits.logits[of]
            if 0 < labels.sum() < len(labels):
                accuracy = balanced_accuracy(labels, self.called[of])
                rows.append((roc_auc(labels, z), accuracy, best_threshold(labels, z)[1]))
        return np.mean(rows, axis=0)


def score(name: str, run: RunFolder, networks: dict[int, Path]) -> Scored:
    """The crops that `networks`, a folder for each fold, have held out, with the thresholds of domains left out."""
    crops, logits = run.crops(), np.full(len(run.crops()), np.nan)
    for network in networks.values():
        stored = np.load(network / "oof.npz")
        logits[stored["index"]] = stored["logits"][0]
    held = np.flatnonzero(np.isfinite(logits))
    column = lambda of: np.array([getattr(crops[n], of) for n in held.tolist()])  # noqa: E731
    scored = DomainLogits(logits[held], column("label"), column("group"), column("domain"))
    called = np.zeros(len(held), bool)
    for row in leave_domains_out(scored, "mean"):
        of = scored.domains == row.domain
        called[of] = scored.logits[of] >= row.cut
    return Scored(name, [crops[n].pixels or str(crops[n].path) for n in held.tolist()], scored, called)


def scored_run(folder: Path) -> tuple[Scored, list[Scored]]:
    """The run itself, the mean of its seeds' adapters, and each seed alone."""
    run, seeds = RunFolder(folder), RunFolder(folder).recipe().seeds
    done = [number for number in run.numbers() if run.is_finished(number)]
    if not done:
        raise UserError(f"{folder} has no finished fold; expected one or more; resume it with 'training fit'")
    whole = score(folder.name, run, {number: run.fold(number) for number in done})
    alone = [score(folder.name, run, {number: run.networks(number, seeds)[n] for number in done}) for n in range(seeds)]
    return whole, alone


def compare(run: Scored, baseline: Scored) -> tuple[np.ndarray, np.ndarray]:
    """(difference of each of SCORES (3,), their 95% intervals (3, 2)) on the crops that both have."""
    here, there = ({key: n for n, key in enumerate(side.keys)} for side in (run, baseline))
    common = sorted(here.keys() & there.keys())
    if not common:
        raise UserError(f"{run.name} and {baseline.name} have no crop in common; expected runs of the same data")
    a = run.part(np.array([here[key] for key in common]))
    b = baseline.part(np.array([there[key] for key in common]))
    draws = [a.part(index).values() - b.part(index).values() for index in group_bootstrap(a.logits.groups, RESAMPLES)]
    return a.values() - b.values(), np.array([interval(column) for column in np.array(draws).T])


def draw(file: Path, rows: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Differences of AUC and balanced accuracy with their intervals, a line for each row (name, differences, edges)."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ideas", "font.size": 10}):
        figure = Figure((9, 1.2 + 0.36 * len(rows)), layout="constrained")
        plots = figure.subplots(1, 2, sharey=True)
        y = np.arange(len(rows))[::-1]
        for number, plot in enumerate(plots):
            middle = np.array([values[number] for _, values, _ in rows])
            reach = np.abs(np.array([edges[number] for _, _, edges in rows]).T - middle)
            plot.axvline(0, color="#888888", linewidth=0.8)
            plot.errorbar(middle, y, xerr=reach, fmt="o", color="#0072b2", markersize=5, capsize=2, linewidth=1.2)
            plot.set(xlabel=f"difference of {SCORES[number]}", yticks=y, yticklabels=[name for name, _, _ in rows])
            plot.locator_params(axis="x", nbins=5)
            plot.grid(axis="x", color="#dddddd", linewidth=0.6)
            plot.spines[["top", "right", "left"]].set_visible(False)
            plot.tick_params(axis="y", length=0)
        figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ideas", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("baseline", type=Path, help="run folder that the others are compared with")
    parser.add_argument("runs", type=Path, nargs="*", help="run folders")
    parser.add_argument("--output", type=Path, default=Path("runs/ideas"), help="gets ideas.md and ideas.svg")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    baseline, singles = scored_run(options.baseline)
    recipe = dataclasses.replace(RunFolder(options.baseline).recipe(), seeds=1)
    lines = [f"| | domains | {' | '.join(SCORES)} |", "|---|--:|---|---|---|"]
    shown = []

    def row(name: str, scored: Scored) -> None:
        values, (differences, edges) = scored.values(), compare(scored, singles[0])
        shown.append((name, differences, edges))
        cells = [
            f"{value:.3f}, {change:+.3f} ({low:+.3f} to {high:+.3f})"
            for value, change, (low, high) in zip(values, differences, edges, strict=True)
        ]
        lines.append(f"| {name} | {len(np.unique(scored.logits.domains))} | {' | '.join(cells)} |")

    for number, single in enumerate(singles):
        row(f"baseline, seed {number}", single)
    if len(singles) > 1:
        row(f"baseline, mean of {len(singles)} seeds' adapters", baseline)
    for folder in options.runs:
        run, parts = RunFolder(folder), []
        if not same_data(run.data(), RunFolder(options.baseline).data()):
            parts = [f"{run.data()['crops']:,} crops"]
        row(", ".join(parts + difference(run.recipe(), recipe)) or folder.name, scored_run(folder)[0])
    (options.output / "ideas.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(options.output / "ideas.svg", shown[1:])
    print("\n".join(lines))


if __name__ == "__main__":
    main()
