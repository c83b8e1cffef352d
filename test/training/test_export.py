"""From a finished run to an ensemble folder: what calibration chose, every hash, and no path of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from inference.checksums import sha256
from inference.ensemble import Ensemble
from inference.errors import UserError
from inference.imageio.stack import read_stack
from inference.manifest import load_manifest
from inference.seen import load_seen
from test.support.miniature import random_base
from test.support.tables import tiny_table, write_crop
from training.__main__ import main
from training.data.table import load_data, table_hash
from training.ensemble.calibrate import calibrate, calibrated
from training.ensemble.card import Row
from training.ensemble.hubcard import check_card
from training.ensemble.joint import METRICS, Choice, Score
from training.fit.feed import load_crops
from training.run import RunFolder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with table.csv, bases, a finished run and the exported ensemble."""
    folder = tmp_path_factory.mktemp("private-name")
    table = tiny_table(folder)
    (folder / "bases").mkdir()
    base = random_base("efficientnet-lite0", folder / "bases" / "efficientnet-lite0.safetensors")
    AcceleratorState._reset_state()
    settings = ["size=32", "crop=0", "targets=late", "rank=2", "epochs=2", "batch=4", "folds=3", "learning_rate=1e-2"]
    changes = [f"--set={change}" for change in settings]
    assert (
        main(
            [
                "fit",
                "--recipe",
                "lite0",
                "--data",
                str(table),
                "--base",
                str(base),
                "--run",
                str(folder / "run"),
                *changes,
            ]
        )
        == 0
    )
    places = ["--bases", str(folder / "bases"), "--output", str(folder / "weights" / "mine")]
    assert main(["export", str(folder / "run"), *places, "--include-base"]) == 0
    return folder


