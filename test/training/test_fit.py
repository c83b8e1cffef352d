"""Fitting: a kill loses nothing but time, and settings do what they say. EfficientNet-Lite0, random base, 32 pixels."""

from __future__ import annotations

import csv
import dataclasses
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
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import training.fit.feed
import training.fit.loop
from inference.errors import UserError
from inference.imageio.stack import read_stack
from inference.preprocess import views
from test.support.miniature import random_base
from test.support.tables import tiny_table, write_crop
from training.__main__ import main
from training.augment.strengths import Augment
from training.data.splits import EXAM, inner_holdout
from training.data.table import load_data
from training.fit import processes
from training.fit.command import fit, make_accelerator, settle_precision
from training.fit.feed import epoch_order, generator, load_crops, parts_of_a_step, step_size, steps_of
from training.fit.loop import Training, fit_fold
from training.fit.recipe import Recipe, load_recipe
from training.fit.state import State, learning_rate_share
from training.run import RunFolder

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
        fit_fold(
            Training(settings, tmp_path / name, data.crops, data.images, data.base, accelerator, workers), data.fold, 0
        )
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

    real = training.fit.feed.augment
    monkeypatch.setattr(training.fit.feed, "augment", dies)
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
    monkeypatch.setattr(training.fit.feed, "augment", None)
    assert same(run_fold(recipe("epochs=1")), first)


def test_another_seed_gives_another_adapter(run_fold):
    assert not same(run_fold(recipe("epochs=1"), "a"), run_fold(recipe("epochs=1", "seed=1"), "b"), 1e-4)


def test_the_same_steps_in_any_number_of_batches(run_fold):
    """Augmented and mixed, from 12 crops that are no multiple of a step: two steps of five or six each."""
    common = [
        "dropout=0",
        "augment.mixup=0.4",
        "learning_rate=2e-4",
    ]  # at a higher one, AdamW makes rounding errors large
    whole = run_fold(recipe("batch=5", *common), "whole")
    assert same(whole, run_fold(recipe("batch=1", "accumulate=5", *common), "single"), 1e-5)
    six = run_fold(recipe("batch=6", *common), "six")
    assert same(six, run_fold(recipe("batch=2", "accumulate=3", *common), "pairs"), 1e-5)
    assert not same(whole, six, 1e-3)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40))
