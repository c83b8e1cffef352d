"""`training calibrate ENSEMBLE --data CROPS`: on labelled crops that it has not seen, in place, and said so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from inference.ensemble import Ensemble
from inference.errors import UserError
from inference.manifest import load_manifest
from inference.metrics import balanced_accuracy, best_threshold, roc_auc
from inference.seen import pixel_hash, write_seen
from test.support.miniature import make_ensemble, make_members
from test.support.tables import tiny_table
from training.__main__ import main
from training.data.table import describe, load_data
from training.ensemble import heldout
from training.ensemble.hubcard import check_card, write_card
from training.ensemble.joint import METRICS, Choice, Joint
from training.ensemble.scaling import Scale
from training.fit.feed import load_crops

MEMBERS = {"a": {"backbone": "efficientnet-lite0", "folds": 2}, "b": {"backbone": "efficientnet-lite0", "folds": 1}}


def calibrate(tmp_path, **provenance):
    """An ensemble of two members, calibrated on a table of 72 crops; returns its exit code and its folder."""
    folder = tmp_path / "mine"
    folder.mkdir()
    make_members(folder, MEMBERS, weights=[0.25, 0.75], averaging="probability", provenance=provenance)
    data = tiny_table(tmp_path, 72, 10)
    return main(["calibrate", str(folder), "--data", str(data), "--device", "cpu"]), folder, load_data([data])


def test_a_held_out_set_calibrates_an_ensemble(tmp_path, capsys):
    code, folder, crops = calibrate(tmp_path, imported=[], out_of_fold={"auc": 0.5})
    assert code == 0
    manifest, labels = load_manifest(folder), np.array([crop.label for crop in crops])
    p = Ensemble.load(folder, "cpu", "fp32").predict(load_crops(crops)).p_atypical  # hashes were written again
    assert np.mean(p) == pytest.approx(labels.mean(), abs=0.05)  # before, half of all
    _, best = best_threshold(labels, p)
    assert balanced_accuracy(labels, p >= manifest.threshold) > best - 0.1
    facts = manifest.provenance["calibration"]
    assert facts["of"] == "a held-out set, not out of fold" and facts["data"] == describe(crops)
    assert (facts["crops"], facts["atypical"], facts["slides"]) == (72, 24, 10)
    assert facts["auc_interval"][0] <= facts["auc"] <= facts["auc_interval"][1] and facts["threshold_interval"]
    assert "out_of_fold" not in manifest.provenance  # its scores were of another threshold
    assert all(member.precision["bf16"] is not None for member in manifest.members)
    assert "held-out crops of 10 slides, cross-fitted: balanced accuracy" in capsys.readouterr().out
    check_card(folder)
    assert "(a held-out set, not out of fold, cross-fitted by slides)" in (folder / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".calibrate")] == []


def rule(kind="logit"):
    """As much of a manifest as scores need, of one member."""
    return SimpleNamespace(averaging=kind, members=[SimpleNamespace(weight=1.0)])


def noise(seed=0, n=200):
    """Labels, slides of five crops, parts, and logits (2, 1, n) that say nothing of the labels."""
    g = np.random.default_rng(seed)
    labels, groups = (g.random(n) < 0.3).astype(int), np.arange(n) // 5
    return labels, groups, groups % 5, g.normal(size=(2, 1, n))


def test_scores_are_of_crops_that_the_fit_left_out():
    """Noise scores half: fitted and judged on the same crops, a threshold would flatter it."""
    labels, groups, parts, z = noise()
    found = heldout.scores([z], rule(), labels, groups, parts)
    assert abs(found["balanced_accuracy"] - 0.5) < 0.1 and found["balanced_accuracy_interval"][0] < 0.5


@pytest.mark.parametrize("strength", [0, 1])
def test_an_auc_compares_no_answers_of_different_fits(strength):
    """The mean logit's own AUC; of mean probabilities, by the pairs of crops within each part."""
    labels, groups, parts, z = noise(1)
    z = z + strength * labels
    found = heldout.scores([z], rule(), labels, groups, parts)
    assert found["auc"] == pytest.approx(roc_auc(labels, z.mean((0, 1))), abs=1e-12)
    assert found["auc_interval"][0] < found["auc"] < found["auc_interval"][1]
    p = np.empty(len(labels))
    for part in range(5):
        left = parts == part
        scale, _ = heldout.fit([z], rule("probability"), labels, groups, ~left)
        p[left] = heldout.answers([z[:, :, left]], rule("probability"), scale)
    pairs = (labels[:, None] == 1) & (labels == 0) & (parts[:, None] == parts)
    won = (p[:, None] > p) + 0.5 * (p[:, None] == p)
    assert heldout.scores([z], rule("probability"), labels, groups, parts)["auc"] == pytest.approx(won[pairs].mean())


