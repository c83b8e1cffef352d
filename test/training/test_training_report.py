"""The report of a run and the tables of a sweep, from finished runs."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest

from inference.errors import UserError
from test.support.tables import fake_run, tiny_table
from training.__main__ import main
from training.calibrate import calibrate, read_out_of_fold
from training.charts import Chart, ticks
from training.recipe import load_recipe
from training.report import report
from training.sweep import variant


def test_the_report_is_one_page_that_fetches_nothing(tmp_path):
    run = fake_run(tmp_path / "my <run>")
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "my &lt;run&gt;" in page and "<run>" not in page
    assert str(tmp_path) not in page and "/somewhere" not in page
    assert not re.search(r"""(src|href)=|url\(|@import|<script""", page)
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
        "mean of domains",
        "worst, score by score",
        "pooled",
        "prefers-color-scheme: dark",
    ):
        assert name in page
    left = calibrate(read_out_of_fold(run))
    assert f"<dd>{left['balanced_accuracy']:.3f}<small>[{left['balanced_accuracy_interval'][0]:.3f}" in page
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert not any("nan" in svg for svg in svgs)


def test_a_domain_of_one_class_and_missing_curves_do_not_stop_it(tmp_path):
    run = fake_run(tmp_path / "run")
    with (run / "split.csv").open(newline="") as lines:
        rows = list(csv.reader(lines))
    for row in rows[1:]:
        row[3] = "all normal" if row[1] == "0" and row[3] == "domain 1" else row[3]
    with (run / "split.csv").open("w", newline="") as out:
        csv.writer(out).writerows(rows)
    (run / "fold1" / "metrics.csv").unlink()
    page = report(run)
    assert "all normal" in page and "–" in page
    (run / "recipe.json").unlink()
    with pytest.raises(UserError, match="expected a run folder"):
        report(run)


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0.43, 0.71) == [0.45, 0.5, 0.55, 0.6, 0.65, 0.7]
    assert ticks(1, 60)[0] >= 1


def test_a_chart_puts_points_where_they_belong():
    chart = Chart("name", "x", "y", x=(0, 2), y=(0, 10))
    chart.line([0, 2], [0, 10], "red", "a < b")
    svg = chart.svg()
    assert f'points="{chart.across(0):.1f},{chart.down(0):.1f} {chart.across(2):.1f},{chart.down(10):.1f}"' in svg
    assert "a &lt; b" in svg
    assert chart.down(10) < chart.down(0)


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
    assert main([*arguments, "--backbone", "virchow"]) == 1
    assert "python -m training base virchow" in capsys.readouterr().err
