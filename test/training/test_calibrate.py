"""Calibration on made-up out-of-fold logits whose answer is known."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from training.ensemble.calibrate import (
    averaged,
    calibrate,
    calibrated,
    leave_one_fold_out,
    of_one,
)
from training.ensemble.joint import RESAMPLES, Joint
from training.ensemble.scaling import fit_scale, smooth_threshold
from training.ensemble.selection import choose
from training.fit.recipe import load_recipe
from training.run import OutOfFold, RunFolder


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
    temperature, shift, bounded = fit_scale([oof.logits[None, :1] + 2], oof.labels, "logit")
    assert temperature == pytest.approx(scale, rel=0.1)
    assert shift == pytest.approx(-2, abs=0.15 * scale) and not bounded


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
    oof = RunFolder(run).out_of_fold()
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


def test_a_fold_is_judged_by_what_the_others_fit():
    oof = made_up(900)
    joint, score = of_one(oof), leave_one_fold_out(oof)
    for fold in (0, 1, 2):
        left, (choice, _) = oof.folds == fold, choose(joint, [""], fold)
        views = oof.logits[None, : {"none": 1, "rot4": 4, "d4": 8}[choice.tta[0]]]
        alone = calibrate(oof.part(~left))
        assert (alone["tta"], alone["averaging"]) == (choice.tta[0], choice.averaging)
        scale = fit_scale([views[..., ~left]], oof.labels[~left], choice.averaging)
        p = averaged(views[0], choice.averaging, scale.temperature, scale.shift)
        assert np.allclose(score.p[left], p[left], atol=1e-6)
        threshold = smooth_threshold(oof.labels[~left], joint.answers(choice, fold)[~left], oof.groups[~left])
        assert np.array_equal(score.called[left], score.p[left] >= threshold)
    found = calibrate(oof)
    assert found["balanced_accuracy"] == balanced_accuracy(oof.labels, score.called)
    assert found["auc"] == roc_auc(oof.labels, score.p)


def test_the_interval_chooses_the_thresholds_anew():
    oof = made_up(120, seed=3)
    joint, score = of_one(oof), leave_one_fold_out(oof)
    values = []
    for draw in group_bootstrap(oof.groups, RESAMPLES):
        labels, folds, called = oof.labels[draw], oof.folds[draw], np.zeros(len(draw), bool)
        if len(np.unique(labels)) < 2 or any(len(np.unique(labels[folds != fold])) < 2 for fold in np.unique(folds)):
            continue
        for fold in np.unique(folds):
            left, p = folds == fold, joint.answers(choose(joint, [""], int(fold))[0], int(fold))[draw]
            called[left] = p[left] >= best_threshold(labels[~left], p[~left])[0]
        values.append(balanced_accuracy(labels, called))
    assert score.intervals["balanced_accuracy"] == np.quantile(values, [0.025, 0.975]).tolist()


@pytest.mark.parametrize(("crops", "atypical"), [(30, 2), (12, 3)])
def test_few_crops_of_a_class_do_not_stop_it(crops, atypical):
    found = calibrate(noise(crops, atypical))
    assert 0 < found["threshold"] < 1
    json.dumps(found, allow_nan=False)


def test_a_missing_class():
    with pytest.raises(UserError, match=r"0 of 30 crops are atypical.*expected both classes.*fit on more data"):
        calibrate(noise(30, 0))
    oof = noise(30, 6)
    oof.labels[oof.folds != 0] = 0
    oof.labels[np.flatnonzero(oof.folds == 0)[:3]] = 1
    found = calibrate(oof)  # without fold 0, nothing is atypical: its crops have no nested score
    assert found["crops"] == int((oof.folds != 0).sum())


@pytest.mark.parametrize("module", ["joint", "scaling"])
def test_every_bootstrap_draws_slides(module, monkeypatch):
    place = importlib.import_module(f"training.ensemble.{module}")
    drawn = []
    real = place.group_bootstrap
    monkeypatch.setattr(place, "group_bootstrap", lambda g, n: drawn.append(g) or real(g, n))
    calibrate(made_up(300))
    assert all(len(set(groups)) < len(groups) for groups in drawn) and drawn


REPORTED = [(1.0, 3.0), (0.35, 1.5), (0.2, 1.5), (1.0, 0.0), (5.0, -40.0)]  # (size, offset)


@pytest.mark.parametrize(("size", "offset"), REPORTED)
def test_no_offset_or_size_of_logits_ends_in_a_corner(size, offset):
    g = np.random.default_rng(1)
    labels = (g.random(900) < 0.1).astype(int)
    base = (2 * labels - 1) + g.normal(size=900)
    plain, moved = (fit_scale([z[None, None]], labels, "logit") for z in (base, size * base + offset))
    assert not moved.bounded and 0.3 < plain.temperature < 1
    assert moved.temperature == pytest.approx(size * plain.temperature, rel=1e-5)
    assert moved.shift == pytest.approx(size * plain.shift - offset, abs=1e-4 * size)
    p = sigmoid((base + plain.shift) / plain.temperature)
    assert p.mean() == pytest.approx(labels.mean(), abs=0.003)


@settings(max_examples=25, deadline=None)
@given(
    size=st.floats(1e-3, 1e3),
    offset=st.floats(-50, 50),
    averaging=st.sampled_from(["logit", "probability"]),
    seed=st.integers(0, 5),
)
def test_scaling_and_moving_logits_changes_no_answer(size, offset, averaging, seed):
    oof = made_up(200, views_noise=1.0, seed=seed)
    plain, moved = (
        average([(z + scale.shift)], averaging, scale.temperature)
        for z in (oof.logits[None], size * oof.logits[None] + offset)
        for scale in [fit_scale([z], oof.labels, averaging)]
    )
    assert np.abs(plain - moved).max() < 1e-4


@settings(max_examples=15, deadline=None)
@given(size=st.floats(0.01, 100), offset=st.floats(-30, 30), member=st.integers(0, 1))
def test_a_members_size_and_offset_change_no_choice(size, offset, member):
    g = np.random.default_rng(3)
    labels, groups = (g.random(240) < 0.3).astype(int), np.arange(240) // 4
    logits = [s * (2 * labels - 1) + g.normal(size=240) + g.normal(scale=0.5, size=(4, 240)) for s in (1.0, 0.8)]
    changed = [size * z + offset if n == member else z for n, z in enumerate(logits)]
    plain, moved = (Joint(z, labels, groups, groups % 3) for z in (logits, changed))
    [choice, steps], [other, other_steps] = (choose(joint, ["a", "b"]) for joint in (plain, moved))
    assert choice == other
    assert np.allclose([s.auc for s in steps], [s.auc for s in other_steps], atol=2e-4)
    a, b = plain.calibrate(choice), moved.calibrate(other)
    assert np.abs(a.p - b.p).max() < 1e-4 and abs(a.threshold - b.threshold) < 1e-3


def test_logits_that_say_nothing_or_everything_are_told(tmp_path, capsys):
    labels = np.arange(200) % 2
    against = fit_scale([-(2.0 * labels - 1)[None, None] + np.random.default_rng(0).normal(size=200)], labels, "logit")
    assert against.bounded and against.temperature > 0
    separated = fit_scale([10.0 * labels[None, None]], labels, "logit")
    assert np.isfinite(separated).all()


def test_only_the_views_that_a_run_has_are_tried(tmp_path):
    run = fake_run(tmp_path / "run")
    for file in run.glob("fold*/oof.npz"):
        stored = np.load(file)
        np.savez(file, index=stored["index"], logits=stored["logits"][:4])
    oof = RunFolder(run).out_of_fold()
    assert oof.logits.shape == (4, 240)
    assert list(calibrate(oof)["tried"]) == ["none", "rot4"]


def test_a_recipe_names_views_that_exist():
    assert load_recipe("lite0", ["tta=rot4"]).tta == "rot4"
    with pytest.raises(UserError, match=r"tta = 'rot8'; input should be 'none', 'rot4' or 'd4'"):
        load_recipe("lite0", ["tta=rot8"])
