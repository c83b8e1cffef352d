"""Fused LoRA ensembles for atypical mitotic figures: what runs inside the container."""

__version__ = "0.1.0"
