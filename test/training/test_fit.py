"""Fitting: a kill loses nothing but time, and settings do what they say. EfficientNet-Lite0, random base, 32 pixels."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import training.feed
import training.loop
from inference.errors import UserError
from inference.imageio.stack import read_stack
from inference.preprocess import views
from test.support.miniature import random_base
from test.support.tables import tiny_table
from training.__main__ import main
from training.data import load_data
from training.feed import batches, epoch_order, generator, load_crops
from training.fit import fit, make_accelerator, settle_precision, write_run
from training.loop import Run, fit_fold
from training.recipe import Recipe, load_recipe
from training.splits import inner_holdout
from training.state import State, learning_rate_share
from training.strengths import Augment

PLAIN = ["augment.dihedral=false", *(f"augment.{f.name}=0" for f in fields(Augment) if f.name != "dihedral")]


def recipe(*changes: str) -> Recipe:
    defaults = ["size=32", "crop=0", "targets=late", "rank=2", "epochs=3", "batch=4", "folds=2", "precision=fp32"]
    return load_recipe("lite0", [*defaults, *changes])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("data")
    crops = load_data([tiny_table(folder)], lambda line: None)
    base = random_base("efficientnet-lite0", folder / "base.safetensors")
    return SimpleNamespace(
        crops=crops,
        images=load_crops(crops),
        base=base,
        table=folder / "table.csv",
        fold=np.array([int(crop.group[-1]) % 2 for crop in crops]),
    )


@pytest.fixture
def run_fold(data: SimpleNamespace, tmp_path: Path) -> Any:
    """Call with a recipe and a name: fits fold 0 in that folder and returns the adapter's tensors."""

    def call(settings: Recipe, name: str = "run", workers: int = 0) -> dict[str, torch.Tensor]:
        AcceleratorState._reset_state()
        accelerator = Accelerator(
            cpu=True, mixed_precision="no" if settings.precision == "fp32" else settings.precision
        )
        fit_fold(Run(settings, tmp_path / name, data.crops, data.images, data.base, accelerator, workers), data.fold, 0)
        return load_file(tmp_path / name / "fold0" / "adapter_model.safetensors")

    return call


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(float((a[k] - b[k]).abs().max()) <= tolerance for k in a)


