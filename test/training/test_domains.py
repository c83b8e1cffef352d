"""The threshold for unseen slides serves every domain, whatever their sizes, and is judged where it was not chosen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.ensemble.domains import RULES, DomainLogits, accuracies, cut_for_unseen, leave_domains_out


def domains(sizes: list[int], shifts: list[float], seed: int = 0) -> DomainLogits:
    """Slides of ten crops, two of them atypical; normal crops have logits around `shift`, atypical ones 3 above."""
    rng = np.random.default_rng(seed)
    parts = []
    for number, (slides, shift) in enumerate(zip(sizes, shifts, strict=True)):
        labels = np.tile([1, 1, 0, 0, 0, 0, 0, 0, 0, 0], slides)
        logits = shift + 3 * labels + rng.normal(size=len(labels))
        groups = np.repeat([f"{number}/{slide}" for slide in range(slides)], 10)
        parts.append((logits, labels, groups, np.repeat(f"domain {number}", len(labels))))
    return DomainLogits(*(np.concatenate(values) for values in zip(*parts, strict=True)))


@pytest.mark.parametrize("rule", RULES)
def test_a_small_domain_counts_as_much_as_a_large_one(rule) -> None:
    scored = domains([60, 6], [0.0, 2.0])
    assert cut_for_unseen(scored, rule) == pytest.approx(2.5, abs=0.35)  # midway between 1.5 and 3.5


def test_the_worst_domain_is_served_at_the_price_of_the_others() -> None:
    scored = domains([30, 30, 30], [0.0, 0.0, 2.0])
    cuts = {rule: cut_for_unseen(scored, rule) for rule in RULES}
    worst = {rule: accuracies(scored, np.array([cut])).min() for rule, cut in cuts.items()}
    mean = {rule: accuracies(scored, np.array([cut])).mean() for rule, cut in cuts.items()}
    assert worst["worst"] >= worst["mean"] and mean["mean"] >= mean["worst"] and cuts["worst"] > cuts["mean"]


@settings(max_examples=25, deadline=None)
@given(st.floats(-3, 3), st.floats(0.2, 4))
def test_moving_and_scaling_all_logits_changes_no_choice(shift, scale) -> None:
    scored = domains([10, 8, 5], [0.0, 0.5, 1.0])
    moved = DomainLogits(scored.logits * scale + shift, scored.labels, scored.groups, scored.domains)
    for rule in RULES:
        assert cut_for_unseen(moved, rule) == pytest.approx(cut_for_unseen(scored, rule) * scale + shift, abs=1e-6)


def test_a_domain_is_judged_with_a_cut_that_it_did_not_choose() -> None:
    scored = domains([20, 20, 20], [0.0, 0.0, 3.0])
    rows = {row.domain: row for row in leave_domains_out(scored, "worst")}
    assert rows["domain 2"].cut == pytest.approx(1.5, abs=0.3)  # the others', although its own best is at 4.5
    assert rows["domain 2"].accuracy < 0.6 < 0.9 < rows["domain 2"].best
    assert all(row.accuracy <= row.best for row in rows.values())
    assert (rows["domain 0"].crops, rows["domain 0"].atypical) == (200, 40)
