"""Make one ensemble of the members of several runs and ensembles, calibrated together on their out-of-fold logits.

It starts with all members, eight views and equal weights. Members or views are left out, and the weights or the kind of
mean changed, only if leave-one-fold-out scores show that it pays.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inference.commandline import DEVICES
from inference.errors import UserError
from inference.manifest import BASES, MAX_MEMBERS, TTA_VIEWS, is_title, load_manifest

from .calibrate import MINIMAL_GAIN
from .candidates import Candidate, read_candidates
from .card import TABLE, Result, Row, card, provenance
from .feed import load_crops
from .hubcard import write_card
from .joint import Calibration, Choice, Joint
from .members import DRIFT_CROPS, UNMEASURED, measure_drift, write_folds, write_manifest
from .selection import Step, every_choice, refine, simplify, subsets
from .stopwatch import CROPS, Seconds, cold_start, median_cold_start, write_job


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("places", type=Path, nargs="+", metavar="RUN_OR_ENSEMBLE", help="finished run folders, ensemble folders")
    add("--output", type=Path, required=True, help="new ensemble folder to write, such as weights/mine")
    add("--name", help="name of the ensemble (default: the folder's)")
    add("--data", type=Path, action="append", default=[], help="the data sets, where no run names them; repeatable")
    add(
        "--cache",
        type=Path,
        default=Path("runs/out-of-fold"),
        metavar="DIR",
        help="keeps the logits that are computed for ensembles (default runs/out-of-fold)",
    )
    add("--bases", type=Path, default=BASES, metavar="DIR", help="base weights of the runs (default weights/bases)")
    add("--include-base", action="store_true", help="copy the bases into the folder too")
    add("--budget", type=float, metavar="SECONDS", help="the longest cold start on this machine, measured")
    add("--device", choices=DEVICES, default="auto", help="to measure seconds and precisions on (default auto)")


def run(options: argparse.Namespace) -> None:
    output = options.output
    if output.exists():
        raise UserError(f"{output} exists; expected a new folder, nothing is overwritten; name another or remove it")
    if not is_title(name := options.name or output.name):
        raise UserError(f"an ensemble called {name!r:.120}; expected a name without /; give another with --name")
    found, table = read_candidates(options.places, options.data, options.cache, options.bases)
    if len(found) > MAX_MEMBERS:
        raise UserError(f"found {len(found)} members; expected at most {MAX_MEMBERS}; leave some out")
    bases = list(dict.fromkeys(one.base for one in found))
    found.sort(key=lambda one: bases.index(one.base))  # groups members by base, which is freed after them
    for one in found:
        if one.base.parent.resolve() != BASES.resolve() and not options.include_base:
            raise UserError(f"{one.base} would not be found; expected it in {BASES}; use --include-base, or move it")
    joint = Joint([one.logits for one in found], table.labels, table.groups, table.folds)
    if len(joint.numbers) < 2:
        raise UserError("fewer than two folds have both classes; expected two to leave one out; fit on more data")
    chosen = np.random.default_rng(0).permutation(len(table.crops))
    crops = load_crops([table.crops[n] for n in chosen[: max(CROPS, DRIFT_CROPS)]])
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".combine-", dir=output.parent) as name:
        work = Path(name)
        folder = work / "ensemble"
        job = write_job(work / "job", crops[:CROPS])
        seconds = time_members(work / "draft", found, job, options.device)
        about = weigh(folder, found, joint, crops[:DRIFT_CROPS], job, seconds, options)
        write_card(folder, card(about))
        for link in folder.glob("*.safetensors"):
            base = link.resolve()
            link.unlink()
            if options.include_base:
                shutil.copyfile(base, link)
        load_manifest(folder)
        folder.rename(output)
    print(f"{output}: written; README.md is its card")


def weigh(
    folder: Path,
    found: Sequence[Candidate],
    joint: Joint,
    crops: Sequence[np.ndarray],
    job: Path,
    seconds: Seconds,
    options: argparse.Namespace,
) -> Result:
    """Choose, write the ensemble to `folder` and measure its cold start; over the budget, the next best."""
    names = [one.name for one in found]
    rows = []
    print(f"\n{TABLE}", flush=True)
    for members in subsets(len(found)):
        choice = Choice(members, ("d4",) * len(members))
        score = joint.score(choice)
        rows.append(Row(choice, score, joint.interval(score), seconds.of(choice)))
        print(f"  {rows[-1].describe(names)}", flush=True)
    for choice, steps in in_order(joint, names, seconds, options.budget):
        print("\nchoices, by leave-one-fold-out AUC")
        for step in steps:
            print(f"  {step}")
        score = joint.score(choice)
        calibration = joint.calibrate(choice)
        shutil.rmtree(folder, ignore_errors=True)
        manifest = write_ensemble(folder, found, choice, calibration, options.name or options.output.name)
        drift = measure_drift(folder, crops, options.device)
        for entry, measured in zip(manifest["members"], drift, strict=True):
            entry["precision"] = measured
        write_manifest(folder, manifest)
        wall = median_cold_start(folder, job, options.device)
        shipped = Row(choice, score, joint.interval(score), wall)
        print(f"\nshipped: {shipped.describe(names)} (measured)", flush=True)
        if options.budget is None or wall <= options.budget:
            break
        print(f"  over the budget of {options.budget:g} seconds: the next", flush=True)
    else:
        raise UserError(
            f"no set of members answers {CROPS} crops within {options.budget:g} seconds here; expected one; allow more"
        )
    result = Result(manifest["name"], names, found, rows, steps, shipped, calibration, joint, options.budget)
    write_manifest(folder, manifest | {"provenance": provenance(result)})
    return result


def in_order(
    joint: Joint, names: Sequence[str], seconds: Seconds, budget: float | None
) -> Iterator[tuple[Choice, list[Step]]]:
    """Choices to ship, each with the decisions that led to it, the best first; without a budget only one."""
    if budget is None:
        everyone = tuple(range(len(names)))
        choice, simpler = simplify(joint, Choice(everyone, ("d4",) * len(names)), names)
        choice, refined = refine(joint, choice)
        yield choice, simpler + refined
        return
    left = [choice for choice in every_choice(len(names)) if seconds.of(choice) <= budget]
    while left:
        highest = max(map(joint.auc, left))
        best = min((one for one in left if joint.auc(one) > highest - MINIMAL_GAIN), key=seconds.of)
        left.remove(best)
        choice, refined = refine(joint, best)
        views = ", ".join(
            f"{names[m]} with {TTA_VIEWS[tta]} of 8 views" for m, tta in zip(best.members, best.tta, strict=True)
        )
        yield choice, [Step(f"{views}, for at most {budget:g} seconds", joint.auc(best), highest, True), *refined]


def write_ensemble(
    folder: Path, found: Sequence[Candidate], choice: Choice, calibration: Calibration, name: str
) -> dict[str, Any]:
    """Write the chosen members to a new ensemble folder, with links to their bases; returns the manifest."""
    folder.mkdir()
    entries = []
    for place, member in enumerate(choice.members):
        one = found[member]
        temperature, shift = calibration.heads[place]
        sources = {f"{one.name}-fold{number}": fold for number, fold in enumerate(one.folds)}
        folds = write_folds(folder, sources, one.entry["backbone"], shift, temperature)
        entries.append(
            {"name": one.name, **one.entry, "folds": folds, "tta": choice.tta[place], "precision": UNMEASURED}
        )
        if not (folder / one.base.name).exists():
            (folder / one.base.name).symlink_to(one.base.resolve())
    manifest = {
        "format": 2,
        "name": name,
        "members": entries,
        "weights": list(choice.shares),
        "averaging": choice.averaging,
        "temperature": round(calibration.temperature, 4),
        "threshold": round(calibration.threshold, 4),
        "provenance": {},
    }
    write_manifest(folder, manifest)
    return manifest


def time_members(draft: Path, found: Sequence[Candidate], job: Path, device: str) -> Seconds:
    """Seconds of each member with each number of views, from cold starts of all members in the fast precision."""
    everyone = tuple(range(len(found)))
    walls, members = [], [dict[str, float]() for _ in found]
    for tta in TTA_VIEWS:
        choice = Choice(everyone, (tta,) * len(found))
        manifest = write_ensemble(draft, found, choice, Calibration.plain(len(found)), "draft")
        for entry in manifest["members"]:  # not measured yet; hardly any is ever refused
            entry["precision"] = {"fp32": 0.0, "bf16": 0.0, "fp16": 0.0}
        write_manifest(draft, manifest)
        wall, details = cold_start(draft, job, device)
        walls.append(wall - sum(member["seconds"] for member in details["members"]))
        for place, member in enumerate(details["members"]):
            members[place][tta] = member["seconds"]
        shutil.rmtree(draft)
    seconds = Seconds(float(np.median(walls)), members)
    print(f"\nseconds of {CROPS} crops on {details['device']}: {seconds.start:.1f} to start", flush=True)
    for one, by_tta in zip(found, members, strict=True):
        views = ", ".join(f"{value:.1f} with {TTA_VIEWS[tta]}" for tta, value in by_tta.items())
        print(f"  {one.name}: {views} views", flush=True)
    return seconds
