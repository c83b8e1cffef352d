"""Faults around a job: killed in any phase, no space, no memory, no home, closed streams, neighbours. It never leaves
half an answer, never hangs, and says in one line what it lacked.

Most jobs here are processes with a stub for PyTorch and the ensemble, which start in a fifth of a second.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from inference.contract import OUTPUT, check_answers
from inference.errors import UserError
from inference.exits import describe, is_memory
from test.support.image_files import stack, with_pillow
from test.support.processes import interruptible
from test.support.stub import make_input, stub_manifest

ROOT = Path(__file__).resolve().parents[2]
STUBBED = """
import importlib, os, sys, time, types
from unittest import mock
sys.modules["torch"] = mock.MagicMock()
from test.support.stub import StubEnsemble
sys.modules["inference.ensemble"] = types.SimpleNamespace(Ensemble=StubEnsemble)
import inference.imageio.stack
from inference import __main__ as command, contract, manifest
place = os.environ.get("STALL")
if place:
    module, name = place.rsplit(".", 1)
    def stalled(*more, **options):
        os.write(1, b"ready\\n")
        time.sleep(3600)
    owner = StubEnsemble if module == "ensemble" else importlib.import_module(module)
    setattr(owner, name, stalled)
    if module == "os":
        setattr(os, name, stalled)
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """Arguments of subprocess.run for a job on a good stack of 16 pages with a stub ensemble."""
    stub_manifest(tmp_path / "weights")
    (tmp_path / "output").mkdir()
    make_input(tmp_path / "input", with_pillow([Image.fromarray(page) for page in stack(6, 16)]))
    paths = [f"--{name}={tmp_path / name}" for name in ("input", "output", "weights")]
    return {
        "args": [sys.executable, "-c", STUBBED, *paths],
        "cwd": ROOT,
        "env": dict(os.environ),
        "text": True,
        "timeout": 600,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }


def left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "output"))


def succeeded(done: subprocess.CompletedProcess, folder: Path) -> None:
    assert (done.returncode, done.stderr) == (0, "")
    assert left(folder) == [OUTPUT]
    check_answers(json.loads((folder / "output" / OUTPUT).read_text()), 16, 0.5)


def failed(done: subprocess.CompletedProcess, folder: Path, *words: str) -> None:
    assert done.returncode == 1, done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert left(folder) == []
    for word in words:
        assert word in done.stderr


