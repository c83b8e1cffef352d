"""The report of a run: one self-contained HTML page of its out-of-fold scores, curves, folds, domains and settings.

Every probability in it comes from the fold that did not train on the crop. The first panel is nested:
what is chosen and fitted comes from the folds that it does not score. The charts and tables show the
shipped settings, chosen on all folds. Intervals are a bootstrap over groups.
"""

from __future__ import annotations

import argparse
import dataclasses
from html import escape
from pathlib import Path

from inference.files import write_whole
from inference.manifest import TTA_VIEWS
from inference.report.page import read

from ..ensemble.calibrate import averaged, calibrate, calibrated
from ..run import RunFolder
from . import mistakes
from .curves import curves_chart, reliability_chart, roc_chart, threshold_chart
from .mistakes import cards, doubts
from .parts import Judged, confusion, counts, facts, left_out, numbers, panel, scores_by, scores_by_domain, tried

STYLE = """
.figures { grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)); }
@media (min-width: 60rem) { .figures { grid-template-columns: repeat(6, 1fr); } }
@media (max-width: 44rem) { table.facts th { white-space: normal; width: auto; } }
.panel h3 { margin-top: .8rem; }
figure { margin: 0; }
.panel > p { margin: .6rem 0 0; max-width: none; }
.panel > p:first-of-type { margin-top: .3rem; }
td small { color: var(--muted); display: block; font-size: .75rem; white-space: nowrap; }
tr.sum > * { border-top: 2px solid var(--line); font-weight: 600; }
.confusion td, .confusion th { text-align: center; padding: .35rem .5rem; }
.confusion thead td { border: 0; }
.confusion thead th { text-align: center; }
.confusion tbody tr td { border: 1px solid var(--line); font-size: 1.2rem; font-weight: 600; }
.confusion td small { font-weight: 400; font-size: .8125rem; }
.hit { background: color-mix(in srgb, var(--accent) 16%, transparent); }
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a finished run folder of 'training fit'")
    parser.add_argument("--output", type=Path, help="HTML file to write (default: report.html in the run folder)")


def run(options: argparse.Namespace) -> None:
    page = report(RunFolder(options.run))
    target = options.output or options.run / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, page)
    print(f"{target}: {len(page):,} bytes; open it in a browser")


def report(run: RunFolder) -> str:
    """The page of a finished run. UserError where a fold or a file of it is missing."""
    oof, settings, data = run.out_of_fold(), dataclasses.asdict(run.recipe()), run.data()
    chosen = calibrate(oof)
    p = calibrated(oof.logits, chosen)
    raw = averaged(oof.logits[: TTA_VIEWS[chosen["tta"]]], chosen["averaging"])
    threshold, name = chosen["threshold"], escape(run.path.resolve().name)
    judged = Judged(oof, p, threshold)
    histories = [run.history(number) for number in run.numbers()]
    panels = [
        panel(
            "Leave one fold out",
            left_out(chosen, counts(oof))
            + """<p class="small muted">Each fold is scored with
            the TTA, averaging, temperature, shift and threshold that the other folds choose, and all crops are
            pooled. In brackets: 95% intervals from resampled slides, with the thresholds chosen
            again in each resample.</p>""",
            wide=True,
        ),
        panel(
            "At the shipped threshold",
            numbers(judged.scores(judged.everything()))
            + f"""<p class="small muted">Called atypical from
            P = {threshold:.3f} on; TTA {chosen["tta"]}, mean {chosen["averaging"]}, temperature
            {chosen["temperature"]:.2f}, shift {chosen["shift"]:+.2f}: all chosen on these same crops, so these scores
            are too good. In brackets: 95% intervals from resampled slides, with the threshold held fixed. At 0.5 on
            uncalibrated probabilities the balanced accuracy is {chosen["balanced_accuracy_at_half"]:.3f}.</p>""",
            wide=True,
        ),
        panel("ROC", roc_chart(oof, p, threshold)),
        panel("Threshold", threshold_chart(oof, p, chosen)),
        panel("Reliability", reliability_chart(oof, raw, p)),
        panel(
            "Confusion", f"{confusion(oof.labels, p >= threshold)}<h3>AUC by views and kind of mean</h3>{tried(chosen)}"
        ),
        panel("Loss", curves_chart(histories, ("loss", "validation_loss"), "loss")),
        panel("AUC by epoch", curves_chart(histories, ("auc",), "AUC, one view")),
        panel("Folds", scores_by(judged, oof.folds, "Fold"), wide=True),
        panel("Domains", scores_by_domain(judged, "Tumour x scanner"), wide=True),
        *crop_panels(run, judged),
        panel("Data", facts(data), wide=True),
        panel("Settings", f"<details><summary>The whole recipe</summary>{facts(settings)}</details>", wide=True),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>Training report: {name}</title><style>{read("page.css")}{STYLE}{mistakes.STYLE}</style></head><body>
<header class="page"><h1>Training report: {name}</h1>
<p>{escape(settings["backbone"])} with LoRA of rank {settings["rank"]} (targets: {escape(settings["targets"])}),
{len(histories)} folds (split: {escape(settings["split"])}), seed {settings["seed"]}</p></header>
<main class="panels">{"".join(panels)}</main>
<footer>Each crop is scored by the fold that did not train on it. The ensemble of all folds cannot be scored on these
crops: every one of them trained some fold.</footer></body></html>
"""


def crop_panels(run: RunFolder, judged: Judged) -> list[str]:
    """The crops of the worst mistakes, and those whose label is doubted."""
    crops = [crop for crop, fold in zip(run.crops(), run.split().tolist(), strict=True) if fold >= 0]
    chosen = doubts(crops, judged.p, judged.threshold)
    return [
        panel(
            title,
            (cards(crops, judged.p, indices) if indices else "<p>None.</p>") + f'<p class="small muted">{text}</p>',
            wide=True,
        )
        for title, indices, text in (
            (
                "Worst mistakes",
                chosen.mistakes,
                "Wrong answers, the most confident first, where all experts agreed on the label, or where the "
                "probability gives no reason to doubt it.",
            ),
            (
                "Labels to look at again",
                chosen.labels,
                "Wrong answers that are more confident than crops of the other class get on average (arXiv "
                "1911.00068), where the experts disagreed or their votes are not known.",
            ),
        )
    ]
