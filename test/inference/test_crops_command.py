"""`python -m inference crops`: real pyramids, written by tifffile and read by OpenSlide, and what is cut from them."""

from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pytest
import tifffile

from inference.ensemble import Ensemble
from inference.errors import UserError
from inference.slides.detections.table import Detection
from test.support import commands
from test.support.miniature import make_ensemble
from test.support.pyramids import FIGURES, crop, detections, halves, pngs, rows_of, run, write_slide


def test_crops_are_the_drawn_pixels_and_columns_are_kept(slide, drawn, tmp_path) -> None:
    rows = [[f"d{n}", *row, n % 2] for n, row in enumerate(detections(slide.name), 1)]
    assert run(tmp_path, rows, "--slides", slide.parent, header="id, slide ,x,y,label") == 0
    found = rows_of(tmp_path)
    assert list(found[0]) == ["path", "slide", "x", "y", "id", "label"]
    assert [(row["id"], row["label"], row["path"]) for row in found] == [
        ("d1", "1", "case 1.tif/700_301.png"),
        ("d2", "0", "case 1.tif/333_900.png"),
        ("d3", "1", "case 1.tif/1101_777.png"),
    ]
    for row, (x, y) in zip(found, FIGURES, strict=True):
        np.testing.assert_array_equal(crop(tmp_path, row["path"]), drawn[y - 64 : y + 64, x - 64 : x + 64])


def test_scores_are_those_of_the_same_pixels(slide, drawn, tmp_path, capsys, eager) -> None:
    (tmp_path / "weights").mkdir()
    make_ensemble(tmp_path / "weights", folds=2)
    rows = [[*row, label] for row, label in zip(detections(slide), ("AMF", "NMF", "AMF"), strict=True)]
    assert run(tmp_path, rows, header="slide,x,y,label") == 0
    assert "0 of 3 detections" in capsys.readouterr().err
    where = ["--weights", str(tmp_path / "weights"), "--device", "cpu", "--precision", "fp32"]
    out, report = tmp_path / "out.csv", tmp_path / "report.html"
    assert (
        commands.inference(
            *["score", str(tmp_path / "crops/crops.csv"), "--csv", str(out), "--report", str(report), *where]
        )
        == 0
    )
    with out.open(newline="") as stream:
        scored = [float(row["p_atypical"]) for row in csv.DictReader(stream)]
    crops = [drawn[y - 64 : y + 64, x - 64 : x + 64] for x, y in FIGURES]
    expected = Ensemble.load(tmp_path / "weights", "cpu", "fp32").predict(crops).p_atypical
    np.testing.assert_allclose(scored, expected, atol=1e-6)
    assert np.ptp(scored) > 1e-4 and report.stat().st_size > 10_000


def test_what_cannot_be_cut_is_named_and_the_rest_goes_on(slide, tmp_path, capsys) -> None:
    (tmp_path / "broken.tif").write_bytes(b"no slide")
    write_slide(tmp_path / "plain.tif", [np.zeros((300, 300, 3), np.uint8)], None)
    write_slide(tmp_path / "dpi.tif", [np.zeros((300, 300, 3), np.uint8)], 25400 / 72)
    good = [slide, 700, 301]
    bad = [
        ([slide, "7OO", 301], "line 3: x is '7OO'; expected a finite number"),
        ([slide, "nan", 301], "line 4: x is 'nan'"),
        ([slide, 5, ""], "line 5: y is ''"),
        ([slide, 1300, 5], "case 1.tif at 1300, 5: it lies outside the slide's 1,300 x 1,000 pixels"),
        ([slide, 5, -0.01], "at 5, -0.01: it lies outside"),
        ([slide, 5, 1e8], "at 5, 100000000: it lies outside"),
        ([slide, 5, "1e300"], "line 9: y is '1e300'"),
        (["", 5, 5], "slide is empty"),
        ([slide, 5], "line 11: it has 2 fields; expected 3"),
        (["gone.svs", 5, 5], "gone.svs (1 detection): cannot be opened (No such file or directory)"),
        (["a\0b.svs", 5, 5], "cannot be opened (embedded null byte)"),
        (["n" * 300, 5, 5], "cannot be opened (File name too long)"),
        (["broken.tif", 5, 5], "broken.tif (1 detection): cannot be read by OpenSlide"),
        (["plain.tif", 5, 5], "plain.tif (2 detections): it states no µm/px; expected 0.05 to 5.0; give --slide-mpp"),
        (["plain.tif", 6, 5], ""),
        (["dpi.tif", 5, 5], "dpi.tif (1 detection): it states 352.778 µm/px"),
    ]
    assert run(tmp_path, [good, *(row for row, _ in bad)]) == 3
    lines = capsys.readouterr().err.splitlines()
    for _, reason in bad:
        assert sum(reason in line for line in lines) == (1 if reason else len(lines)), reason
    assert all(line.startswith("not cut: ") for line in lines[:-1]) and len(lines) == len(bad)
    assert lines[-1] == "16 of 17 detections could not be cut"
    (row,), (file,) = rows_of(tmp_path), pngs(tmp_path)
    assert tmp_path / "crops" / row["path"] == file


