"""Scoring against scikit-learn, which the official evaluator uses, and against figures worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from test.harness import scoring

NAMES = ("normal", "atypical")


def make(seed: int, crops: int = 160, ties: bool = False) -> tuple[dict[str, list[dict[str, object]]], scoring.Truth]:
    """Answers and truth of random crops in stacks of 16 with three domains."""
    rng = np.random.default_rng(seed)
    gt = rng.random(crops) < 0.25
    p = np.clip(0.3 * gt + rng.random(crops) * 0.7, 0, 1)
    p = p.round(1) if ties else p
    answers, truth = {}, {}
    for start in range(0, crops, 16):
        part, name = slice(start, start + 16), f"stack_{start // 16}.tiff"
        answers[name] = [{"class": NAMES[int(q >= 0.45)], "confidence": float(q)} for q in p[part]]
        truth[name] = ([NAMES[int(label)] for label in gt[part]], [int(d) for d in rng.integers(0, 3, len(gt[part]))])
    return answers, truth


@pytest.mark.parametrize("ties", [False, True])
def test_official_figures(ties: bool) -> None:
    """The same keys and numbers as the official evaluator's code gives with scikit-learn."""
    answers, truth = make(1, ties=ties)
    got = scoring.score(answers, truth, draws=20)["aggregates"]
    gt = np.array([NAMES.index(label) for labels, _ in truth.values() for label in labels])
    domain = np.array([td for _, domains in truth.values() for td in domains])
    output = np.array([NAMES.index(str(a["class"])) for part in answers.values() for a in part])
    confidence = np.array([a["confidence"] for part in answers.values() for a in part])
    sensitivity, specificity = recall_score(gt, output), recall_score(gt, output, pos_label=0)
    want: dict[str, object] = {
        "overall_sensitivity": pytest.approx(sensitivity),
        "overall_specificity": pytest.approx(specificity),
        "overall_balanced_accuracy": pytest.approx((sensitivity + specificity) / 2),
        "overall_roc_auc": pytest.approx(roc_auc_score(gt, confidence)),
        "overall_accuracy": pytest.approx(accuracy_score(gt, output)),
    }
    for td in range(3):
        g, o, c = gt[domain == td], output[domain == td], confidence[domain == td]
        sensitivity, specificity = recall_score(g, o), recall_score(g, o, pos_label=0)
        want[f"domain_{td}"] = {
            "sensitivity": pytest.approx(sensitivity),
            "specificity": pytest.approx(specificity),
            "balanced_accuracy": pytest.approx((sensitivity + specificity) / 2),
            "accuracy": pytest.approx(accuracy_score(g, o)),
            "roc_auc": pytest.approx(roc_auc_score(g, c)),
        }
    assert got == want
    assert list(got) == list(want)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=60))
def test_auc_equals_scikit_learn(pairs: list[tuple[bool, int]]) -> None:
    gt, confidence = np.array([int(g) for g, _ in pairs]), np.array([c / 6 for _, c in pairs])
    got = scoring.roc_auc(gt, confidence)
    if len(set(gt)) == 1:
        assert got is None
    else:
        assert got == pytest.approx(roc_auc_score(gt, confidence))


def test_counts_and_intervals() -> None:
    answers, truth = make(2)
    metrics = scoring.score(answers, truth)
    counts = metrics["counts"]["overall"]
    assert counts["crops"] == 160
    assert counts["tp"] + counts["fn"] == counts["atypical"]
    assert counts["tn"] + counts["fp"] == counts["normal"]
    for name, value in metrics["aggregates"].items():
        if name.startswith("overall_"):
            low, high = metrics["intervals"][name]
            assert low < value < high
            assert high - low < 0.35
    assert metrics == scoring.score(answers, truth)  # the same draws each time


def test_bootstrap_width_is_that_of_a_binomial() -> None:
    gt = np.repeat([0, 1], 500)
    output = np.where(np.arange(1000) % 5 == 0, 1 - gt, gt)  # accuracy 0.8
    interval = scoring.bootstrap(gt, output, output.astype(float), 2000, 0)["accuracy"]
    assert interval is not None
    assert interval[1] - interval[0] == pytest.approx(2 * 1.96 * (0.8 * 0.2 / 1000) ** 0.5, rel=0.1)


def test_single_class_gives_none() -> None:
    answers: dict[str, list[dict[str, object]]] = {"a.tiff": [{"class": "normal", "confidence": 0.1}] * 2}
    metrics = scoring.score(answers, {"a.tiff": (["normal"] * 2, [0, 0]), "b.tiff": (["normal"], [0])}, draws=10)
    assert metrics["aggregates"]["overall_balanced_accuracy"] is None
    assert metrics["aggregates"]["domain_0"]["sensitivity"] == 0  # as scikit-learn's recall
    assert len(metrics["warnings"]) == 2
    json.dumps(metrics, allow_nan=False)


def test_evaluator_stops_where_the_official_one_does() -> None:
    answers, truth = make(3)
    with pytest.raises(ValueError, match=r"No GT for this image: x\.tiff"):
        scoring.score({"x.tiff": []}, truth)
    answers["stack_0.tiff"].pop()
    with pytest.raises(ValueError, match=r"result lengths=15, GT length=16"):
        scoring.score(answers, truth)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", None),
        ('[{"image": "a"}]', "not a list of objects"),
        ("[1]", "not a list of objects"),
        ("[", "not a list of objects"),
        ('[{"image": "a", "labels": ["normal"], "tumordomains": []}]', "1 labels and 0 tumour domains"),
        ('[{"image": "a", "labels": ["mitosis"], "tumordomains": [0]}]', "expected normal and atypical"),
    ],
)
def test_reading_truth(content: str, message: str | None, tmp_path: Path) -> None:
    path = tmp_path / "ground_truth.json"
    path.write_text(content)
    if message is None:
        assert scoring.read_truth(path) == {}
    else:
        with pytest.raises(ValueError, match=message):
            scoring.read_truth(path)
