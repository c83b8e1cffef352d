"""`python -m inference score`: every kind of input, runs that were stopped and continued, and what is refused."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from inference.answers import Answer, Computed
from inference.ensemble import Ensemble
from inference.errors import UserError
from inference.exits import INCOMPLETE
from inference.imageio.listing import list_crops
from inference.scoring.run import most_worth_a_look
from inference.scoring.table import AnswerTable
from test.support import commands
from test.support.miniature import make_ensemble


def noise(rng: np.random.Generator, pages: int) -> list[np.ndarray]:
    return list(rng.integers(0, 256, (pages, 48, 48, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    make_ensemble(folder, threshold=0.45)
    return folder


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, int], np.ndarray]]:
    """A folder with every format, and what lies in it by path and page."""
    folder, rng = tmp_path_factory.mktemp("crops"), np.random.default_rng(0)
    known: dict[tuple[str, int], np.ndarray] = {}
    for name in ("atypical/a.png", "normal/b.PNG", "normal/stack.tiff", "normal/three.mha"):
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        pages = noise(rng, 1 if name.lower().endswith("png") else 5)
        if file.suffix == ".mha":
            sitk.WriteImage(sitk.GetImageFromArray(np.stack(pages), isVector=True), str(file))
        else:
            images = [Image.fromarray(page) for page in pages]
            images[0].save(file, save_all=len(images) > 1, append_images=images[1:]) if len(images) > 1 else images[
                0
            ].save(file)
        known |= {(str(file), page): crop for page, crop in enumerate(pages)}
    (folder / "notes.txt").write_text("no crop")
    (folder / ".hidden.png").write_text("no crop")
    return folder, known


def run(weights: Path, *arguments: object) -> int:
    return commands.inference(
        *["score", *map(str, arguments), "--weights", str(weights), "--device", "cpu", "--precision", "fp32"]
    )


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_format_gets_the_answers_of_the_ensemble(weights, crops, tmp_path, capsys) -> None:
    folder, known = crops
    assert run(weights, folder, "--csv", tmp_path / "out.csv") == 0
    rows = read(tmp_path / "out.csv")
    assert [(row["path"], int(row["page"])) for row in rows] == list(known)
    prediction = Ensemble.load(weights, "cpu", "fp32").predict(list(known.values()))
    np.testing.assert_allclose([float(row["p_atypical"]) for row in rows], prediction.p_atypical, atol=1e-5)
    np.testing.assert_allclose([float(row["fold_2"]) for row in rows], prediction.fold_p[2], atol=1e-5)
    np.testing.assert_allclose([float(row["spread"]) for row in rows], prediction.spread, atol=1e-5)
    assert all((row["class"] == "atypical") == (float(row["p_atypical"]) >= 0.45) for row in rows)
    out, err = capsys.readouterr()
    assert f"{len(known)} crops" in out and err == ""


@pytest.mark.parametrize("lost", [1, 40, 700, 1400])
def test_a_stopped_run_is_continued_to_the_same_file(weights, crops, tmp_path, lost, capsys) -> None:
    folder, known = crops
    whole, file = tmp_path / "whole.csv", tmp_path / "out.csv"
    assert run(weights, folder, "--csv", whole) == 0
    content = whole.read_bytes()
    file.write_bytes(content[:-lost])
    assert run(weights, folder, "--csv", file) == 0
    assert [row["path"] + row["page"] for row in read(file)] == [f"{path}{page}" for path, page in known]
    kept = content[:-lost].rindex(b"\n")
    assert file.read_bytes()[:kept] == content[:kept]  # what was there is not touched
    assert "known already" in capsys.readouterr().out


def test_a_finished_run_loads_nothing_again(weights, crops, tmp_path, monkeypatch) -> None:
    _, known = crops
    last = tmp_path / "table.csv"  # pages asked for one by one: then the last file is known to be whole too
    last.write_text("path,page\n" + "\n".join(f"{path},{page}" for path, page in known))
    assert run(weights, last, "--csv", tmp_path / "out.csv") == 0
    before = (tmp_path / "out.csv").read_bytes()
    monkeypatch.setattr(Ensemble, "load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("inference.scoring.run.read_stack", lambda *_: pytest.fail("read"))
    assert run(weights, last, "--csv", tmp_path / "out.csv") == 0
    assert (tmp_path / "out.csv").read_bytes() == before


def test_results_of_another_ensemble_are_refused(weights, crops, tmp_path) -> None:
    file = tmp_path / "out.csv"
    assert run(weights, crops[0] / "atypical", "--csv", file) == 0
    other = tmp_path / "other"
    other.mkdir()
    for entry in weights.iterdir():
        (other / entry.name).symlink_to(entry)
    (other / "ensemble.json").unlink()
    (other / "ensemble.json").write_text((weights / "ensemble.json").read_text().replace("0.45", "0.46"))
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"expected ensemble [0-9a-f]{12}; name another CSV file"):
        run(other, crops[0] / "atypical", "--csv", file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", ["path,label\na.png,1", "hello", "path,page,p_atypical\n", "\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_result_is_left_as_it_is(weights, crops, tmp_path, content) -> None:
    file = tmp_path / "mine.csv"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="name another CSV file"):
        run(weights, crops[0], "--csv", file)
    assert file.read_bytes() == content.encode("latin-1")


NAMES = ('a "quoted", \u00e4.png', "line\nline.png", "carriage\rreturn.png", "\udcff.png")
CONTENT = "sha256:0123456789abcdef"
ROWS = [Answer(NAMES[n % 4], n // 4, n / 8, (n / 9, n / 8), pages=2, content=CONTENT) for n in range(8)]
COMPUTED = Computed("cpu", "fp32", "0123456789ab")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_result_cut_anywhere_is_resumed(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("cut")
    (folder / "ensemble.json").write_text("{}")
    manifest = load_like(folder)
    file = folder / "out.csv"
    AnswerTable(file, manifest, COMPUTED).append(ROWS)
    whole = file.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    file.write_bytes(whole[:cut])
    table = AnswerTable(file, manifest, COMPUTED)
    done = [table.done[path, content][page] for path, page, content in table.keys]
    assert done == ROWS[: len(done)]
    table.append(ROWS[len(done) :])
    assert table.settle(ROWS) == 0
    assert file.read_bytes() == whole


def test_every_crop_is_answered_once(weights, crops, tmp_path) -> None:
    """By whatever paths it is named: a folder and one in it, a file and its folder, links, a page and its file."""
    folder, known = crops
    (tmp_path / "link.png").symlink_to(folder / "atypical/a.png")
    table = tmp_path / "pages.csv"
    table.write_text(f"path,page,label\n{folder}/normal/stack.tiff,3,AMF\n{folder}/normal/stack.tiff,3,\n")
    out = tmp_path / "out.csv"
    assert run(weights, table, folder / "normal", folder, tmp_path / "link.png", table, "--csv", out) == 0
    found = [(row["path"], int(row["page"])) for row in read(out)]
    assert found[0] == (str(folder / "normal/stack.tiff"), 3)
    assert sorted(found) == sorted(known)
    again = tmp_path / "again.csv"
    assert run(weights, folder / "normal", "--csv", again) == 0
    assert run(weights, folder, "--csv", again) == 0  # first a folder, later its parent
    assert [(row["path"], int(row["page"])) for row in read(again)] == list(known)


def test_labels_of_one_crop_may_not_contradict_each_other(crops, tmp_path) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f"path,label\n{crops[0]}/atypical/a.png,AMF\n")
    assert [item.label for item in list_crops([crops[0] / "atypical", table])] == [1]
    table.write_text(table.read_text() + f"{crops[0]}/atypical/../atypical/a.png,NMF\n")
    with pytest.raises(UserError, match="has the labels 1 and 0"):
        list_crops([table])


def test_a_name_that_a_spreadsheet_would_compute(weights, crops, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "=1+1.png").write_bytes((crops[0] / "atypical/a.png").read_bytes())
    assert run(weights, "=1+1.png", "--csv", "out.csv") == 0
    assert [row["path"] for row in read(tmp_path / "out.csv")] == ["./=1+1.png"]


def test_the_labels_of_omg_octo(tmp_path) -> None:
    """Its table says MF for a normal figure; a word that nobody knows is an error, and never no label."""
    table = tmp_path / "omg_octo.csv"
    table.write_text("filename,label,domain\na.png,AMF,canine\nb.png,MF,canine\nc.png,,human\n")
    assert [item.label for item in list_crops([table])] == [1, 0, None]
    table.write_text("filename,label\na.png,mitosis\n")
    with pytest.raises(UserError, match="row 2, column label: label is 'mitosis'"):
        list_crops([table])


def test_what_is_there_is_not_overwritten(weights, crops, tmp_path) -> None:
    crop, table = tmp_path / "a.png", tmp_path / "table.csv"
    crop.write_bytes((crops[0] / "atypical/a.png").read_bytes())
    table.write_text("path\na.png\n")
    (tmp_path / "page.html").write_text("<!doctype html><p>mine")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for option, file in (
        ("--report", crop),
        ("--report", table),
        ("--report", tmp_path / "page.html"),
        ("--csv", table),
        ("--csv", crop),
    ):
        with pytest.raises(UserError, match=r"is named twice|no report|begins with"):
            run(weights, tmp_path / "table.csv", option, file)
    with pytest.raises(UserError, match="is named twice"):
        run(weights, crop, "--csv", tmp_path / "new", "--report", tmp_path / "new")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    for _ in range(2):  # an earlier report may be written again
        assert run(weights, crop, "--report", tmp_path / "report.html") == 0


def test_one_run_at_a_time_writes_to_a_file(tmp_path) -> None:
    (tmp_path / "ensemble.json").write_text("{}")
    table = AnswerTable(tmp_path / "out.csv", load_like(tmp_path), COMPUTED)
    with pytest.raises(UserError, match="another run is writing"):
        AnswerTable(tmp_path / "out.csv", load_like(tmp_path), COMPUTED)
    assert not table.keys


def load_like(folder: Path):
    """What a table needs of a manifest: a folder to hash, the folds and the threshold."""
    from types import SimpleNamespace

    return SimpleNamespace(folder=folder, members=[SimpleNamespace(name="one", folds=(1, 2))], threshold=0.5)


def test_unreadable_files_are_named_and_counted(weights, crops, tmp_path, capsys) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "broken.png").write_bytes((crops[0] / "atypical/a.png").read_bytes()[:-500])
    good = tmp_path / "good.png"
    good.write_bytes((crops[0] / "atypical/a.png").read_bytes())
    out = tmp_path / "out.csv"
    assert run(weights, tmp_path, "--csv", out, "--report", tmp_path / "out.html") == INCOMPLETE
    assert [row["path"] for row in read(out)] == [str(good)]
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 3 and err[0].startswith("not scored: ") and "empty.png" in err[1]
    assert err[2] == "2 of 3 files could not be read"
    good.unlink()
    with pytest.raises(UserError, match="none of 2 files"):
        run(weights, tmp_path, "--csv", tmp_path / "none.csv")


def test_a_table_brings_pages_labels_and_domains(weights, crops, tmp_path, capsys) -> None:
    folder, _ = crops
    table = folder / "table.csv"
    table.write_text(
        "image,page,truth,domain\nnormal/stack.tiff,3,AMF,x\natypical/a.png,,Normal,y\n"
        "normal/stack.tiff,0,0,x\nnormal/b.PNG,,,y\n",
        encoding="utf-8-sig",
    )
    try:
        items = list_crops([table], labels="truth")
        assert [(item.page, item.label, item.domain) for item in items] == [
            (3, 1, "x"),
            (None, 0, "y"),
            (0, 0, "x"),
            (None, None, "y"),
        ]
        assert run(weights, table, "--labels", "truth", "--csv", tmp_path / "out.csv") == 0
    finally:
        table.unlink()
    assert [row["page"] for row in read(tmp_path / "out.csv")] == ["3", "0", "0", "0"]
    assert "3 labelled (1 atypical): balanced accuracy" in capsys.readouterr().out


def test_folders_can_be_labels(crops) -> None:
    items = list_crops([crops[0]], labels="@folder", domains="@folder")
    assert [(item.label, item.domain) for item in items] == [(1, "atypical")] + [(0, "normal")] * 3


@pytest.mark.parametrize(
    ("content", "labels", "message"),
    [
        ("name,label\na.png,1\n", None, "has the columns .* expected one of path"),
        ("path\na.png\n", "truth", "has no column 'truth'"),
        ("path,label\na.png,perhaps\n", "label", "row 2, column label: label is 'perhaps'"),
        ("path,page\na.png,-1\n", None, "page is '-1'"),
        ("path,page\na.png,²\n", None, "page is '²'"),
        ("path,page\na.png," + "9" * 5000 + "\n", None, "expected a number, counted from 0"),
        ("path,page\na.png\n", None, "row 2 does not have 2 fields"),
        ("", None, "has the columns"),
    ],
)
def test_tables_that_make_no_sense_are_refused(tmp_path, content, labels, message) -> None:
    table = tmp_path / "table.csv"
    table.write_text(content)
    with pytest.raises(UserError, match=message):
        list_crops([table], labels)


def test_nothing_to_score_is_an_error(tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        list_crops([tmp_path / "missing"])
    with pytest.raises(UserError, match="no crops in"):
        list_crops([tmp_path])


def test_a_report_that_cannot_be_written_is_refused_before_the_work(weights, crops, tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        run(weights, crops[0], "--csv", tmp_path / "out.csv", "--report", tmp_path / "missing" / "out.html")
    with pytest.raises(UserError, match="expected --report FILE too"):
        run(weights, crops[0], "--attribution")
    assert list(tmp_path.iterdir()) == []


def test_maps_of_the_crops_most_worth_a_look(weights, crops, tmp_path, monkeypatch) -> None:
    """With labels the worst mistake first; the page holds as many maps as were asked for."""
    monkeypatch.setattr("inference.report.attribution.GRID", 2)
    out, report = tmp_path / "out.csv", tmp_path / "out.html"
    assert run(weights, crops[0], "--labels", "@folder", "--csv", out, "--report", report, "--attribution", 3) == 0
    data = json.loads(re.search(r'id="data">(.*?)</script>', report.read_text())[1])
    rows = [(float(row["p_atypical"]), "/atypical/" in row["path"]) for row in read(out)]
    order = most_worth_a_look([Answer("", 0, p, (), label=int(atypical)) for p, atypical in rows], 0.45)
    assert {n for n, one in enumerate(data["maps"]) if one} == set(order[:3])
    assert data["label"] == [int(atypical) for _, atypical in rows]


def test_mistakes_are_most_worth_a_look() -> None:
    cases = [(0.9, 1), (0.46, None), (0.6, 0), (0.1, 1), (0.43, 0), (0.05, None)]
    rows = [Answer("", 0, p, (), label=label) for p, label in cases]
    assert most_worth_a_look(rows, 0.45) == [3, 2, 1, 4, 5, 0]


def test_the_command_itself(weights, crops) -> None:
    """Without --csv and --report the rows go to stdout, the summary to stderr; a refusal is one line and code 1."""
    command = [sys.executable, "-m", "inference", "score", "--weights", str(weights), "--device", "cpu"]
    done = subprocess.run([*command, str(crops[0] / "atypical")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("path,page,pages,p_atypical,class,fold_0,fold_1,fold_2,spread")
    assert "1 crops (" in done.stderr
    refused = subprocess.run([*command, "missing.png"], capture_output=True, text=True)
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1


def test_what_needs_no_network_imports_no_torch() -> None:
    code = "import sys, inference.scoring.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_manifest_is_read_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no ensemble\.json"):
        run(tmp_path, tmp_path, "--csv", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