def test_slide_mpp_is_for_slides_that_state_none_or_the_same(drawn, tmp_path, capsys) -> None:
    write_slide(tmp_path / "plain.tif", [drawn], None)
    write_slide(tmp_path / "stated.tif", [drawn], 0.5)
    assert run(tmp_path, detections("plain.tif") + detections("stated.tif"), "--slide-mpp", 0.5) == 0
    write_slide(tmp_path / "native" / "stated.tif", [drawn], 0.25)
    with pytest.raises(UserError, match="none of the 3"):
        run(tmp_path / "native", detections("stated.tif"), "--slide-mpp", 0.5)
    assert "it states 0.25 µm/px, not 0.5; expected the same" in capsys.readouterr().err
    native, enlarged = drawn[237:365, 636:764], crop(tmp_path, "plain.tif/700_301.png")
    np.testing.assert_array_equal(crop(tmp_path, "stated.tif/700_301.png"), enlarged)
    rough = native[32:96, 32:96].astype(float)
    assert np.abs(halves(enlarged) - rough).mean() < 4 < np.abs(halves(native).astype(float) - rough).mean()


def test_a_damaged_tile_costs_only_its_own_crops(drawn, tmp_path, capsys) -> None:
    file = write_slide(tmp_path / "s.tif", [drawn])
    with tifffile.TiffFile(file) as tiff:
        offset, count = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]  # type: ignore[union-attr]
    data = bytearray(file.read_bytes())
    data[offset : offset + count] = b"\xff" * count
    file.write_bytes(data)
    places = [(x, y) for y in range(100, 1000, 60) for x in range(100, 1300, 60)]
    assert run(tmp_path, detections("s.tif", places)) == 3
    whole = [(x, y) for x, y in places if x - 64 >= 256 or y - 64 >= 256]
    assert 0 < len(whole) < len(places)
    assert [(int(row["x"]), int(row["y"])) for row in rows_of(tmp_path)] == whole
    assert capsys.readouterr().err.count("not cut: ") == len(places) - len(whole)
    for x, y in whole[::40]:
        padded = np.pad(drawn, ((64, 64), (64, 64), (0, 0)))
        np.testing.assert_array_equal(crop(tmp_path, f"s.tif/{x}_{y}.png"), padded[y : y + 128, x : x + 128])


def test_names_are_stable_apart_and_inside_the_folder(drawn, tmp_path) -> None:
    base = tmp_path / "in" / "tables"
    other = np.ascontiguousarray(drawn[::-1])
    write_slide(base / "a/s.tif", [drawn])
    write_slide(base / "b/s.tif", [other])
    write_slide(base / "b/s.tiff", [drawn])
    outside = write_slide(tmp_path / "in/s.tif", [other])
    write_slide(tmp_path / "s.tif", [drawn])
    names = ["a/s.tif", "b/s.tif", "b/s.tiff", "../s.tif", "../../s.tif", str(outside), "a/../../s.tif"]
    assert run(base, [[name, 700, 500] for name in names]) == 0
    paths = [row["path"] for row in rows_of(base)]
    assert len(set(paths)) == len(names) and paths[:3] == [f"{name}/700_500.png" for name in names[:3]]
    for path, name in zip(paths, names, strict=True):
        assert (base / "crops" / path).resolve().is_relative_to(base / "crops")
        pixels = drawn if name in ("a/s.tif", "b/s.tiff", "../../s.tif") else other
        np.testing.assert_array_equal(crop(base, path), pixels[436:564, 636:764])
    assert len(list(tmp_path.rglob("*.png"))) == len(pngs(base)) == len(names)
    # of a table with other rows as well, and of another spelling, the same names
    assert Detection("b/s.tif", 700.0, 500.0).path == paths[1]


def test_a_detection_listed_twice_counts_once(slide, tmp_path, capsys) -> None:
    same = f"{slide.parent}/./{slide.name}"
    rows = [[slide, 700, 301, "first"], [slide, "700.0", " 301", "again"], [same, 7e2, 301, ""]]
    assert run(tmp_path, rows, header="slide,x,y,note") == 0
    assert [row["note"] for row in rows_of(tmp_path)] == ["first"]
    assert ": 1 crops, 2 detections listed twice," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("header", "rows", "reason"),
    [
        ("file,x,y", [["a", 1, 2]], r"has the columns \['file', 'x', 'y'\]; expected slide, x, y"),
        ("slide,x,y,path", [["a", 1, 2, 3]], "none called path or page"),
        ("slide,x,y,x", [["a", 1, 2, 3]], "each once"),
        ("slide,x,y", [], "has no rows"),
        ("slide,x,y", [["a", 1, 2], ["a", 1, 3], ["b", "", 3]], "none of the 3 detections could be cut"),
    ],
)
def test_tables_that_make_no_sense_are_refused(header, rows, reason, tmp_path) -> None:
    with pytest.raises(UserError, match=reason):
        run(tmp_path, rows, header=header)
    assert not (tmp_path / "crops/crops.csv").exists()


@pytest.mark.parametrize("options", [["--side", "4"], ["--side", "9999"], ["--mpp", "nan"], ["--slide-mpp", "0"]])
def test_options_out_of_range_are_refused(options, tmp_path) -> None:
    with pytest.raises(UserError, match=f"{options[0]} is .*; expected"):
        run(tmp_path, [["a", 1, 2]], *options)


def test_a_file_in_place_of_the_folder_is_one_line(slide, tmp_path) -> None:
    (tmp_path / "crops").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        run(tmp_path, detections(slide))
    assert (tmp_path / "crops").read_text() == "mine"


def test_without_openslide_one_line_says_how_to_get_it(tmp_path) -> None:
    program = (
        "import sys; import inference.slides.crops; assert 'openslide' not in sys.modules; "
        "sys.modules['openslide'] = None; "
        "from inference.__main__ import main; sys.exit(main(['crops', 'x.csv', '--output', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "crops")], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "run ./build.sh --engine native --requirements requirements/slides.txt" in done.stderr
    assert not (tmp_path / "crops").exists()
