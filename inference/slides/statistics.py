"""What a slide's answers add up to: counts, the atypical share with its interval, density, and the hot spot.

P(atypical) presumes a mitotic figure: a detector's false positives are counted here as figures too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

FIELDS = 2.0  # mm2: ten high-power fields (0.2 mm2 each; Donovan et al., Vet Pathol 2021)
RATIO = 4 / 3  # width by height of the hot spot, as of a field of view (MIDOG: about 4:3)
Z = 1.959964  # of the normal distribution, for 95%


def wilson(hits: int, total: int) -> tuple[float, float]:
    """95% interval of a share, hits of total (Wilson 1927); (0, 1) if total is 0."""
    if not total:
        return 0.0, 1.0
    share = hits / total
    middle = share + Z * Z / (2 * total)
    half = Z * math.sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    low, high = ((middle + sign * half) / (1 + Z * Z / total) for sign in (-1, 1))
    return max(0.0, low) if hits else 0.0, min(1.0, high) if hits < total else 1.0


@dataclass(frozen=True)
class HotSpot:
    """The window of 2 mm2 with the most figures. x, y: its centre in level-0 pixels; count: the figures in it."""

    x: float
    y: float
    count: int


def window(mpp: tuple[float, float]) -> tuple[float, float]:
    """Width and height of 2 mm2, in level-0 pixels."""
    height = math.sqrt(FIELDS / RATIO) * 1000  # um
    return height * RATIO / mpp[0], height / mpp[1]


def window_fits(size: tuple[int, int], mpp: tuple[float, float]) -> bool:
    """Whether a slide of that width and height, in level-0 pixels, has room for the window."""
    return all(side <= extent for side, extent in zip(window(mpp), size, strict=True))


def hot_spot(x: np.ndarray, y: np.ndarray, size: tuple[int, int], mpp: tuple[float, float]) -> HotSpot | None:
    """The window with the most of the figures at x, y (N,); None without figures, or on a slide smaller than it.

    size, x, y: level-0 pixels. Exact: some best window has a figure on its left border and one on its top. So the left
    border moves from figure to figure, while `counts` holds, for each figure's y as the top, how many figures the
    window has: each figure that enters or leaves changes one slice of it. Ties: the leftmost, then the topmost.
    """
    if not len(x) or not window_fits(size, mpp):
        return None
    width, height = window(mpp)
    order = np.argsort(x, kind="stable")
    xs, ys, tops = x[order], y[order], np.unique(y)
    lows, highs = np.searchsorted(tops + height, ys, "left"), np.searchsorted(tops, ys, "right")
    counts = np.zeros(len(tops), np.int32)
    best, left, upper, entered = 0, 0.0, 0.0, 0
    for first, last in enumerate(np.searchsorted(xs, xs + width, "right")):
        if last > entered:
            for n in range(entered, last):
                counts[lows[n] : highs[n]] += 1
            if last - first > best:  # or else even all of them would not beat the best
                start, stop = lows[entered:last].min(), highs[entered:last].max()
                top = start + int(counts[start:stop].argmax())
                if counts[top] > best:
                    best, left, upper = int(counts[top]), float(xs[first]), float(tops[top])
            entered = last
        counts[lows[first] : highs[first]] -= 1
    chosen = (xs >= left) & (xs <= left + width) & (ys >= upper) & (ys <= upper + height)
    middles = [float(axis[chosen].min() + axis[chosen].max()) / 2 for axis in (xs, ys)]  # centred on its figures
    # moved onto the slide: whatever it leaves behind holds no figures
    x_middle, y_middle = (
        min(max(middle, side / 2), extent - side / 2)
        for middle, side, extent in zip(middles, (width, height), size, strict=True)
    )
    return HotSpot(x_middle, y_middle, best)


@dataclass(frozen=True)
class Summary:
    """One slide's row. area: mm2 of the outlined region, or None; inside: figures and atypical ones in it.

    too_small: the slide has no room for a hot spot; where there is a region, hot spots count the figures in it alone
    """

    slide: str
    figures: int
    atypical: int
    failed: int
    area: float | None
    inside: tuple[int, int] | None
    too_small: bool
    hottest: HotSpot | None
    hottest_atypical: HotSpot | None

    @property
    def share(self) -> float | None:
        return self.atypical / self.figures if self.figures else None

    def row(self) -> dict[str, object]:
        """By column, for CSV; a missing value is empty."""
        low, high = wilson(self.atypical, self.figures)
        spots = {"hotspot": self.hottest, "atypical_hotspot": self.hottest_atypical}
        row: dict[str, object] = {
            "slide": self.slide,
            "figures": self.figures,
            "atypical": self.atypical,
            "not_scored": self.failed,
            "atypical_share": "" if self.share is None else round(self.share, 6),
            "share_low": round(low, 6) if self.figures else "",
            "share_high": round(high, 6) if self.figures else "",
            "area_mm2": "" if self.area is None else round(self.area, 6),
            "figures_per_mm2": self.density(0),
            "atypical_per_mm2": self.density(1),
        }
        for name, spot in spots.items():
            row[f"{name}_figures"] = spot.count if spot else "" if self.too_small else 0
            row[f"{name}_x"], row[f"{name}_y"] = (round(spot.x), round(spot.y)) if spot else ("", "")
        return row

    def density(self, which: int) -> object:
        return round(self.inside[which] / self.area, 6) if self.area and self.inside else ""


COLUMNS = tuple(Summary("", 0, 0, 0, None, None, False, None, None).row())
