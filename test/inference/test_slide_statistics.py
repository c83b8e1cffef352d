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
def test_the_hot_spot_holds_the_most(points) -> None:
    """Against every window that begins at a figure's column and another's row."""
    x, y = np.array(points, float).T
    mpp = (1000 / 20, 1000 / 20)  # 2 mm2 are 33 by 24 pixels
    width, height = statistics.window(mpp)
    best = max(((x >= a) & (x <= a + width) & (y >= b) & (y <= b + height)).sum() for a in x for b in y)
    spot = statistics.hot_spot(x, y, mpp)
    assert spot is not None and spot.count == best
    inside = (abs(x - spot.x) <= width / 2 + 1e-9) & (abs(y - spot.y) <= height / 2 + 1e-9)
    assert inside.sum() == best
