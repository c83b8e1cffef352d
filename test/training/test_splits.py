"""Folds: no group on both sides, classes in proportion, and the file that a run keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.errors import UserError
from training.data import Crop
from training.splits import check_leaks, read_split, split, write_split


def table(groups: list[int], labels: list[int]) -> list[Crop]:
    return [Crop(Path(f"{n}.png"), label, f"g{group}", f"d{group % 3}")
            for n, (group, label) in enumerate(zip(groups, labels, strict=True))]  # fmt: skip


CROPS = table([n // 6 for n in range(180)], [int(n % 4 == 0) for n in range(180)])


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(0, 100), st.integers(8, 40))
def test_grouped_folds_never_share_a_group(folds, seed, groups):
    crops = table(np.random.default_rng(seed).integers(groups, size=200).tolist(), [n % 2 for n in range(200)])
    fold = split(crops, "grouped", folds, seed)
    assert set(fold) == set(range(folds))
    for group in {crop.group for crop in crops}:
        assert len({f for crop, f in zip(crops, fold, strict=True) if crop.group == group}) == 1
    assert (fold == split(crops, "grouped", folds, seed)).all()


def test_classes_are_in_proportion():
    labels = np.array([crop.label for crop in CROPS])
    for kind in ("grouped", "random"):
        fold = split(CROPS, kind, 3, 0)
        assert all(abs(labels[fold == f].mean() - labels.mean()) < 0.05 for f in range(3))


def test_leave_one_domain_out():
    fold = split(CROPS, "domain", 99)
    assert {(crop.domain, f) for crop, f in zip(CROPS, fold.tolist(), strict=True)} == {("d0", 0), ("d1", 1), ("d2", 2)}
    with pytest.raises(UserError, match="found 1 domain"):
        split(table([0, 3], [0, 1]), "domain")


def test_a_leak_is_refused():
    with pytest.raises(UserError, match="is in folds"):
        check_leaks(CROPS, split(CROPS, "random", 3, 0))
    with pytest.raises(UserError, match="found 30 groups with the rarer class"):
        split(CROPS, "grouped", 31)
    with pytest.raises(UserError, match="'by hand' is not known"):
        split(CROPS, "by hand")


def test_a_run_keeps_its_split(tmp_path):
    fold = split(CROPS, "grouped", 3, 7)
    write_split(tmp_path / "split.csv", CROPS, fold)
    assert (read_split(tmp_path / "split.csv", CROPS) == fold).all()
    with pytest.raises(UserError, match="lists other crops"):
        read_split(tmp_path / "split.csv", CROPS[1:])
