"""`python -m inference slides`: which slide an object lies on, slides without figures, and the area of outlines."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.errors import UserError
from inference.slides.detections.geometry import centre, outline
from test.support import detection_files as files
from test.support.commands import rows_of
from test.support.commands import slides as run
from test.support.pyramids import FIGURES, write_slide

PLACES = list(FIGURES)


@pytest.fixture
def two(slide: Path, tmp_path: Path) -> Path:
    """A folder with case1/a.tif and case2/a.tif."""
    for name in ("case1", "case2"):
        (tmp_path / name).mkdir()
        shutil.copy(slide, tmp_path / name / "a.tif")
    return tmp_path


def table(file: Path, *rows: str) -> Path:
    file.write_text("\n".join(["slide,x,y,id", *rows]) + "\n")
    return file


def tumour(x: float, y: float, half: float, **more: Any) -> dict[str, Any]:
    return files.features([(0.0, 0.0)], "Tumor")[0] | {"id": f"{x}", "geometry": files.square(x, y, half)} | more


def test_two_folders_are_two_slides_and_never_one(two, miniature, tmp_path) -> None:
    found = table(tmp_path / "found.csv", "case1/a.tif,700,301,1", "case2/a.tif,333,900,1")
    assert run(miniature, found, "--csv", two / "out.csv", "--summary", two / "summary.csv") == 0
    both = [str(two / name / "a.tif") for name in ("case1", "case2")]
    assert [row["slide"] for row in rows_of(two / "summary.csv")] == both
    assert len({row["slide"] for row in rows_of(two / "out.csv")}) == 2
    (two / "flat").mkdir()
    shutil.copy(two / "case1" / "a.tif", two / "flat")
    for which in (["--slides", two / "flat"], ["--slide", two / "flat" / "a.tif"]):
        with pytest.raises(UserError, match=r"case1/a\.tif and case2/a\.tif would both be"):
            run(miniature, found, *which, "--csv", two / "flat.csv")
    assert not (two / "flat.csv").exists()


def test_one_slide_may_be_spelled_in_several_ways(two, miniature, tmp_path, capsys) -> None:
    whole = two / "case1" / "a.tif"
    rows = f"{whole},700,301,1", "case1/a.tif,333,900,2", "case1/../case1/a.tif,700,301,3"
    found = table(tmp_path / "found.csv", *rows)
    assert run(miniature, found, "--csv", two / "out.csv") == 3
    assert len(rows_of(two / "out.csv")) == 2 and {row["slide"] for row in rows_of(two / "out.csv")} == {"a.tif"}
    assert f"it lies where {found}, line 2 does" in capsys.readouterr().err


def test_a_slide_without_figures_has_its_row(slide, miniature, tmp_path, capsys) -> None:
    for name in "abc":
        shutil.copy(slide, tmp_path / f"{name}.tif")
    inputs = [
        files.write_json(tmp_path / "a.geojson", [*files.features(PLACES), tumour(800, 500, 400)]),
        files.write_json(tmp_path / "b.geojson", [tumour(800, 500, 400)]),
        files.write_json(tmp_path / "c.geojson", {"type": "FeatureCollection", "features": []}),
    ]
    options = ["--class", "Mitosis", "--region", "Tumor", "--report", tmp_path / "r.html", "--output", tmp_path / "out"]
    assert run(miniature, *inputs, *options, "--summary", tmp_path / "s.csv") == 0
    a, b, c = rows_of(tmp_path / "s.csv")
    assert (a["figures"], b["figures"], c["figures"]) == ("3", "0", "0")
    assert (b["area_mm2"], b["figures_per_mm2"], b["atypical_share"], b["share_low"]) == ("0.04", "0.0", "", "")
    assert c["area_mm2"] == ""
    assert "b.tif: no figures in 0.04 mm²" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "b.tif.geojson").read_text())["features"] == []
    assert (tmp_path / "r.html").read_text().count("<figure>") >= 3
    (tmp_path / "c.tif").unlink()
    assert run(miniature, *inputs, *options, "--summary", tmp_path / "s.csv") == 3
    assert "c.geojson: no slide called c" in capsys.readouterr().err


def test_failures_count_on_their_slide(slide, miniature, tmp_path) -> None:
    shutil.copy(slide, tmp_path / "a.tif")
    wrong = files.features([*PLACES, (0, 0)])
    wrong[3]["geometry"]["coordinates"] = [None, 1]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("first/a.geojson", json.dumps(files.features([(9000, 5), PLACES[0]])))
        packed.writestr(
            "second/a.geojson", json.dumps([one | {"id": f"second {n}"} for n, one in enumerate(wrong[1:])])
        )
    assert run(miniature, tmp_path / "a.zip", "--summary", tmp_path / "s.csv") == 3
    [row] = rows_of(tmp_path / "s.csv")
    assert (row["figures"], row["not_scored"]) == ("3", "2")


@pytest.mark.parametrize(
    "option", [["--class", "Mitosi"], ["--class", "Mitosis", "--class", "mitoses"], ["--region", "T"]]
)
def test_a_class_that_no_object_has_is_a_mistake(option, slide, miniature, tmp_path) -> None:
    detections = files.write_json(tmp_path / "a.geojson", [*files.features(PLACES), tumour(800, 500, 400)])
    with pytest.raises(UserError, match=rf"no object of class {option[-1]} in .* found Mitosis \(3\), Tumor \(1\)"):
        run(miniature, detections, "--slide", slide, *option, "--csv", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_ids_are_those_of_a_slide(two, miniature, tmp_path) -> None:
    found = table(tmp_path / "found.csv", "case1/a.tif,700,301,7", "case2/a.tif,700,301,7")
    assert run(miniature, found, "--csv", two / "out.csv") == 0
    assert [row["id"] for row in rows_of(two / "out.csv")] == ["7", "7"]


def test_a_table_with_a_column_of_its_readers_is_kept(slide, miniature, tmp_path) -> None:
    detections = files.qupath(tmp_path / "a.geojson", PLACES)
    for option in ("--csv", "--summary"):
        out = tmp_path / f"out{option}.csv"
        assert run(miniature, detections, "--slide", slide, option, out) == 0
        out.write_text("\n".join(f"{line},me" for line in out.read_text().splitlines()))
        before = out.read_bytes()
        with pytest.raises(UserError, match="holds something else"):
            run(miniature, detections, "--slide", slide, option, out)
        assert out.read_bytes() == before


def test_a_file_that_is_no_journal_is_kept(slide, miniature, tmp_path) -> None:
    mine = tmp_path / ".out.csv.journal"
    mine.write_text("my notes\n")
    detections = files.qupath(tmp_path / "a.geojson", PLACES)
    with pytest.raises(UserError, match="holds something else"):
        run(miniature, detections, "--slide", slide, "--csv", tmp_path / "out.csv")
    assert mine.read_text() == "my notes\n"


def test_a_table_in_a_zip_file_is_read_too(slide, miniature, tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("first/a.geojson", json.dumps(files.features([PLACES[0]])))
        packed.writestr("2.csv", f"x,y\n{PLACES[1][0]},{PLACES[1][1]}\n")
    assert run(miniature, tmp_path / "a.zip", "--slide", slide, "--csv", tmp_path / "out.csv") == 0
    assert len(rows_of(tmp_path / "out.csv")) == 2


def test_a_coarser_slide_is_said_to_be(drawn, miniature, tmp_path, capsys) -> None:
    write_slide(tmp_path / "s.tif", [drawn], 0.5)
    assert run(miniature, files.qupath(tmp_path / "s.geojson", PLACES), "--csv", tmp_path / "out.csv") == 0
    assert "slides with less detail than 0.25 µm/px: 1, such as s.tif" in capsys.readouterr().out


def test_a_finer_slide_shows_the_same_field_of_view(drawn, slide, miniature, tmp_path) -> None:
    """At 0.125 um/px every pixel of the other slide is four: nearly the same crops, so nearly the same answers."""
    fine = write_slide(tmp_path / "fine.tif", [drawn.repeat(2, 0).repeat(2, 1)], 0.125)
    found = {}
    for file, scale in ((slide, 1), (fine, 2)):
        detections = files.qupath(tmp_path / f"{scale}.geojson", [(scale * x, scale * y) for x, y in PLACES])
        assert run(miniature, detections, "--slide", file, "--csv", tmp_path / "out.csv") == 0
        found[scale] = np.array([float(row["p_atypical"]) for row in rows_of(tmp_path / "out.csv")])
    assert np.abs(found[2] - found[1]).max() < 0.1 * np.ptp(found[1])


def test_a_region_gives_the_density_and_the_page_shows_the_slide(slide, miniature, tmp_path) -> None:
    region = files.features([(0.0, 0.0)], "Tumor")[0] | {"id": "region", "geometry": files.square(800, 500, 400)}
    detections = files.write_json(
        tmp_path / "a.geojson", [*files.features(PLACES), region, region]
    )  # as in two exports of one slide
    summary, page = tmp_path / "s.csv", tmp_path / "r.html"
    options = ["--slide", slide, "--region", "tumor", "--summary", summary, "--report", page]
    assert run(miniature, detections, *options) == 0
    [row] = rows_of(summary)
    assert float(row["area_mm2"]) == pytest.approx(0.04)  # 800 pixels of 0.25 um: 200 um a side
    assert float(row["figures_per_mm2"]) == pytest.approx(2 / 0.04)  # one of the three lies outside
    text = page.read_text()
    assert (
        text.count('data-crop="') == 3
        and "<image href=" in text
        and "Every object is taken for a mitotic figure" in text
    )


@pytest.mark.parametrize(
    ("regions", "side"),  # area as the side of a square, in pixels
    [
        ([tumour(800, 500, 400), tumour(800, 500, 400)], 800),  # as in two exports
        ([tumour(800, 500, 400), tumour(800, 500, 100)], 800),  # one in the other
        ([tumour(600, 500, 200), tumour(800, 500, 200)], (600 * 400) ** 0.5),  # overlapping
        ([tumour(300, 500, 200), tumour(900, 500, 200)], (2 * 400 * 400) ** 0.5),
    ],
)
def test_what_lies_in_several_outlines_counts_once(regions, side, slide, miniature, tmp_path) -> None:
    detections = files.write_json(tmp_path / "a.geojson", [*files.features(PLACES), *regions])
    assert run(miniature, detections, "--slide", slide, "--region", "Tumor", "--summary", tmp_path / "s.csv") == 0
    [row] = rows_of(tmp_path / "s.csv")
    assert float(row["area_mm2"]) == pytest.approx((side * 0.00025) ** 2, rel=1e-4)


@pytest.mark.parametrize(
    ("boxes", "centres"),
    [
        ([[100, 100, 150, 150], [600, 300, 650, 350]], [(125, 125), (625, 325)]),  # MIDOG.json
        ([[690, 290, 20, 22], [600, 300, 40, 40], [10, 10, 60, 60]], [(700, 301), (620, 320), (40, 40)]),  # COCO
        ([[100, 100, 150, 150], [600, 300, 650.6, 350.2]], [(125, 125), (625.3, 325.1)]),  # MIDOG.json, with fractions
    ],
)
def test_boxes_are_midogs_if_all_are(boxes, centres, slide, miniature, tmp_path, capsys) -> None:
    content = {
        "images": [{"id": 1, "file_name": slide.name}],
        "annotations": [{"id": n, "image_id": 1, "bbox": box} for n, box in enumerate(boxes)],
    }
    found = files.write_json(tmp_path / "a.json", content)
    run(miniature, found, "--slide", slide, "--csv", tmp_path / "out.csv")
    blank = capsys.readouterr().err.count("it lies on blank glass")
    scored = {(float(row["x"]), float(row["y"])) for row in rows_of(tmp_path / "out.csv")}
    assert scored <= set(centres) and len(scored) + blank == len(centres)


def polygon(*corners: tuple[float, float], holes: tuple[Any, ...] = ()) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": [list(map(list, ring)) for ring in (corners, *holes)]}


def square(x: float, y: float, half: float) -> Any:
    return files.square(x, y, half)["coordinates"]


def several(*polygons: Any) -> dict[str, Any]:
    return {"type": "MultiPolygon", "coordinates": list(polygons)}


def test_outlines_that_touch_themselves_have_a_centre() -> None:
    """Traced pixels do: at a corner, along an edge, in a spike."""
    corner = polygon((0, 0), (2, 0), (2, 2), (4, 2), (4, 4), (2, 4), (2, 2), (0, 2))
    assert centre(corner) == pytest.approx((2, 2)) and outline(corner).area == 8
    assert centre(polygon((0, 0), (10, 0), (10, 10), (15, 10), (10, 10), (0, 10))) == pytest.approx((5, 5))
    assert centre(polygon((0, 0), (10, 0), (10, 5), (10, 0), (20, 0), (20, 20), (0, 20))) == pytest.approx((10, 10))
    assert centre(polygon((0, 0), (10, 0), (5, 0))) == pytest.approx((5, 0))  # no area
    assert centre(polygon((3, 3), (3, 3), (3, 3))) == (3, 3)
    hole = [(1, 1), (1, 3), (3, 3), (3, 1)]
    assert outline(polygon((0, 0), (10, 0), (10, 4), (0, 4), holes=(hole,))).area == 36
    assert centre(polygon((0, 0), (5, 5), (5, 0), (0, 5))) == pytest.approx((2.5, 2.5))


def test_outlines_of_traced_pixels_have_a_centre() -> None:
    """Of ragged shapes, whose outlines run along themselves and touch themselves at corners."""
    import cv2

    rng = np.random.default_rng(0)
    for _ in range(100):
        found, _ = cv2.findContours(
            (rng.random((24, 24)) < 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
        )
        traced = max(found, key=len)[:, 0]
        x, y = centre(polygon(*map(tuple, traced.tolist())))
        assert (traced.min(0) <= (x, y)).all() and (traced.max(0) >= (x, y)).all()


def test_what_rings_go_around_twice_is_inside_and_holes_are_not() -> None:
    area = lambda *polygons: outline(several(*polygons), figure=False).area  # noqa: E731
    assert area(square(2, 2, 2), square(4, 4, 2)) == 28  # overlapping parts, which RFC 7946 forbids
    assert area(square(5, 5, 5), square(5, 5, 1)) == 100
    assert area([*square(5, 5, 5), *square(5, 5, 1)]) == 96
    assert area([*square(2, 2, 2), *square(4, 2, 1)]) == 14  # a hole that reaches beyond
    assert area([*square(5, 5, 5), *square(5, 5, 1)], square(5, 5, 2)) == 100
    loop = polygon((0, 0), (10, 0), (10, 10), (4, 10), (4, -1), (5, -1), (5, 5), (0, 10))
    assert outline(loop, figure=False).area == 93


def test_an_outline_without_area_is_refused() -> None:
    line = polygon((0, 0), (10, 0), (5, 0))
    for geometry, figure in ((line, False), (several([*square(5, 5, 5), *square(5, 5, 5)]), True)):
        with pytest.raises(UserError, match="its polygon has no area"):
            outline(geometry, figure)


def test_a_region_may_cross_itself_and_have_many_corners() -> None:
    assert outline(polygon((0, 0), (4, 4), (4, 0), (0, 4)), figure=False).area == 8  # both wings, as QuPath fills them
    angles = np.linspace(0, 2 * np.pi, 50_000, endpoint=False)
    circle = polygon(*zip(np.cos(angles).tolist(), np.sin(angles).tolist(), strict=True))
    assert outline(circle, figure=False).area == pytest.approx(np.pi, rel=1e-6)


@given(
    st.lists(st.floats(0, 6.28), min_size=3, max_size=12, unique_by=lambda a: round(a, 2)),
    st.tuples(st.floats(-1e5, 1e5), st.floats(-1e5, 1e5)),
)
def test_the_centre_is_that_of_the_triangles(angles, move) -> None:
    corners = np.array([(np.cos(a), np.sin(a)) for a in sorted(angles)]) * 30 + move
    fan = np.array([[corners[0], corners[n], corners[n + 1]] for n in range(1, len(corners) - 1)])
    a, b = fan[:, 1] - fan[:, 0], fan[:, 2] - fan[:, 0]
    areas = (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]) / 2
    expected = (fan.mean(1) * areas[:, None]).sum(0) / areas.sum()
    assert centre(polygon(*map(tuple, corners.tolist()))) == pytest.approx(tuple(expected), abs=1e-3)
