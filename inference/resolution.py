"""The resolution of the crops that ensembles were trained on, and which others can be read, in µm per pixel.

AMi-Br's crops are the scanners' own pixels, 0.23 µm/px (Hamamatsu) to 0.25 (Aperio; Aubreville et al. 2023, table 1).
"""

MPP = 0.25
NEAR = 0.1  # pixels within this share of the wanted µm/px are taken as they are, not resampled
PLAUSIBLE = 0.05, 5.0  # of a slide or crop; 72 dpi, a default of many programs, would be 353


def is_near(mpp: float, wanted: float = MPP) -> bool:
    """Whether pixels of `mpp` need no resampling."""
    return abs(mpp / wanted - 1) <= NEAR


def is_plausible(mpp: float) -> bool:
    """False for NaN too."""
    return PLAUSIBLE[0] <= mpp <= PLAUSIBLE[1]
