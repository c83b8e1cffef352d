"""`training compare`: DeLong and McNemar against their definitions, paired intervals, and what is refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binom, norm

from inference.answers import Answer
from inference.assessment import Labelled
from inference.manifest import BUNDLED
from inference.seen import pixel_hash, write_seen
from test.support.commands import inference
from test.support.miniature import make_ensemble
from training.__main__ import main
from training.ensemble import calibrate, export, verify
from training.ensemble import compare as comparison
from training.ensemble.compare import Side, delong, differences, mcnemar
from training.ensemble.compare import compare as lines_of

TABLE = "ab" * 32


@pytest.mark.parametrize("module", [calibrate, comparison, export, verify])
def test_a_bundled_ensemble_goes_by_its_name(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the package is installed, nobody knows the folder."""
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    module.configure(parser)
    words = ["default"] + ["mine.csv"] * (module is comparison) + ["--output", "new"] * (module is export)
    options = vars(parser.parse_args([*words, "--data", "crops"]))
    found = next(options[name] for name in ("a", "run", "folders", "ensemble") if name in options)
    assert (found[0] if isinstance(found, list) else found) == BUNDLED
    assert options.get("b", Path("mine.csv")) == Path("mine.csv")


@given(st.integers(0, 2**32 - 1), st.integers(4, 40))
@settings(max_examples=40, deadline=None)
def test_delong_is_its_definition(seed: int, n: int) -> None:
    """By the pairs of atypical and normal crops: V10, V01 and the covariances of DeLong's paper, with ties."""
    g = np.random.default_rng(seed)
    labels = np.append(g.integers(0, 2, n), [0, 0, 1, 1])
    scores = g.integers(0, 8, (2, n + 4)) / 8
    won = [
        (p[labels == 1][:, None] > p[labels == 0]) + 0.5 * (p[labels == 1][:, None] == p[labels == 0]) for p in scores
    ]
    v10, v01 = np.array([w.mean(1) for w in won]), np.array([w.mean(0) for w in won])
    covariance = np.cov(v10) / v10.shape[1] + np.cov(v01) / v01.shape[1]
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    difference = won[1].mean() - won[0].mean()
    low, high, p = delong(labels, *scores)
    if variance < 1e-12 < abs(difference):
        assert np.isnan([low, high, p]).all()
        return
    assert (low + high) / 2 == pytest.approx(difference, abs=1e-12)
    if variance < 1e-12:
        assert p == 1
    else:
        assert (high - low) / 2 == pytest.approx(1.959964 * np.sqrt(variance), rel=1e-5)
        assert p == pytest.approx(2 * norm.sf(abs(difference) / np.sqrt(variance)), rel=1e-6, abs=1e-12)


