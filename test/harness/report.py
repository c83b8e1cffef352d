"""Readable tables of what the jobs answered."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference.checks import Check, passed
from inference.phase import PHASE
from test.harness.engines import Run


@dataclass
class Result:
    """One stack's job: what ran, what it answered (None when nothing usable), what was found."""

    stack: Path
    pages: int
    run: Run
    answers: list[dict[str, Any]] | None
    findings: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return passed(self.findings)


def judge_others(results: list[Result]) -> list[Check]:
    """What the other answers are worth where a job failed: nothing, and those after it may never have been run."""
    failed = [result.stack.name for result in results if not (result.passed or result.run.skipped)]
    if not failed or len(results) == 1:
        return []
    answered, skipped = (sum(map(each, results)) for each in (lambda r: r.passed, lambda r: r.run.skipped))
    message = f"{', '.join(failed)} failed, and with it the evaluation of all {len(results)} stacks"
    worth = f"the answers of {answered} stack(s) count for nothing, {skipped} were not run"
    return [Check("FAIL", f"{message}: {worth}", "correct it and run all of them again")]


def judge_shown(result: Result) -> list[Check]:
    """What reaches a challenge's participants of a failed job; the log stays with whoever may see the phase's jobs."""
    if result.passed or result.run.skipped:
        return []
    first = next(finding.message for finding in result.findings if finding.level == "FAIL")
    message = f"at most this is shown of {result.stack.name}, and nothing in a phase that hides its jobs: {first}"
    return [Check("WARN", message, "say all in the last line of stderr")]


def print_pages(result: Result) -> None:
    """Table of one stack: page, class, probability, spread over the folds; then the seconds of the whole job."""
    details = result.run.details
    spreads = {page["page"]: page["spread"] for page in details.get("pages", [])}
    seconds = details.get("seconds", {})
    print(f"  {'page':>4}  {'class':<8}  {f'P({PHASE.positive})':>11}  {'spread':>6}")
    for page, answer in enumerate(result.answers or []):
        spread = f"{spreads[page]:6.3f}" if spreads.get(page) is not None else "     -"
        bar = "#" * round(20 * answer["confidence"])
        print(f"  {page:>4}  {answer['class']:<8}  {answer['confidence']:11.4f}  {spread}  {bar}")
    phases = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    about = ", ".join(str(details[key]) for key in ("ensemble", "device", "precision") if details.get(key))
    if about:
        print(f"  ensemble, device, precision: {about}")
    print(f"  seconds: whole job {result.run.wall_seconds:.2f}" + (f" ({phases})" if phases else ""))


def print_row(result: Result) -> None:
    """One line for one stack of many."""
    p = [answer["confidence"] for answer in result.answers or []]
    mean = f"{statistics.fmean(p):.3f}" if p else "-"
    positive = sum(answer["class"] == PHASE.positive for answer in result.answers or [])
    state = "ok" if result.passed else "FAIL"
    seconds = f"{result.run.wall_seconds:>7.2f}"
    print(f"  {result.stack.name:<24}  {result.pages:>5}  {positive:>8}  {mean:>6}  {seconds}  {state}", flush=True)


def print_header() -> None:
    print(f"  {'stack':<24}  {'pages':>5}  {PHASE.positive:>8}  {'mean P':>6}  {'seconds':>7}")


def print_metrics(metrics: dict[str, Any]) -> None:
    """The official metrics with their intervals, then one line per tumour domain."""
    aggregates, counts, intervals = metrics["aggregates"], metrics["counts"], metrics["intervals"]
    for key in (key for key in aggregates if key.startswith("overall_")):
        low, high = intervals.get(key) or (None, None)
        print(f"  {key.removeprefix('overall_'):<18} {show(aggregates[key])}  [{show(low)}, {show(high)}]")
    print("  " + ", ".join(f"{name} {value}" for name, value in counts["overall"].items()))
    for key in (key for key in aggregates if key.startswith("domain_")):
        figures, count = aggregates[key], counts[key]
        text = ", ".join(f"{name} {show(figures[name])}" for name in ("balanced_accuracy", "roc_auc"))
        print(f"  {key:<18} {text} ({count['atypical']} atypical, {count['normal']} normal)")


def show(value: float | None) -> str:
    return "     -" if value is None else f"{value:6.4f}"
