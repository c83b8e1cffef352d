"""Maps of where an ensemble looks: right where the answer is known, for every family of backbones."""

from __future__ import annotations

import base64
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from inference.ensemble import Ensemble
from inference.report.attribution import GRID, SIDE, Attribution, attribute, masks
from test.support.miniature import make_ensemble


@dataclass
class Spot:
    """Stands for an ensemble: its logit is the mean darkness of one place, minus that of another."""

    place: tuple[slice, slice]
    against: tuple[slice, slice] | None = None
    crop: int | None = None
    tta: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.manifest = SimpleNamespace(members=[SimpleNamespace(preprocess={"crop": self.crop})])

    def predict(self, crops: list[np.ndarray], tta: str) -> SimpleNamespace:
        self.tta.append(tta)
        dark = lambda crop, place: 4 * (1 - crop[place].mean() / 255)  # noqa: E731
        logits = np.array(
            [dark(crop, self.place) - (dark(crop, self.against) if self.against else 0) for crop in crops]
        )
        return SimpleNamespace(p_atypical=1 / (1 + np.exp(-logits)))


def crop_with(*places: tuple[slice, slice]) -> np.ndarray:
    crop = np.full((128, 128, 3), 220, np.uint8)
    for place in places:
        crop[place] = 30
    return crop


FIGURE = (slice(52, 76), slice(52, 76))
CORNER = (slice(4, 28), slice(100, 124))


def test_the_map_is_bright_where_the_answer_is_decided() -> None:
    ensemble = Spot(FIGURE)
    found = attribute(ensemble, crop_with(FIGURE, CORNER))
    row, column = np.unravel_index(found.values.argmax(), found.values.shape)
    assert abs(row - SIDE / 2) <= 2 and abs(column - SIDE / 2) <= 2
    assert found.values[:5, -5:].max() < 0.05 * found.values.max()  # the dark corner plays no part
    assert found.centre > 0.65 > 3 * found.area
    assert set(ensemble.tta) == {"none"}  # one view for the map, whatever the answers take


def test_a_decision_by_the_background_shows() -> None:
    found = attribute(Spot(CORNER), crop_with(FIGURE, CORNER))
    assert found.centre < 0.1


def test_what_speaks_against_is_negative() -> None:
    found = attribute(Spot(FIGURE, against=CORNER), crop_with(FIGURE, CORNER))
    assert found.values[SIDE // 2, SIDE // 2] > 0 > found.values[2, -3]


def test_only_the_part_that_the_networks_see_is_mapped() -> None:
    place = (slice(28, 52), slice(28, 52))  # the middle of the central 80 pixels
    found = attribute(Spot(place, crop=80), crop_with((slice(52, 76), slice(52, 76))))
    assert found.centre > 0.65
    wide = np.full((80, 200, 3), 220, np.uint8)
    wide[28:52, 88:112] = 30
    assert attribute(Spot(place), wide).centre > 0.65


def test_masks_cover_the_square_evenly() -> None:
    hidden = masks(64)
    assert hidden.shape == (GRID**2, 64, 64) and hidden.max() == 1 and hidden.min() >= 0
    assert hidden.sum(0).min() > 1  # every pixel is hidden by some position


def test_a_large_crop_takes_memory_for_a_few_of_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """65 copies of the crop in floating point would take 1.2 GB."""
    crop = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
    expected = attribute(Spot(FIGURE), crop).values
    monkeypatch.setattr("inference.report.attribution.CHUNK", 4 * crop.nbytes)
    tracemalloc.start()
    found = attribute(Spot(FIGURE), crop).values
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, expected)
    assert peak < 12 * crop.nbytes


def test_packing_keeps_a_map() -> None:
    values = np.random.default_rng(0).normal(0, 2, (SIDE, SIDE)).astype(np.float32)
    packed = Attribution(values, 0.4, 0.2).packed()
    stored = np.frombuffer(base64.b64decode(packed["values"]), np.uint8).astype(float)
    restored = (stored - 128) / 127 * packed["largest"]
    np.testing.assert_allclose(restored.reshape(SIDE, SIDE), values, atol=packed["largest"] / 200)
    assert Attribution(values * 0, 0.2, 0.2).packed()["largest"] == 0


@pytest.mark.parametrize("backbone", ["efficientnet-lite0", "virchow", "dinov3-vith16plus"])
def test_real_networks_of_every_family(tmp_path: Path, backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights: the map is finite, depends on the crop, and the same crop has the same map."""
    monkeypatch.setattr("inference.report.attribution.GRID", 3)  # ten predictions instead of 65
    make_ensemble(tmp_path, backbone, folds=1, tta="rot4")
    ensemble = Ensemble.load(tmp_path, "cpu", "fp32")
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    one, again, other = (attribute(ensemble, crop) for crop in (first, first, second))
    assert np.isfinite(one.values).all() and np.abs(one.values).max() > 0
    np.testing.assert_array_equal(one.values, again.values)
    assert np.abs(one.values - other.values).max() > 0
