"""Folds: no group on both sides, classes in proportion, and the file that a run keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.errors import UserError
from training.data.crop import Crop
from training.data.splits import SET_ASIDE, check_leaks, domains_of, inner_holdout, split
from training.fit.recipe import load_recipe
from training.run import RunFolder


def table(groups: list[int], labels: list[int]) -> list[Crop]:
    return [
        Crop(Path(f"{n}.png"), label, f"g{group}", f"d{group % 3}")
        for n, (group, label) in enumerate(zip(groups, labels, strict=True))
    ]


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
    fold = split(CROPS, "leave-one-out", 99)
    assert {(crop.domain, f) for crop, f in zip(CROPS, fold.tolist(), strict=True)} == {("d0", 0), ("d1", 1), ("d2", 2)}
    with pytest.raises(UserError, match="found 1 domain"):
        split(table([0, 3], [0, 1]), "leave-one-out")


# MIDOG25's ten groups of tumour, scanner and origin, of which tumour x origin makes eight and tumour x scanner nine
MIDOG25 = [
    ("mast cell", "Aperio", "Berlin"),
    ("lung", "3DH", "Vienna"),
    ("lymphoma", "3DH", "Vienna"),
    ("sarcoma", "3DH", "York"),
    ("sarcoma", "3DH", "Vienna"),
    ("breast", "Aperio", "Utrecht"),
    ("breast", "S360", "Utrecht"),
    ("breast", "XR", "Utrecht"),
    ("melanoma", "XR", "Utrecht"),
    ("neuroendocrine", "XR", "Utrecht"),
]


def midog25() -> list[Crop]:
    return [
        Crop(
            Path(f"{n}.png"),
            int(n % 4 == 0),
            f"g{n // 6}",
            f"{tumour} x {scanner}",
            (),
            f"{n}",
            tumour,
            scanner,
            origin,
        )
        for n in range(600)
        for tumour, scanner, origin in [MIDOG25[n // 6 % 10]]
    ]


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        ("domain", 9),
        ("tumour", 7),
        ("scanner", 4),
        ("origin", 4),
        ("tumour x scanner", 9),
        ("tumour x origin", 8),
        ("eight-groups", 8),
        ("tumour x scanner x origin", 10),
    ],
)
def test_folds_keep_domains_whole_by_any_column_or_product(by, groups):
    crops = midog25()
    assert len(set(split(crops, "leave-one-out", by=by).tolist())) == groups
    fold = split(crops, "domain", 3, 1, by)
    assert set(fold) == {0, 1, 2}
    for name in set(domains_of(crops, by)):
        assert len({f for domain, f in zip(domains_of(crops, by), fold.tolist(), strict=True) if domain == name}) == 1
    with pytest.raises(UserError, match=f"found {groups} values of {by} with the rarer class"):
        split(crops, "domain", groups + 1, 0, by)


def test_a_split_by_what_is_not_known_is_refused():
    with pytest.raises(UserError, match=r"180 of 180 crops have no origin \(first: 0.png\)"):
        split(CROPS, "domain", 3, 0, "origin")
    with pytest.raises(UserError, match="split_by 'colour' is not known"):
        split(CROPS, "domain", 3, 0, "colour")


def test_the_crops_that_choose_an_epoch_are_whole_groups_of_both_classes():
    chooses = inner_holdout(CROPS, "grouped", 0)
    assert 0.05 < chooses.mean() < 0.25
    groups = [
        {crop.group for crop, inner in zip(CROPS, chooses, strict=True) if inner == side} for side in (False, True)
    ]
    assert not groups[0] & groups[1]
    assert {crop.label for crop, inner in zip(CROPS, chooses, strict=True) if inner} == {0, 1}
    with pytest.raises(UserError, match=r"found 1 groups .* patience=0"):
        inner_holdout(table([0, 1, 1], [1, 0, 0]), "grouped", 0)


def test_a_leak_is_refused():
    with pytest.raises(UserError, match="is in folds"):
        check_leaks(CROPS, split(CROPS, "random", 3, 0))
    with pytest.raises(UserError, match="found 30 groups with the rarer class"):
        split(CROPS, "grouped", 31)
    with pytest.raises(UserError, match="'by hand' is not known"):
        split(CROPS, "by hand")


def test_a_run_keeps_its_split(tmp_path):
    run, recipe = RunFolder(tmp_path), load_recipe("lite0", ["folds=3", "seed=7"])
    fold = run.begin(recipe, CROPS)
    assert (run.split() == fold).all() and (run.begin(recipe, CROPS) == split(CROPS, "grouped", 3, 7)).all()
    assert run.numbers() == [0, 1, 2] and [crop.path for crop in run.crops()] == [crop.path for crop in CROPS]
    run.write_split(CROPS[1:], fold[1:])
    with pytest.raises(UserError, match="lists other crops"):
        run.begin(recipe, CROPS)


def in_order(lengths: list[int], margin: int) -> list[Crop]:
    """Numbered crops in slides of these lengths one after another; those near a cut may belong to the other side."""
    slide_of = [number for number, length in enumerate(lengths) for _ in range(length)]
    crops = []
    for n, slide in enumerate(slide_of):
        near = {f"g{other}" for other in slide_of[max(0, n - margin) : n + margin + 1]} - {f"g{slide}"}
        crops.append(Crop(Path(f"{n}.png"), n % 2, f"g{slide}", f"d{slide % 2}", beside=tuple(sorted(near))))
    return crops


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(4, 20), min_size=12, max_size=24),
    st.integers(0, 5),
    st.integers(0, 9),
    st.sampled_from([0, 4]),
)
def test_a_cut_that_is_not_exact_leaks_nothing(lengths, margin, seed, exam):
    """Whichever side of a cut a crop within the margin belongs to, it is on no side of a split that divides them."""
    crops = in_order(lengths, margin)
    fold = split(crops, "grouped", 3, seed, exam=exam)
    kept = np.flatnonzero(fold != SET_ASIDE)
    for n in kept.tolist():
        for m in range(max(0, n - 2 * margin), n):  # a cut lies between them, and each may be of the other's slide
            near = crops[n].group in crops[m].beside or crops[m].group in crops[n].beside
            assert fold[m] == SET_ASIDE or not near or fold[m] == fold[n]
    sides = {
        group: set(fold[[crop.group == group for crop in crops]].tolist()) - {SET_ASIDE}
        for group in {crop.group for crop in crops}
    }
    assert all(len(folds) <= 1 for folds in sides.values())
    if margin == 0:
        assert len(kept) == len(crops)


def test_crops_set_aside_neither_train_nor_score(tmp_path):
    crops = in_order([9] * 12, 2)
    fold = split(crops, "grouped", 2, 0)
    aside = fold == SET_ASIDE
    assert 0 < aside.sum() < len(crops)
    run = RunFolder(tmp_path)
    assert (run.begin(load_recipe("lite0", ["folds=2"]), crops) == fold).all()
    assert run.numbers() == [0, 1]
    random = split(crops, "random", 2, 0)
    assert (random >= 0).all()  # its slides lie in both folds anyway
