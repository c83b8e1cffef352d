"""One ensemble out of runs and ensembles: what is chosen and why, what is refused, and that the folder answers so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference.averaging import average
from inference.ensemble import Ensemble
from inference.errors import UserError
from inference.manifest import load_manifest
from inference.metrics import balanced_accuracy, best_threshold, roc_auc
from test.support.miniature import make_ensemble
from test.support.runs import make_run
from test.support.tables import tiny_table, write_crop
from training.__main__ import main
from training.data.splits import split
from training.data.table import describe, load_data
from training.ensemble import export as command
from training.ensemble.candidates import Candidate, Sources, StudyTable, named_apart, read_candidates
from training.ensemble.hubcard import check_card
from training.ensemble.joint import Choice, Joint
from training.ensemble.selection import choose, every_choice, refine, simplify
from training.ensemble.stopwatch import Seconds
from training.fit.feed import load_crops

CROPS = 48
BACKBONES = {"lite": "efficientnet-lite0", "uni": "uni"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with table.csv, bases and the runs lite, uni and other (of other folds). Not to be changed."""
    folder = tmp_path_factory.mktemp("private-name")
    table = tiny_table(folder, CROPS, 16)
    for number, (name, backbone) in enumerate(BACKBONES.items()):
        make_run(folder / name, table, folder / "bases", backbone, 10 * number)
    make_run(folder / "other", table, folder / "bases", "efficientnet-lite0", seed=5, adapters=False, folds=4)
    return folder


def arguments(place: Path, output: Path, *names: str) -> list[str]:
    found = [str(place / name) for name in names]
    return [
        "export",
        *found,
        f"--output={output}",
        f"--bases={place / 'bases'}",
        "--include-base",
        "--device=cpu",
        f"--cache={place / 'cache'}",
    ]


@pytest.fixture(scope="module")
def combined(place: Path) -> Path:
    assert main(arguments(place, place / "weights" / "both", "lite", "uni")) == 0
    return place / "weights" / "both"


def test_the_folder_is_an_ensemble_of_what_was_chosen(combined: Path, place: Path) -> None:
    manifest = load_manifest(combined)
    assert {member.backbone for member in manifest.members} <= set(BACKBONES.values())
    assert sum(member.weight for member in manifest.members) == pytest.approx(1)
    about = manifest.provenance
    scores = about["out_of_fold"]
    assert scores["crops"] == CROPS and about["chosen"]
    assert scores["nested"] and not scores["chosen_on_same_scores"] and scores["groups_whole"]
    assert scores["split"]["split"] == "grouped" and about["calibration"]["of"] == "single folds, out of fold"
    assert json.loads((combined / "ensemble.json").read_text())["format"] == 2
    for member in manifest.members:
        assert about["members"][member.name]["data"]["crops"] == CROPS
        assert len(member.folds) == 3 and member.precision["fp32"] == 0
    files = {path.name for path in combined.iterdir()}
    assert {"ensemble.json", "README.md"} <= files and not list(place.glob("weights/.export*"))
    assert not any(path.is_symlink() for path in combined.iterdir())
    for path in combined.rglob("*"):
        assert path.is_dir() or b"private-name" not in path.read_bytes(), path
    card = (combined / "README.md").read_text()
    check_card(combined)
    assert "| efficientnet-lite0 + uni |" in card and "as shipped" in card and "AUC" in card


def test_heads_carry_the_calibration(combined: Path, place: Path) -> None:
    """The shipped networks' logits are those of the runs' networks, shifted and scaled alike for all crops."""
    manifest = load_manifest(combined)
    crops = load_crops(load_data([place / "table.csv"], lambda line: None)[:6])
    member = manifest.members[0]
    run = place / next(name for name, backbone in BACKBONES.items() if backbone == member.backbone)
    one = dataclasses.replace(member, weight=1.0)
    shipped = Ensemble(dataclasses.replace(manifest, members=(one,)), "cpu", "fp32").predict(crops).logits[0]
    raw = dataclasses.replace(one, folds=tuple(sorted(run.glob("fold*"))))
    before = Ensemble(dataclasses.replace(manifest, members=(raw,)), "cpu", "fp32").predict(crops).logits[0]
    slope, offset = np.polyfit(before.ravel(), shipped.ravel(), 1)
    assert slope > 0 and np.abs(slope * before + offset - shipped).max() < 1e-3 * max(1, np.abs(shipped).max())


