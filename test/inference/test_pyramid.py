"""Which pixels of a slide become a crop's: level, place, scale and border, on real pyramids that OpenSlide reads."""

from __future__ import annotations

import numpy as np
import pytest

from test.support.pyramids import crop, detections, halves, pyramid, rows_of, run, write_slide


@pytest.mark.parametrize("mpp", [0.0625, 0.1, 0.125, 0.2, 0.23, 0.2425, 0.25, 0.27, 0.35, 0.5])
@pytest.mark.parametrize("side", [128, 63])
def test_a_target_is_in_the_middle_and_of_its_size(mpp, side, tmp_path) -> None:
    """A dark Gaussian of 1 um, drawn at fractions of a pixel: its centroid and its width in the crop."""
    height, width, centre = 1200, 1400, (701.3, 560.8)
    y, x = np.mgrid[:height, :width] + 0.5  # pixel k covers k to k + 1
    sigma = 1 / mpp
    dark = 230 * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / 2 / sigma**2)
    write_slide(tmp_path / "s.tif", pyramid(np.repeat((250 - dark).round().astype(np.uint8)[..., None], 3, 2)), mpp)
    assert run(tmp_path, [["s.tif", *centre]], "--side", side) == 0
    found = 250.0 - crop(tmp_path, "s.tif/701.3_560.8.png")[..., 0]
    assert found.shape == (side, side)
    axis = np.arange(side) + 0.5
    for profile in (found.sum(0), found.sum(1)):
        middle = (profile * axis).sum() / profile.sum()
        assert abs(middle - side / 2) <= 0.5
        spread = np.sqrt((profile * (axis - middle) ** 2).sum() / profile.sum())
        # near 0.25 the scanner's own pixels are taken, as they were for the training data
        own = mpp if abs(mpp / 0.25 - 1) <= 0.1 else 0.25
        assert spread == pytest.approx(1 / own, rel=0.04)


@pytest.mark.parametrize(
    ("mpp", "level"),
    [(0.5, 0), (0.28, 0), (0.25, 0), (0.2425, 0), (0.15, 0), (0.13, 1), (0.125, 1), (0.1, 1), (0.0625, 2), (0.06, 2)],
)
def test_pixels_come_from_the_coarsest_level_with_the_detail(mpp, level, tmp_path) -> None:
    colours = [np.array(colour, np.uint8) for colour in ((200, 40, 40), (40, 200, 40), (40, 40, 200))]
    levels = [np.tile(colour, (1024 >> n, 1024 >> n, 1)) for n, colour in enumerate(colours)]
    write_slide(tmp_path / "s.tif", levels, mpp)
    assert run(tmp_path, [["s.tif", 512, 512]]) == 0
    np.testing.assert_array_equal(crop(tmp_path, "s.tif/512_512.png"), np.tile(colours[level], (128, 128, 1)))


@pytest.mark.parametrize("mpp", [0.2425, 0.23, 0.25, 0.27])
def test_scanners_own_pixels_near_the_wanted_size_are_not_resampled(mpp, drawn, tmp_path) -> None:
    write_slide(tmp_path / "s.tif", [drawn], mpp)
    assert run(tmp_path, [["s.tif", 700, 301]]) == 0
    np.testing.assert_array_equal(crop(tmp_path, "s.tif/700_301.png"), drawn[237:365, 636:764])


def test_a_coarser_slide_is_enlarged_and_said_to_be(drawn, tmp_path, capsys) -> None:
    write_slide(tmp_path / "s.tif", [halves(drawn)], 0.5)
    assert run(tmp_path, [["s.tif", 350, 150.5]]) == 0
    assert "slides with less detail than 0.25 µm/px: 1, such as s.tif (by 2)" in capsys.readouterr().out
    error = crop(tmp_path, "s.tif/350_150.5.png").astype(float) - drawn[237:365, 636:764]
    assert np.abs(error).mean() < 5  # what halving lost
    shifted = crop(tmp_path, "s.tif/350_150.5.png").astype(float) - drawn[238:366, 637:765]
    assert np.abs(error).mean() < np.abs(shifted).mean()


@pytest.mark.parametrize("mpp", [0.1, 0.5])
def test_a_resampled_crop_is_the_middle_of_a_larger_one(mpp, drawn, tmp_path) -> None:
    write_slide(tmp_path / "s.tif", [drawn], mpp)
    for side in (128, 160):
        (tmp_path / str(side)).mkdir()
        assert run(tmp_path / str(side), [["s.tif", 700, 500]], "--slides", tmp_path, "--side", side) == 0
    small, large = (crop(tmp_path / side, "s.tif/700_500.png").astype(int) for side in ("128", "160"))
    assert np.abs(small - large[16:144, 16:144]).max() <= 1  # the outermost pixels too


def test_beyond_the_border_is_black_as_in_the_training_data(slide, drawn, tmp_path) -> None:
    places = [(0, 0), (20, 500), (1299, 999), (1290.5, 3)]
    assert run(tmp_path, detections(slide, places)) == 0
    padded = np.pad(drawn, ((64, 64), (64, 64), (0, 0)))
    for row, (x, y) in zip(rows_of(tmp_path), places, strict=True):
        left, top = int(np.floor(x + 0.5)), int(np.floor(y + 0.5))
        np.testing.assert_array_equal(crop(tmp_path, row["path"]), padded[top : top + 128, left : left + 128])


def test_the_border_of_a_resampled_slide_is_black_too(tmp_path) -> None:
    write_slide(tmp_path / "s.tif", [np.full((300, 300, 3), 200, np.uint8)], 0.5)
    assert run(tmp_path, [["s.tif", 300 - 1e-2, 150]]) == 0
    found = crop(tmp_path, "s.tif/299.99_150.png")
    assert (found[:, :60] == 200).all() and (found[:, 68:] == 0).all()