def test_the_folder_holds_exactly_what_the_manifest_names(trained):
    ensemble = trained / "weights" / "mine"
    manifest = load_manifest(ensemble)
    files = {str(path.relative_to(ensemble)) for path in ensemble.rglob("*") if path.is_file()} - {"README.md"}
    fold_files = {
        f"efficientnet-lite0-fold{f}/{name}"
        for f in range(3)
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert files == {"ensemble.json", "efficientnet-lite0.safetensors", "seen.txt", *fold_files}
    seen, run = load_seen(manifest), RunFolder(trained / "run")
    assert seen and all(read_stack(crop.path)[0] in seen for crop in run.crops()) and len(seen) == len(run.crops())
    assert manifest.name == "mine"
    card = (ensemble / "README.md").read_text()
    check_card(ensemble)
    assert "| efficientnet-lite0 | " in card
    assert all(sha256(path) == expected for path, expected in manifest.files.items())


def test_the_manifest_says_what_was_chosen_and_on_what(trained):
    manifest = load_manifest(trained / "weights" / "mine")
    chosen = calibrate(RunFolder(trained / "run").out_of_fold())
    assert (manifest.members[0].tta, manifest.averaging) == (chosen["tta"], chosen["averaging"])
    assert manifest.threshold == pytest.approx(chosen["threshold"], abs=1e-3)
    provenance = manifest.provenance
    about = provenance["members"]["efficientnet-lite0"]
    assert about["data"]["crops"] == 24
    crops = load_data([trained / "table.csv"], lambda line: None)
    assert about["data"]["sha256"] == table_hash(crops)
    assert about["recipe"]["rank"] == 2
    assert all(provenance["out_of_fold"][name] == chosen[name] for name in METRICS)  # one definition of every score
    assert provenance["out_of_fold"]["auc_interval"] == chosen["auc_interval"]
    assert {"torch", "timm", "peft", "python"} <= provenance["versions"].keys()
    assert manifest.members[0].precision["fp32"] == 0


def test_no_path_of_this_machine_leaves_it(trained):
    for path in (trained / "weights" / "mine").rglob("*"):
        if path.is_file():
            assert b"private-name" not in path.read_bytes(), path


def test_inference_gives_the_out_of_fold_answers_of_each_fold(trained):
    """The ensemble's fold k on the crops that fold k held out: the same probabilities as in training."""
    chosen = calibrate(RunFolder(trained / "run").out_of_fold())
    images = load_crops(load_data([trained / "table.csv"], lambda line: None))
    found = Ensemble.load(trained / "weights" / "mine", "cpu", "fp32").predict(images)
    for fold in range(3):
        stored = np.load(trained / "run" / f"fold{fold}" / "oof.npz")
        expected = calibrated(stored["logits"], chosen)
        assert np.abs(found.fold_p[fold][stored["index"]] - expected).max() < 0.03  # trained in bf16


def test_every_step_speaks_and_chance_is_told(trained, tmp_path, capsys, eager, monkeypatch):
    for interval, chance in (([0.45, 0.7], True), ([0.3, 0.5], True), ([0.51, 0.7], False), (None, False)):
        score = Score(np.empty(0), np.empty(0, bool), {}, {"auc": interval})
        assert Row(Choice((0,), ("none",)), score, None).is_chance() is chance
    monkeypatch.setattr(Row, "is_chance", lambda row: True)
    places = ["--bases", str(trained / "bases"), "--output", str(tmp_path / "mine"), "--include-base"]
    assert main(["export", str(trained / "run"), *places]) == 0
    printed = capsys.readouterr()
    for step in ("choosing members and views", "calibrating", "scoring, with everything chosen again"):
        assert step in printed.err and ": 0:00:00 so far" in printed.err
    assert "crops in fp32, 0.0 crops/s" in printed.err
    assert "warning: the 95% interval of the AUC includes 0.5" in printed.out


def test_the_same_run_gives_the_same_bytes(trained, tmp_path):
    again = tmp_path / "mine"
    base = ["--bases", str(trained / "bases"), "--include-base"]
    assert main(["export", str(trained / "run"), "--output", str(again), *base]) == 0
    for name in (
        "README.md",
        "ensemble.json",
        "efficientnet-lite0-fold0/adapter_config.json",
        "efficientnet-lite0-fold2/adapter_model.safetensors",
    ):
        assert (again / name).read_bytes() == (trained / "weights" / "mine" / name).read_bytes()


def test_an_altered_folder_is_refused(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained / "weights" / "mine", copy)
    config = copy / "efficientnet-lite0-fold1" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 4'))
    with pytest.raises(UserError, match="SHA-256"):
        Ensemble.load(copy, "cpu", "fp32")
    shutil.copyfile(trained / "weights" / "mine" / "efficientnet-lite0-fold1" / "adapter_config.json", config)
    base = copy / "efficientnet-lite0.safetensors"
    base.write_bytes(base.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="SHA-256"):
        Ensemble.load(copy, "cpu", "fp32")


def test_an_unfinished_run_is_refused(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    (run / "fold2" / "oof.npz").unlink()
    arguments = ["export", str(run), "--bases", str(trained / "bases"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "fold 2 is not finished" in capsys.readouterr().err
    assert json.loads((run / "data.json").read_text())["crops"] == 24


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(trained, tmp_path, capsys, monkeypatch):
    base = ["--bases", str(trained / "bases"), "--include-base"]
    (tmp_path / "mine").mkdir()
    assert main(["export", str(trained / "run"), "--output", str(tmp_path / "mine"), *base]) == 1
    assert "nothing is overwritten" in capsys.readouterr().err and not list((tmp_path / "mine").iterdir())
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    rows = (run / "split.csv").read_text().splitlines()
    cells = [row.split(",") for row in rows[1:]]
    for row in cells:
        row[1] = "0"
    (run / "split.csv").write_text("\n".join([rows[0], *(",".join(row) for row in cells)]) + "\n")
    assert main(["export", str(run), "--output", str(tmp_path / "none"), *base]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "fewer than two folds can be left out" in told

    def breaks(*_: object) -> None:
        raise UserError("broke; expected not to; try again")

    monkeypatch.setattr("training.ensemble.export.measure_drift", breaks)
    assert main(["export", str(trained / "run"), "--output", str(tmp_path / "none"), *base]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "run"}


def test_crops_with_other_pixels_than_the_run_had_are_refused(trained, tmp_path, capsys):
    """They were replaced after training, and precisions would be measured on them."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    for file in (trained / "crops").glob("*.png"):
        write_crop(tmp_path / "crops" / file.name, 99, 40, 160)
    table = (run / "split.csv").read_text()
    (run / "split.csv").write_text(table.replace(str(trained / "crops"), str(tmp_path / "crops")))
    arguments = ["export", str(run), "--bases", str(trained / "bases"), "--include-base"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 1
    assert "png has other pixels than when its run began" in capsys.readouterr().err
    assert not (tmp_path / "out" / "ensemble.json").exists()


def test_a_precision_that_overflows_is_not_allowed(trained, tmp_path, monkeypatch, capsys):
    """Its crops are computed again in fp32, so that the answers do not change; only the time does."""
    from inference.ensemble import LoadedMember

    real = LoadedMember.predict

    def overflows(self, *arguments):
        if self.precision == "fp16":
            self.recomputed += 1
        return real(self, *arguments)

    monkeypatch.setattr(LoadedMember, "predict", overflows)
    output = tmp_path / "mine"
    base = ["--bases", str(trained / "bases"), "--include-base"]
    assert main(["export", str(trained / "run"), "--output", str(output), "--device", "cpu", *base]) == 0
    found = load_manifest(output).members[0].precision
    assert found["fp16"] is None
    assert found["bf16"] is not None
    out = capsys.readouterr().out
    assert [f"measuring {precision} on 24 crops" in out for precision in ("fp32", "bf16", "fp16")] == [True] * 3


def test_a_run_of_an_earlier_version_exports(trained, tmp_path):
    """Its recipe.json lacks the settings that have come since."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    settings = json.loads((run / "recipe.json").read_text())
    for name in ("grid", "optical", "macenko", "shuffle_p", "clahe", "clahe_p", "defocus", "motion"):
        del settings["augment"][name]
    del settings["split_by"]
    (run / "recipe.json").write_text(json.dumps(settings))
    base = ["--bases", str(trained / "bases"), "--include-base"]
    for words in (["calibrate"], ["report"], ["export", "--output", str(tmp_path / "out"), *base]):
        assert main([words[0], str(run), *words[1:]]) == 0
