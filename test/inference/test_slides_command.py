"""`python -m inference slides`: detections on generated slides in, classes on the same slides out."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from inference.ensemble import Ensemble
from inference.errors import UserError
from inference.exits import INTERRUPTED
from inference.progress import Progress
from inference.slides import part as scoring
from inference.slides import reader
from inference.slides.journal import Journal, journal
from test.support import detection_files as files
from test.support.commands import rows_of
from test.support.commands import slides as run
from test.support.processes import killed
from test.support.pyramids import FIGURES, pyramid, write_slide

PLACES = list(FIGURES)


def features_of(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["features"]


def test_answers_are_those_of_the_same_pixels_and_go_back_to_their_objects(
    slide, drawn, miniature, tmp_path, capsys, eager
) -> None:
    detections = files.qupath_polygons(tmp_path / "found.geojson", PLACES)
    before = detections.read_bytes(), slide.read_bytes()
    out, table = tmp_path / "out.geojson", tmp_path / "out.csv"
    assert run(miniature, detections, "--slide", slide, "--output", out, "--csv", table) == 0
    said = capsys.readouterr().err
    assert "looking at the slides" in said and "loading the ensemble" in said and "0 of 3 detections" in said
    crops = [drawn[y - 64 : y + 64, x - 64 : x + 64] for x, y in PLACES]
    expected = Ensemble.load(miniature, "cpu", "fp32").predict(crops)
    np.testing.assert_allclose([float(row["p_atypical"]) for row in rows_of(table)], expected.p_atypical, atol=1e-6)
    assert np.ptp(expected.p_atypical) > 1e-4
    for n, (old, new) in enumerate(zip(features_of(detections), features_of(out), strict=True)):
        assert (old["id"], old["geometry"]) == (new["id"], new["geometry"])
        measured = new["properties"]["measurements"]
        assert measured["P(atypical)"] == pytest.approx(expected.p_atypical[n], abs=1e-6)
        assert measured["P(atypical) fold 1"] == pytest.approx(expected.fold_p[1, n], abs=1e-6)
        assert measured["P(atypical) spread"] == pytest.approx(expected.spread[n], abs=1e-6)
        assert measured["Detection probability"] == old["properties"]["measurements"]["Detection probability"]
    assert (detections.read_bytes(), slide.read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.geojson", "out.csv", "out.geojson"]


@pytest.mark.parametrize("name", files.MAKERS)
def test_every_format_gives_the_same_answers(name, slide, miniature, tmp_path) -> None:
    detections = files.MAKERS[name](tmp_path / name, [(float(x), float(y)) for x, y in PLACES])
    assert run(miniature, detections, "--slide", slide, "--csv", tmp_path / "out.csv") == 0
    found = rows_of(tmp_path / "out.csv")
    assert [(float(row["x"]), float(row["y"])) for row in found] == PLACES
    expected = {"700,301", "333,900", "1101,777"}
    assert {f"{row['x']},{row['y']}" for row in found} == expected and len({row["p_atypical"] for row in found}) == 3


def test_what_cannot_be_scored_is_named_and_the_rest_is(slide, drawn, miniature, tmp_path, capsys) -> None:
    shutil.copy(slide, tmp_path / "case.tif")
    rows = files.features([*PLACES, (9000, 5), (-1, 5), (150, 120), PLACES[0], *[(600, 600)] * 5])
    bow_tie = [[160, 110], [180, 130], [180, 110], [160, 130], [160, 110]]
    rows[7]["geometry"]["coordinates"] = [None, 1]
    rows[8]["geometry"]["coordinates"] = [math.nan, 1]
    rows[9]["geometry"] = {"type": "Polygon", "coordinates": [bow_tie]}
    rows[10]["geometry"] = files.square(600, 600, 600)
    detections = files.write_json(tmp_path / "case.geojson", rows)
    before = detections.read_bytes(), (tmp_path / "case.tif").read_bytes()
    assert run(miniature, detections, "--output", tmp_path / "out.geojson") == 3
    output = capsys.readouterr()
    lines = output.err.splitlines()
    for where, reason in [
        ("feature 4", "it lies outside the slide's 1,300 x 1,000 pixels"),
        ("feature 5", "it lies outside"),
        ("feature 6", "it lies on blank glass"),
        ("feature 7", f"it lies where {detections}, feature 1 does"),
        ("feature 8", "x is None; expected a finite number"),
        ("feature 9", "x is nan; expected a finite number"),
        ("feature 10", "it lies on blank glass"),
        ("feature 11", "it is 1,200 pixels across"),
        ("feature 12", "it lies on blank glass"),
    ]:
        assert sum(line.startswith(f"not scored: {detections}, {where}: {reason}") for line in lines) == 1, (
            where,
            lines,
        )
    assert lines[-1] == "9 of 12 detections could not be scored" and len(lines) == 10
    assert [one["id"] for one in features_of(tmp_path / "out.geojson")] == [files.uuid(n) for n in range(3)]
    assert "3 of 12 detections on 1 slide, " in output.out
    assert (detections.read_bytes(), (tmp_path / "case.tif").read_bytes()) == before


def test_a_slide_that_is_cut_off_costs_only_its_own_objects(drawn, miniature, tmp_path, capsys) -> None:
    noisy = np.random.default_rng(0).integers(0, 200, drawn.shape, dtype=np.uint8)
    whole, cut = (write_slide(tmp_path / name, [noisy]) for name in ("whole.tif", "cut.tif"))
    with cut.open("r+b") as stream:
        stream.truncate(cut.stat().st_size // 2)
    inputs = [files.qupath(tmp_path / f"{file.stem}.geojson", PLACES) for file in (cut, whole)]
    assert run(miniature, *inputs, "--csv", tmp_path / "out.csv") == 3
    found = [row["slide"] for row in rows_of(tmp_path / "out.csv")]
    assert found.count("whole.tif") == 3 and found.count("cut.tif") < 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"{6 - len(found)} of 6 detections could not be scored"


def test_a_damaged_tile_costs_only_its_own_crops(drawn, miniature, tmp_path, capsys) -> None:
    noisy = np.random.default_rng(0).integers(0, 255, drawn.shape, dtype=np.uint8)
    file = write_slide(tmp_path / "s.tif", [noisy])
    with tifffile.TiffFile(file) as tiff:
        offset, count = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]  # type: ignore[union-attr]
    data = bytearray(file.read_bytes())
    data[offset : offset + count] = b"\xff" * count
    file.write_bytes(data)
    places = [(x, y) for y in range(100, 1000, 200) for x in range(100, 1300, 200)]
    assert run(miniature, files.qupath(tmp_path / "s.geojson", places), "--csv", tmp_path / "out.csv") == 3
    whole = [(x, y) for x, y in places if x - 64 >= 256 or y - 64 >= 256]
    assert [(int(row["x"]), int(row["y"])) for row in rows_of(tmp_path / "out.csv")] == whole
    assert capsys.readouterr().err.count("the slide is damaged there") == len(places) - len(whole) > 0


def test_a_slide_that_is_replaced_while_it_is_read_counts_for_nothing(
    drawn, miniature, tmp_path, capsys, monkeypatch
) -> None:
    write_slide(tmp_path / "s.tif", [drawn])
    write_slide(tmp_path / "other.tif", [drawn // 2])
    looked = scoring.look

    def look_and_replace(crop: Any) -> np.ndarray:
        with contextlib.suppress(FileNotFoundError):  # several threads look; the first one replaces it, at once
            (tmp_path / "other.tif").replace(tmp_path / "s.tif")
        return looked(crop)

    monkeypatch.setattr(scoring, "look", look_and_replace)
    with pytest.raises(UserError, match="none of 3 detections could be scored"):
        run(miniature, files.qupath(tmp_path / "s.geojson", PLACES), "--csv", tmp_path / "out.csv")
    assert "s.tif (3 detections): it changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_a_killed_run_is_resumed_and_ends_as_a_fresh_one(slide, drawn, miniature, tmp_path) -> None:
    noisy = np.random.default_rng(0).integers(0, 200, drawn.shape, dtype=np.uint8)
    write_slide(tmp_path / "s.tif", [noisy])
    places = [(x, y) for y in range(64, 930, 40) for x in range(64, 1230, 40)]
    detections = files.qupath(tmp_path / "s.geojson", places)
    out, journal = tmp_path / "out.csv", tmp_path / ".out.csv.journal"
    options = ["--csv", str(out), "--weights", str(miniature), "--device", "cpu", "--precision", "fp32"]
    killed("inference.slides.journal:Journal", "add", 2, "slides", detections, *options)
    assert not out.exists() and 0 < journal.read_bytes().count(b"\n") < len(places)
    command = [sys.executable, "-m", "inference", "slides", str(detections), *options]
    with journal.open("ab") as stream:
        stream.write(b'["torn')
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "known already" in done.stdout and not journal.exists()
    resumed = out.read_bytes()
    assert len(rows_of(out)) == len(places)
    subprocess.run(command, capture_output=True, check=True)
    assert out.read_bytes() == resumed  # of a run that was never stopped


def test_what_a_journal_knows_of_another_slide_ensemble_or_scale_is_not_used(slide, drawn, miniature, tmp_path) -> None:
    write_slide(tmp_path / "s.tif", pyramid(drawn))
    detections, journal = files.qupath(tmp_path / "s.geojson", PLACES), tmp_path / ".out.csv.journal"
    kept: list[bytes] = []
    add = Journal.add

    def remember(self: Any, answers: Any) -> None:
        add(self, answers)
        kept.append(journal.read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", remember)
        assert run(miniature, detections, "--csv", tmp_path / "out.csv") == 0
    for change in ("nothing", "scale", "slide"):
        journal.write_bytes(kept[0])
        if change == "slide":
            write_slide(tmp_path / "s.tif", pyramid(drawn // 2))
        option = ["--mpp", 0.5] if change == "scale" else []
        counted: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "add", lambda self, answers, counted=counted: counted.append(len(answers)))
            run(miniature, detections, "--csv", tmp_path / "out.csv", "--slide", tmp_path / "s.tif", *option)
        assert bool(counted) == (change != "nothing"), change


def test_progress_counts_what_is_known_or_refused_as_done(slide, miniature, tmp_path, monkeypatch) -> None:
    inside = [(x + n / 2, y) for x, y in PLACES for n in range(14)]
    table = tmp_path / "found.csv"
    rows = [*[(slide.name, x, y) for x, y in [*inside, (9000, 5)]], ("gone.tif", 1, 2)]
    table.write_text("slide,x,y\n" + "".join(f"{name},{x},{y}\n" for name, x, y in rows))
    shown: list[tuple[int, int, int]] = []

    def show(self: Progress, *state: int) -> None:
        assert self.total == 44
        shown.append(state)  # type: ignore[arg-type]
        if len(shown) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "show", show)
    command = [miniature, table, "--slides", slide.parent, "--csv", tmp_path / "out.csv"]
    assert run(*command) == INTERRUPTED and run(*command) == 3
    assert shown == [(1, 0, 0), (34, 32, 32), (1, 0, 0), (44, 10, 10)]


def test_one_run_at_a_time(slide, miniature, tmp_path) -> None:
    detections = files.qupath(tmp_path / "a.geojson", PLACES)
    with journal(tmp_path / "out.csv"), pytest.raises(UserError, match="another run is writing to"):
        run(miniature, detections, "--slide", slide, "--csv", tmp_path / "out.csv")


def test_nothing_of_somebody_else_is_overwritten(slide, miniature, tmp_path) -> None:
    detections = files.qupath(tmp_path / "a.geojson", PLACES)
    mine = tmp_path / "mine.html"
    mine.write_text("a,b\n1,2\n")
    for option in ("--output", "--csv", "--summary", "--report"):
        names = [detections, slide, mine.rename(mine.with_suffix(".geojson")) if option == "--output" else mine]
        for name in names:
            content = name.read_bytes()
            with pytest.raises(UserError, match=r"is an input|holds something else|is a file"):
                run(miniature, detections, "--slide", slide, option, name)
            assert name.read_bytes() == content
        if option == "--output":
            mine.with_suffix(".geojson").rename(mine)
    with pytest.raises(UserError, match="nothing to write"):
        run(miniature, detections, "--slide", slide)
    for _ in range(2):  # what is ours is
        assert (
            run(miniature, detections, "--slide", slide, "--csv", tmp_path / "o", "--report", tmp_path / "r.html") == 0
        )


def test_no_result_overwrites_another(slide, miniature, tmp_path) -> None:
    detections, out = files.qupath(tmp_path / "a.geojson", PLACES), tmp_path / "out"
    out.mkdir()
    for options in (
        ["--csv", out / "../out/x.csv", "--summary", out / "x.csv"],
        ["--output", out, "--csv", out / f"{slide.name}.geojson"],
    ):
        with pytest.raises(UserError, match="two results have the same name"):
            run(miniature, detections, "--slide", slide, *options)
        assert not list(out.iterdir())


def test_slides_are_found_by_name_and_each_gets_its_file(drawn, miniature, tmp_path, capsys) -> None:
    folder = tmp_path / "slides"
    for name in ("one.tif", "two.tif"):
        write_slide(folder / name, [drawn])
    inputs = [
        files.qupath(tmp_path / "one.geojson", PLACES),
        files.qupath_gzip(tmp_path / "two.geojson.gz", PLACES[:2]),
        files.qupath(tmp_path / "three.geojson", PLACES[:1]),
    ]
    summary = tmp_path / "summary.csv"
    code = run(miniature, *inputs, "--slides", folder, "--output", tmp_path / "out", "--summary", summary)
    assert code == 3 and "no slide called three" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one.tif.geojson", "two.tif.geojson"]
    assert len(features_of(tmp_path / "out/two.tif.geojson")) == 2
    assert [(row["slide"], row["figures"]) for row in rows_of(summary)] == [("one.tif", "3"), ("two.tif", "2")]
    with pytest.raises(UserError, match="for 2 slides; expected a folder"):
        run(miniature, *inputs[:2], "--slides", folder, "--output", tmp_path / "one file.geojson")


class Shifted:
    """A slide whose scanned area begins elsewhere, as OpenSlide reports for MIRAX: its property, nothing else."""

    def __init__(self, real: Any, x: int, y: int) -> None:
        self.real = real
        self.properties = {**real.properties, "openslide.bounds-x": str(x), "openslide.bounds-y": str(y)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.fixture
def shifted(monkeypatch) -> list[tuple[float, float]]:
    """All slides have a scanned area that begins at 100, 50; the figures as they count from there."""
    opened = reader.open_slide
    monkeypatch.setattr(reader, "open_slide", lambda file: Shifted(opened(file), 100, 50))
    return [(x - 100.0, y - 50.0) for x, y in PLACES]


KEY = ("x", "y", "id", "p_atypical")


@pytest.mark.parametrize("maker", ["qupath.geojson", "polygons.geojson", "annotations.sqlite"])
def test_what_a_format_counts_from_is_known(maker, shifted, slide, miniature, tmp_path) -> None:
    """QuPath counts from the scanned area, SlideRunner from the slide's corner: no question."""
    on_slide = [(float(x), float(y)) for x, y in PLACES]
    detections = files.MAKERS[maker](tmp_path / f"in-{maker}", shifted if maker.endswith(".geojson") else on_slide)
    out, table = tmp_path / "out.geojson", tmp_path / "out.csv"
    assert run(miniature, detections, "--slide", slide, "--output", out, "--csv", table) == 0
    assert [(float(row["x"]), float(row["y"])) for row in rows_of(table)] == on_slide
    assert run(miniature, out, "--slide", slide, "--csv", tmp_path / "again.csv") == 0  # ours count as QuPath does
    again = [[row[key] for key in KEY] for row in rows_of(tmp_path / "again.csv")]
    assert again == [[row[key] for key in KEY] for row in rows_of(table)]


