"""Metrics against scikit-learn, averaging against its definition, and the words for labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, recall_score, roc_auc_score

from inference.averaging import average
from inference.errors import UserError
from inference.labels import CLASSES, WORDS, class_of, parse_label
from inference.metrics import best_threshold, roc_auc, scores


@given(st.integers(0, 2**32 - 1), st.integers(2, 200), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_metrics_are_scikit_learns(seed: int, n: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    labels, p = np.append(rng.integers(0, 2, n), [0, 1]), rng.integers(0, steps + 1, n + 2) / steps  # with ties
    found = scores(labels, p, 0.35)
    assert found["auc"] == pytest.approx(roc_auc_score(labels, p))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, p >= 0.35))
    assert found["sensitivity"] == pytest.approx(recall_score(labels, p >= 0.35))
    assert found["brier"] == pytest.approx(brier_score_loss(labels, p))
    cut, best = best_threshold(labels, p)
    tried = [balanced_accuracy_score(labels, p >= value) for value in {*p, 2.0}]
    assert best == pytest.approx(max(tried)) == balanced_accuracy_score(labels, p >= cut)


def test_one_class_has_no_auc() -> None:
    found = scores(np.ones(5), np.linspace(0, 1, 5), 0.5)
    assert np.isnan(found["auc"]) and np.isnan(found["balanced_accuracy"]) and found["sensitivity"] == 0.6
    assert np.isnan(roc_auc(np.array([0, 1]), np.array([0.1, np.nan])))


@given(st.integers(0, 2**32 - 1), st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 4, 8])), min_size=1))
@settings(max_examples=50, deadline=None)
def test_an_ensemble_is_the_weighted_mean_of_its_members(seed: int, shapes: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(seed)
    logits = [rng.normal(0, 3, (folds, views, 7)) for folds, views in shapes]
    weights = rng.dirichlet(np.ones(len(shapes)))
    alone = [average([member], "probability", 1.3) for member in logits]
    np.testing.assert_allclose(average(logits, "probability", 1.3, weights), np.tensordot(weights, alone, 1))
    means = [member.mean((0, 1)) / 1.3 for member in logits]
    expected = 1 / (1 + np.exp(-np.tensordot(weights, means, 1)))
    np.testing.assert_allclose(average(logits, "logit", 1.3, weights), expected)
    equal = [1 / len(logits)] * len(logits)
    np.testing.assert_allclose(average(logits, "logit", 1.3), average(logits, "logit", 1.3, equal))


def test_labels() -> None:
    for word, label in WORDS.items():
        assert parse_label(f" {word.upper()} ", "here") == label
    for word in ("perhaps", "", "2", "non-mitotic"):
        with pytest.raises(UserError, match="here: label is"):
            parse_label(word, "here")
    assert [class_of(p, 0.3) for p in (0.29, 0.3)] == list(CLASSES)
