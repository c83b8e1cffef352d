"""The report of a run: one self-contained HTML page of its out-of-fold scores, curves, folds, domains and settings.

Every probability in it comes from the fold that did not train on the crop. The first panel is leave-one-fold-out: TTA,
averaging, temperature and threshold are chosen without the fold that they score. The charts and tables show the
shipped settings, chosen on all folds. Intervals are a bootstrap over groups.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from inference.errors import UserError
from inference.files import write_whole
from inference.manifest import TTA_VIEWS
from inference.metrics import intervals, scores
from inference.report.page import read

from .calibrate import METRICS, OutOfFold, averaged, calibrate, calibrated, read_out_of_fold
from .curves import curves_chart, reliability_chart, roc_chart, threshold_chart

FEW = 10  # atypical crops; with fewer, one crop changes a domain's balanced accuracy by more than five points
NAMES = {
    "balanced_accuracy": "Balanced accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "auc": "AUC",
    "brier": "Brier",
    "ece": "ECE",
}
STYLE = """
figure { margin: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: .15rem .9rem; margin-top: .3rem; }
figcaption { font-size: .8125rem; color: var(--muted); }
.key { display: inline-flex; align-items: center; gap: .35rem; }
.panel > p { margin: .6rem 0 0; max-width: none; }
.panel > p:first-of-type { margin-top: .3rem; }
td small { color: var(--muted); display: block; font-size: .75rem; white-space: nowrap; }
tr.sum > * { border-top: 2px solid var(--line); font-weight: 600; }
.confusion td, .confusion th { text-align: center; padding: .7rem .5rem; }
.confusion thead th { text-align: center; }
.confusion td { border: 1px solid var(--line); font-size: 1.2rem; font-weight: 600; }
.confusion td small { font-weight: 400; font-size: .8125rem; }
.hit { background: color-mix(in srgb, var(--accent) 16%, transparent); }
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a finished run folder of 'training fit'")
    parser.add_argument("--output", type=Path, help="HTML file to write (default: report.html in the run folder)")


def run(options: argparse.Namespace) -> None:
    page = report(options.run)
    target = options.output or options.run / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, page)
    print(f"{target}: {len(page):,} bytes; open it in a browser")


def report(run: Path) -> str:
    """The page of a finished run. UserError where a fold or a file of it is missing."""
    oof = read_out_of_fold(run)
    settings = _read_json(run / "recipe.json")
    data = _read_json(run / "data.json") if (run / "data.json").exists() else {}
    chosen = calibrate(oof)
    p = calibrated(oof.logits, chosen)
    raw = averaged(oof.logits[: TTA_VIEWS[chosen["tta"]]], chosen["averaging"])
    threshold, name = chosen["threshold"], escape(run.resolve().name)
    counts = f"{len(p):,} crops, {oof.labels.sum():,} atypical, {len(set(oof.groups)):,} slides or cases"
    pooled, spans = scores(oof.labels, p, threshold), intervals(oof.labels, p, oof.groups, threshold)
    histories = [_history(run / f"fold{fold}" / "metrics.csv") for fold in np.unique(oof.folds)]
    panels = [
        _panel(
            "Leave one fold out",
            _left_out(chosen)
            + f"""<p class="small muted">{counts}. Each fold is scored with
            the TTA, averaging, temperature, shift and threshold that the other folds choose. In brackets: 95%
            intervals from resampled slides, with the thresholds chosen again in each resample.</p>""",
            wide=True,
        ),
        _panel(
            "At the shipped threshold",
            _numbers(pooled, spans)
            + f"""<p class="small muted">Called atypical from
            P = {threshold:.3f} on; TTA {chosen["tta"]}, mean {chosen["averaging"]}, temperature
            {chosen["temperature"]:.2f}, shift {chosen["shift"]:+.2f}: all chosen on these same crops, which flatters.
            In brackets: 95% intervals from resampled slides, with the threshold held fixed.</p>""",
            wide=True,
        ),
        _panel("ROC", roc_chart(oof, p, threshold).svg()),
        _panel(
            "Threshold",
            threshold_chart(oof, p, chosen).svg()
            + f"""<p class="small muted">At 0.5 on uncalibrated probabilities, the balanced accuracy would be
               {chosen["balanced_accuracy_at_half"]:.4f}.</p>""",
        ),
        _panel("Reliability", reliability_chart(oof, raw, p).svg()),
        _panel("Confusion", _confusion(oof.labels, p >= threshold)),
        _panel("Loss", curves_chart(histories, ("loss", "validation_loss"), "loss").svg()),
        _panel("AUC by epoch", curves_chart(histories, ("auc",), "AUC, one view").svg()),
        _panel("Folds", _table(oof, p, threshold, oof.folds, "Fold", (pooled, spans)), wide=True),
        _panel("Domains", _table(oof, p, threshold, oof.domains, "Tumour x scanner", None), wide=True),
        _panel("Test-time augmentation, by AUC", _tried(chosen)),
        _panel("Data", _facts(data) if data else "<p>This run has no data.json.</p>"),
        _panel("Settings", f"<details><summary>The whole recipe</summary>{_facts(settings)}</details>"),
    ]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Training report: {name}</title><style>{read("page.css")}{STYLE}</style></head><body>
<header class="page"><h1>Training report: {name}</h1>
<p>{escape(settings["backbone"])}, LoRA rank {settings["rank"]} on {escape(settings["targets"])},
{len(histories)} folds split {escape(settings["split"])}, seed {settings["seed"]}</p></header>
<main class="panels">{"".join(panels)}</main>
<footer>Each crop is scored by the fold that did not train on it. The ensemble of all folds cannot be scored on these
crops: every one of them trained some fold.</footer></body></html>
"""


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({error}); expected a run folder; make one with 'training fit'"
        ) from None
    return dict(content)


def _history(file: Path) -> dict[str, list[float]]:
    """Columns of a fold's metrics.csv; empty where the file is missing."""
    if not file.exists():
        return {}
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]} if rows else {}