def test_what_a_table_counts_from_is_asked(shifted, slide, miniature, tmp_path, capsys) -> None:
    results = []
    for origin, places in (("scan", shifted), ("slide", [(float(x), float(y)) for x, y in PLACES])):
        detections = files.MAKERS["detections.csv"](tmp_path / f"{origin}.csv", places)
        options = ["--slide", slide, "--csv", tmp_path / f"{origin}-out.csv"]
        with pytest.raises(UserError, match="none of 3"):
            run(miniature, detections, *options)
        assert "give --origin scan (QuPath) or --origin slide" in capsys.readouterr().err
        assert run(miniature, detections, *options, "--origin", origin) == 0
        results.append([[row[key] for key in KEY] for row in rows_of(tmp_path / f"{origin}-out.csv")])
    assert results[0] == results[1]
    outline = [tumour_at(*place) for place in shifted]  # QuPath's, beside a table that counts from the slide's corner
    both = [tmp_path / "slide.csv", files.write_json(tmp_path / "t.geojson", outline)]
    options = ["--slide", slide, "--origin", "slide", "--region", "Tumor", "--summary", tmp_path / "s.csv"]
    assert run(miniature, *both, "--class", "", *options) == 0
    assert float(rows_of(tmp_path / "s.csv")[0]["figures_per_mm2"]) == 1600  # 3 in three squares of 100 pixels


