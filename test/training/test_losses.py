"""Losses and weights against numbers computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from training.data.crop import Crop
from training.fit.feed import loss_shares, loss_weights, targets
from training.fit.losses import focal, weights_by
from training.fit.recipe import Recipe

LOGITS = torch.tensor([0.0, math.log(3)])  # p = 0.5 and 0.75
ONES = torch.ones(2)


def test_bce():
    # -[log 0.5 + log(1 - 0.75)] / 2 for targets 1 and 0
    assert float(focal(LOGITS, torch.tensor([1.0, 0.0]), ONES, 0)) == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_focal():
    # targets 1 and 0, gamma 2: 0.5^2 log 2 and 0.75^2 log 4
    expected = (0.25 * math.log(2) + 0.5625 * math.log(4)) / 2
    assert float(focal(LOGITS, torch.tensor([1.0, 0.0]), ONES, 2)) == pytest.approx(expected, rel=1e-6)


def test_soft_target_and_weight():
    # target 0.25 at p = 0.75: 0.25 * 0.25^2 * log(4/3) + 0.75 * 0.75^2 * log 4, weight 3, over a batch of two
    expected = 3 * (0.25 * 0.0625 * math.log(4 / 3) + 0.75 * 0.5625 * math.log(4)) / 2
    found = focal(LOGITS, torch.tensor([0.5, 0.25]), torch.tensor([0.0, 3.0]), 2)
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_gradient_stays_finite_at_extreme_logits(gamma):
    z = torch.tensor([-200.0, 200.0, 0.0], requires_grad=True)
    focal(z, torch.tensor([1.0, 0.0, 1.0]), torch.ones(3), gamma).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize(
    ("weighting", "rare", "common"),
    [
        ("none", 1.0, 1.0),
        ("inverse", 2.0, 2 / 3),  # 1 and 1/3, mean 1/2
        ("sqrt_inverse", 4 / (1 + math.sqrt(3)), 4 / (1 + math.sqrt(3)) / math.sqrt(3)),
        ("effective", 1.9990, 0.6670),
    ],  # 1 and 0.001 / (1 - 0.999^3) = 0.333667, mean 0.50025
)
def test_weights_of_one_rare_and_three_common(weighting, rare, common):
    found = weights_by(["a", "b", "b", "b"], weighting)
    assert found.tolist() == pytest.approx([rare, common, common, common], rel=1e-4)
    assert float(found.mean()) == pytest.approx(1)


def test_domain_weights_by_domain_or_by_domain_and_class():
    crops = [Crop(Path("x"), label, "g", domain) for domain, label in [("a", 0), ("b", 0), ("b", 0), ("b", 1)]]
    by_domain = Recipe("uni", class_weighting="none", domain_weighting="inverse")
    assert loss_weights(by_domain, crops).tolist() == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3])
    by_both = Recipe("uni", class_weighting="none", domain_weighting="inverse", domain_by_class=True)
    # 1, 1/2, 1/2, 1: mean 3/4
    assert loss_weights(by_both, crops).tolist() == pytest.approx([4 / 3, 2 / 3, 2 / 3, 4 / 3])
    both = Recipe("uni", class_weighting="inverse", domain_weighting="inverse")
    product = torch.tensor([2 / 3 * 2, 2 / 3 * 2 / 3, 2 / 3 * 2 / 3, 2 * 2 / 3])
    assert loss_weights(both, crops).tolist() == pytest.approx((product / product.mean()).tolist())


def test_soft_labels_mix_label_and_votes():
    crops = [Crop(Path("x"), 1, "g", "d", (1, 1, 0)), Crop(Path("y"), 0, "g", "d")]
    assert targets(Recipe("uni", soft_labels=0.0), crops).tolist() == [1, 0]
    assert targets(Recipe("uni", soft_labels=1.0), crops).tolist() == pytest.approx([2 / 3, 0])
    assert targets(Recipe("uni", soft_labels=0.5), crops).tolist() == pytest.approx([5 / 6, 0])


# normal and atypical figures of MIDOG25 by tumour x scanner
MIDOG25 = [(1976, 351), (745, 110), (3642, 317), (1076, 210), (516, 172), (455, 127), (346, 105), (879, 271), (554, 85)]


@pytest.mark.parametrize(
    ("weighting", "atypical"), [("none", 14.6), ("sqrt_inverse", 30.3), ("effective", 38.8), ("inverse", 50.0)]
)
def test_the_shares_of_the_loss_that_the_recipes_name(weighting, atypical):
    crops = [
        Crop(Path("x"), label, "g", f"d{domain}")
        for domain, counts in enumerate(MIDOG25)
        for label, count in enumerate(counts)
        for _ in range(count)
    ]
    recipe = Recipe("uni", class_weighting="none", domain_weighting=weighting, domain_by_class=True)
    classes, domains = loss_shares(recipe, crops)
    assert 100 * classes["atypical"] == pytest.approx(atypical, abs=0.1)
    assert sum(classes.values()) == pytest.approx(1) == pytest.approx(sum(domains.values()))
    if weighting == "inverse":
        weights = loss_weights(recipe, crops)
        assert float(weights.max() / weights.min()) == pytest.approx(42.8, abs=0.1)


def test_sampling_counts_in_the_shares_of_the_loss():
    crops = [Crop(Path("x"), label, "g", "d") for label in (1, 0, 0, 0)]
    classes, _ = loss_shares(Recipe("uni", class_weighting="none", sampling="class"), crops)
    assert classes == {"atypical": pytest.approx(0.5), "normal": pytest.approx(0.5)}
