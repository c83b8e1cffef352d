"""Adapters that other programs trained, made into an ensemble folder: `python -m training import`."""
