"""Parts of the report of a run: panels, large numbers, and tables of scores and settings."""

from __future__ import annotations

import math
from html import escape
from typing import Any, NamedTuple

import numpy as np

from inference import assessment
from inference.manifest import TTA_VIEWS
from inference.metrics import intervals, scores

from ..ensemble.joint import METRICS
from ..run import OutOfFold

FEW = 10  # atypical crops; with fewer, one crop changes a domain's balanced accuracy by more than five points
NAMES = {key: name[0].upper() + name[1:] for key, name in assessment.NAMES.items()}


def panel(title: str, content: str, wide: bool = False) -> str:
    return f'<section class="panel{" wide" if wide else ""}"><h2>{title}</h2>{content}</section>'


def number(value: float, digits: int = 3) -> str:
    return "–" if np.isnan(value) else f"{value:.{digits}f}"


def span(span: tuple[float, float]) -> str:
    return f"[{number(span[0])}, {number(span[1])}]"


def numbers(result: Scores, more: str = "") -> str:
    """Scores as large numbers with their intervals, if any; more: further <div> of a <dl class="figures">."""
    cells = []
    for key, value in result.values.items():
        text = span(result.spans[key]) if key in result.spans else "&nbsp;"
        cells.append(f"<div><dt>{NAMES[key]}</dt><dd>{number(value)}<small>{text}</small></dd></div>")
    return f'<dl class="figures">{"".join(cells)}{more}</dl>'


def left_out(chosen: dict[str, Any], more: str) -> str:
    """The nested metrics of `calibrate`, followed by the figures `more`."""
    values = {key: chosen[key] for key in METRICS}
    spans = {key: chosen[f"{key}_interval"] for key in METRICS if chosen.get(f"{key}_interval")}
    return numbers(Scores(values, spans), more)


def counts(oof: OutOfFold) -> str:
    """How many crops, slides and atypical ones were scored, as figures for `numbers`."""
    slides = len(set(oof.groups))
    return (
        f"<div><dt>Crops</dt><dd>{len(oof.labels):,}<small>{slides:,} slides</small></dd></div>"
        f"<div><dt>Atypical</dt><dd>{oof.labels.sum():,}<small>{oof.labels.mean():.1%}</small></dd></div>"
    )


def confusion(labels: np.ndarray, called: np.ndarray) -> str:
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


class Scores(NamedTuple):
    """Values by the names of NAMES, and the 95% intervals of some of them."""

    values: dict[str, float]
    spans: dict[str, tuple[float, float]]


class Judged(NamedTuple):
    """Out-of-fold crops with their P(atypical) (N,), and the threshold from which they are called atypical."""

    oof: OutOfFold
    p: np.ndarray
    threshold: float

    def scores(self, part: np.ndarray) -> Scores:
        """Scores of the crops that the mask `part` (N,) selects."""
        labels, p = self.oof.labels[part], self.p[part]
        return Scores(scores(labels, p, self.threshold), intervals(labels, p, self.oof.groups[part], self.threshold))

    def everything(self) -> np.ndarray:
        return np.ones(len(self.p), bool)


def scores_by(judged: Judged, keys: np.ndarray, title: str) -> str:
    """A row of scores, counts and intervals for each of `keys` (N,), and one for all crops."""
    rows = [row(str(key), counted(judged, keys == key), judged.scores(keys == key)) for key in np.unique(keys)]
    rows.append(row("all", counted(judged, judged.everything()), judged.scores(judged.everything()), "sum"))
    return _scores_table(title, rows)


def scores_by_domain(judged: Judged, title: str) -> str:
    """The same for domains, with the mean of the domains and the worst value of each score."""
    keys = judged.oof.domains
    by_domain = {str(key): judged.scores(keys == key) for key in np.unique(keys)}
    rows = [row(name, counted(judged, keys == name), result) for name, result in by_domain.items()]
    if len(by_domain) > 1:
        mean, worst = {}, {}
        for name in NAMES:
            # a domain that lacks a class has no AUC
            values = [result.values[name] for result in by_domain.values() if math.isfinite(result.values[name])]
            mean[name] = float(np.mean(values)) if values else math.nan
            worst[name] = float((max if name in ("brier", "ece") else min)(values)) if values else math.nan
        rows.append(row("mean of the domains", "<td></td>" * 3, Scores(mean, {}), "sum"))
        rows.append(row("worst domain for each score", "<td></td>" * 3, Scores(worst, {})))
    return _scores_table(title, rows)


def row(name: str, counts: str, result: Scores, kind: str = "") -> str:
    cells = "".join(
        f"<td>{number(result.values[key])}<small>{span(result.spans[key]) if key in result.spans else ''}</small></td>"
        for key in NAMES
    )
    return f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{counts}{cells}</tr>'


def counted(judged: Judged, part: np.ndarray) -> str:
    """Cells with the number of crops, of atypical ones and of slides in the mask `part` (N,)."""
    atypical = int(judged.oof.labels[part].sum())
    few = ' class="atypical" title="too few for a steady score"' if atypical < FEW else ""
    return f"<td>{part.sum():,}</td><td{few}>{atypical:,}</td><td>{len(set(judged.oof.groups[part])):,}</td>"


def _scores_table(title: str, rows: list[str]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in (title, "Crops", "Atypical", "Slides", *NAMES.values()))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def tried(chosen: dict[str, Any]) -> str:
    rules = ("logit", "probability")
    rows = "".join(
        f'<tr><th scope="row">{TTA_VIEWS[tta]}{f" ({tta})" if TTA_VIEWS[tta] > 1 else ""}</th>'
        + "".join(
            f"<td>{'<strong>' if (tta, rule) == (chosen['tta'], chosen['averaging']) else ''}{auc[rule]:.4f}</td>"
            for rule in rules
        )
        + "</tr>"
        for tta, auc in chosen["tried"].items()
    )
    head = '<th scope="col">Views</th><th scope="col">of logits</th><th scope="col">of probabilities</th>'
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        '<p class="small muted">In bold: what calibration chose.</p>'
    )


def facts(content: dict[str, Any], prefix: str = "") -> str:
    """Nested settings as one two-column table."""

    def rows(part: dict[str, Any], prefix: str) -> str:
        return "".join(
            rows(value, f"{prefix}{key}: ")
            if isinstance(value, dict)
            else f'<tr><th scope="row">{escape(prefix + str(key))}</th><td>{escape(str(value))}</td></tr>'
            for key, value in part.items()
        )

    return f'<table class="facts"><tbody>{rows(content, prefix)}</tbody></table>'