def tumour_at(x: float, y: float) -> dict[str, Any]:
    return files.features([(x, y)], "Tumor")[0] | {"geometry": files.square(x, y, 50)}


def test_crops_ask_too_and_name_what_was_not_scanned(shifted, slide, drawn, tmp_path, capsys) -> None:
    from test.support import pyramids

    rows = [[slide.name, x, y] for x, y in shifted]
    options = ["--slides", slide.parent]
    with pytest.raises(UserError, match="none of the 3"):
        pyramids.run(tmp_path, rows, *options)
    assert "give --origin scan (QuPath) or --origin slide" in capsys.readouterr().err
    assert pyramids.run(tmp_path, rows, *options, "--origin", "scan") == 0
    path = f"{slide.name}/{shifted[0][0]:.12g}_{shifted[0][1]:.12g}.png"
    np.testing.assert_array_equal(pyramids.crop(tmp_path, path), drawn[237:365, 636:764])


def test_hovernets_magnification_is_the_slides(slide, miniature, tmp_path, monkeypatch) -> None:
    halved = [(x / 2, y / 2) for x, y in PLACES]
    detections = files.hovernet(tmp_path / "h.json", halved, mag=20)
    with pytest.raises(UserError, match="none of 3"):
        run(miniature, detections, "--slide", slide, "--csv", tmp_path / "out.csv")
    opened = reader.open_slide

    def with_power(file: Path) -> Any:
        found = Shifted(opened(file), 0, 0)
        found.properties["openslide.objective-power"] = "40"
        return found

    monkeypatch.setattr(reader, "open_slide", with_power)
    assert (
        run(miniature, detections, "--slide", slide, "--csv", tmp_path / "out.csv", "--output", tmp_path / "o.geojson")
        == 0
    )
    assert [(float(row["x"]), float(row["y"])) for row in rows_of(tmp_path / "out.csv")] == PLACES
    corners = np.array(features_of(tmp_path / "o.geojson")[0]["geometry"]["coordinates"][0])
    assert corners.min(0).tolist() == [680, 281]  # level-0 pixels, as QuPath draws
    cells = json.loads(detections.read_text())
    square = [[200, 200], [400, 200], [400, 400], [200, 400]]  # at 20x: 200 pixels of 0.5 um
    cells["nuc"]["9"] = files.cell(300, 300) | {"contour": square, "type": 5}
    options = ["--slide", slide, "--class", "1", "--region", "5", "--summary", tmp_path / "s.csv"]
    assert run(miniature, files.write_json(tmp_path / "r.json", cells), *options) == 0
    assert rows_of(tmp_path / "s.csv")[0]["area_mm2"] == "0.01"
