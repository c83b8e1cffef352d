"""What a slide's answers add up to: the interval of a share, and the hot spot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.slides import statistics


@pytest.mark.parametrize(("hits", "total", "low", "high"), [(0, 0, 0, 1), (0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634)])
def test_wilsons_interval(hits, total, low, high) -> None:
    assert statistics.wilson(hits, total) == pytest.approx((low, high), abs=1e-4)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=25))
def test_the_hot_spot_holds_the_most_and_lies_on_the_slide(points) -> None:
    """Against every window that begins at a figure's column and another's row."""
    x, y = np.array(points, float).T
    size, mpp = (61, 61), (1000 / 20, 1000 / 20)  # 2 mm2 are 33 by 24 pixels
    width, height = statistics.window(mpp)
    best = max(((x >= a) & (x <= a + width) & (y >= b) & (y <= b + height)).sum() for a in x for b in y)
    spot = statistics.hot_spot(x, y, size, mpp)
    assert spot is not None and spot.count == best
    inside = (abs(x - spot.x) <= width / 2 + 1e-9) & (abs(y - spot.y) <= height / 2 + 1e-9)
    assert inside.sum() == best
    assert width / 2 <= spot.x <= size[0] - width / 2 and height / 2 <= spot.y <= size[1] - height / 2


def test_a_slide_without_room_for_the_hot_spot_has_none() -> None:
    x = y = np.array([5.0])
    assert statistics.hot_spot(x, y, (32, 60), (50, 50)) is None  # narrower than the window
    assert statistics.hot_spot(x, y, (60, 60), (50, 50)) is not None


def test_many_figures_have_a_hot_spot_in_reasonable_memory_and_steps() -> None:
    """20,000 figures on a grid, of which a corner is twice as dense: no step sorts them again."""
    x, y = np.divmod(np.arange(20_000.0), 100)
    spot = statistics.hot_spot(np.append(x, x[:2000] + 0.5), np.append(y, y[:2000]), (300, 300), (50, 50))
    assert spot is not None and spot.x < 40 and spot.count > 34 * 24