def test_intervals_are_those_of_an_ensemble_that_was_trained_here():
    """Each resample chooses its thresholds again, as `joint` does; folds are the parts."""
    labels, groups, parts, z = noise(2)
    z = z.mean(0, keepdims=True) + labels
    found = heldout.scores([z], rule(), labels, groups, parts)
    joint = Joint([z[0]], labels, groups, parts).score(lambda _: Choice((0,), ("none",)))
    for name in METRICS[:3]:
        assert found[name] == pytest.approx(joint.metrics[name], abs=0.002)
        assert found[f"{name}_interval"] == pytest.approx(joint.intervals[name], abs=0.002)


def test_what_is_fitted_is_rounded_as_it_is_shipped():
    labels, groups, _, z = noise(3)
    every = np.ones(len(labels), bool)
    scale, threshold = heldout.fit([1e-6 * (z + labels)], rule(), labels, groups, every)
    assert scale.temperature == float(f"{scale.temperature:.6g}") < 1e-4
    assert threshold == float(f"{threshold:.6g}")
    assert 0 < heldout.rounded(1 - 1e-9 / 3, 1e-9 / 3) < 1


@pytest.fixture
def shipped(tmp_path):
    """A link to an ensemble of one fold, and how to write a calibration to it."""
    folder = tmp_path / "real" / "mine"
    folder.mkdir(parents=True)
    make_members(folder, {"a": MEMBERS["b"]})
    write_card(folder)
    (tmp_path / "link").symlink_to(folder)
    crops = load_data([tiny_table(tmp_path, 2, 2)], ungrouped=True)

    def write(temperature=1.5):
        manifest = load_manifest(tmp_path / "link")
        heldout.write(manifest, Scale(temperature, 0.1), 0.4, {"of": heldout.OF}, crops, "cpu")

    return tmp_path / "link", write


def test_a_calibration_replaces_what_a_link_names_and_what_it_wrote_itself(shipped, capsys):
    link, write = shipped
    write(1.23456e-06)
    assert link.is_symlink() and load_manifest(link.resolve()).temperature == 1.23456e-06
    check_card(link)
    assert "keeps its text" not in capsys.readouterr().out
    card = link / "README.md"
    card.write_text(card.read_text().replace("Answer:", "Somebody's words. Answer:"))
    write()
    assert "Somebody's words." in card.read_text() and "temperature 1.23456e-06" in card.read_text()
    assert "README.md keeps its text, which is of the calibration before; correct it" in capsys.readouterr().out
    with pytest.raises(UserError, match="is not known to be of these weights"):
        check_card(link)


def test_a_calibration_that_is_stopped_leaves_the_ensemble(shipped, monkeypatch):
    link, write = shipped
    before, rename = {path.name: path.stat().st_ino for path in link.iterdir()}, Path.rename

    def stopped(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert {path.name: path.stat().st_ino for path in link.iterdir()} == before
    assert [path.name for path in link.resolve().parent.iterdir()] == ["mine"]


@pytest.mark.parametrize("problem", ["seen", "seen pixels", "few", "format 1", "no data", "a run"])
def test_what_cannot_be_calibrated_is_refused(problem, tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    data = tiny_table(tmp_path, 72 if "seen" in problem else 24, 10)
    crops = load_data([data])
    table = describe(crops if problem == "seen" else crops[1:])["sha256"]
    make = make_ensemble if problem == "format 1" else make_members
    what = () if problem == "format 1" else ({"a": MEMBERS["b"]},)
    make(folder, *what, provenance={"members": {"a": {"data": {"sha256": table}}}})
    if problem == "seen pixels":
        write_seen(folder, table, map(pixel_hash, load_crops(crops[1:4])))
    before = (folder / "ensemble.json").read_bytes()
    arguments = ["calibrate", str(tmp_path if problem == "a run" else folder)]
    assert main(arguments + ([] if problem == "no data" else ["--data", str(data)])) == 1
    messages = {
        "seen": "a was trained on these crops",
        "seen pixels": "the ensemble was trained on 3 of 72 crops, such as ",
        "few": "8 of 24 crops are atypical",
        "format 1": "ensemble.json has format 1; expected 2",
        "no data": "add --data CROPS",
        "a run": "is no ensemble; expected one for --data",
    }
    error = capsys.readouterr().err
    assert messages[problem] in error and error.count("\n") == 1
    assert (folder / "ensemble.json").read_bytes() == before and json.loads(before)
