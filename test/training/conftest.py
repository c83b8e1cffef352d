"""What every test of training needs."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _own_accelerator() -> None:
    """Accelerate keeps precision and device for the whole process, which several tests share."""
    AcceleratorState._reset_state()