def simulated(strengths: list[float], crops: int = 1200, views: float = 0.3, seed: int = 0) -> Joint:
    """Members whose logits know the labels as well as `strengths` say, with noise of their own, in three folds."""
    g = np.random.default_rng(seed)
    labels, groups = (g.random(crops) < 0.3).astype(int), np.arange(crops) // 4
    logits = [s * (2 * labels - 1) + g.normal(size=crops) + g.normal(scale=views, size=(8, crops)) for s in strengths]
    return Joint(logits, labels, groups, groups % 3)


def test_temperature_and_threshold_are_of_the_mean() -> None:
    joint = simulated([1.0, 0.7])
    labels, choice = joint.labels, Choice((0, 1), ("d4", "none"), "probability", (0.25, 0.75))
    fitted = joint.calibrate(choice)
    members = [
        (z[None, :views] + head.shift) / head.temperature
        for z, views, head in zip(joint.logits, (8, 1), fitted.heads, strict=True)
    ]

    def loss(temperature: float, shift: float = 0.0) -> float:
        p = average([z + shift for z in members], "probability", temperature, choice.shares)
        return -float(np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p)))

    best = loss(fitted.temperature)
    others = [(fitted.temperature * factor, shift) for factor in (0.8, 1, 1.25) for shift in (-0.1, 0, 0.1)]
    assert all(best <= loss(*other) + 1e-6 for other in others)
    p = average(members, "probability", fitted.temperature, choice.shares)
    assert balanced_accuracy(labels, p >= fitted.threshold) > best_threshold(labels, p)[1] - 0.01
    assert fitted.aucs == [roc_auc(labels, average([z], "probability", fitted.temperature)) for z in members]


def test_a_member_that_helps_stays_and_one_of_noise_goes() -> None:
    joint = simulated([1.0, 1.0, 0.0])
    choice, steps = simplify(joint, Choice((0, 1, 2), ("d4",) * 3), ["a", "b", "noise"])
    assert choice.members == (0, 1)
    assert [step.taken for step in steps[:2]] == [True, False] and steps[0].text == "without noise"
    assert steps[0].auc > steps[0].before and steps[1].auc < steps[1].before
    assert joint.auc(choice) > max(joint.auc(Choice((m,), ("d4",))) for m in (0, 1))


def test_views_that_say_the_same_go_and_others_stay() -> None:
    same, noisy = simulated([1.0], views=0.0), simulated([1.0], views=3.0)
    start = Choice((0,), ("d4",))
    assert simplify(same, start, ["a"])[0].tta == ("none",)
    assert simplify(noisy, start, ["a"])[0].tta == ("d4",)


def test_weights_stay_equal_unless_others_pay() -> None:
    equal = simulated([1.0, 1.0])
    assert refine(equal, Choice((0, 1), ("d4", "d4")))[0].weights is None
    # logits of one size whatever they know: their means must weigh them
    uneven = simulated([1.6, 0.15])
    choice, steps = refine(uneven, Choice((0, 1), ("d4", "d4")))
    if choice.weights is not None:
        assert choice.weights[0] > choice.weights[1]
    assert steps[-1].taken == (choice.weights is not None)


def test_no_crop_takes_part_in_what_judges_it() -> None:
    """Other labels in one fold change nothing that is fitted for that fold."""
    joint = simulated([1.0, 0.7])
    choice = Choice((0, 1), ("d4", "rot4"), "probability", (0.5, 0.5))
    changed = dataclasses.replace(
        joint, labels=np.where(joint.folds == 1, 1 - joint.labels, joint.labels), _scales={}, _answers={}
    )
    names = ["a", "b"]
    assert choose(joint, names, 1) == choose(changed, names, 1)
    assert np.array_equal(joint.answers(choice, 1), changed.answers(choice, 1))
    assert not np.array_equal(joint.answers(choice, 0), changed.answers(choice, 0))


