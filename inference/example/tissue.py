"""Canvas of two stain concentrations, and the tissue around a mitotic figure: stroma, empty glass, neighbouring cells.

Distances are in pixels of the final crop (0.25 um each) from its centre; the canvas has twice that resolution.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rng = np.random.Generator


class Drawing:
    """Stain maps `h` and `e` (S, S) at twice the final resolution; x and y run from -side/2 to side/2 final pixels."""

    def __init__(self, side: int, rng: Rng) -> None:
        self.rng, self.side = rng, side
        axis = (np.arange(2 * side) + 0.5) / 2 - side / 2
        self.y, self.x = np.meshgrid(axis, axis, indexing="ij")
        self.h, self.e = np.zeros_like(self.x), np.zeros_like(self.x)

    def noise(self, grain: float) -> Array:
        """Smooth noise of mean 0 and standard deviation 1; features are about `grain` final pixels wide."""
        frequency = np.fft.fftfreq(2 * self.side, d=0.5)
        square = frequency[:, None] ** 2 + frequency[None, : self.side + 1] ** 2
        spectrum = np.fft.rfft2(self.rng.standard_normal(self.x.shape)) * np.exp(-square * (np.pi * grain) ** 2 / 3)
        field = np.fft.irfft2(spectrum, s=self.x.shape)
        normal: Array = (field - field.mean()) / field.std()
        return normal

    def blob(self, cx: float, cy: float, a: float, b: float, angle: float, rough: float, edge: float = 1.0) -> Array:
        """Mask in [0, 1] of an irregular ellipse with half axes a and b, whose outline wobbles by `rough`."""
        dx, dy = self.x - cx, self.y - cy
        u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        radius, theta = np.hypot(u / a, v / b), np.arctan2(v / b, u / a)
        outline = np.ones_like(theta)
        for k in range(2, 7):
            outline += rough / k * self.rng.normal() * np.cos(k * theta + self.rng.uniform(0, 2 * np.pi))
        return soft((outline - radius) * min(a, b) / edge)

    def chromatin(self, points: Array, widths: Array, ragged: float = 1.0) -> Array:
        """Mask in [0, 1] of condensed chromatin: metaballs of radius `widths` (P,) at `points` (P, 2), ragged rims."""
        field = np.zeros_like(self.x)
        for (px, py), width in zip(points, widths, strict=True):
            field += np.exp(-((self.x - px) ** 2 + (self.y - py) ** 2) / width**2)
        return soft((field - 0.5 + ragged * (0.13 * self.noise(4.0) + 0.08 * self.noise(2.0)) * np.sqrt(field)) * 6)


def soft(value: Array) -> Array:
    """Logistic step: 0 far below zero, 1 far above it."""
    return 1 / (1 + np.exp(-np.clip(value * 2.5, -50, 50)))


def paint_stroma(canvas: Drawing, gaps: int) -> None:
    """Cytoplasm of uneven density, a few fibres along one direction, and empty glass."""
    rng = canvas.rng
    angle = rng.uniform(0, np.pi)
    across = canvas.x * np.cos(angle) + canvas.y * np.sin(angle)
    wave = across * rng.uniform(0.5, 0.8) + 2.2 * canvas.noise(22) + 0.8 * canvas.noise(7)
    fibres = np.sin(wave) ** 4 * soft(1.5 * canvas.noise(26) - 1)
    texture = 0.18 * canvas.noise(18) + 0.13 * canvas.noise(5) + 0.10 * canvas.noise(2)
    canvas.e += np.clip(0.85 + texture + 0.3 * fibres, 0.1, 2.2)
    canvas.h += np.clip(0.17 + 0.06 * canvas.noise(14) + 0.05 * canvas.noise(2.5), 0, 1)
    for _ in range(gaps):
        cx, cy = place(rng, 48, 76)
        gap = canvas.blob(cx, cy, rng.uniform(6, 15), rng.uniform(5, 11), rng.uniform(0, np.pi), 0.3, 1.3)
        canvas.e *= 1 - 0.93 * gap
        canvas.h *= 1 - 0.95 * gap


def place(rng: Rng, near: float, far: float) -> tuple[float, float]:
    """A random point between `near` and `far` pixels from the centre."""
    angle, radius = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform(near**2, far**2))
    return float(radius * np.cos(angle)), float(radius * np.sin(angle))


def paint_neighbours(canvas: Drawing, count: int) -> None:
    """Cells around the figure: borders half-way; nuclei with rim, clumped chromatin and nucleoli, some dense."""
    rng, placed = canvas.rng, list[tuple[float, float, float]]()
    for _ in range(200):
        cx, cy = place(rng, 42, 88)
        a = rng.uniform(8, 12) if rng.random() < 0.2 else rng.uniform(14, 20)
        if len(placed) < count and all(np.hypot(cx - x, cy - y) > 0.95 * (a + r) for x, y, r in placed):
            placed.append((cx, cy, a))
    wobble = 2.5 * canvas.noise(12)
    distance = np.sort([np.hypot(canvas.x - x, canvas.y - y) - r for x, y, r in [(0.0, 0.0, 24.0), *placed]], axis=0)
    border = np.exp(-(((distance[1] - distance[0] + wobble) / 1.5) ** 2)) * soft(0.6 + canvas.noise(20))
    canvas.e *= 1 + rng.choice([-0.5, 0.3, 0.45]) * border  # a pale cleft or a stained membrane
    for cx, cy, a in placed:
        dense = a < 13
        b, angle = a * rng.uniform(0.5 if dense else 0.66, 0.95), rng.uniform(0, np.pi)
        body, inside = twice(canvas, cx, cy, a, b, angle, shrink=1.5)
        clumps = soft(1.6 * canvas.noise(2.6) - 0.8)
        vesicular = rng.uniform(0.34, 0.6)
        density = (1.3 + 0.35 * clumps) if dense else vesicular + 0.55 * clumps * inside + 0.6 * (body - inside).clip(0)
        for _ in range(0 if dense else int(rng.integers(1, 3))):
            nx, ny = cx + rng.normal(0, a / 4), cy + rng.normal(0, b / 4)
            density = density + 0.7 * canvas.blob(nx, ny, rng.uniform(1.8, 3), rng.uniform(1.6, 2.4), 0, 0.2, 0.8)
        canvas.h = canvas.h * (1 - body) + density * rng.uniform(0.85, 1.15) * body
        canvas.e *= 1 - 0.4 * body


def twice(
    canvas: Drawing, cx: float, cy: float, a: float, b: float, angle: float, shrink: float
) -> tuple[Array, Array]:
    """The same irregular outline twice: the body, and its interior `shrink` pixels further in (a membrane between)."""
    state = canvas.rng.bit_generator.state
    body = canvas.blob(cx, cy, a, b, angle, 0.12)
    canvas.rng.bit_generator.state = state
    return body, canvas.blob(cx, cy, a - shrink, b - shrink, angle, 0.12, 1.4)