def _panel(title: str, content: str, wide: bool = False) -> str:
    return f'<section class="panel{" wide" if wide else ""}"><h2>{title}</h2>{content}</section>'


def _number(value: float, digits: int = 3) -> str:
    return "–" if np.isnan(value) else f"{value:.{digits}f}"


def _span(span: tuple[float, float]) -> str:
    return f"[{_number(span[0])}, {_number(span[1])}]"


def _numbers(found: dict[str, float], spans: dict[str, tuple[float, float]]) -> str:
    """Metrics as large numbers, with their intervals, if any."""
    cells = []
    for key, value in found.items():
        span = _span(spans[key]) if key in spans else ""
        cells.append(f"<div><dt>{NAMES[key]}</dt><dd>{_number(value)}<small>{span}</small></dd></div>")
    return f'<dl class="figures">{"".join(cells)}</dl>'


def _left_out(chosen: dict[str, Any]) -> str:
    """The leave-one-fold-out metrics of `calibrate`."""
    if chosen["balanced_accuracy"] is None:
        return "<p>Not possible: without one of the folds a class is missing.</p>"
    found = {key: chosen[key] for key in METRICS}
    return _numbers(found, {key: chosen[f"{key}_interval"] for key in METRICS if chosen.get(f"{key}_interval")})


def _confusion(labels: np.ndarray, called: np.ndarray) -> str:
    rows = []
    for name, label in (("atypical", 1), ("normal", 0)):
        of_class = called[labels == label]
        cells = "".join(
            f'<td class="{"hit" if hit == label else ""}">{n:,}<small>{n / max(1, len(of_class)):.1%}</small></td>'
            for hit, n in ((1, int(of_class.sum())), (0, int((~of_class).sum())))
        )
        rows.append(f'<tr><th scope="row" class="{name}">is {name}</th>{cells}</tr>')
    return (
        '<table class="confusion"><thead><tr><td></td><th scope="col">called atypical</th>'
        f'<th scope="col">called normal</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _table(
    oof: OutOfFold,
    p: np.ndarray,
    threshold: float,
    keys: np.ndarray,
    title: str,
    pooled: tuple[dict[str, float], dict[str, tuple[float, float]]] | None,
) -> str:
    """One row of scores, counts and intervals for each of `keys`, then all of them pooled, or their mean and worst."""

    def row(name: str, n: str, found: dict[str, float], spans: dict[str, tuple[float, float]], kind: str = "") -> str:
        cells = "".join(
            f"<td>{_number(found[key])}<small>{_span(spans[key]) if key in spans else ''}</small></td>" for key in NAMES
        )
        return f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{n}{cells}</tr>'

    def counted(chosen: np.ndarray) -> str:
        atypical = int(oof.labels[chosen].sum())
        few = ' class="atypical" title="too few for a steady score"' if atypical < FEW else ""
        return f"<td>{chosen.sum():,}</td><td{few}>{atypical:,}</td><td>{len(set(oof.groups[chosen])):,}</td>"

    rows, all_found = [], []
    for key in np.unique(keys):
        chosen = keys == key
        all_found.append(scores(oof.labels[chosen], p[chosen], threshold))
        spans = intervals(oof.labels[chosen], p[chosen], oof.groups[chosen], threshold)
        rows.append(row(str(key), counted(chosen), all_found[-1], spans))
    if pooled:
        rows.append(row("pooled", counted(np.ones(len(p), bool)), *pooled, "sum"))
    elif len(all_found) > 1:
        empty = "<td></td>" * 3
        ends = {name: max if name in ("brier", "ece") else min for name in NAMES}
        mean, worst = {}, {}
        for name in NAMES:
            # a domain that lacks a class has no AUC
            values = [found[name] for found in all_found if math.isfinite(found[name])]
            mean[name] = float(np.mean(values)) if values else math.nan
            worst[name] = float(ends[name](values)) if values else math.nan
        rows.append(row("mean of domains", empty, mean, {}, "sum"))
        rows.append(row("worst, score by score", empty, worst, {}))
    head = "".join(f'<th scope="col">{name}</th>' for name in (title, "Crops", "Atypical", "Slides", *NAMES.values()))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _tried(chosen: dict[str, Any]) -> str:
    rules = ("logit", "probability")
    rows = "".join(
        f'<tr><th scope="row">{tta}, {TTA_VIEWS[tta]} view{"s" if TTA_VIEWS[tta] > 1 else ""}</th>'
        + "".join(
            f"<td>{'<strong>' if (tta, rule) == (chosen['tta'], chosen['averaging']) else ''}{auc[rule]:.4f}</td>"
            for rule in rules
        )
        + "</tr>"
        for tta, auc in chosen["tried"].items()
    )
    head = '<th></th><th scope="col">mean of logits</th><th scope="col">mean of probabilities</th>'
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        '<p class="small muted">In bold: what calibration chose.</p>'
    )


def _facts(content: dict[str, Any], prefix: str = "") -> str:
    """Nested settings as one two-column table."""

    def rows(part: dict[str, Any], prefix: str) -> str:
        return "".join(
            rows(value, f"{prefix}{key}: ")
            if isinstance(value, dict)
            else f'<tr><th scope="row">{escape(prefix + str(key))}</th><td>{escape(str(value))}</td></tr>'
            for key, value in part.items()
        )

    return f'<table class="facts"><tbody>{rows(content, prefix)}</tbody></table>'
