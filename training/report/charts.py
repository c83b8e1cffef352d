"""Figures of a report as inline SVG by matplotlib, in the colours of `inference/report/page.css`.

matplotlib knows fixed colours alone, and a page has light and dark ones. So each fixed colour here stands for one of
the page's variables, which takes its place in the SVG.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VARIABLES = ("accent", "atypical", "normal", "warn", "muted", "line")
ACCENT, ATYPICAL, NORMAL, WARN, MUTED, LINE = COLOURS = [f"#0000{n:02x}" for n in range(1, 1 + len(VARIABLES))]
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 9,
    "text.color": MUTED,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}


def chart(name: str, x: str, y: str, draw: Callable[[Axes], None]) -> str:
    """One <figure>: what `draw` draws on axes that are labelled x and y, with a legend below.

    name: what a screen reader reads out
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure((3.75, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel=x, ylabel=y)
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=3, fontsize=8.5, columnspacing=1, handlelength=1.6)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub(r".*<svg ", "<svg ", stream.getvalue(), count=1, flags=re.DOTALL)
    svg = re.sub(r'width="\S+" height="\S+"', f'role="img" aria-label="{escape(name)}"', svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for colour, variable in zip(COLOURS, VARIABLES, strict=True):
        svg = svg.replace(colour, f"var(--{variable})")
    return f"<figure>{svg}</figure>"
