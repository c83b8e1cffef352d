"""Fused LoRA ensembles for atypical mitotic figures: what runs inside the container, and a library.

from inference import Ensemble
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ensemble import Ensemble

__version__ = "0.1.0"
__all__ = ["Ensemble", "__version__"]

START = time.perf_counter()  # from which a job counts its seconds

# Read when PyTorch is loaded. By default its threads busy-wait for milliseconds after each layer: that gains nothing on
# an idle machine and costs a factor of ten when another process wants the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def __getattr__(name: str) -> Any:
    """Import PyTorch when `Ensemble` is first used, not with the package: until then a job reads its input."""
    if name == "Ensemble":
        from .ensemble import Ensemble

        return Ensemble
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
