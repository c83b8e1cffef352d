"""Make an ensemble folder of the members of runs and other ensembles, calibrated together on their out-of-fold logits.

It starts with all members, their most views and equal weights. Members or views are left out, and the weights or the
kind of mean changed, only if nested scores show that it pays. One run is a combination of one member.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from inference.errors import UserError
from inference.manifest import MAX_MEMBERS, TTA_VIEWS, ensemble_folder
from inference.progress import speaking
from inference.seen import write_seen

from ..fit.feed import load_crops
from .candidates import Candidate, Sources, StudyTable, read_candidates
from .card import TABLE, Result, Row, card, provenance
from .domains import RULES, DomainLogits, LeftOutDomain, check_domains, leave_domains_out, resampled_cuts
from .folder import add_options, beside, check_findable, check_name, hand_over
from .hubcard import write_card
from .joint import Calibration, Choice, Joint
from .members import DRIFT_CROPS, measure_drift, predict, write_ensemble, write_manifest
from .scaling import Correction, correct, log_odds
from .selection import Step, choose, choose_within, every_choice, everything, subsets
from .stopwatch import CROPS, Seconds, cold_start, median_cold_start, write_job
from .unseen import Unseen, read_unseen

Choose = Callable[[int | None], tuple[Choice, list[Step]]]


class Written(NamedTuple):
    """An ensemble that was written. correction: on unseen crops; domains: where the threshold serves domains."""

    calibration: Calibration
    correction: Correction | None
    domains: list[LeftOutDomain]
    manifest: dict[str, Any]


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "folders",
        type=ensemble_folder,
        nargs="+",
        metavar="RUN_OR_ENSEMBLE",
        help="finished run folders, ensemble folders",
    )
    add_options(parser)
    help_ = "each member's folds apart, or averaged to one adapter, for a third of the time with three (default apart)"
    add("--folds", choices=("apart", "averaged"), default="apart", help=help_)
    help_ = (
        "crops that no fold has seen, a folder, file or CSV; labels are not needed: with them the calibration is that "
        "of the mean that answers, without them that of single folds; repeatable"
    )
    add("--unseen", type=Path, action="append", default=[], metavar="CROPS", help=help_)
    help_ = (
        "crops: of the highest balanced accuracy of all crops (default); mean, worst: of the mean or the lowest of "
        "their domains, with those of --unseen, which then are data sets with labels, as 'fit --data' takes them"
    )
    add("--threshold", choices=("crops", *RULES), default="crops", help=help_)
    add("--tta", choices=tuple(TTA_VIEWS), default="d4", help="the most views to choose from (default d4)")
    add("--data", type=Path, action="append", default=[], help="the data sets, where no run names them; repeatable")
    help_ = "keeps the logits that are computed for ensembles (default runs/out-of-fold)"
    add("--cache", type=Path, default=Path("runs/out-of-fold"), metavar="DIR", help=help_)
    add("--budget", type=float, metavar="SECONDS", help="the longest cold start on this machine, measured")


def run(options: argparse.Namespace) -> None:
    name = check_name(options)
    candidates, table = read_candidates(
        Sources(options.folders, options.data, options.cache, options.bases, options.tta)
    )
    candidates = [dataclasses.replace(c, logits=c.logits[: TTA_VIEWS[options.tta]]) for c in candidates]
    if len(candidates) > MAX_MEMBERS:
        raise UserError(f"found {len(candidates)} members; expected at most {MAX_MEMBERS}; leave some out")
    bases = list(dict.fromkeys(candidate.base for candidate in candidates))
    candidates.sort(key=lambda candidate: bases.index(candidate.base))  # by base, which is freed after its members
    for base in bases:
        check_findable(base, options)
    rule = "" if options.threshold == "crops" else options.threshold
    logits, folds = [candidate.logits for candidate in candidates], table.folds[table.studied]
    joint = Joint(logits, table.labels, table.groups, folds, table.domains, rule)
    if rule:
        check_domains(table.labels, table.domains)
    unseen = read_unseen(options.unseen, table, bool(rule)) if options.unseen else None
    with beside(options.output) as work:
        maker = Maker(work, name, candidates, joint, table, options.folds == "averaged", unseen, options.device)
        result = maker.make(options.budget)
        write_card(maker.folder, card(result))
        write_seen(maker.folder, table.data["sha256"], table.pixels())
        hand_over(maker.folder, options)
    print(f"{options.output}: written; README.md is its card")


@dataclass
class Maker:
    """What an ensemble is made of, and the folder `work` in which it is made."""

    work: Path
    name: str
    candidates: Sequence[Candidate]
    joint: Joint
    table: StudyTable
    averaged: bool
    unseen: Unseen | None
    device: str

    @property
    def folder(self) -> Path:
        return self.work / "ensemble"

    @property
    def names(self) -> list[str]:
        return [candidate.name for candidate in self.candidates]

    @cached_property
    def crops(self) -> list[np.ndarray]:
        """Crops for measurements, uint8 (H, W, 3), drawn from all folds."""
        chosen = np.random.default_rng(0).permutation(self.table.studied)[: max(CROPS, DRIFT_CROPS)]
        return load_crops([self.table.crops[n] for n in chosen])

    @cached_property
    def job(self) -> Path:
        return write_job(self.work / "job", self.crops[:CROPS])

    def make(self, budget: float | None) -> Result:
        """Choose, write the ensemble to `folder`, and measure it; over the budget, the next best."""
        rows = []
        with speaking("timing the members"):
            seconds = self.time_members() if budget is not None or len(self.candidates) > 1 else None
        if len(self.candidates) > 1:
            print(f"\n{TABLE}", flush=True)
            most = everything(self.joint)
            for members in subsets(len(self.candidates)):
                choice = Choice(members, tuple(most.tta[member] for member in members))
                with speaking("scoring"):
                    score = self.joint.score({k: choice for k in self.joint.numbers}.__getitem__)
                rows.append(Row(choice, score, seconds.of(choice) if seconds else None))
                print(f"  {rows[-1].describe(self.names)}", flush=True)
        for choose_without in self.in_order(seconds, budget):
            with speaking("choosing members and views"):
                choice, steps = choose_without(None)
            print("\nchoices, by out-of-fold AUC")
            for step in steps:
                print(f"  {step}")
            calibration, correction, domains, manifest = self.write(choice)
            drift = measure_drift(self.folder, self.crops[:DRIFT_CROPS], self.device)
            for entry, measured in zip(manifest["members"], drift, strict=True):
                entry["precision"] = measured
            write_manifest(self.folder, manifest)
            with speaking("timing jobs"):
                wall = median_cold_start(self.folder, self.job, self.device) if seconds else None
            if budget is None or wall is None or wall <= budget:
                break
            print(f"  over the budget of {budget:g} seconds ({wall:.1f}): the next", flush=True)
        else:
            raise UserError(
                f"no set of members answers {CROPS} crops within {budget:g} seconds here; expected one; allow more"
            )
        with speaking("scoring, with everything chosen again without each fold"):
            shipped = Row(choice, self.joint.score(lambda left: choose_without(left)[0]), wall)
        print(f"\nshipped: {shipped.describe(self.names)}", flush=True)
        if shipped.is_chance():
            print(
                "warning: the 95% interval of the AUC includes 0.5: out of fold these answers cannot be told from "
                "chance; train longer or on more crops before you use or upload them",
                flush=True,
            )
        result = Result(
            self.name,
            self.candidates,
            rows,
            steps,
            shipped,
            calibration,
            correction,
            domains,
            self.joint,
            self.table.split,
            self.averaged,
            budget,
            self.unseen,
        )
        write_manifest(self.folder, manifest | {"provenance": provenance(result)})
        return result

    def write(self, choice: Choice) -> Written:
        """Write the ensemble of a choice, corrected on unseen crops if there are any."""
        with speaking("calibrating"):
            calibration, correction = self.joint.calibrate(choice), None
        for position in [n for n, head in enumerate(calibration.heads) if head.bounded]:
            name = self.names[choice.members[position]]
            print(f"warning: {name}: its temperature ended at a bound; its logits hardly depend on the labels")
        if self.unseen is not None:
            apart = self.logits(choice, calibration, averaged=False)
            shipped = self.logits(choice, calibration, averaged=True) if self.averaged else apart
            rule = choice.averaging, calibration.temperature, calibration.threshold, choice.shares
            correction = correct(apart, shipped, *rule)
            calibration = calibration.corrected(correction)
        domains = []
        if self.joint.rule:
            scored = self.by_domain(calibration, correction)
            calibration = calibration.cut_at(resampled_cuts(scored, self.joint.rule))
            domains = leave_domains_out(scored, self.joint.rule)
        shutil.rmtree(self.folder, ignore_errors=True)
        manifest = write_ensemble(self.folder, self.name, self.candidates, choice, calibration, self.averaged)
        return Written(calibration, correction, domains, manifest)

    def by_domain(self, calibration: Calibration, correction: Correction | None) -> DomainLogits:
        """Log-odds of the crops out of fold, and of the unseen ones by the mean, which is corrected to their spread."""
        own = self.joint.by_domain(calibration.p, np.arange(len(calibration.p)))
        if self.unseen is None or correction is None:
            return own
        column = lambda of: np.array([getattr(crop, of) for crop in self.unseen.labelled])  # noqa: E731
        other = DomainLogits(log_odds(correction.p), column("label"), column("group"), column("domain"))
        return own.joined(other)

    def logits(self, choice: Choice, calibration: Calibration, averaged: bool) -> list[np.ndarray]:
        """Logits (folds, V, N) of the unseen crops by each member of a choice."""
        assert self.unseen is not None
        draft = self.work / "draft"
        write_ensemble(draft, "draft", self.candidates, choice, calibration, averaged)
        members = range(len(choice.members))
        by_member, _ = predict(draft, self.unseen.crops, self.device, "fp32", members)
        shutil.rmtree(draft)
        return [by_member[m] for m in members]

    def in_order(self, seconds: Seconds | None, budget: float | None) -> Iterator[Choose]:
        """Ways to choose, each without the fold of a number, or None; over the budget, the next one."""
        if budget is None or seconds is None:
            yield partial(choose, self.joint, self.names)
            return
        affordable = [choice for choice in every_choice(self.joint) if seconds.of(choice) <= budget]
        while affordable:
            choose_one = partial(choose_within, self.joint, self.names, affordable, seconds)
            yield choose_one
            shipped, _ = choose_one(None)
            affordable = [c for c in affordable if (c.members, c.tta) != (shipped.members, shipped.tta)]

    def time_members(self) -> Seconds:
        """Seconds of each member with each number of views, from cold starts of all in the fast precision."""
        everyone = tuple(range(len(self.candidates)))
        walls, members = [], [dict[str, float]() for _ in everyone]
        draft = self.work / "draft"
        for tta in TTA_VIEWS:
            choice = Choice(everyone, (tta,) * len(everyone))
            plain = Calibration.plain(len(everyone))
            manifest = write_ensemble(draft, "draft", self.candidates, choice, plain, self.averaged)
            for entry in manifest["members"]:  # not measured yet; hardly any is ever refused
                entry["precision"] = {"fp32": 0.0, "bf16": 0.0, "fp16": 0.0}
            write_manifest(draft, manifest)
            wall, details = cold_start(draft, self.job, self.device)
            walls.append(wall - sum(member["seconds"] for member in details["members"]))
            for position, member in enumerate(details["members"]):
                members[position][tta] = member["seconds"]
            shutil.rmtree(draft)
        seconds = Seconds(float(np.median(walls)), members)
        print(f"\nseconds of {CROPS} crops on {details['device']}: {seconds.start:.1f} to start", flush=True)
        for name, by_tta in zip(self.names, members, strict=True):
            views = ", ".join(f"{value:.1f} with {TTA_VIEWS[tta]}" for tta, value in by_tta.items())
            print(f"  {name}: {views} views", flush=True)
        return seconds
