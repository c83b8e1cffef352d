"""The report of a run and the tables of a sweep, from finished runs."""

from __future__ import annotations

import base64
import csv
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from inference.errors import UserError
from inference.imageio.stack import read_stack
from inference.seen import pixel_hash
from test.support.tables import fake_run, tiny_table, write_crop
from training.__main__ import main
from training.ensemble.calibrate import calibrate, calibrated
from training.fit.lora import Lora
from training.fit.recipe import load_recipe
from training.report.curves import curves_chart
from training.report.mistakes import doubts
from training.report.page import report
from training.report.sweep import variant
from training.report.sweeptable import parameters
from training.run import RunFolder


def test_the_report_is_one_page_that_fetches_nothing(tmp_path):
    run = fake_run(tmp_path / "my <run>")
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "my &lt;run&gt;" in page and "<run>" not in page
    assert str(tmp_path) not in page and "/somewhere" not in page
    assert not re.search(r"""href="(?!#)|src="(?!data:)|url\((?!#)|@import|<script""", page)
    assert page.count("<figure>") == 5
    for title in (
        "Leave one fold out",
        "At the shipped threshold",
        "ROC",
        "Threshold",
        "Reliability",
        "Confusion",
        "Loss",
        "Folds",
        "Domains",
        "Settings",
    ):
        assert f"<h2>{title}</h2>" in page
    for name in (
        "domain 0",
        "domain 2",
        "mean of the domains",
        "worst domain for each score",
        "all",
        "prefers-color-scheme: dark",
    ):
        assert name in page
    left = calibrate(RunFolder(run).out_of_fold())
    assert f"<dd>{left['balanced_accuracy']:.3f}<small>[{left['balanced_accuracy_interval'][0]:.3f}" in page
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert not any("nan" in svg for svg in svgs)


def test_the_crops_of_mistakes_and_of_doubtful_labels_are_in_the_page(tmp_path):
    run = RunFolder(fake_run(tmp_path / "run"))
    crops = []
    for n, crop in enumerate(run.crops()):
        votes = (1, 1, 1) if crop.label and n % 2 else (crop.label, crop.label, 1 - crop.label)
        path = write_crop(tmp_path / "crops" / f"{n}.png", n)
        crops.append(
            replace(crop, path=path, name=f"mine/{n}.png", votes=votes, pixels=pixel_hash(read_stack(path)[0]))
        )
    run.write_split(crops, run.split())
    page = report(run)
    pictures = re.findall(r'<img alt="" width="8" height="8" src="data:image/webp;base64,([^"]+)">', page)
    assert len(pictures) == page.count("P(atypical) 0.") > 12
    assert all(Image.open(io.BytesIO(base64.b64decode(text))).size == (8, 8) for text in pictures)
    oof, chosen = run.out_of_fold(), calibrate(run.out_of_fold())
    p = calibrated(oof.logits, chosen)
    found = doubts(crops, p, chosen["threshold"])
    assert not set(found.mistakes) & set(found.labels)
    for n in (*found.mistakes, *found.labels):
        assert (p[n] >= chosen["threshold"]) != bool(crops[n].label)
        assert f"<br>{n}.png<" in page
    assert all(len(set(crops[n].votes)) == 2 for n in found.labels)
    shown = found.labels[0]
    assert f"{sum(crops[shown].votes)} of 3 atypical<br>P(atypical) {p[shown]:.3f}" in page
    write_crop(crops[shown].path, 999)
    crops[found.labels[1]].path.unlink()
    page = report(run)
    assert page.count("not as it was") == page.count("file gone") == 1


def test_a_domain_of_one_class_and_missing_curves_do_not_stop_it(tmp_path):
    run = fake_run(tmp_path / "run")
    with (run / "split.csv").open(newline="") as lines:
        rows = list(csv.reader(lines))
    for row in rows[1:]:
        row[3] = "all normal" if row[1] == "0" and row[3] == "domain 1" else row[3]
    with (run / "split.csv").open("w", newline="") as out:
        csv.writer(out).writerows(rows)
    (run / "fold1" / "metrics.csv").unlink()
    page = report(RunFolder(run))
    assert "all normal" in page and "–" in page
    (run / "recipe.json").unlink()
    with pytest.raises(UserError, match="expected a run folder"):
        report(RunFolder(run))