PHASES = {
    "reading the manifest": "inference.job.load_manifest",
    "hashing": "inference.checksums.sha256",
    "finding the stack": "inference.job.find_stack",
    "reading the stack": "inference.imageio.stack.read_stack",
    "predicting": "ensemble.predict",
    "before writing": "inference.job.write_answers",
    "while writing": "os.fsync",
    "before the answers get their name": "os.link",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_any_phase(phase: str, number: signal.Signals, job: dict[str, Any], tmp_path: Path) -> None:
    job["env"]["STALL"] = PHASES[phase]
    job.pop("timeout")
    with subprocess.Popen(**job, preexec_fn=interruptible) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        if phase == "hashing" and number == signal.SIGINT:
            process.kill()  # a thread cannot be interrupted: the platform kills after five seconds
        assert process.wait(600) != 0  # the phase would take an hour
    assert left(tmp_path) == []
    shutil.rmtree(tmp_path / "output")


def test_a_child_is_interruptible_where_we_are_not() -> None:
    """As under nohup, or in a background job; else every test above that sends SIGINT would wait for an hour."""
    program = "import signal; print(signal.getsignal(signal.SIGINT) == signal.default_int_handler)"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        inherited, ours = (
            subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, preexec_fn=first).stdout
            for first in (None, interruptible)
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert (inherited, ours) == ("False\n", "True\n")


def test_killed_at_random_moments(job: dict[str, Any], tmp_path: Path) -> None:
    """All the answers or none, and nothing else; and the next job is not disturbed."""
    done = subprocess.run(**job)
    succeeded(done, tmp_path)
    whole = (tmp_path / "output" / OUTPUT).read_bytes()
    job.pop("timeout")
    for tenth in range(6):
        with subprocess.Popen(**job) as process:
            time.sleep(tenth / 10)
            process.kill()
        assert left(tmp_path) in ([], [OUTPUT])
        assert not left(tmp_path) or (tmp_path / "output" / OUTPUT).read_bytes() == whole
    succeeded(subprocess.run(**job), tmp_path)


def limit(kind: int, amount: int) -> Any:
    return lambda: resource.setrlimit(kind, (amount, amount))


def test_no_space_for_the_answers(job: dict[str, Any], tmp_path: Path) -> None:
    """A limit on file sizes fails in the same call as a full disk, and needs no rights to set up."""
    failed(subprocess.run(**job, preexec_fn=limit(resource.RLIMIT_FSIZE, 100)), tmp_path, "cannot write", "space")


def test_a_full_disk(job: dict[str, Any], tmp_path: Path) -> None:
    script = (
        f"mount -t tmpfs -o size=4k,nr_inodes=3 none {tmp_path}/output && head -c 4096 /dev/zero > {tmp_path}/output/x"
    )
    script += f'; "$@"; code=$?; ls -A {tmp_path}/output; exit $code'
    arguments = ["unshare", "--mount", "sh", "-c", script, "sh", *job.pop("args")]
    done = subprocess.run(arguments, **job)
    if "unshare" in done.stderr or "mount:" in done.stderr or not shutil.which("unshare"):
        pytest.skip("mounting is not allowed here")
    failed(done, tmp_path, "No space left on device")
    assert done.stdout.splitlines()[-1] == "x"


@pytest.mark.parametrize("output", ["/proc/sys", "/dev/null", "/nonexistent/output"])
def test_an_output_that_cannot_be_written(output: str, job: dict[str, Any], tmp_path: Path) -> None:
    job["args"] = [f"--output={output}" if "--output" in part else part for part in job["args"]]
    failed(subprocess.run(**job), tmp_path, "expected a writable folder")


@pytest.mark.parametrize("stream", ["stdout", "stderr", "both"])
@pytest.mark.parametrize("how", ["full", "closed", "broken"])
def test_a_log_that_nobody_reads_does_not_cost_the_answers(
    how: str, stream: str, job: dict[str, Any], tmp_path: Path
) -> None:
    numbers = {"stdout": "1", "stderr": "2"}
    chosen = [numbers[stream]] if stream in numbers else ["1", "2"]
    if how == "broken":
        ends = [os.pipe() for _ in chosen]
        for read, _ in ends:
            os.close(read)
        for number, (_, write) in zip(chosen, ends, strict=True):
            job["stdout" if number == "1" else "stderr"] = write
        done = subprocess.run(**job)
        for _, write in ends:
            os.close(write)
    else:
        redirects = " ".join(f"{number}>{'/dev/full' if how == 'full' else '&-'}" for number in chosen)
        job["args"] = ["sh", "-c", f'exec "$@" {redirects}', "sh", *job["args"]]
        done = subprocess.run(**job)
    assert done.returncode == 0 and not done.stderr
    check_answers(json.loads((tmp_path / "output" / OUTPUT).read_text()), 16, 0.5)


def test_without_home_shared_memory_and_proc(job: dict[str, Any], tmp_path: Path) -> None:
    job["env"] |= {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"}
    script = 'umount -l /dev/shm /proc; "$@"'
    arguments = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *job.pop("args")]
    done = subprocess.run(arguments, **job)
    if "unshare" in done.stderr or "umount:" in done.stderr:
        pytest.skip("unmounting is not allowed here")
    succeeded(done, tmp_path)


def test_as_a_user_without_a_name(job: dict[str, Any], tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("needs the rights of root to become another user")
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.owner() == "root" and folder != Path("/") and str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    (tmp_path / "output").chmod(0o777)
    job |= {"user": 54321, "group": 54321, "extra_groups": []}
    try:
        subprocess.run(**job | {"args": [sys.executable, "-c", "import numpy, PIL, inference"]}, check=True)
    except (PermissionError, subprocess.CalledProcessError):
        pytest.skip("this environment is not readable for others")
    succeeded(subprocess.run(**job), tmp_path)


def test_jobs_beside_each_other(job: dict[str, Any], tmp_path: Path) -> None:
    """Six at once, three of them into the same folder."""
    job.pop("timeout")
    outputs = [tmp_path / name for name in ("output", "output", "output", "a", "b", "c")]
    processes = []
    for output in outputs:
        output.mkdir(exist_ok=True)
        arguments = [f"--output={output}" if "--output" in part else part for part in job["args"]]
        processes.append(subprocess.Popen(**job | {"args": arguments}))
    for process in processes:
        _, err = process.communicate(timeout=600)
        assert (process.returncode, err) == (0, "")
    texts = {(output / OUTPUT).read_bytes() for output in outputs}
    assert len(texts) == 1 and all(os.listdir(output) == [OUTPUT] for output in outputs)


@pytest.mark.parametrize("mebibytes", [120, 350, 1000])
def test_a_memory_limit_is_one_clear_line(mebibytes: int, miniature: Path, job: dict[str, Any], tmp_path: Path) -> None:
    """The platform sets RLIMIT_DATA for each process. PyTorch would not end in an error of its own, but crash."""
    paths = [part for part in job["args"][3:] if "--weights" not in part]
    job["args"] = [sys.executable, "-m", "inference", *paths, f"--weights={miniature}", "--device=cpu"]
    job["env"] |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(**job, preexec_fn=limit(resource.RLIMIT_DATA, mebibytes << 20))
    failed(done, tmp_path, f"memory limit is {mebibytes:,} MiB", "raise it")


def test_too_little_memory_for_the_stack(job: dict[str, Any], tmp_path: Path) -> None:
    pages = [Image.new("RGB", (4096, 4096))] * 8  # 384 MiB as RGB, 0.2 MB as a file
    make_input(tmp_path / "input", with_pillow(pages, "tiff_adobe_deflate"))
    failed(subprocess.run(**job, preexec_fn=limit(resource.RLIMIT_DATA, 300 << 20)), tmp_path, "out of memory")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)
def test_a_lack_of_memory_under_any_name(error: Exception) -> None:
    assert describe(error).startswith("out of memory; expected")
    wrapped = RuntimeError("loading failed")
    wrapped.__cause__ = error
    assert describe(wrapped).startswith("out of memory")
    assert not is_memory(UserError("cannot allocate memory is in the name of a file"))
