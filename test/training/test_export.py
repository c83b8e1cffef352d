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
from inference.manifest import load_manifest
from test.support.miniature import random_base
from test.support.tables import tiny_table
from training.__main__ import main
from training.calibrate import averaged, calibrate, read_out_of_fold
from training.data import load_data, table_hash
from training.feed import load_crops
from training.hubcard import is_current


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with table.csv, base.safetensors, a finished run and the exported ensemble."""
    folder = tmp_path_factory.mktemp("private-name")
    table = tiny_table(folder)
    base = random_base("efficientnet-lite0", folder / "base.safetensors")
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
    arguments = ["export", str(folder / "run"), "--base", str(base), "--output", str(folder / "weights" / "mine")]
    assert main([*arguments, "--include-base"]) == 0
    return folder


def test_the_folder_holds_exactly_what_the_manifest_names(trained):
    ensemble = trained / "weights" / "mine"
    manifest = load_manifest(ensemble)
    files = {str(path.relative_to(ensemble)) for path in ensemble.rglob("*") if path.is_file()} - {"README.md"}
    fold_files = {f"fold{f}/{name}" for f in range(3) for name in ("adapter_config.json", "adapter_model.safetensors")}
    assert files == {"ensemble.json", "base.safetensors", *fold_files}
    assert manifest.name == "mine"
    card = (ensemble / "README.md").read_text()
    assert is_current(ensemble) and "| efficientnet-lite0 | 3 | " in card
    assert all(sha256(path) == expected for path, expected in manifest.files.items())


def test_the_manifest_says_what_was_chosen_and_on_what(trained):
    manifest = load_manifest(trained / "weights" / "mine")
    chosen = calibrate(read_out_of_fold(trained / "run"))
    assert (manifest.members[0].tta, manifest.averaging) == (chosen["tta"], chosen["averaging"])
    assert manifest.threshold == pytest.approx(chosen["threshold"], abs=1e-3)
    assert manifest.temperature == pytest.approx(chosen["temperature"], abs=1e-3)
    provenance = manifest.provenance
    assert provenance["data"]["crops"] == 24
    crops = load_data([trained / "table.csv"], lambda line: None)
    assert provenance["data"]["sha256"] == table_hash(crops)
    assert provenance["recipe"]["rank"] == 2
    assert provenance["out_of_fold"]["auc"] == chosen["auc"]
    assert {"torch", "timm", "peft", "python"} <= provenance["versions"].keys()
    assert manifest.members[0].precision["fp32"] == 0


def test_no_path_of_this_machine_leaves_it(trained):
    for path in (trained / "weights" / "mine").rglob("*"):
        if path.is_file():
            assert b"private-name" not in path.read_bytes(), path


def test_inference_gives_the_out_of_fold_answers_of_each_fold(trained):
    """The ensemble's fold k on the crops that fold k held out: the same probabilities as in training."""
    manifest = load_manifest(trained / "weights" / "mine")
    images = load_crops(load_data([trained / "table.csv"], lambda line: None))
    found = Ensemble.load(trained / "weights" / "mine", "cpu", "fp32").predict(images)
    for fold in range(3):
        stored = np.load(trained / "run" / f"fold{fold}" / "oof.npz")
        logits = stored["logits"][: found.logits[0].shape[1]]
        expected = averaged(
            logits, manifest.averaging, manifest.temperature, manifest.provenance["out_of_fold"]["shift"]
        )
        assert np.abs(found.fold_p[fold][stored["index"]] - expected).max() < 0.03  # trained in bf16


def test_the_same_run_gives_the_same_bytes(trained, tmp_path):
    again = tmp_path / "mine"
    base = ["--base", str(trained / "base.safetensors"), "--include-base"]
    assert main(["export", str(trained / "run"), "--output", str(again), *base]) == 0
    for name in ("README.md", "ensemble.json", "fold0/adapter_config.json", "fold2/adapter_model.safetensors"):
        assert (again / name).read_bytes() == (trained / "weights" / "mine" / name).read_bytes()


def test_an_altered_folder_is_refused(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained / "weights" / "mine", copy)
    config = copy / "fold1" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 4'))
    with pytest.raises(UserError, match="SHA-256"):
        Ensemble.load(copy, "cpu", "fp32")
    shutil.copyfile(trained / "weights" / "mine" / "fold1" / "adapter_config.json", config)
    base = copy / "base.safetensors"
    base.write_bytes(base.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="SHA-256"):
        Ensemble.load(copy, "cpu", "fp32")


def test_an_unfinished_run_is_refused(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    (run / "fold2" / "oof.npz").unlink()
    arguments = ["export", str(run), "--base", str(trained / "base.safetensors"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "fold 2 is not finished" in capsys.readouterr().err
    assert json.loads((run / "data.json").read_text())["crops"] == 24


def test_folds_of_an_earlier_export_are_not_packed(trained, tmp_path, capsys):
    output = tmp_path / "mine"
    (output / "fold7").mkdir(parents=True)
    base = ["--base", str(trained / "base.safetensors"), "--include-base"]
    assert main(["export", str(trained / "run"), "--output", str(output), *base]) == 1
    assert "holds fold7 of another ensemble" in capsys.readouterr().err


def test_a_precision_that_overflows_is_not_allowed(trained, tmp_path, monkeypatch, capsys):
    """Its crops are computed again in fp32, so that the answers do not change; only the time does."""
    from inference.ensemble import Member

    real = Member.predict

    def overflows(self, *arguments):
        if self.precision == "fp16":
            self.recomputed += 1
        return real(self, *arguments)

    monkeypatch.setattr(Member, "predict", overflows)
    output = tmp_path / "mine"
    base = ["--base", str(trained / "base.safetensors"), "--include-base"]
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
    base = ["--base", str(trained / "base.safetensors"), "--include-base"]
    for words in (["calibrate"], ["report"], ["export", "--output", str(tmp_path / "out"), *base]):
        assert main([words[0], str(run), *words[1:]]) == 0
