"""Calibration on made-up out-of-fold logits whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from inference.averaging import average
from inference.errors import UserError
from inference.metrics import (
    balanced_accuracy,
    best_threshold,
    brier,
    ece,
    group_bootstrap,
    intervals,
    reliability,
    roc_auc,
    roc_curve,
    scores,
    sigmoid,
)
from test.support.tables import fake_run
from training.__main__ import main
from training.calibrate import (
    RESAMPLES,
    OutOfFold,
    averaged,
    calibrate,
    calibrated,
    fit_scale,
    leave_one_fold_out,
    read_out_of_fold,
    resampled,
)
from training.recipe import load_recipe


def made_up(n: int = 3000, views_noise: float = 0.0, scale: float = 1.0, seed: int = 0) -> OutOfFold:
    """Labels drawn from sigmoid(z); logits are scale * z, the same in all views but for independent noise."""
    g = np.random.default_rng(seed)
    z = g.normal(-1, 2, n)
    labels = (g.random(n) < sigmoid(z)).astype(int)
    logits = scale * z + g.normal(scale=1, size=(8, n)) * views_noise
    groups = np.array([f"g{i}" for i in np.arange(n) // 20])
    return OutOfFold(logits, labels, groups, np.array(["d"] * n), np.arange(n) // 20 % 3)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_temperature_and_shift_undo_scale_and_prior(scale):
    oof = made_up(scale=scale)
    temperature, shift = fit_scale(oof.logits[:1] + 2, oof.labels, "logit")
    assert temperature == pytest.approx(scale, rel=0.1)
    assert shift == pytest.approx(-2, abs=0.15 * scale)


def test_calibrated_probabilities_are_closer_to_the_shares():
    oof = made_up(scale=3.0)
    chosen = calibrate(oof)
    raw, p = averaged(oof.logits[:1], "logit"), calibrated(oof.logits, chosen)
    assert ece(oof.labels, p) < 0.03 < ece(oof.labels, raw)
    assert brier(oof.labels, p) < brier(oof.labels, raw)


def test_more_views_only_where_they_gain():
    assert calibrate(made_up())["tta"] == "none"
    assert calibrate(made_up(views_noise=2.0))["tta"] == "d4"


def test_the_threshold_has_high_balanced_accuracy_and_an_interval_around_it():
    oof = made_up()
    chosen = calibrate(oof)
    p = calibrated(oof.logits, chosen)
    low, high = chosen["threshold_interval"]
    assert low < chosen["threshold"] < high
    same = chosen["same_crops"]["balanced_accuracy"]
    assert best_threshold(oof.labels, p)[1] - 0.01 < same <= best_threshold(oof.labels, p)[1]
    low, high = chosen["balanced_accuracy_interval"]
    assert low < chosen["balanced_accuracy"] < high < low + 0.06


def test_training_and_inference_average_alike():
    logits = np.random.default_rng(0).normal(size=(8, 50))
    for rule in ("logit", "probability"):
        assert np.allclose(averaged(logits, rule, 1.7), average([logits[None]], rule, 1.7))


def test_scores_against_scikit_learn():
    from sklearn import metrics as sk

    g = np.random.default_rng(1)
    labels, p = g.integers(0, 2, 300), np.round(g.random(300), 2)
    found = scores(labels, p, 0.4)
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, p >= 0.4))
    assert found["auc"] == pytest.approx(sk.roc_auc_score(labels, p))
    assert found["brier"] == pytest.approx(sk.brier_score_loss(labels, p))
    assert np.allclose(roc_curve(labels, p), sk.roc_curve(labels, p, drop_intermediate=False)[:2])


def test_ece_by_hand():
    # one bin with mean 0.95 and share 1/2, one with 0.05 and share 0: (2 * 0.45 + 1 * 0.05) / 3
    labels, p = np.array([1, 0, 0]), np.array([0.95, 0.95, 0.05])
    assert ece(labels, p) == pytest.approx((2 * 0.45 + 0.05) / 3)
    assert [values.tolist() for values in reliability(labels, p)] == [[1, 2], [0.05, 0.95], [0, 0.5]]


def test_the_best_threshold_is_one_of_the_best_cuts():
    # 1 | 0 0 | 1 1: cuts after the second and the fourth value are equally good; between them is not
    labels, values = np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4])
    threshold, score = best_threshold(labels, values)
    assert balanced_accuracy(labels, values >= threshold) == score == 0.75


def test_one_class_gives_no_number_instead_of_a_wrong_one():
    ones = np.ones(5)
    assert np.isnan(roc_auc(ones, ones))
    assert np.isnan(scores(ones, ones, 0.5)["balanced_accuracy"])
    assert np.isnan(intervals(ones, ones, np.arange(5), 0.5, 10)["balanced_accuracy"]).all()


def test_the_bootstrap_draws_whole_groups():
    groups = np.array([0, 0, 0, 1, 2, 2])
    for index in group_bootstrap(groups, 20):
        drawn = np.bincount(groups[index], minlength=3)
        assert (drawn % [3, 1, 2] == 0).all()


def test_the_command_writes_its_choices_and_refuses_unfinished_runs(tmp_path, capsys):
    run = fake_run(tmp_path / "run")
    assert main(["calibrate", str(run)]) == 0
    assert "chosen: tta" in capsys.readouterr().out
    chosen = json.loads((run / "calibration.json").read_text())
    assert chosen["crops"] == 240
    oof = read_out_of_fold(run)
    assert not np.isnan(oof.logits).any()
    (run / "fold1" / "oof.npz").unlink()
    assert main(["calibrate", str(run)]) == 1
    assert "fold 1 is not finished; run 'training fit' again" in capsys.readouterr().err
    assert main(["calibrate", str(tmp_path)]) == 1


def noise(crops: int, atypical: int, folds: int = 3, a_slide: int = 5, seed: int = 0) -> OutOfFold:
    """Logits that say nothing about the labels."""
    g = np.random.default_rng(seed)
    labels = np.zeros(crops, int)
    labels[g.permutation(crops)[:atypical]] = 1
    slides = np.arange(crops) // a_slide
    groups, domains = np.array([f"s{slide}" for slide in slides]), np.array(["d"] * crops)
    return OutOfFold(g.normal(size=(8, crops)), labels, groups, domains, slides % folds)


def test_leave_one_fold_out_does_not_flatter_noise():
    """On thirty sets of noise the shipped threshold's own crops promise more than chance; the left-out folds do not."""
    results = [calibrate(noise(90, 20, seed=seed)) for seed in range(30)]
    assert np.mean([result["same_crops"]["balanced_accuracy"] for result in results]) > 0.55
    assert abs(np.mean([result["balanced_accuracy"] for result in results]) - 0.5) < 0.03


