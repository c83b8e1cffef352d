"""The crops of a report: the worst mistakes, and labels that may be wrong, each judged by the fold that did not see it.

A label is doubted where the experts disagreed (or their votes are not known) and the probability of the
other class is above the mean that crops of that class get: the rule of confident learning (arXiv 1911.00068).
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from inference.errors import UserError
from inference.report.page import picture

from ..data.crop import Crop
from ..fit.feed import load_crops

SHOWN = 12  # crops of each kind
STYLE = """
.crops { display: grid; gap: .75rem; margin: 0; padding: 0; }
.crops { grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
@media (min-width: 60rem) { .crops { grid-template-columns: repeat(6, 1fr); } }
.crops li { list-style: none; font-size: .8125rem; line-height: 1.35; overflow-wrap: anywhere; }
.crops img, .crops .none { display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain; }
.crops img, .crops .none { margin-bottom: .3rem; border-radius: 6px; }
.crops .none { display: grid; place-items: center; background: var(--sunken); color: var(--muted); }
"""


class Doubts(NamedTuple):
    """Indices of crops, the most confident first."""

    mistakes: list[int]
    labels: list[int]


def doubts(crops: Sequence[Crop], p: np.ndarray, threshold: float) -> Doubts:
    """Crops whose call is wrong, and crops whose label is doubted; none is in both.

    p: out-of-fold P(atypical) (N,); threshold: from which a crop is called atypical
    """
    labels = np.array([crop.label for crop in crops])
    agreed = np.array([len(crop.votes) > 1 and len(set(crop.votes)) == 1 for crop in crops])
    other = np.where(labels == 1, 1 - p, p)  # probability of the class that the label is not
    typical = np.where(labels == 1, 1 - p[labels == 0].mean(), p[labels == 1].mean())  # of crops of that class
    wrong = (p >= threshold) != (labels == 1)
    doubted = wrong & ~agreed & (other > typical)
    order = np.argsort(-other / typical, kind="stable")
    return Doubts(
        [int(n) for n in order if wrong[n] and not doubted[n]][:SHOWN], [int(n) for n in order if doubted[n]][:SHOWN]
    )


def cards(crops: Sequence[Crop], p: np.ndarray, chosen: Sequence[int]) -> str:
    """A list of the chosen crops with picture, label, probability, votes and slide."""
    return f'<ul class="crops">{"".join(_card(crops[n], float(p[n])) for n in chosen)}</ul>'


def _card(crop: Crop, p: float) -> str:
    name = "atypical" if crop.label else "normal"
    votes = f"<br>experts: {sum(crop.votes)} of {len(crop.votes)} atypical" if crop.votes else ""
    return (
        f'<li>{_picture(crop)}<span class="{name}">is {name}</span>{votes}<br>P(atypical) {p:.3f}<br>'
        f'<span class="muted">{escape(crop.group)}<br>{escape(crop.path.name)}</span></li>'
    )


def _picture(crop: Crop) -> str:
    """The crop inside the page; a line of text where its file is gone or has other pixels now."""
    try:
        image = picture(load_crops([crop])[0])
    except UserError:
        reason = "not as it was" if crop.path.exists() else "file gone"
        return f'<span class="none">{reason}</span>'
    text = base64.b64encode(image.webp).decode()
    return f'<img alt="" width="{image.width}" height="{image.height}" src="data:image/webp;base64,{text}">'
