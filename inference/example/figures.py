"""Draws plausible H&E crops of mitotic figures, normal and atypical, from a seed (numpy and Pillow only).

A crop is painted as two stain concentrations, haematoxylin (nuclei, chromatin) and eosin (cytoplasm, fibres), at twice
the final resolution, and turned into colours by the Beer-Lambert law, as a bright-field scanner does. Distances are in
pixels of the final crop (0.25 um each) from its centre. The drawings are for tests and demonstrations of the pipeline;
they are no substitute for real crops, and no score on them means anything.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .tissue import Array, Drawing, Rng, paint_neighbours, paint_stroma, twice

# One row per "scanner": optical density per unit of haematoxylin and of eosin (R, G, B), and the colour of empty glass.
STAINS = (
    ((0.74, 0.80, 0.40), (0.10, 0.50, 0.26), (0.97, 0.96, 0.97)),  # magenta, blue-violet nuclei
    ((0.86, 0.82, 0.36), (0.14, 0.36, 0.16), (0.95, 0.95, 0.98)),  # bluish, pale
    ((0.62, 0.82, 0.42), (0.08, 0.54, 0.34), (0.98, 0.97, 0.95)),  # red eosin
    ((0.64, 0.80, 0.42), (0.10, 0.38, 0.25), (0.98, 0.95, 0.93)),  # faded pink
)

# ---- chromatin of the figures: rows (P, 3) of x, y and width, in a frame whose y axis is the spindle's ----


def bar(rng: Rng, length: float, thick: float, y: float = 0.0, bend: float = 0.0, jitter: float = 1.0) -> Array:
    """A plate across the spindle: (P, 3) rows of x, y, width; `bend` > 0 curves its ends towards larger y."""
    count = max(6, int(length * 0.9))
    x = np.linspace(-length / 2, length / 2, count)
    taper = 1 - 0.25 * (2 * x / length) ** 2
    rows = np.stack([x, y + bend * (2 * x / length) ** 2, thick * 0.62 * taper], axis=1)
    rows[:, :2] += rng.normal(0, 0.45 * jitter, (count, 2))
    rows[:, 2] *= rng.uniform(0.8, 1.2, count)
    arms = rows[rng.choice(count, count // 4, replace=False)].copy()  # chromosome arms stick out of the plate
    arms[:, 1] += rng.choice([-1, 1], len(arms)) * rng.uniform(0.5, 0.8, len(arms)) * thick
    arms[:, 2] *= 0.55
    return np.concatenate([rows, arms])


def bits(rng: Rng, count: int, spread_x: float, low: float, high: float) -> Array:
    """Loose chromosomes: (P, 3) short rods at |y| between low and high."""
    rods = []
    for _ in range(count):
        centre = np.array([rng.uniform(-spread_x, spread_x), rng.uniform(low, high) * rng.choice([-1, 1])])
        step = rng.normal(0, 1, 2)
        step *= rng.uniform(0.9, 1.6) / np.hypot(*step)
        rods += [[*(centre + k * step), rng.uniform(1.2, 1.7)] for k in (-1, 0, 1)]
    return np.array(rods)


def metaphase(rng: Rng) -> Array:
    return bar(rng, rng.uniform(20, 27), rng.uniform(6, 8), bend=rng.normal(0, 1))


def prometaphase(rng: Rng) -> Array:
    angle, radius = rng.uniform(0, 2 * np.pi, 40), 10 * np.sqrt(rng.uniform(0.05, 1, 40))
    return np.stack([1.2 * radius * np.cos(angle), 0.9 * radius * np.sin(angle), rng.uniform(1.6, 2.7, 40)], axis=1)


def anaphase(rng: Rng) -> Array:
    length, thick, half = rng.uniform(16, 21), rng.uniform(5, 6), rng.uniform(8, 12)
    return np.concatenate([bar(rng, length, thick, half, -2.5, 0.7), bar(rng, length, thick, -half, 2.5, 0.7)])


def telophase(rng: Rng) -> Array:
    length, thick, half = rng.uniform(13, 16), rng.uniform(4.5, 5.5), rng.uniform(15, 18)
    return np.concatenate([bar(rng, length, thick, half, 1, 0.5), bar(rng, length, thick, -half, -1, 0.5)])


def lagging(rng: Rng) -> Array:
    """Anaphase with chromosomes left behind, or a metaphase plate with chromosomes off it (polar)."""
    if rng.random() < 0.5:
        return np.concatenate([anaphase(rng), bits(rng, int(rng.integers(2, 4)), 5, 0, 3)])
    return np.concatenate([metaphase(rng), bits(rng, int(rng.integers(2, 5)), 7, 10, 15)])


def bridge(rng: Rng) -> Array:
    """Anaphase whose two halves stay tied by one or two strands."""
    rows = [anaphase(rng)]
    half = float(np.abs(rows[0][:, 1]).mean())
    for x in rng.uniform(-6, 6, int(rng.integers(1, 3))):
        y = np.linspace(-half, half, 18)
        rows.append(np.stack([x + rng.normal(0, 1) + 1.5 * np.sin(y / half * 1.5), y, np.full(18, 1.35)], axis=1))
    return np.concatenate(rows)


def multipolar(rng: Rng) -> Array:
    """Three or four plates that meet at the centre: a Y or an X."""
    poles = int(rng.integers(3, 5))
    rows = []
    for k in range(poles):
        arm = bar(rng, rng.uniform(12, 17), rng.uniform(5.5, 7))
        arm[:, 0] += 8
        angle = 2 * np.pi * k / poles + rng.normal(0, 0.15)
        rows.append(np.concatenate([rotate(arm[:, :2], angle), arm[:, 2:]], axis=1))
    return np.concatenate(rows)


def asymmetric(rng: Rng) -> Array:
    """Anaphase that shares the chromatin unequally."""
    half = rng.uniform(9, 12)
    big, small = bar(rng, rng.uniform(20, 24), 8, half, -3), bar(rng, rng.uniform(7, 10), 4, -half, 1)
    return np.concatenate([big, small, bits(rng, 1, 4, 0, 4)])


def dispersed(rng: Rng) -> Array:
    """Prometaphase whose chromosomes are scattered through the cell."""
    return np.concatenate([prometaphase(rng) * [0.75, 0.75, 0.9], bits(rng, int(rng.integers(7, 11)), 14, 7, 15)])


FIGURES: dict[str, dict[str, Callable[[Rng], Array]]] = {
    "normal": {"metaphase": metaphase, "prometaphase": prometaphase, "anaphase": anaphase, "telophase": telophase},
    "atypical": {
        "multipolar": multipolar,
        "lagging": lagging,
        "bridge": bridge,
        "asymmetric": asymmetric,
        "dispersed": dispersed,
    },
}


def rotate(points: Array, angle: float) -> Array:
    """Rotates points (P, 2) about the origin by `angle` radians."""
    c, s = np.cos(angle), np.sin(angle)
    turned: Array = points @ np.array([[c, s], [-s, c]])
    return turned


def paint_figure(canvas: Drawing, rows: Array) -> None:
    """The dividing cell, turned at random: cleared cytoplasm, no nuclear membrane, dark chromatin `rows` (P, 3)."""
    rng = canvas.rng
    angle = rng.uniform(0, 2 * np.pi)
    reach = np.abs(rows[:, :2]).max(axis=0) + np.array([11, 9])
    a, b = np.maximum(reach, rng.uniform(19, 26, 2))
    cell, cytoplasm = twice(canvas, 0, 0, a + 2, b + 2, angle, shrink=2)
    clear, granules = rng.uniform(0.4, 0.8), 0.09 * canvas.noise(2) + 0.07 * canvas.noise(6)
    membrane = (cell - cytoplasm).clip(0)
    rim = clear + rng.uniform(0.1, 0.5)
    canvas.e = canvas.e * (1 - cell) + cytoplasm * np.clip(clear + granules, 0, 2) + membrane * rim
    canvas.h = canvas.h * (1 - cell) + cytoplasm * np.clip(0.16 + granules / 2, 0, 1) + 0.22 * membrane
    mask = canvas.chromatin(rotate(rows[:, :2], angle), rows[:, 2])
    dark = rng.uniform(2.0, 2.6) + 0.34 * canvas.noise(2.6)
    canvas.h = canvas.h * (1 - mask) + np.clip(dark, 1.2, 3.2) * mask


def draw(kind: str, rng: Rng, side: int = 128, stain: int | None = None) -> NDArray[np.uint8]:
    """Draws one crop.

    Args:
        kind: a figure's name (`FIGURES`), e.g. "metaphase" or "bridge".
        rng: every random choice comes from it.
        side: width and height in pixels of 0.25 um.
        stain: row of `STAINS`; drawn at random when None.
    Returns: uint8 (side, side, 3) RGB.
    Raises: KeyError for an unknown kind.
    """
    shape = {name: f for figures in FIGURES.values() for name, f in figures.items()}[kind]
    canvas = Drawing(side, rng)
    paint_stroma(canvas, gaps=int(rng.integers(0, 4)))
    paint_neighbours(canvas, count=int(rng.integers(6, 12)))
    paint_figure(canvas, shape(rng))
    row = int(rng.integers(len(STAINS))) if stain is None else stain
    haematoxylin, eosin, glass = (np.array(v) for v in STAINS[row])
    strength = rng.uniform(0.9, 1.15, 2)
    density = canvas.h[..., None] * haematoxylin * strength[0] + canvas.e[..., None] * eosin * strength[1]
    rgb = np.clip(glass * np.exp(-density) * 255, 0, 255).astype(np.uint8)
    focus = ImageFilter.GaussianBlur(rng.uniform(0.9, 1.6))  # the scanner's optics, at twice the resolution
    image = Image.fromarray(rgb).filter(focus).resize((side, side), Image.Resampling.BOX)
    grainy = np.asarray(image, dtype=np.float64) + rng.normal(0, 1.2, (side, side, 3))
    return np.clip(grainy, 0, 255).astype(np.uint8)