def test_a_fold_is_judged_by_what_the_others_choose():
    oof = made_up(900)
    left = leave_one_fold_out(oof)
    for fold in (0, 1, 2):
        here = oof.folds == fold
        alone = calibrate(oof.part(~here))
        assert left.chosen[fold]["threshold"] == alone["threshold"]
        assert np.array_equal(left.p[here], calibrated(oof.logits[:, here], alone))
        assert np.array_equal(left.called[here], left.p[here] >= alone["threshold"])
    found = calibrate(oof)
    assert found["balanced_accuracy"] == balanced_accuracy(oof.labels, left.called)


def test_the_interval_chooses_the_thresholds_anew():
    oof = made_up(120, seed=3)
    left = leave_one_fold_out(oof)
    draw = group_bootstrap(oof.groups, RESAMPLES)[0]
    drawn, p = oof.part(draw), {fold: calibrated(oof.logits, chosen)[draw] for fold, chosen in left.chosen.items()}
    called = np.zeros(len(draw), bool)
    for fold in (0, 1, 2):
        here = drawn.folds == fold
        called[here] = p[fold][here] >= best_threshold(drawn.labels[~here], p[fold][~here])[0]
    accuracies, aucs = resampled(oof, left)
    assert (
        accuracies[0] == balanced_accuracy(drawn.labels, called) != balanced_accuracy(drawn.labels, left.called[draw])
    )
    assert aucs[0] == roc_auc(drawn.labels, left.p[draw])


@pytest.mark.parametrize(("crops", "atypical"), [(30, 2), (30, 1), (12, 3)])
def test_few_crops_of_a_class_do_not_stop_it(crops, atypical):
    found = calibrate(noise(crops, atypical))
    assert 0 < found["threshold"] < 1
    json.dumps(found, allow_nan=False)


def test_a_missing_class():
    with pytest.raises(UserError, match="found 30 crops, 0 of them atypical; calibration needs both"):
        calibrate(noise(30, 0))
    oof = noise(30, 6)
    oof.labels[oof.folds != 0] = 0
    oof.labels[np.flatnonzero(oof.folds == 0)[:3]] = 1
    found = calibrate(oof)  # without fold 0, nothing is atypical
    assert (found["balanced_accuracy"], found["auc"], found["balanced_accuracy_interval"]) == (None, None, None)
    assert found["same_crops"]["balanced_accuracy"] > 0


def test_every_bootstrap_draws_slides(monkeypatch):
    import training.calibrate

    drawn = []
    real = training.calibrate.group_bootstrap
    monkeypatch.setattr(training.calibrate, "group_bootstrap", lambda g, n: drawn.append(g) or real(g, n))
    calibrate(made_up(300))
    assert all(len(set(groups)) < len(groups) for groups in drawn) and len(drawn) >= 3


def test_only_the_views_that_a_run_has_are_tried(tmp_path):
    run = fake_run(tmp_path / "run")
    for file in run.glob("fold*/oof.npz"):
        stored = np.load(file)
        np.savez(file, index=stored["index"], logits=stored["logits"][:4])
    oof = read_out_of_fold(run)
    assert oof.logits.shape == (4, 240)
    assert list(calibrate(oof)["tried"]) == ["none", "rot4"]


def test_a_recipe_names_views_that_exist():
    assert load_recipe("lite0", ["tta=rot4"]).tta == "rot4"
    with pytest.raises(UserError, match="tta 'rot8' is unknown; expected one of none, rot4, d4"):
        load_recipe("lite0", ["tta=rot8"])
