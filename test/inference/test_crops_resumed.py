"""`crops` again, over what an earlier run left: stopped, killed, on a full disk, beside another run."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from inference.errors import UserError
from inference.slides import crops as slides
from inference.slides.detections.table import Detection
from test.support.processes import killed
from test.support.pyramids import detections, pngs, rows_of, run, write_slide
from test.support.tables import write_csv


def test_a_rerun_cuts_only_what_is_missing(slide, tmp_path, capsys) -> None:
    rows = detections(slide)
    assert run(tmp_path, rows) == 0
    files, table = pngs(tmp_path), (tmp_path / "crops/crops.csv").read_bytes()
    whole = [file.read_bytes() for file in files]
    files[0].unlink()
    files[1].write_bytes(b"")
    kept = files[2].stat()
    assert run(tmp_path, rows) == 0
    assert ": 3 crops, 1 of them there already," in capsys.readouterr().out
    assert [file.read_bytes() for file in files] == whole
    assert files[2].stat().st_mtime_ns == kept.st_mtime_ns and files[2].stat().st_ino == kept.st_ino
    assert (tmp_path / "crops/crops.csv").read_bytes() == table
    assert run(tmp_path, rows, "--slide-mpp", 0.25) == 0  # which an earlier run may have asked for
    for options, found, expected in (
        (["--side", 64], "--side 128, --slide-mpp 0.25", "--side 64, no --slide-mpp"),
        (["--mpp", 0.5], "--mpp 0.25, --slide-mpp 0.25", "--mpp 0.5, no --slide-mpp"),
        ([], "--slide-mpp 0.25", "no --slide-mpp"),
        (["--slide-mpp", 0.5], "--slide-mpp 0.25", "--slide-mpp 0.5"),
        (["--slide-mpp", 0.25, "--slides", tmp_path.parent], f"--slides {tmp_path}", f"--slides {tmp_path.parent}"),
    ):
        with pytest.raises(UserError, match=f"holds crops of {found}; expected {expected}; name another folder"):
            run(tmp_path, rows, *options)


def test_one_run_at_a_time_writes_to_a_folder(slide, tmp_path) -> None:
    assert run(tmp_path, detections(slide)) == 0
    held = os.open(tmp_path / "crops", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing to"):
            run(tmp_path, detections(slide))
    finally:
        os.close(held)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"side": 128}', "null"])
def test_a_folder_whose_settings_are_damaged_is_refused_as_it_is(content, slide, tmp_path) -> None:
    """A full disk, or a computer that lost its power: nobody knows how these crops were cut."""
    assert run(tmp_path, detections(slide)) == 0
    (tmp_path / "crops" / slides.SETTINGS).write_text(content)
    for option in (["--mpp", 0.5], []):
        with pytest.raises(UserError, match=r"crops\.json .*; name another folder"):
            run(tmp_path, detections(slide), *option)
    (tmp_path / "crops" / slides.SETTINGS).unlink()
    with pytest.raises(UserError, match=r"holds PNG files but no crops\.json"):
        run(tmp_path, detections(slide))


def test_a_full_disk_keeps_the_settings_of_the_crops_that_are_there(slide, tmp_path) -> None:
    assert run(tmp_path, detections(slide)) == 0
    settings = tmp_path / "crops" / slides.SETTINGS
    before = settings.read_bytes()
    program = (
        "import resource, sys; from inference.__main__ import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8)); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "crops", str(tmp_path / "found.csv"), "--output", str(tmp_path / "crops")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "cannot write" in done.stderr and len(done.stderr.splitlines()) == 1
    assert settings.read_bytes() == before
    with pytest.raises(UserError, match="holds crops of"):
        run(tmp_path, detections(slide), "--mpp", 0.5)


def test_crops_of_a_slide_that_was_replaced_are_not_taken_for_the_new_ones(drawn, tmp_path, capsys) -> None:
    write_slide(tmp_path / "s.tif", [drawn])
    assert run(tmp_path, detections("s.tif")) == 0
    write_slide(tmp_path / "s.tif", [np.ascontiguousarray(drawn[::-1])])
    with pytest.raises(UserError, match="none of the 3 detections"):
        run(tmp_path, detections("s.tif"))
    assert "it changed since crops of it were cut" in capsys.readouterr().err


def test_a_killed_run_leaves_whole_crops_and_goes_on(slide, drawn, tmp_path) -> None:
    places = [(x, y) for y in range(64, 930, 25) for x in range(64, 1230, 33)]
    table = write_csv(tmp_path / "found.csv", "slide,x,y", detections(slide, places))
    command = ["crops", str(table), "--output", str(tmp_path / "crops")]
    killed("inference.slides.crops", "write_whole", 50, *command)
    before = pngs(tmp_path)
    assert 0 < len(before) < 50
    assert not (tmp_path / "crops/crops.csv").exists()
    for file in before:
        x, y = map(int, file.stem.split("_"))
        np.testing.assert_array_equal(np.asarray(Image.open(file)), drawn[y - 64 : y + 64, x - 64 : x + 64])
    command = [sys.executable, "-m", "inference", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{len(places):,} crops, {len(before):,} of them there already" in done.stdout
    assert len(rows_of(tmp_path)) == len(pngs(tmp_path)) == len(places)
    assert not list((tmp_path / "crops").rglob("*.partial"))


def test_where_a_crop_cannot_be_written_the_run_ends_in_one_line(slide, tmp_path) -> None:
    other = Detection(str(slide), 1.0, 1.0).path.split("/")[0]
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / other).write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*; run the same command again"):
        run(tmp_path, detections(slide))


def test_a_full_disk_leaves_no_half_of_a_crop(slide, tmp_path) -> None:
    table = write_csv(tmp_path / "found.csv", "slide,x,y", detections(slide))
    program = (
        "import resource, sys; from inference.__main__ import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
        "sys.exit(main(['crops', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", program, str(table), "--output", str(tmp_path / "crops")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "cannot write" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not pngs(tmp_path) and not (tmp_path / "crops/crops.csv").exists()
    assert run(tmp_path, detections(slide)) == 0
    assert len(pngs(tmp_path)) == 3 and not list((tmp_path / "crops").rglob(".*"))