def test_a_chart_has_the_colours_of_the_page_alone():
    history = {"loss": [1.0, 0.61, 0.33], "validation_loss": [1.1, 0.7, float("nan")]}
    figure = curves_chart([history, history], ("loss", "validation_loss"), "loss < 1")
    assert not re.search(r"#[0-9a-f]{6}\b", figure) and "var(--accent)" in figure and "var(--line)" in figure
    assert {"fold 0", "fold 1", "held out", "epoch", "loss &lt; 1"} <= set(re.findall(r">([^<>]+)</text>", figure))
    assert 'aria-label="loss &lt; 1 by epoch"' in figure
    assert "<figure>" in curves_chart([{}], ("auc",), "AUC")  # a fold that has not been scored yet


def test_a_variant_keeps_the_size_of_a_step_and_takes_what_the_backbone_needs():
    shared = load_recipe("lite0", ["rank=8", "alpha=16"])
    same = variant(shared, "efficientnet-lite0", "random", 16)
    assert (same.rank, same.alpha, same.size, same.targets, same.split) == (
        16,
        32,
        shared.size,
        shared.targets,
        "random",
    )
    assert variant(shared, "virchow", "grouped", 4, given=["size"]).size == shared.size
    other = variant(shared, "virchow", "grouped", 4)
    assert (other.size, other.targets, other.alpha) == (224, "qkv", 8)


def test_a_sweep_fits_each_combination_once_and_writes_one_table(tmp_path, capsys):
    from test.support.miniature import random_base

    table = tiny_table(tmp_path)
    (tmp_path / "bases").mkdir()
    random_base("efficientnet-lite0", tmp_path / "bases" / "efficientnet-lite0.safetensors")
    sweep = tmp_path / "sweep"
    changes = [f"--set={change}" for change in ("size=32", "epochs=1", "folds=2", "batch=8", "crop=0", "targets=late")]
    arguments = [
        "sweep",
        "--data",
        str(table),
        "--run",
        str(sweep),
        "--bases",
        str(tmp_path / "bases"),
        *changes,
        "--split",
        "grouped",
    ]
    assert main([*arguments, "--rank", "1"]) == 0
    first = (sweep / "efficientnet-lite0-grouped-r1" / "fold0" / "oof.npz").stat().st_mtime_ns
    assert main([*arguments, "--rank", "2"]) == 0  # the table keeps what an earlier sweep found
    assert (sweep / "efficientnet-lite0-grouped-r1" / "fold0" / "oof.npz").stat().st_mtime_ns == first
    with (sweep / "sweep.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["rank"] for row in rows] == ["1", "2"]
    assert int(rows[1]["trainable"]) - 1281 == 2 * (int(rows[0]["trainable"]) - 1281)
    assert all(0 <= float(row["balanced_accuracy"]) <= 1 and float(row["seconds"]) > 0 for row in rows)
    text = (sweep / "sweep.md").read_text()
    picture = (sweep / "sweep.svg").read_text()
    assert "efficientnet-lite0, grouped" in picture and ">rank<" in picture
    assert text.count("| efficientnet-lite0 | 32 | grouped |") == 2
    assert np.isfinite([float(row["auc"]) for row in rows]).all()
    assert text.count("| backbone |") == 1
    assert main([*arguments, "--backbone", "virchow"]) == 1
    assert "python -m training base virchow" in capsys.readouterr().err
    for change in ("rank=4", "split=random", "backbone=uni"):
        assert main([*arguments, f"--set={change}"]) == 1
        assert f"use --{change.partition('=')[0]} instead" in capsys.readouterr().err

    assert main([*arguments, "--rank", "4", "--set", "learning_rate=1e-4", "--set", "targets=pointwise"]) == 0
    text = (sweep / "sweep.md").read_text()  # runs of other settings, and then of other crops, are apart
    assert "Not comparable with the first table, with targets late, learning_rate 0.0003:" in text
    first, second = text.split("Not comparable")
    assert first.count("| efficientnet-lite0 |") == 1 and second.count("| efficientnet-lite0 |") == 2
    write_crop(tmp_path / "crops" / "0.png", 99, 40, 90)
    assert main([*arguments, "--rank", "3"]) == 0
    text = (sweep / "sweep.md").read_text()
    assert "with other crops (24):" in text and text.count("Not comparable") == 2
    with (sweep / "sweep.csv").open(newline="") as lines:
        assert [row["apart"] for row in csv.DictReader(lines)].count("") == 1


def test_what_a_sweep_calls_trained_is_what_trains():
    """Half of the entries of a "qv" adapter stay zero."""
    assert parameters("virchow", Lora(8, 16, targets="qv")) == 1_310_720 + 2561
    assert parameters("virchow", Lora(8, 16)) == 1_310_720 + 2561