def test_a_step_is_cut_into_batches_of_about_the_same_size(batch, accumulate, crops):
    settings = recipe(f"batch={batch}", f"accumulate={accumulate}")
    size, parts = step_size(settings, crops), parts_of_a_step(settings, crops)
    assert size == min(batch * accumulate, crops) and parts <= accumulate
    sizes = [len(part) for part in torch.arange(size).tensor_split(parts)]
    assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1 and min(sizes) == size // parts
    assert [len(step) for step in steps_of(crops, settings, torch.arange(crops))] == [size] * (crops // size)


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

    monkeypatch.setattr(training.fit.loop, "roc_auc", judge)
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
    assert [len(batch) for batch in steps_of(10, recipe("batch=4"), torch.arange(10))] == [4, 4]
    assert [len(batch) for batch in steps_of(3, recipe("batch=4"), torch.arange(3))] == [3]


def test_the_command_fits_all_folds_and_refuses_another_run_in_the_folder(data, tmp_path, capsys):
    run = tmp_path / "run"
    settings = ["size=32", "crop=0", "targets=late", "rank=2", "epochs=1", "batch=8", "folds=2"]
    arguments = ["fit", "--recipe", "lite0", "--data", str(data.table), "--base", str(data.base), "--run", str(run)]
    changes = [word for change in settings for word in ("--set", change)]
    assert main([*arguments, *changes]) == 0
    out = capsys.readouterr().out
    assert "in adapters, 1,281 in the head" in out
    assert re.search(
        r"2 of 2 folds are finished; out of fold on 24 crops: AUC \d\.\d+ \(95% \d\.\d+ to \d\.\d+\)\n", out
    )
    assert out.endswith(f"export {run} --output weights/NAME\n")
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


def test_a_fold_of_several_seeds_is_the_mean_of_their_adapters(data, tmp_path):
    """Killed after the first seed, it goes on with the second; its answers are those of the mean of the weights."""
    from inference.backbones import lookup
    from inference.models import logits
    from inference.preprocess import to_batch
    from inference.weights import Weights

    settings = recipe("seeds=2", "epochs=1")
    share = Training(settings, tmp_path / "run", data.crops, data.images, data.base, make_accelerator(settings))
    fold = RunFolder(share.folder).begin(settings, data.crops)
    alone = dataclasses.replace(share, recipe=recipe("epochs=1", "seed=1"), folder=tmp_path / "alone")
    fit_fold(alone, RunFolder(alone.folder).begin(alone.recipe, data.crops) * 0 + fold, 0)
    fit_fold(share, fold, 0)
    folder = share.folder / "fold0"
    second = load_file(folder / "seed1" / "adapter_model.safetensors")
    for name, value in load_file(alone.folder / "fold0" / "adapter_model.safetensors").items():
        assert torch.equal(second[name], value), name  # a seed's network is that of a run with this seed
    stored = np.load(folder / "oof.npz")
    batch = views(to_batch([data.images[n] for n in stored["index"]], settings.preprocess()), "d4")
    networks = RunFolder(share.folder).networks(0, 2)
    fused = [Weights(data.base, [place], torch.device("cpu"), torch.float32) for place in networks]
    mean = Weights(data.base, [folder], torch.device("cpu"), torch.float32)
    for name in mean.adapted:
        each = [weights.get(name) for weights in fused]
        torch.testing.assert_close(mean.get(name), torch.stack(each).mean(0), atol=1e-6, rtol=0)
    with torch.inference_mode():
        found = logits(batch, mean, lookup("efficientnet-lite0"), "avg").view(8, -1).numpy()
    assert np.abs(found - stored["logits"]).max() < 1e-4
    assert RunFolder(share.folder).seconds() > 0 and len(RunFolder(share.folder).history(0)["auc"]) == 1


def test_the_exam_is_in_no_fold_and_can_be_scored(tmp_path):
    """Also for a run that began before there was such a file."""
    from inference.imageio.listing import list_crops

    crops = load_data([tiny_table(tmp_path / "data", crops=96, groups=32)], lambda line: None)
    run = RunFolder(tmp_path / "run")
    fold = run.begin(recipe("exam=4"), crops)
    listed = run.exam.read_text()
    run.exam.unlink()
    run.begin(recipe("exam=4"), crops)
    assert run.exam.read_text() == listed
    exam = [crop for crop, number in zip(crops, fold.tolist(), strict=True) if number == EXAM]
    items = list_crops([run.exam])
    assert [(Path(item.path), item.label, item.slide) for item in items] == [(c.path, c.label, c.group) for c in exam]
    assert len({crop.domain for crop in exam}) == 2
    assert not {crop.group for crop in exam} & {c.group for c, number in zip(crops, fold, strict=True) if number >= 0}
    plain = RunFolder(tmp_path / "plain")
    plain.begin(recipe(), crops)
    assert not plain.exam.exists()


def test_a_run_folder_refuses_other_pixels_under_the_same_names(tmp_path):
    """It took them for the same data, and resumed."""
    table = tiny_table(tmp_path / "data")
    RunFolder(tmp_path / "run").begin(recipe(), load_data([table], lambda line: None))
    write_crop(tmp_path / "data" / "crops" / "5.png", 99, 40, 160)
    with pytest.raises(UserError, match=r"describes other crops than this call \(their table or their pixels\)"):
        RunFolder(tmp_path / "run").begin(recipe(), load_data([table], lambda line: None))


def test_a_run_folder_refuses_another_base(data, tmp_path, capsys):
    """It resumed, and averaged or shipped adapters of two bases."""
    other = random_base("efficientnet-lite0", tmp_path / "other.safetensors", seed=1)
    settings = ["size=32", "crop=0", "targets=late", "rank=2", "epochs=1", "batch=8", "folds=2"]
    changes = [word for change in settings for word in ("--set", change)]
    run = ["fit", "--recipe", "lite0", "--data", str(data.table), "--run", str(tmp_path / "run"), *changes]
    assert main([*run, "--base", str(data.base), "--fold", "0"]) == 0
    assert main([*run, "--base", str(other), "--fold", "1"]) == 1
    assert "base.sha256 is not of" in capsys.readouterr().err


def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = capsys.readouterr().out
    for name in [f.name for f in fields(Recipe) if f.name != "augment"] + [
        f"augment.{f.name}" for f in fields(Augment)
    ]:
        assert re.search(rf"^  {re.escape(name)}( \([^)]*\))?: \w", shown, re.MULTILINE), name


def test_without_a_terminal_a_line_says_now_and_then_where_it_is(eager, capsys):
    unit = "steps of fold 0 epoch 1/2"
    assert list(processes.progress(range(4), Accelerator(cpu=True), unit, 4)) == [0, 1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(re.fullmatch(rf"\d of 4 {unit}, \S+ steps/s, \S+ (left|so far)", line) for line in lines)


def test_files_that_changed_since_the_run_began_are_refused(tmp_path):
    table = tiny_table(tmp_path / "data")
    run = RunFolder(tmp_path / "run")
    run.begin(recipe(), load_data([table], lambda line: None))
    assert len(load_crops(run.crops())) == 24
    write_crop(tmp_path / "data" / "crops" / "5.png", 99, 40, 160)
    with pytest.raises(UserError, match=r"5\.png has other pixels than when its run began"):
        load_crops(run.crops())


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
    RunFolder(tmp_path).begin(settings, data.crops)
    with pytest.raises(UserError, match="differs from this call in rank, augment"):
        RunFolder(tmp_path).begin(recipe("rank=4", "augment.macenko=0.1"), data.crops)


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
    for word in ("memory: ", "GiB), of which train", "FLOPs: ", " h a fold", "precision "):
        assert word in out


def test_a_plan_needs_no_weights(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.fit.command.BASES", tmp_path)
    changes = [f"--set={c}" for c in ("size=32", "crop=0", "rank=2", "epochs=1", "batch=4", "folds=2")]
    assert main(["fit", "--recipe", "lite0", "--data", str(data.table), "--plan", *changes]) == 0
    out = capsys.readouterr().out
    assert "planned with random ones" in out and " h a fold" in out


def test_tensorboard_reads_the_scalars(run_fold, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_fold(recipe("epochs=2"))
    events = EventAccumulator(str(tmp_path / "run" / "fold0")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "validation_loss", "auc", "learning_rate", "seconds"}
    assert [event.step for event in events.Scalars("auc")] == [1, 2]


def test_precisions_that_cannot_be(monkeypatch):
    with pytest.raises(UserError, match="precision = 'fp8'"):
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
    fit(Training(settings, tmp_path, crops, load_crops(crops), data.base, make_accelerator(settings)), [1])
    stored = np.load(tmp_path / "fold1" / "oof.npz")
    assert stored["logits"].shape == (8, len(stored["index"]))
    assert np.isfinite(stored["logits"]).all()