@pytest.mark.parametrize(
    "changes",
    [["dropout=0.1", "drop=0.2", "augment.mixup=0.4"], ["precision=bf16", "patience=2", "batch=3", "sampling=domain"]],
)
def test_a_kill_in_the_middle_of_an_epoch_changes_nothing(run_fold, monkeypatch, tmp_path, changes):
    settings = recipe(*changes)
    whole = run_fold(settings, "whole")
    calls = 0

    def dies(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:  # three steps an epoch: in the middle of the second
            raise KeyboardInterrupt
        return real(*arguments)

    real = training.feed.augment
    monkeypatch.setattr(training.feed, "augment", dies)
    with pytest.raises(KeyboardInterrupt):
        run_fold(settings, "killed")
    assert (tmp_path / "killed" / "fold0" / "checkpoint.pt").exists()
    assert same(run_fold(settings, "killed"), whole)
    assert calls == 5 + 2 * 3  # the first epoch was not done again
    rows = []
    for name in ("whole", "killed"):
        with (tmp_path / name / "fold0" / "metrics.csv").open(newline="") as lines:
            rows.append([{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(lines)])
    assert rows[0] == rows[1]
    assert [row["epoch"] for row in rows[0]] == ["1", "2", "3"]
    found = [np.load(tmp_path / name / "fold0" / "oof.npz")["logits"] for name in ("whole", "killed")]
    assert np.array_equal(*found)
    assert not (tmp_path / "killed" / "fold0" / "checkpoint.pt").exists()


def test_a_finished_fold_is_left_alone(run_fold, monkeypatch):
    first = run_fold(recipe("epochs=1"))
    monkeypatch.setattr(training.feed, "augment", None)
    assert same(run_fold(recipe("epochs=1")), first)


def test_another_seed_gives_another_adapter(run_fold):
    assert not same(run_fold(recipe("epochs=1"), "a"), run_fold(recipe("epochs=1", "seed=1"), "b"), 1e-4)


def test_accumulated_batches_are_one_larger_batch(run_fold):
    """Twelve crops without augmentation: three groups of two batches of two are three batches of four."""
    common = [*PLAIN, "dropout=0", "learning_rate=2e-4"]  # at a higher one, AdamW makes rounding errors large
    large = run_fold(recipe("batch=4", *common), "large")
    small = run_fold(recipe("batch=2", "accumulate=2", *common), "small")
    assert same(large, small, 1e-5)
    assert not same(large, run_fold(recipe("batch=2", *common), "other"), 1e-3)


def test_the_stored_logits_are_those_of_the_stored_adapter(run_fold, data, tmp_path):
    """Not of the last weights: with averaging, adapter and out-of-fold logits are both the average's."""
    from inference.backbones import lookup
    from inference.models import logits
    from inference.preprocess import to_batch
    from inference.weights import Weights

    settings = recipe("ema=0.9")
    run_fold(settings)
    fold0 = tmp_path / "run" / "fold0"
    stored = np.load(fold0 / "oof.npz")
    batch = to_batch([data.images[n] for n in stored["index"]], settings.preprocess())
    weights = Weights(data.base, [fold0], torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        found = logits(views(batch, "d4"), weights, lookup("efficientnet-lite0"), "avg").view(8, -1).numpy()
    assert np.abs(found - stored["logits"]).max() < 1e-4
    assert {data.fold[n] for n in stored["index"]} == {0}


def test_early_stopping_keeps_the_best_epoch_of_crops_that_it_is_not_scored_on(run_fold, data, monkeypatch, tmp_path):
    aucs, watched = iter([0.6, 0.8, 0.7, 0.7, 0.9]), []

    def judge(labels: np.ndarray, z: np.ndarray) -> float:
        watched.append(len(labels))
        return next(aucs)

    monkeypatch.setattr(training.loop, "roc_auc", judge)
    stopped = run_fold(recipe("epochs=9", "patience=2", "warmup=0"), "stopped")
    with (tmp_path / "stopped" / "fold0" / "metrics.csv").open(newline="") as lines:
        assert [row["auc"] for row in csv.DictReader(lines)] == ["0.6", "0.8", "0.7", "0.7"]
    assert not same(stopped, run_fold(recipe("epochs=1"), "other"))
    training_crops = [crop for crop, fold in zip(data.crops, data.fold, strict=True) if fold != 0]
    inner = inner_holdout(training_crops, "grouped", 0)
    assert watched[0] == inner.sum() > 0
    groups = [
        {crop.group for crop, chooses in zip(training_crops, inner, strict=True) if chooses == side} for side in (0, 1)
    ]
    assert groups[0] and not groups[0] & groups[1]
    assert len(np.load(tmp_path / "stopped" / "fold0" / "oof.npz")["index"]) == (data.fold == 0).sum()


def test_a_state_without_an_auc_keeps_the_latest():
    model = torch.nn.Linear(1, 1, bias=False)
    state = State(model, recipe(), 1, Accelerator(cpu=True), None)
    for value, auc in ((1.0, math.nan), (2.0, math.nan)):
        state.average["weight"].fill_(value)
        state.judge(auc)
    assert (state.best_state["weight"].item(), state.stale, state.best) == (2.0, 0, -1.0)
    state.judge(0.5)
    state.average["weight"].fill_(3.0)
    state.judge(0.4)
    assert (state.best_state["weight"].item(), state.stale, state.best) == (2.0, 1, 0.5)


def test_the_learning_rate_warms_up_and_ends_at_zero():
    shares = [learning_rate_share(step, 100, 0.1) for step in range(101)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == shares[9] == shares[10] == 1
    assert shares[100] == pytest.approx(0)
    assert learning_rate_share(0, 10, 0.0) == 1


@pytest.mark.parametrize("sampling", ["shuffle", "class", "domain"])
def test_an_epochs_order(data, sampling):
    order = epoch_order(data.crops * 50, sampling, generator(1))
    assert len(order) == 1200
    chosen = [(data.crops * 50)[n] for n in order.tolist()]
    atypical = np.mean([crop.label for crop in chosen])
    if sampling == "shuffle":
        assert sorted(order.tolist()) == list(range(1200))
    else:
        assert atypical == pytest.approx(0.5, abs=0.05)
    assert [len(batch) for batch in batches(10, recipe("batch=4"), torch.arange(10))] == [4, 4]
    assert [len(batch) for batch in batches(3, recipe("batch=4"), torch.arange(3))] == [3]


def test_the_command_fits_all_folds_and_refuses_another_run_in_the_folder(data, tmp_path, capsys):
    run = tmp_path / "run"
    settings = ["size=32", "crop=0", "targets=late", "rank=2", "epochs=1", "batch=8", "folds=2"]
    arguments = ["fit", "--recipe", "lite0", "--data", str(data.table), "--base", str(data.base), "--run", str(run)]
    changes = [word for change in settings for word in ("--set", change)]
    assert main([*arguments, *changes]) == 0
    out = capsys.readouterr().out
    assert "in adapters, 1,281 in the head" in out
    assert {file.name for file in (run / "fold1").iterdir() if "tfevents" not in file.name} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.csv",
        "oof.npz",
    }
    described = json.loads((run / "data.json").read_text())
    assert (described["crops"], described["groups"], len(described["domains"])) == (24, 8, 2)
    assert main([*arguments, *changes, "--set", "rank=4"]) == 1
    assert "recipe.json differs from this call in rank" in capsys.readouterr().err
    assert main([*arguments, *changes, "--fold", "5"]) == 1
    assert "fold 5 is not one of this split's (0 to 1)" in capsys.readouterr().err
    assert main([*arguments[:5], *changes, "--set", "backbone=uni"]) == 1
    assert "python -m training base uni" in capsys.readouterr().err


def test_auto_is_what_the_hardware_multiplies_and_stays_what_the_run_began_in(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, backbone, expected in (
        ((8, 0), "uni", "bf16"),
        ((7, 5), "uni", "fp16"),
        ((7, 5), "dinov3-vith16plus", "fp32"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        asked = recipe("precision=auto", f"backbone={backbone}", "targets=qkv")
        assert settle_precision(asked, tmp_path).precision == expected
        assert f"precision {expected}: " in capsys.readouterr().out
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(recipe("precision=bf16"))))
    assert settle_precision(asked, tmp_path).precision == "bf16"
    assert settle_precision(recipe("precision=fp32"), tmp_path).precision == "fp32"


def test_threads_that_augment_ahead_change_nothing(run_fold):
    changes = ["augment.mixup=0.4", "dropout=0.1", "augment.macenko=0.2", "augment.clahe_p=0.5", "augment.motion_p=0.5"]
    assert same(run_fold(recipe(*changes), "ahead", workers=3), run_fold(recipe(*changes), "inline"))


def test_a_run_of_an_earlier_version_is_the_same_run(tmp_path, data):
    """Its recipe.json lacks the settings that have come since."""
    settings = recipe()
    old = asdict(settings)
    del old["split_by"], old["augment"]["macenko"]
    (tmp_path / "recipe.json").write_text(json.dumps(old))
    write_run(tmp_path, settings, data.crops)
    with pytest.raises(UserError, match="differs from this call in rank, augment"):
        write_run(tmp_path, recipe("rank=4", "augment.macenko=0.1"), data.crops)


def test_a_plan_measures_and_writes_nothing(data, tmp_path, capsys):
    changes = [f"--set={c}" for c in ("size=32", "crop=0", "targets=late", "rank=2", "epochs=3", "batch=4", "folds=2")]
    before = sorted(tmp_path.rglob("*"))
    run = tmp_path / "run"
    words = [
        "fit",
        "--recipe",
        "lite0",
        "--data",
        str(data.table),
        "--base",
        str(data.base),
        "--run",
        str(run),
        "--plan",
        *changes,
    ]
    assert main(words) == 0
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    assert "of which train 44,336 in adapters and 1,281 in the head" in out
    assert re.search(r"steps: 3 an epoch, 9 a fold", out)
    for word in ("memory: weights", "FLOPs: ", " h a fold", "precision "):
        assert word in out


def test_tensorboard_reads_the_scalars(run_fold, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_fold(recipe("epochs=2"))
    events = EventAccumulator(str(tmp_path / "run" / "fold0")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "validation_loss", "auc", "learning_rate", "seconds"}
    assert [event.step for event in events.Scalars("auc")] == [1, 2]


def test_precisions_that_cannot_be(monkeypatch):
    with pytest.raises(UserError, match="'fp8' is unknown"):
        settle_precision(recipe("precision=fp8"), Path())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        make_accelerator(recipe("precision=fp16"))


REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "ami-br"


@pytest.mark.skipif(not REAL.exists(), reason="the AMi-Br training split is not here")
def test_real_crops_train(data, tmp_path):
    """Sixty real crops, the default recipe at a small size: runs, and every held-out crop has finite logits."""
    crops = load_data([REAL], lambda line: None)[::48]
    assert read_stack(crops[0].path)[0].shape == (128, 128, 3)
    settings = load_recipe("lite0", ["size=48", "epochs=1", "batch=16", "precision=bf16"])
    fit(Run(settings, tmp_path, crops, load_crops(crops), data.base, make_accelerator(settings)), [1])
    stored = np.load(tmp_path / "fold1" / "oof.npz")
    assert stored["logits"].shape == (8, len(stored["index"]))
    assert np.isfinite(stored["logits"]).all()