def test_a_budget_takes_the_best_that_fits(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    views = {"none": 1.0, "rot4": 4.0, "d4": 8.0}
    monkeypatch.setattr(command.Maker, "time_members", lambda _: Seconds(2.0, [views, views]))
    walls = iter([9.0, 3.0])
    monkeypatch.setattr(command, "median_cold_start", lambda *_: next(walls))
    output = tmp_path / "fast"
    assert main([*arguments(place, output, "lite", "uni"), "--budget=4.5"]) == 0
    member_views = [member.tta for member in load_manifest(output).members]
    assert member_views in (["none"], ["none", "none"])
    assert "over the budget of 4.5 seconds" in capsys.readouterr().out  # the first took 9 seconds when it was measured
    assert main([*arguments(place, tmp_path / "none", "lite", "uni"), "--budget=2.5"]) == 1
    assert "no set of members" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_every_choice_of_few_and_of_many() -> None:
    assert len(set(every_choice(simulated([1.0] * 2, 60)))) == 3 + 3 + 9
    assert len(set(every_choice(simulated([1.0] * 8, 60)))) == 3 * 255
    one_view = simulated([1.0] * 2, 60)
    one_view.logits = [one_view.logits[0], one_view.logits[1][:1]]
    assert len(set(every_choice(one_view))) == 3 + 1 + 3


def test_an_ensemble_folder_gets_its_logits_again(place: Path, tmp_path: Path) -> None:
    """Each crop by the fold that held it out, as its provenance says; and once computed, from the cache."""
    crops = load_data([place / "table.csv"], lambda line: None)
    folds = split(crops, "grouped", 3, 0)
    labels = np.array([crop.label for crop in crops])
    folder, cache = tmp_path / "shipped", tmp_path / "cache"
    folder.mkdir()
    make_ensemble(folder, targets="late", folds=3, tta="d4", temperature=1.3)
    every = Ensemble.load(folder, "cpu", "fp32").predict(load_crops(crops)).logits[0]  # (3, 8, N)
    expected = every[folds, :, np.arange(CROPS)].T
    content = json.loads((folder / "ensemble.json").read_text())
    auc = roc_auc(labels, average([expected[None]], "logit", 1.3))
    recipe = json.loads((place / "lite" / "recipe.json").read_text())

    def ship(**about: Any) -> None:
        told = {"recipe": recipe, "data": describe(crops), "out_of_fold": {"auc": auc}} | about
        (folder / "ensemble.json").write_text(json.dumps(content | {"provenance": told}))

    def read(folders: list[Path], *data: Path) -> tuple[list[Candidate], StudyTable]:
        return read_candidates(Sources(folders, data, cache, place / "bases"))

    ship()
    for _ in range(2):
        found, table = read([folder, place / "uni"])
        assert np.abs(found[0].logits - expected).max() < 1e-4
        assert np.array_equal(table.folds, folds)
    assert len(list(cache.iterdir())) == 1
    alone, _ = read([folder], place / "table.csv")
    assert np.array_equal(alone[0].logits, found[0].logits)
    retaken = tiny_table(tmp_path / "retaken", CROPS, 16)  # the same table, but one crop has other pixels
    write_crop(tmp_path / "retaken" / "crops" / "0.png", 1000, 40, 90)
    with pytest.raises(UserError, match="fitted on other crops"):
        read([folder], retaken)
    earlier = {key: value for key, value in describe(crops).items() if key != "pixels"}
    ship(data=earlier)  # a version that did not keep the hash of pixels
    again, _ = read([folder], retaken)
    assert (again[0].logits != found[0].logits).any(0).tolist() == [True] + [False] * (CROPS - 1)
    with pytest.raises(UserError, match="add --data"):
        read([folder])
    ship(out_of_fold={"auc": auc + 0.1})
    with pytest.raises(UserError, match="its provenance says"):
        read([folder, place / "uni"])
    ship(recipe={})
    with pytest.raises(UserError, match="names no recipe"):
        read([folder, place / "uni"])


def test_refuses_what_cannot_be_compared(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*names: str, more: tuple[str, ...] = ()) -> str:
        assert main([*arguments(place, tmp_path / "out", *names), *more]) == 1
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and not (tmp_path / "out").exists()
        return text

    told = fails("lite", "other")
    assert "split their crops differently" in told and "training fit" in told and "--set folds=3" in told
    table = tiny_table(tmp_path / "data", 24)
    make_run(tmp_path / "less", table, place / "bases", "efficientnet-lite0", adapters=False)
    assert "other crops" in fails("lite", str(tmp_path / "less"))
    assert "other crops than --data" in fails("lite", more=(f"--data={table}",))
    assert "no run and no ensemble" in fails("lite", "bases")
    (tmp_path / "less" / "fold1" / "oof.npz").unlink()
    assert "fold 1 is not finished" in fails(str(tmp_path / "less"))
    (tmp_path / "out").mkdir()
    assert main(arguments(place, tmp_path / "out", "lite")) == 1
    assert "nothing is overwritten" in capsys.readouterr().err


def test_members_get_names_of_their_own() -> None:
    def one(name: str, crop: int | None, size: int = 192) -> Candidate:
        entry = {"preprocess": {"crop": crop, "size": size}}
        return Candidate(name, {}, {}, entry, Path(), (), np.empty(0))

    names = [found.name for found in named_apart([one("a", 64), one("a", None), one("b", 64), one("a", 64)])]
    assert names == ["a-64-192-1", "a-all-192", "b", "a-64-192-2"]
