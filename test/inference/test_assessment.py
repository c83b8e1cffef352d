"""Scores with intervals and curves against their definitions; crops that were trained on, known by their pixels."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve

from inference.answers import Answer
from inference.assessment import assess, curves, in_training, labelled, unseen
from inference.errors import UserError
from inference.imageio.listing import list_crops
from inference.manifest import load_manifest
from inference.metrics import average_precision, group_bootstrap, net_benefit, precision_recall
from inference.seen import Seen, load_seen, pixel_hash, write_seen
from test.support.commands import inference
from test.support.miniature import make_ensemble

TABLE = "ab" * 32


def answers(count: int, slides: int = 0, seed: int = 0) -> list[Answer]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    p = (0.6 * labels + 0.4 * rng.random(count)).round(2)
    return [
        Answer(f"{n}.png", 0, float(p[n]), (), label=int(labels[n]), slide=f"s{n % slides}" if slides else "")
        for n in range(count)
    ]


@given(st.integers(0, 2**32 - 1), st.integers(2, 200), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_precision_and_recall_are_scikit_learns(seed: int, n: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    labels, p = np.append(rng.integers(0, 2, n), [0, 1]), rng.integers(0, steps + 1, n + 2) / steps  # with ties
    assert average_precision(labels, p) == pytest.approx(average_precision_score(labels, p))
    recall, precision = precision_recall(labels, p)
    theirs = precision_recall_curve(labels, p)
    np.testing.assert_allclose(precision, theirs[0][::-1])
    np.testing.assert_allclose(recall, theirs[1][::-1])


def test_net_benefit_by_hand() -> None:
    labels, called = np.array([1, 1, 0, 0, 0]), np.array([True, False, True, False, False])
    assert net_benefit(labels, called, 0.2) == pytest.approx(1 / 5 - 1 / 5 * 0.25)
    assert net_benefit(labels, called & False, 0.2) == 0


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 100))
def test_a_resample_holds_whole_groups(groups: list[int], seed: int) -> None:
    """As it is defined: groups in their order, drawn with replacement, each with all of its crops."""
    values = np.array(groups)
    members = [np.flatnonzero(values == group) for group in np.unique(values)]
    g = np.random.default_rng(seed)
    for found in group_bootstrap(values, 5, seed):
        drawn = g.integers(len(members), size=len(members))
        np.testing.assert_array_equal(found, np.concatenate([members[m] for m in drawn]))


def test_intervals_are_over_slides_where_there_are_some() -> None:
    by_crop, by_slide = assess(answers(80), 0.5), assess(answers(80, slides=8), 0.5)
    assert by_crop and by_slide and by_crop.scores == by_slide.scores
    assert by_crop.intervals != by_slide.intervals
    for name, (low, high) in by_slide.intervals.items():
        assert low <= by_slide.scores[name] <= high
    assert by_crop.labelled.resampled == "80 crops" and by_slide.labelled.resampled == "8 slides"
    mixed = [*answers(80, slides=8)[:40], *answers(80)[40:]]
    assert labelled(mixed).resampled == "8 slides and 40 crops without one"
    assert len(set(labelled(mixed).groups)) == 48
    assert assess([replace(row, label=None) for row in mixed], 0.5) is None


def test_the_same_answers_have_the_same_intervals() -> None:
    first, second = assess(answers(40), 0.5), assess(answers(40), 0.5)
    assert first and second and first.intervals == second.intervals


def test_curves_of_many_crops_stay_small() -> None:
    found = curves(labelled(answers(5000)))
    assert len(found["precision_recall"]) <= 400 and found["precision_recall"][-1][0] == 1
    assert len(found["decision"]) == 99 and 1 <= len(found["reliability"]) <= 10
    assert curves(labelled([replace(row, label=1) for row in answers(5)])) == {}


def test_crops_are_known_by_their_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    crops = list(rng.integers(0, 256, (6, 20, 20, 3), dtype=np.uint8))
    make_ensemble(tmp_path, provenance={"recipe": {}, "data": {"sha256": TABLE}})
    manifest = load_manifest(tmp_path)
    assert load_seen(manifest) is None
    write_seen(tmp_path, TABLE, map(pixel_hash, crops[:4]))
    seen = load_seen(manifest)
    assert isinstance(seen, Seen) and len(seen) == 4
    assert [crop in seen for crop in crops] == [True] * 4 + [False] * 2
    assert crops[0][:, ::-1] not in seen and crops[0].reshape(10, 40, 3) not in seen
    good = (tmp_path / "seen.txt").read_text()
    for content, message in (
        (good.replace(TABLE, "cd" * 32), "is of other crops than"),
        (good[:-4], "is damaged; expected 12 hexadecimal digits"),
        ("", "cannot be read"),
        ("\u00e4", "cannot be read"),
    ):
        (tmp_path / "seen.txt").write_text(content)
        with pytest.raises(UserError, match=message):
            load_seen(manifest)


@pytest.mark.parametrize("name", ["default", "lite0"])
def test_the_shipped_ensembles_know_all_their_crops(name: str) -> None:
    manifest = load_manifest(Path(__file__).parents[2] / "weights" / name, with_bases=False)
    seen = load_seen(manifest)
    assert seen is not None and len(seen) == manifest.provenance["out_of_fold"]["crops"]


def test_score_says_which_crops_were_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And gives the scores without them, on the terminal and in the page; a resumed run says the same."""
    rng = np.random.default_rng(0)
    crops = list(rng.integers(0, 256, (20, 20, 20, 3), dtype=np.uint8))
    rows = []
    for n, crop in enumerate(crops):
        Image.fromarray(crop).save(tmp_path / f"{n}.png")
        rows.append(f"{n}.png,{n % 2},slide {n // 4}")
    (tmp_path / "table.csv").write_text("\n".join(["path,label,case", *rows]))
    weights, page, out = tmp_path / "weights", tmp_path / "r.html", tmp_path / "out.csv"
    weights.mkdir()
    make_ensemble(weights, provenance={"recipe": {}, "data": {"sha256": TABLE}})
    command = ["score", tmp_path / "table.csv", "--weights", weights, "--device", "cpu", "--csv", out]

    def said() -> list[str]:
        assert inference(*command) == 0
        return [line for line in capsys.readouterr().out.splitlines() if re.search("label|without|trained", line)]

    assert "is not known: its folder does not say." in "\n".join(said())
    write_seen(weights, TABLE, map(pixel_hash, crops[:6]))
    lines = said()
    assert re.match(r"20 labelled \(10 atypical\): balanced accuracy .* \(.* to .*\), .*over 5 slides$", lines[0])
    assert lines[1].startswith("6 of the 20 labelled crops were in the ensemble's training data")
    assert re.match(r"14 without the training crops: balanced accuracy .*; 95% intervals over 4 slides$", lines[2])
    assert said() == lines
    command += ["--report", page]
    said()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text())[1])["assessment"]
    assert [each["name"] for each in data["sets"]] == ["all labelled crops", "without the training crops"]
    assert data["seen"] == lines[1] and data["curves"]["prevalence"] == 0.5
    write_seen(weights, TABLE, map(pixel_hash, crops))
    assert said()[1].startswith("20 of the 20 labelled crops were in")


def test_what_is_said_of_none_and_of_unknown() -> None:
    rows = answers(4)
    assert "is not known" in in_training(rows) and unseen(rows) == []
    new = [replace(row, seen=False) for row in rows]
    assert in_training(new).startswith("None of the 4 labelled crops") and unseen(new) == []


def test_a_table_names_slides(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "t.csv").write_text("path,label,slide\na.png,1,s1 \nb.png,0,\n")
    assert [item.slide for item in list_crops([tmp_path / "t.csv"])] == ["s1", ""]
    (tmp_path / "u.csv").write_text("path,slide\na.png,s2\n")
    with pytest.raises(UserError, match="has the slides s1 and s2; expected one per crop"):
        list_crops([tmp_path / "t.csv", tmp_path / "u.csv"])
