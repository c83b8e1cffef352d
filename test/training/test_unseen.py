"""What is shipped is calibrated as it answers: folds averaged or apart, on crops that none of them has seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.averaging import average
from inference.ensemble import Ensemble
from inference.imageio.stack import read_stack
from inference.manifest import load_manifest
from inference.metrics import balanced_accuracy, best_threshold, sigmoid
from test.support.runs import make_run
from test.support.tables import tiny_table, write_crop
from training.__main__ import main
from training.ensemble.scaling import correct, log_odds

CROPS, UNSEEN = 48, 120


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, and crops of two other domains in `other`."""
    folder = tmp_path_factory.mktemp("unseen")
    make_run(folder / "lite", tiny_table(folder, CROPS, 16), folder / "bases", "efficientnet-lite0")
    tiny_table(folder / "other", UNSEEN, 24)
    for n in range(UNSEEN):  # other pixels than those of the first table
        write_crop(folder / "other" / "crops" / f"{n}.png", 1000 + n, 40, 90 if n % 3 == 0 else 160)
    return folder


def export(place: Path, output: Path, *more: str) -> int:
    places = [f"--output={output}", f"--bases={place / 'bases'}", "--include-base", "--device=cpu", "--tta=none"]
    return main(["export", str(place / "lite"), *places, *more])


@pytest.fixture(scope="module")
def averaged(place: Path) -> Path:
    """Folds averaged, corrected on the other domains' crops, of which the labels choose the threshold."""
    more = ("--folds=averaged", f"--unseen={place / 'other'}", "--threshold=worst")
    assert export(place, place / "weights" / "mean", *more) == 0
    return place / "weights" / "mean"


def answers(folder: Path, place: Path) -> np.ndarray:
    pages = [read_stack(place / "other" / "crops" / f"{n}.png")[0] for n in range(UNSEEN)]
    return Ensemble.load(folder, "cpu", "fp32").predict(pages).p_atypical


def test_averaged_folds_are_one_adapter_that_answers_as_their_libraries_do(averaged: Path, capsys) -> None:
    [member] = load_manifest(averaged).members
    assert [fold.name for fold in member.folds] == ["efficientnet-lite0-mean"]
    assert main(["verify", str(averaged)]) == 0
    assert "efficientnet-lite0-mean: logits differ by at most" in capsys.readouterr().out


def test_the_shipped_mean_is_as_spread_and_as_often_atypical_as_its_folds(place: Path, tmp_path: Path) -> None:
    for form in ("apart", "averaged"):
        assert export(place, tmp_path / form, f"--folds={form}", f"--unseen={place / 'other' / 'crops'}") == 0
        manifest = json.loads((tmp_path / form / "ensemble.json").read_text())
        facts = manifest["provenance"]["calibration"]
        assert (facts["of"], facts["unseen_crops"]) == ("the mean that answers", UNSEEN)
        p, single = answers(tmp_path / form, place), facts["single_folds"]
        assert log_odds(p).mean() == pytest.approx(single["mean"], abs=0.01)
        assert log_odds(p).std() == pytest.approx(single["standard deviation"], abs=0.01)
        assert (p >= manifest["threshold"]).mean() == pytest.approx(single["share atypical"], abs=1.5 / UNSEEN)


def test_a_threshold_for_domains_counts_those_of_unseen_crops(averaged: Path, place: Path) -> None:
    manifest = json.loads((averaged / "ensemble.json").read_text())
    facts, card = manifest["provenance"]["calibration"], (averaged / "README.md").read_text()
    rows = {row["domain"]: row for row in facts["domains"]}
    assert facts["threshold_rule"] == "worst" and sorted(rows) == ["tumour x scanner 0", "tumour x scanner 1"]
    assert sum(row["crops"] for row in rows.values()) == CROPS + UNSEEN
    low, high = facts["threshold_interval"]
    assert low <= manifest["threshold"] <= high
    for name, row in rows.items():
        assert f"| {name} | {row['crops']} | {row['atypical']} | {row['shipped']:.3f} |" in card
        assert row["shipped"] <= row["best"] + 1e-9 and row["accuracy"] <= row["best"] + 1e-9


def test_refusals(place: Path, tmp_path: Path, capsys) -> None:
    def fails(*more: str) -> str:
        assert export(place, tmp_path / "none", *more) == 1
        assert not (tmp_path / "none").exists()
        return capsys.readouterr().err.splitlines()[-1]

    assert f"{CROPS} of {CROPS} crops of --unseen are among those" in fails(f"--unseen={place / 'crops'}")
    write_crop(tmp_path / "few" / "one.png", 5000, 40)
    assert "--unseen has 1 crops; expected 100 or more" in fails(f"--unseen={tmp_path / 'few'}")
    assert "holds no table that is known" in fails(f"--unseen={place / 'other' / 'crops'}", "--threshold=mean")


def test_one_domain_has_no_threshold_for_others(tmp_path: Path, capsys) -> None:
    table = tiny_table(tmp_path, CROPS, 16)
    table.write_text(table.read_text().replace("scanner 1", "scanner 0"))
    make_run(tmp_path / "lite", table, tmp_path / "bases", "efficientnet-lite0")
    assert export(tmp_path, tmp_path / "none", "--threshold=worst") == 1
    assert "1 domains of the training data have crops of both classes" in capsys.readouterr().err


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 5), st.floats(0.2, 1.5), st.floats(0.5, 3), st.floats(-2, 1), st.floats(0.4, 2.5), st.integers(0, 99)
)
def test_copies_of_a_noisy_network_are_calibrated_as_their_mean(folds, noise, slope, offset, temperature, seed) -> None:
    """F copies of one network, each with noise of its own: the corrected mean calls as many, as sure, and better."""
    g = np.random.default_rng(seed)
    truth = slope * g.normal(size=4000) + offset
    labels = (g.random(4000) < sigmoid(2 * truth)).astype(int)
    logits = (truth + noise * slope * g.normal(size=(folds, 1, 4000))).astype(np.float32)  # as networks give them
    single = average([logits[:1]], "logit", temperature)
    threshold = best_threshold(labels, single)[0]
    scale, cut, p, *_ = correct([logits], [logits], "logit", temperature, threshold, [1.0])
    assert average([logits + scale.shift], "logit", scale.temperature) == pytest.approx(p, abs=1e-5)
    each = [average([logits[f : f + 1]], "logit", temperature) for f in range(folds)]
    assert log_odds(p).std() == pytest.approx(np.mean([log_odds(one).std() for one in each]), rel=1e-4)
    assert log_odds(p).mean() == pytest.approx(log_odds(np.array(each)).mean(), abs=1e-4)
    assert (p >= cut).mean() == pytest.approx(np.mean([one >= threshold for one in each]), abs=1 / 4000)
    uncorrected = balanced_accuracy(labels, average([logits], "logit", temperature) >= threshold)
    corrected = balanced_accuracy(labels, p >= cut)
    assert corrected >= uncorrected - 0.01
    assert corrected >= best_threshold(labels, p)[1] - 0.03


def test_copies_without_noise_need_no_correction() -> None:
    logits = np.repeat(np.random.default_rng(0).normal(size=(1, 1, 500)), 3, axis=0)
    scale, cut, *_ = correct([logits], [logits], "logit", 0.7, 0.4, [1.0])
    assert (scale.temperature, scale.shift) == pytest.approx((0.7, 0.0), abs=1e-6)
    p = average([logits], "logit", 0.7)
    assert ((p >= cut) == (p >= 0.4)).all()
