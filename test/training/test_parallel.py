"""Many processes: folds side by side, and several that share each batch. Real launches, real kills; nothing is lost.

EfficientNet-Lite0 on a random base at 32 pixels; every test ends in the adapters of one undisturbed process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from inference.errors import UserError
from test.support.miniature import random_base
from test.support.processes import until
from test.support.tables import tiny_table
from training.__main__ import main
from training.data.table import load_data
from training.fit.processes import gpus
from training.fit.recipe import load_recipe
from training.run import RunFolder

ROOT = Path(__file__).resolve().parents[2]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux only")
# few epochs: rounding grows with each, for Adam turns a gradient near zero into a whole step
SETTINGS = ["size=32", "crop=0", "targets=late", "rank=2", "epochs=6", "batch=3", "folds=2", "precision=fp32"]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
    "PYTHONUNBUFFERED": "1",
}


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words after `python -m training`, without --run."""
    folder = tmp_path_factory.mktemp("data")
    base = random_base("efficientnet-lite0", folder / "base.safetensors")
    changes = [word for change in SETTINGS for word in ("--set", change)]
    return ["fit", "--recipe", "lite0", "--data", str(tiny_table(folder)), "--base", str(base), *changes]


@pytest.fixture(scope="module")
def whole(fit: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, never disturbed."""
    run, threads = tmp_path_factory.mktemp("whole") / "run", torch.get_num_threads()
    AcceleratorState._reset_state()
    torch.set_num_threads(1)
    assert main([*fit, "--run", str(run)]) == 0
    torch.set_num_threads(threads)
    return run


@contextmanager
def started(*commands: list[str], log: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of `commands`, which all write to `log`; none is left behind."""
    with log.open("ab") as out:
        processes = [subprocess.Popen(c, cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=out) for c in commands]
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


def members(run: Path, *words: str) -> list[psutil.Process]:
    """The live processes with this run folder and all of `words` on their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            if any(str(run) in word for word in line) and set(words) <= set(line):
                found.append(process)
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


def check_same_training(run: Path, other: Path, fold: int) -> None:
    """As far as rounding goes: what was learned, and the logits of the held-out crops."""
    assert difference(run, other, fold) < 5e-3
    found, expected = (np.load(folder / f"fold{fold}" / "oof.npz")["logits"] for folder in (run, other))
    assert np.abs(found - expected).max() < 2e-4 * np.ptp(expected)


def difference(run: Path, other: Path, fold: int) -> float:
    """Of what training made of B, which starts at zero, relative to its norm.

    Not of single weights: rounding, through Adam, moved one by 8e-4 on one machine, and on another none by 1e-4.
    """
    a, b = (load_file(folder / f"fold{fold}" / "adapter_model.safetensors") for folder in (run, other))
    assert a.keys() == b.keys()
    learned = [name for name in a if "lora_B" in name]
    found, expected = (torch.cat([some[name].flatten() for name in learned]) for some in (a, b))
    return float((found - expected).norm() / expected.norm())


@LINUX
@pytest.mark.slow
def test_folds_side_by_side_survive_every_kill(fit, whole, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "training", *fit, "--run", str(run), "--parallel", "2"]

    with started(command, log=log) as (parent,):  # kill -9 of the parent takes the folds with it
        until((run / "fold1" / "checkpoint.pt").exists, "a checkpoint")
        parent.kill()
        until(lambda: not members(run), "the folds to end with their parent")
    assert not (run / "fold1" / "oof.npz").exists()  # on a busy machine fold 0 may be far ahead
    assert torch.load(run / "fold1" / "checkpoint.pt", weights_only=True)["epoch"] >= 1

    log.write_text("")
    with started(command, log=log) as (parent,):  # kill -9 of one fold ends the run
        until(lambda: members(run, "--fold", "1"), "fold 1 to start")
        members(run, "--fold", "1")[0].kill()
        assert parent.wait(600) == 1
        assert not members(run)
    assert log.read_text().splitlines()[-1] == (
        "error: fold 1 was ended by SIGKILL; the other folds were stopped; run the same command to resume"
    )

    with started(command, log=log) as (parent,):  # pre-emption
        until(lambda: members(run, "--fold", "1"), "fold 1 to start")
        parent.terminate()
        assert parent.wait(600) == 1
        assert not members(run)
    assert "error: SIGTERM stopped all folds; run the same command to resume" in log.read_text()

    log.write_text("")
    with started(command, log=log) as (parent,):
        assert parent.wait(600) == 0, log.read_text()
    assert "fold 1 resumes after epoch" in log.read_text()
    assert [difference(run, whole, fold) for fold in (0, 1)] == [0, 0]


def launch(fit: list[str], run: Path, *where: str) -> list[str]:
    """`accelerate launch` of two processes, which --multi_gpu brings on a CPU too; --cpu would start one only."""
    common = ["--multi_gpu", "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no", *where]
    return [sys.executable, "-m", "accelerate.commands.launch", *common, "-m", "training", *fit, "--run", str(run)]


@LINUX
@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_whatever_happens_to_their_launcher(fit, whole, tmp_path):
    """Batches of three: shares of two crops and one."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = launch([*fit, "--fold", "0"], run, "--num_machines", "1", "--main_process_port", "0")
    with started(command, log=log) as (launcher,):
        until((run / "fold0" / "checkpoint.pt").exists, "a checkpoint")
        launcher.kill()
        until(lambda: not members(run), "the workers to end with their launcher")
    assert not (run / "fold0" / "oof.npz").exists()
    with started(command, log=log) as (launcher,):  # pre-emption
        until(lambda: log.read_text().count("24 crops") == 2, "the workers to have found each other")
        launcher.terminate()
        assert launcher.wait(600) != 0
        assert not members(run)
    with started(command, log=log) as (launcher,):
        assert launcher.wait(600) == 0, log.read_text()
    assert "2 processes share each batch" in log.read_text()
    assert "fold 0 resumes after epoch" in log.read_text()
    check_same_training(run, whole, 0)


@LINUX
@pytest.mark.slow
def test_two_machines_take_the_steps_of_one_whatever_happens_to_a_worker(fit, whole, tmp_path, unused_port):
    run, log = tmp_path / "run", tmp_path / "log"
    commands = [
        launch(
            [*fit, "--fold", "1"],
            run,
            "--num_machines",
            "2",
            "--machine_rank",
            rank,
            "--main_process_ip",
            "127.0.0.1",
            "--main_process_port",
            unused_port,
        )
        for rank in "01"
    ]
    with started(*commands, log=log) as machines:
        until((run / "fold1" / "checkpoint.pt").exists, "a checkpoint")
        (worker,) = (p for p in psutil.Process(machines[1].pid).children() if str(run) in p.cmdline())
        worker.kill()
        assert all(machine.wait(600) for machine in machines)
        until(lambda: not members(run), "the other worker to end")
    assert not (run / "fold1" / "oof.npz").exists()
    log.write_text("")
    with started(*commands, log=log) as machines:
        assert [machine.wait(600) for machine in machines] == [0, 0], log.read_text()
    assert log.read_text().count("fold 1 epoch 6/6") == 1  # not once a machine
    check_same_training(run, whole, 1)


@pytest.fixture
def unused_port() -> str:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_jobs_of_one_run_may_prepare_it_at_once(fit, tmp_path):
    """One job a fold: whoever comes first writes, the others read the same; nothing is written twice."""
    crops = load_data([Path(fit[4])], lambda line: None)
    recipe = load_recipe("lite0", SETTINGS)
    fold = RunFolder(tmp_path).begin(recipe, crops)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert set(before) == {"recipe.json", "data.json", "split.csv"}
    assert (RunFolder(tmp_path).begin(recipe, crops) == fold).all()
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
    with pytest.raises(UserError, match=r"recipe\.json differs from this call in rank"):
        RunFolder(tmp_path).begin(load_recipe("lite0", [*SETTINGS, "rank=4"]), crops)
    assert {file.name for file in tmp_path.iterdir()} == set(before)


def test_parallel_where_it_cannot_be(fit, tmp_path, monkeypatch, capsys):
    words = [*fit, "--run", str(tmp_path / "run"), "--parallel"]
    assert main([*words, "0"]) == 1
    assert "--parallel 0; expected the number of folds at once" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main([*words, "2"]) == 1
    assert "start the launcher once for each fold" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("named", "count", "found"),
    [(None, 2, ["0", "1"]), ("3,1", 2, ["3", "1"]), ("GPU-a,GPU-b", 2, ["GPU-a", "GPU-b"]), ("-1", 0, []), ("", 0, [])],
)
def test_gpus_are_named_as_the_cluster_names_them(monkeypatch, named, count, found):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpus() == found
