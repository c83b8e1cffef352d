"""Places, areas and resolutions that files state: none is guessed, ignored or shifted, by `slides` or `crops`."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from inference.errors import UserError
from inference.imageio.listing import FORMULA, is_formula
from inference.imageio.stack import read_stack
from inference.slides import reader
from inference.slides.crops import check_labels
from inference.slides.detections.table import Detection
from inference.slides.outputs import plain
from inference.slides.pyramid import open_slide, stated_mpp
from inference.slides.qupath import strict_json
from inference.slides.reader import Slide
from test.support import detection_files as files
from test.support import pyramids
from test.support.commands import rows_of
from test.support.commands import slides as run
from test.support.pyramids import FIGURES, crop, detections, pngs, write_slide

PLACES = list(FIGURES)


class Scanned:
    """A slide whose scanned area begins elsewhere, as OpenSlide reports for Leica SCN: its property, nothing else."""

    def __init__(self, real: Any, x: int, y: int) -> None:
        self.real = real
        self.properties = {**real.properties, "openslide.bounds-x": str(x), "openslide.bounds-y": str(y)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def test_crops_asks_for_the_origin_and_uses_it(slide, drawn, tmp_path, monkeypatch, capsys) -> None:
    opened = reader.open_slide
    monkeypatch.setattr(reader, "open_slide", lambda file: Scanned(opened(file), 100, 50))
    with pytest.raises(UserError, match="none of the 3 detections could be cut"):
        pyramids.run(tmp_path, detections(slide))
    assert "its scanned area begins at 100, 50" in capsys.readouterr().err
    for origin, (dx, dy) in {"scan": (100, 50), "slide": (0, 0)}.items():
        folder = tmp_path / origin
        folder.mkdir()
        rows = [[slide, x - dx, y - dy] for x, y in PLACES]
        assert pyramids.run(folder, rows, "--origin", origin) == 0
        for row, (x, y) in zip(pyramids.rows_of(folder), PLACES, strict=True):
            np.testing.assert_array_equal(crop(folder, row["path"]), drawn[y - 64 : y + 64, x - 64 : x + 64])
    with pytest.raises(UserError, match="holds crops of"):  # of the other origin
        pyramids.run(tmp_path / "scan", rows, "--origin", "slide")


def test_a_crop_where_nothing_was_scanned_is_named(drawn, tmp_path, capsys) -> None:
    gap = drawn.copy()
    gap[:400, :400] = 0
    write_slide(tmp_path / "s.tif", [gap])
    assert pyramids.run(tmp_path, detections("s.tif", [(200, 200), PLACES[0]])) == 3
    assert "s.tif at 200, 200: nothing was scanned there" in capsys.readouterr().err
    assert [file.name for file in pngs(tmp_path)] == ["700_301.png"]


def test_crops_of_a_slide_that_is_replaced_while_it_is_read_are_taken_back(
    slide, drawn, tmp_path, monkeypatch, capsys
) -> None:
    write_slide(tmp_path / "s.tif", [drawn])
    write_slide(tmp_path / "other.tif", [drawn // 2])
    read = reader.read_crop

    def read_and_replace(*arguments: Any) -> Image.Image:
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "other.tif").replace(tmp_path / "s.tif")
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_crop", read_and_replace)
        with pytest.raises(UserError, match="none of the 3 detections could be cut"):
            pyramids.run(tmp_path, detections("s.tif"))
    assert "s.tif (3 detections): it changed while it was read" in capsys.readouterr().err
    assert not pngs(tmp_path)
    assert pyramids.run(tmp_path, detections("s.tif")) == 0  # as the message says
    np.testing.assert_array_equal(crop(tmp_path, "s.tif/700_301.png"), drawn[237:365, 636:764] // 2)


@given(st.floats(0, 100), st.floats(0, 100), st.floats(-0.001, 0.001), st.floats(-0.001, 0.001))
def test_two_labels_for_one_place_are_refused(x, y, dx, dy) -> None:
    row = lambda x, y, label: Detection("a.tif", round(x, 2), round(y, 2), (label, "7"))  # noqa: E731
    places = (x, y), (x + dx, y + dy)
    with pytest.raises(UserError, match="is 'AMF' and 'NMF' in label"):
        check_labels([row(*places[0], "AMF"), row(*places[1], "NMF")], ["label", "score"])
    check_labels([row(*places[0], "AMF"), row(*places[1], "AMF"), row(x, y + 1, "NMF")], ["label", "score"])


def region(left: float, top: float, right: float, bottom: float) -> dict[str, Any]:
    corners = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    return files.features([(0.0, 0.0)], "Tumor")[0] | {
        "id": "region",
        "geometry": {"type": "Polygon", "coordinates": [corners]},
    }


def test_a_region_counts_as_far_as_the_slide_goes(slide, miniature, tmp_path, capsys) -> None:
    outlines = [region(1000, 500, 9000, 9000), region(5000, 5000, 6000, 6000)]
    found = files.write_json(tmp_path / "a.geojson", [*files.features(PLACES), *outlines])
    options = ["--slide", slide, "--region", "Tumor", "--summary", tmp_path / "s.csv"]
    assert run(miniature, found, *options) == 3
    [row] = rows_of(tmp_path / "s.csv")
    area = 300 * 500 * 0.0625 / 1e6
    assert float(row["area_mm2"]) == pytest.approx(area, abs=1e-6)
    assert float(row["figures_per_mm2"]) == pytest.approx(1 / area, rel=1e-4)
    assert "region feature 5: it lies outside the slide's 1,300 x 1,000 pixels" in capsys.readouterr().err


def test_the_hot_spot_is_the_regions_and_a_small_slide_has_none(drawn, slide, miniature, tmp_path, capsys) -> None:
    wide = write_slide(tmp_path / "wide.tif", [drawn], 4)  # 5.2 by 4 mm
    found = files.write_json(tmp_path / "a.geojson", [*files.features(PLACES), region(600, 200, 800, 400)])
    summary, page = tmp_path / "s.csv", tmp_path / "r.html"
    options = ["--region", "Tumor", "--summary", summary, "--report", page]
    assert run(miniature, found, "--slide", wide, "--mpp", 4, *options) == 0
    assert rows_of(summary)[0]["hotspot_figures"] == "1"
    assert "hot spot of 2 mm² in the region: 1" in capsys.readouterr().out
    assert run(miniature, found, "--slide", slide, *options) == 0
    assert rows_of(summary)[0]["hotspot_figures"] == ""
    assert "the slide is too small for a hot spot of 2 mm²" in capsys.readouterr().out
    assert 'class="spot"' not in page.read_text() and "slide too small" in page.read_text()


@settings(max_examples=40, deadline=None)
@given(mpp=st.integers(100, 1000), how=st.sampled_from(["tags", "inches", "ome", "ome-nm"]))
def test_flat_images_and_ome_xml_state_their_resolution(mpp, how, tmp_path_factory) -> None:
    file, mpp = tmp_path_factory.mktemp("flat") / "a.tif", mpp / 1000
    pixels = np.zeros((40, 40, 3), np.uint8)
    if how in ("tags", "inches"):
        per_unit = (1e4 if how == "tags" else 25400) / mpp
        unit = "CENTIMETER" if how == "tags" else "INCH"
        tifffile.imwrite(file, pixels, photometric="rgb", resolution=(per_unit, per_unit), resolutionunit=unit)
    else:
        factor, name = (1, "µm") if how == "ome" else (1000, "nm")
        about = {"PhysicalSizeX": mpp * factor, "PhysicalSizeY": mpp * factor}
        about |= {"PhysicalSizeXUnit": name, "PhysicalSizeYUnit": name}
        tifffile.imwrite(file, pixels, photometric="rgb", tile=(16, 16), ome=True, metadata={"axes": "YXS", **about})
    assert stated_mpp(open_slide(file)) == pytest.approx((mpp, mpp), rel=1e-3)


@pytest.mark.parametrize("name", ["grey.tif", "grey.png"])
def test_flat_grey_of_16_bits_is_read_as_in_a_stack(name, drawn, tmp_path) -> None:
    grey = drawn[..., 0].astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / name)
    region = open_slide(tmp_path / name).read_region((0, 0), 0, (1300, 1000))
    np.testing.assert_array_equal(np.asarray(region)[..., :3], read_stack(tmp_path / name)[0])
    np.testing.assert_array_equal(np.asarray(region)[..., 0], drawn[..., 0])


def refuse(text: str) -> Any:
    raise AssertionError(f"{text} is no JSON")


numbers = st.floats() | st.integers() | st.text() | st.none()
content = st.recursive(numbers, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)


@given(content)
def test_what_is_written_is_strict_json(value) -> None:
    again = json.loads(strict_json(value), parse_constant=refuse)
    if not isinstance(value, float):
        return
    assert again == (value if math.isfinite(value) else {"inf": "Infinity", "-inf": "-Infinity"}.get(str(value), "NaN"))


def test_measurements_that_are_no_numbers_stay_readable(slide, miniature, tmp_path) -> None:
    some = files.features(PLACES)
    some[0]["properties"]["measurements"] |= {"a": math.nan, "b": -math.inf}
    found = files.write_json(tmp_path / "a.geojson", some)
    assert run(miniature, found, "--slide", slide, "--output", tmp_path / "out.geojson") == 0
    first = json.loads((tmp_path / "out.geojson").read_text(), parse_constant=refuse)["features"][0]
    kept = first["properties"]["measurements"]
    assert (kept["a"], kept["b"]) == ("NaN", "-Infinity")


@given(st.sampled_from(FORMULA), st.text(st.characters(exclude_categories=("Cs",))))
def test_no_cell_is_a_formula(start, text) -> None:
    cell = plain(start + text)
    assert not is_formula(cell)
    if cell.startswith(FORMULA):
        float(cell)  # a number is none


def test_numbers_stay_numbers_in_cells_and_sums_do_not() -> None:
    assert [plain(text) for text in ("-1.5", "+2", "-1+1|cmd", "\t=1", "-")] == [
        "-1.5",
        "+2",
        "'-1+1|cmd",
        "'\t=1",
        "'-",
    ]


def test_slides_are_looked_at_before_the_network_is_loaded(slide, miniature, tmp_path, monkeypatch) -> None:
    from inference.ensemble import Ensemble

    def load(*arguments: Any) -> Any:
        raise AssertionError("loaded")

    plain_tiff = write_slide(tmp_path / "plain.tif", [np.zeros((300, 300, 3), np.uint8)], None)
    monkeypatch.setattr(Ensemble, "load", load)
    with pytest.raises(UserError, match="none of 3 detections could be scored"):
        run(miniature, files.qupath(tmp_path / "a.geojson", PLACES), "--slide", plain_tiff, "--csv", tmp_path / "o.csv")


def test_slides_are_closed_when_they_are_done(drawn, miniature, tmp_path, monkeypatch) -> None:
    import weakref

    alive: list[Any] = []
    most: list[int] = []
    opened = reader.open_slide

    def counted(file: Path) -> Any:
        slide = Scanned(opened(file), 0, 0)
        alive.append(weakref.ref(slide))
        most.append(sum(reference() is not None for reference in alive))
        return slide

    monkeypatch.setattr(reader, "open_slide", counted)
    names = [write_slide(tmp_path / f"{n}.tif", [drawn]).stem for n in range(5)]
    inputs = [files.qupath(tmp_path / f"{name}.geojson", PLACES) for name in names]
    assert run(miniature, *inputs, "--csv", tmp_path / "out.csv") == 0
    assert max(most) <= 2


def test_fewer_large_crops_are_read_ahead(slide, tmp_path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    read: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        crops = Slide(slide, 0.25, None).each([PLACES[0]] * 200, 1024, lambda n, _: read.append(n), pool)
        next(crops)
        crops.close()  # type: ignore[attr-defined]
    assert len(read) < 100


def test_one_line_says_that_a_slide_is_missing(slide, miniature, tmp_path, capsys) -> None:
    shutil.copy(slide, tmp_path / "a.tif")
    rows = ["a.tif,700,301", *(f"gone/b.tif,{n},{n}" for n in range(2000))]
    (tmp_path / "t.csv").write_text("slide,x,y\n" + "\n".join(rows) + "\n")
    assert run(miniature, tmp_path / "t.csv", "--csv", tmp_path / "out.csv") == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "b.tif (2,000 detections): cannot be opened" in lines[0]
    assert lines[-1] == "2,000 of 2,001 detections could not be scored"
