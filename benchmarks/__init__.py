"""Measurements, beside the usual way and the machine's limits. Random weights; see README.md."""