def test_delong_says_nothing_where_the_difference_has_no_variance() -> None:
    """Every pair in order against none, or all tied, is no chance of 1; nor has one crop of a class a variance."""
    labels = np.repeat([0, 1], 30)
    perfect = np.linspace(0, 1, 60)
    assert delong(labels, perfect, perfect) == (0, 0, 1)
    for worse in (np.full(60, 0.5), 1 - perfect):
        assert np.isnan(delong(labels, worse, perfect)).all()
        rows = [[Answer(str(n), 0, p, (), label=n // 30) for n, p in enumerate(each)] for each in (worse, perfect)]
        a, b = (Side("", each, np.array([row.p_atypical > 0.5 for row in each])) for each in rows)
        assert "DeLong" not in "\n".join(lines_of(a, b))
        few = [0, 1, 2, 30]
        assert "DeLong" not in "\n".join(lines_of(a.part(few), b.part(few)))


def test_mcnemar_is_the_binomial_of_the_crops_that_one_alone_calls_rightly() -> None:
    labels = np.array([1] * 12)
    a, b = np.array([1] * 2 + [0] * 10), np.array([0] * 2 + [1] * 8 + [0] * 2)
    assert mcnemar(labels, a, b) == (2, 8, pytest.approx(2 * binom.cdf(2, 10, 0.5)))
    assert mcnemar(labels, a, a) == (0, 0, 1.0)


def test_differences_are_paired() -> None:
    """B is A with noise: each varies by far more over slides than their difference does."""
    g = np.random.default_rng(0)
    labels = g.integers(0, 2, 300)
    a = np.clip(0.5 + 0.15 * (2 * labels - 1) + g.normal(0, 0.25, 300), 0, 1)
    b = np.clip(a + g.normal(0, 0.01, 300), 0, 1)
    groups = np.array([f"s{n // 10}" for n in range(300)], object)
    sides = [Labelled(labels, p, groups, 30, 0) for p in (a, b)]
    rows = {each.name: each for each in differences((sides[0], sides[1]), (a >= 0.5, b >= 0.5), 300)}
    auc = rows["AUC"]
    assert auc.low <= auc.b - auc.a <= auc.high and auc.high - auc.low < 0.02
    again = differences((sides[1], sides[0]), (b >= 0.5, a >= 0.5), 300)
    swapped = {each.name: each for each in again}["AUC"]
    assert (swapped.low, swapped.high) == pytest.approx((-auc.high, -auc.low))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ensembles of different weights, the first with its training crops, a table, and the answers of each."""
    folder = tmp_path_factory.mktemp("compared")
    crops = list(np.random.default_rng(0).integers(0, 256, (24, 24, 24, 3), dtype=np.uint8))
    for n, crop in enumerate(crops):
        Image.fromarray(crop).save(folder / f"{n}.png")
    lines = [f"{n}.png,{n % 2},slide {n // 3}" for n in range(24)]
    (folder / "table.csv").write_text("\n".join(["path,label,slide", *lines]))
    for name, seed in (("a", 0), ("b", 1)):
        (folder / name).mkdir()
        make_ensemble(folder / name, seed=seed, provenance={"recipe": {}, "data": {"sha256": TABLE}})
        write_seen(folder / name, TABLE, map(pixel_hash, crops[: 6 if name == "a" else 0]))
        options = ["--weights", folder / name, "--device", "cpu", "--csv", folder / f"{name}.csv"]
        assert inference("score", folder / "table.csv", *options) == 0
    return folder


def compare(*arguments: object) -> int:
    return main(["compare", *map(str, arguments), "--device", "cpu"])


def test_ensembles_and_their_answers_compare_alike(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", compared / "table.csv")
    capsys.readouterr()
    assert compare(compared / "a", compared / "b", *data) == 0
    computed = capsys.readouterr().out
    assert "24 crops (12 atypical); 95% intervals over 8 slides" in computed
    assert "of these crops in the training data of A: 6, of B: 0\nwithout them:\n18 crops (9 atypical)" in computed
    assert "DeLong: AUC " in computed and computed.count("McNemar, normal") == 2
    assert compare(compared / "a.csv", compared / "b.csv", *data) == 0
    read = capsys.readouterr().out
    assert "in the training data of A: not known, of B: not known" in read and "without them" not in read
    table = computed.split("\n\n")[0].splitlines()[2:]
    assert read.split("\n\n")[0].splitlines()[2:] == table


def test_missing_labels_are_told_before_anything_is_computed(tmp_path, capsys, monkeypatch) -> None:
    def computes(*_: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr("training.ensemble.compare.read_side", computes)
    Image.new("RGB", (8, 8)).save(tmp_path / "crop.png")
    assert main(["compare", "a.csv", "b.csv", "--data", str(tmp_path)]) == 1
    assert "has no labels; expected a column label, or crops in the folders" in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused(compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, table = compared / "a.csv", compared / "table.csv"
    Image.new("RGB", (8, 8)).save(tmp_path / "new.png")
    (tmp_path / "new.csv").write_text("path,label\nnew.png,1\n")
    (tmp_path / "bare.csv").write_text(f"path\n{compared / '0.png'}\n")
    (tmp_path / "odd.csv").write_text("path,p\n1,2\n")
    (tmp_path / "part.csv").write_text(a.read_text().replace("png,0,1,", "png,0,2,", 1))  # a stack's first page
    for arguments, message in (
        ((a, a, "--data", table), "is compared with itself"),
        ((a, compared / "b.csv", "--data", tmp_path / "new.csv"), "has no answer for"),
        ((a, compared / "b.csv", "--data", tmp_path / "bare.csv"), "has no labels; expected a column label"),
        ((a, tmp_path / "odd.csv", "--data", table), "holds no answers"),
        ((a, tmp_path / "none.csv", "--data", table), "cannot be read"),
        ((tmp_path / "part.csv", compared / "b.csv", "--data", table), "has no answer for page 1 of"),
    ):
        assert compare(*arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
