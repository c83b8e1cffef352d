"""Measurements, side by side with what is usual and with what the machine could do. Random weights; see README.md."""
