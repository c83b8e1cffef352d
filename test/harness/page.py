"""The run as the page that `inference score --report` makes: every crop with its answer, and the mistakes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from inference.phase import PHASE
from test.harness.report import Result

if TYPE_CHECKING:
    import numpy as np

NEEDS = ("numpy", "PIL")
PACKAGES = ("numpy", "pillow", "simpleitk")


def pinned(lock: Path) -> str:
    """The lines of a requirements file that pin what a report needs, with their hashes."""
    entries = re.findall(r"^[^\s#].*(?:\n    --hash.*)+", lock.read_text(), re.MULTILINE)
    return "\n".join(entry for entry in entries if entry.partition("==")[0] in PACKAGES) + "\n"


def write_page(results: list[Result], truth: Path | None, ensemble: Path | None, file: Path) -> str:
    """Writes `file` from all stacks that have answers; returns a line that names it, or says why there is none.

    Args:
        truth: ground_truth.json, for labels and domains.
        ensemble: its folder, if the answers are known to come from it.
    """
    answered = [result for result in results if result.answers]
    if not answered:
        return "no report: no stack was answered"
    from inference.answers import Answer
    from inference.imageio.stack import read_stack
    from inference.manifest import holds_ensemble, load_manifest
    from inference.report.page import Page, write_report
    from test.harness.scoring import read_truth

    truths = read_truth(truth) if truth else {}
    rows = []
    for result in answered:
        labels, domains = truths.get(result.stack.name, ([None] * result.pages, [""] * result.pages))
        pages = (result.run.details or {}).get("pages", [{}] * result.pages)
        for page, answer in enumerate(result.answers or []):
            label = None if labels[page] is None else int(labels[page] == PHASE.classes[1])
            folds = tuple(pages[page].get("fold_p", ()))
            p, domain = PHASE.confidence(answer["confidence"]), str(domains[page])  # P(atypical) again
            rows.append(Answer(result.stack.name, page, p, folds, label=label, domain=domain))

    def crops() -> Iterator[np.ndarray]:
        for result in answered:
            yield from read_stack(result.stack)

    details = answered[0].run.details or {}
    manifest = load_manifest(ensemble) if ensemble and ensemble.is_dir() and holds_ensemble(ensemble) else None
    known = {"ensemble": manifest.name, "threshold": manifest.threshold} if manifest else {}
    if any(details.get(name, value) != value for name, value in known.items()):
        manifest = None  # the image was built with another ensemble
    write_report(rows, crops(), manifest or details.get("threshold", 0.5), file, Page("Local run"))
    return f"open {os.path.relpath(file)}"
