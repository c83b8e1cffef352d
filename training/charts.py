"""Line charts as inline SVG in the colours of `inference/report/page.css`, so that they suit light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np

Numbers: TypeAlias = "Sequence[float] | np.ndarray"
WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40
COLOURS = ("var(--accent)", "var(--atypical)", "var(--normal)", "var(--warn)", "var(--muted)")


@dataclass
class Chart:
    """Axes with ranges x and y, each (low, high). Add layers, then call `svg()`.

    name: what a screen reader reads out
    """

    name: str
    x_label: str
    y_label: str
    x: tuple[float, float] = (0.0, 1.0)
    y: tuple[float, float] = (0.0, 1.0)
    x_ticks: Sequence[float] = (0, 0.2, 0.4, 0.6, 0.8, 1)
    y_ticks: Sequence[float] = (0, 0.2, 0.4, 0.6, 0.8, 1)
    layers: list[str] = field(default_factory=list)
    legend: list[tuple[str, str, str]] = field(default_factory=list)  # name, colour, dash

    def across(self, x: float) -> float:
        return LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def down(self, y: float) -> float:
        return HEIGHT - BOTTOM - (y - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)

    def line(
        self,
        x: Numbers,
        y: Numbers,
        colour: str,
        name: str = "",
        width: float = 2,
        dash: str = "",
        opacity: float = 1,
    ) -> None:
        points = " ".join(f"{self.across(a):.1f},{self.down(b):.1f}" for a, b in zip(x, y, strict=True))
        style = f'stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}" stroke-opacity="{opacity}"'
        self.layers.append(f'<polyline points="{points}" fill="none" {style} stroke-linejoin="round"/>')
        if name:
            self.legend.append((name, colour, dash))

    def dots(self, x: Numbers, y: Numbers, radius: Numbers, colour: str) -> None:
        for a, b, r in zip(x, y, radius, strict=True):
            self.layers.append(
                f'<circle cx="{self.across(a):.1f}" cy="{self.down(b):.1f}" r="{r:.1f}" fill="{colour}"/>'
            )

    def band(self, low: float, high: float, colour: str, name: str = "") -> None:
        """Shade the x axis from `low` to `high`."""
        left, right = self.across(max(low, self.x[0])), self.across(min(high, self.x[1]))
        self.layers.append(
            f'<rect x="{left:.1f}" y="{TOP}" width="{max(1, right - left):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}" fill="{colour}" fill-opacity="0.15"/>'
        )
        if name:
            self.legend.append((name, colour, "band"))

    def svg(self) -> str:
        """The chart with its legend below, as one <figure>."""
        marks = []
        foot = HEIGHT - BOTTOM
        for tick in self.x_ticks:
            a = self.across(tick)
            marks.append(
                f'<path class="axis" d="M{a:.1f} {TOP}V{foot}"/>'
                f'<text x="{a:.1f}" y="{foot + 15}" text-anchor="middle">{tick:g}</text>'
            )
        for tick in self.y_ticks:
            b = self.down(tick)
            marks.append(
                f'<path class="axis" d="M{LEFT} {b:.1f}H{WIDTH - RIGHT}"/>'
                f'<text x="{LEFT - 6}" y="{b + 4:.1f}" text-anchor="end">{tick:g}</text>'
            )
        middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
        labels = (
            f'<text x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle">{escape(self.x_label)}</text>'
            f'<text transform="translate(12 {middle_y}) rotate(-90)" text-anchor="middle">{escape(self.y_label)}</text>'
        )
        keys = "".join(
            f'<span class="key"><svg width="22" height="10" aria-hidden="true">{_swatch(colour, dash)}</svg>'
            f"{escape(name)}</span>"
            for name, colour, dash in self.legend
        )
        return (
            f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.name)}">'
            f"{''.join(marks)}{''.join(self.layers)}{labels}</svg><figcaption>{keys}</figcaption></figure>"
        )


def _swatch(colour: str, dash: str) -> str:
    if dash == "band":
        return f'<rect width="22" height="10" fill="{colour}" fill-opacity="0.25"/>'
    return f'<path d="M0 5H22" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"/>'


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About `about` round numbers between `low` and `high`."""
    from math import ceil, floor, log10

    span = max(high - low, 1e-9)
    power = 10 ** floor(log10(span / about))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(span / s - about))
    return [round(n * step, 10) for n in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]
