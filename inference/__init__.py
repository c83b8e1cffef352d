"""Fused LoRA ensembles for atypical mitotic figures: what runs inside the container."""

import os

__version__ = "0.1.0"

# Read when PyTorch is loaded. By default its threads busy-wait for milliseconds after each layer: that gains nothing on
# an idle machine, and costs a factor of ten where another process wants the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
