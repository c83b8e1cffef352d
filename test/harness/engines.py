"""Runs one job in a fresh container, or natively in the same folder layout. Both hand the job to shim.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from inference.checks import docker
from inference.phase import VARIABLE
from test.harness import gpus

ROOT = Path(__file__).resolve().parents[2]
SHIM = "shim.py"
PROGRAMS = (*(ROOT / "test/harness" / name for name in (SHIM, "shim_invoke.py")), ROOT / "release/unpack.py")
PLATFORM_ENV = {"LOG_LEVEL": "INFO", "PYTHONUNBUFFERED": "1", "no_proxy": "amazonaws.com"}
OURS = ["-m", "inference"]  # a command that ends with these words understands --details


@dataclass(frozen=True)
class Limits:
    """What the platform allows a job: the request for a T4 with 16 GB, on its cheapest instance."""

    memory_gib: int = 16
    seconds: float = 300  # the shortest limit that a phase may set
    shm: str = "8g"  # half the memory; the organisers' own re-run gave 1g
    cpus: int = 4
    gpus: str = "auto"  # auto, all or none
    strict: bool = False  # read-only root, no capabilities, no new privileges, a limit of 256 processes
    start_seconds: float = 300  # of a server (invoke): from its start to the first answer on /health

    @property
    def data_bytes(self) -> int:
        """RLIMIT_DATA of the program: the instance's memory less 1 GiB."""
        return (self.memory_gib - 1) * 2**30


@dataclass(frozen=True)
class Run:
    """How a job ended. `code` is None when its program did not start; `error` is the platform's own message then.

    skipped: never started, because an earlier task in its container failed.
    reported: the last lines of stderr in the published shim's result, from which the platform takes what it shows.
    """

    code: int | None
    error: str | None
    output: Path
    stdout: bytes = b""
    stderr: bytes = b""
    timed_out: bool = False
    streams_held: bool = False
    oom: bool = False
    skipped: bool = False
    reported: list[str] | None = None
    seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_mib: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


def inspect(image: str) -> dict[str, Any] | None:
    """`docker image inspect`, or None when there is no such image, or no engine."""
    client = docker()
    answer = client and subprocess.run([client, "image", "inspect", image], capture_output=True)
    return json.loads(answer.stdout)[0] if answer and answer.returncode == 0 else None


def run_docker(image: str, folder: Path, pk: str, weights: Path | None, limits: Limits, details: bool = True) -> Run:
    """Runs the image's command on folder/input in a fresh container without network.

    Args:
        image: tag; its ENTRYPOINT, CMD, USER and WORKDIR are handed to the shim, which runs as root in its place.
        folder: the job's folder with input/; receives output/, the logs and result.json.
        weights: None, or what appears at /opt/ml/model: an ensemble folder (copied) or a model tarball (unpacked).
        details: ask a job of ours for details; otherwise the command is exactly the image's, as on the platform.
    Raises: RuntimeError when the image is missing or has no command.
    """
    job = describe_image(image, limits)
    file = "/tmp/details.json" if details and job["command"][-2:] == OURS else None
    job["command"] += ["--details", file] if file else []
    job |= {"input_source": f"/opt/ml/input/data/{pk}-input", "details": file}
    return collect(folder, *run_container(image, folder, job, weights, limits))


def describe_image(image: str, limits: Limits) -> dict[str, Any]:
    """What job.json says of a container of `image`. RuntimeError when the image is missing or has no command."""
    about = inspect(image)
    if about is None:
        raise RuntimeError(f"no image {image}; build it with ./build.sh")
    config = about["Config"]
    command = (config.get("Entrypoint") or []) + (config.get("Cmd") or [])
    if not command:
        raise RuntimeError(f"{image} has neither ENTRYPOINT nor CMD: the platform cannot start it; add an ENTRYPOINT")
    return describe(command, config.get("WorkingDir") or "/", limits) | {
        "user": config.get("User") or "",
        "input": "/input",
        "link_input": not limits.strict,
        "output": "/output",
        "tmp": "/tmp",
        "model": "/opt/ml/model",
        "writable": [f"/opt/ml/{name}" for name in ("model", "output/data", "checkpoints", "input/data/ground_truth")],
    }


def run_container(
    image: str, folder: Path, job: dict[str, Any], weights: Path | None, limits: Limits, script: str = SHIM
) -> tuple[float, int, str]:
    """Runs `script` on `job` as root in a fresh container; returns its seconds, exit code and stderr."""
    program = place_programs(folder) / script
    job["model_source"] = "/weights" if weights is not None else None
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "tmp").mkdir()
    folder.chmod(0o700)  # root's, so that the job cannot look into /harness
    name = f"harness-{uuid.uuid4()}"
    options = ["--rm", "--name", name, "--network", "none", "--user", "0", "--entrypoint", "python3"]
    options += ["--env", "PYTHONCOERCECLOCALE=0", *limit_options(limits)]
    volumes = [f"{folder}:/harness", f"{folder / 'tmp'}:/tmp"]
    if weights is not None:
        (folder / "model").mkdir()
        volumes += [f"{weights}:/weights:ro", f"{folder / 'model'}:/opt/ml/model"]
    options += [f"--volume={volume}" for volume in volumes]
    if limits.strict:
        options += ["--read-only", "--security-opt", "no-new-privileges", "--pids-limit", "256", "--cap-drop", "ALL"]
        options += [f"--cap-add={name}" for name in ("CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID")]
        options += [f"--tmpfs={path}:rw,exec,mode=0755" for path in ("/input", "/output", "/opt/ml")]
    command = [image, f"/harness/{program.relative_to(folder)}", "/harness/job.json"]
    return docker_run([*options, *command], name, limits, len(job.get("tasks", "1")))


def place_programs(folder: Path) -> Path:
    """Copies what stands in for the platform's shim, with what it imports, to a folder beside job.json."""
    target = folder / "program"
    target.mkdir()
    for path in PROGRAMS:
        shutil.copyfile(path, target / path.name)
    return target


def limit_options(limits: Limits) -> list[str]:
    """Options of `docker run` for the machine: memory, shared memory, processors, GPUs."""
    options = ["--memory", f"{limits.memory_gib}g", "--memory-swap", f"{limits.memory_gib}g", "--shm-size", limits.shm]
    options += ["--cpus", str(min(limits.cpus, os.cpu_count() or 1))]
    return options + gpus.container_options(limits.gpus)


def docker_run(
    arguments: list[str], name: str, limits: Limits, tasks: int = 1, log: Path | None = None
) -> tuple[float, int, str]:
    """`docker run`; kills a container that outlives its tasks' limits. Returns seconds, exit code and stderr.

    Both streams go to the file `log` if one is given.
    """
    start = time.monotonic()
    try:
        whole = [docker() or "docker", "run", *arguments]
        ended = subprocess.run(
            whole, capture_output=True, timeout=tasks * (limits.seconds + 10) + limits.start_seconds + 60
        )
        if log is not None:
            log.write_bytes(ended.stdout + ended.stderr)
        code, message = ended.returncode, ended.stderr.decode(errors="replace").strip()
    except subprocess.TimeoutExpired:
        subprocess.run([docker() or "docker", "kill", name], capture_output=True)
        code, message = 1, "the container did not end"
    return time.monotonic() - start, code, message


def run_native(folder: Path, pk: str, weights: Path | None, limits: Limits, command: list[str] | None = None) -> Run:
    """Runs the job (or `command`, where {input} and {output} stand for the folders) in the layout below `folder`.

    Not imitated, because it needs a container: another user, root-owned input, a fixed /input, the limit of 16 GiB.
    The network is cut off where `unshare` is allowed to.
    """
    places, job = native_places(folder)
    details = f"{places['tmp']}/details.json"
    if command is None:
        command = [native_python(), *OURS, "--input", "{input}", "--output", "{output}", "--details", details]
        if weights is not None:
            command += ["--weights", str(job["model"] if weights.is_file() else weights)]
    command = [word.format(**places) if word in ("{input}", "{output}", "{tmp}") else word for word in command]
    job |= describe([*offline(), *command], str(ROOT), limits)
    job |= {"input_source": f"{folder}/root/opt/ml/input/data/{pk}-input", "details": details}
    return collect(folder, *run_natively(folder, job, weights, limits))


def native_python() -> str:
    """Python of .venv, or this one."""
    python = ROOT / ".venv/bin/python"
    return str(python if python.exists() else sys.executable)


def native_places(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The platform's folders below `folder`, as words for a command and as a part of job.json."""
    root = folder / "root"
    (root / "home").mkdir(parents=True)
    places = {name: str(root / name) for name in ("input", "output", "tmp")}
    model = str(root / "opt/ml/model")
    return places, {"user": "", **places, "link_input": True, "model": model, "writable": [model]}


def run_natively(
    folder: Path, job: dict[str, Any], weights: Path | None, limits: Limits, script: str = SHIM, prefix: Any = ()
) -> tuple[float, int, str]:
    """Runs `script` on `job` as a process of the caller; returns its seconds, exit code and stderr."""
    job["model_source"] = str(weights) if weights is not None and weights.is_file() else None
    (folder / "job.json").write_text(json.dumps(job))
    names = ("PATH", "LD_LIBRARY_PATH", "LANG", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", VARIABLE)
    keep = {k: v for k, v in os.environ.items() if k in names}
    keep |= gpus.visible(limits.gpus, keep.get("CUDA_VISIBLE_DEVICES"))
    keep |= {"HOME": str(folder / "root/home"), "TMPDIR": job["tmp"], "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    program = place_programs(folder) / script
    start = time.monotonic()
    ended = subprocess.run([*prefix, sys.executable, program, folder / "job.json"], env=keep, capture_output=True)
    return time.monotonic() - start, ended.returncode, ended.stderr.decode(errors="replace").strip()


def describe(command: list[str], cwd: str, limits: Limits) -> dict[str, Any]:
    """The part of job.json that both engines share; shim.py shows what each key does."""
    env, data = PLATFORM_ENV | gpus.environment(limits.gpus), limits.data_bytes
    return {"command": command, "cwd": cwd, "env": env, "data_limit": data, "time_limit": limits.seconds}


def collect(folder: Path, wall_seconds: float, code: int, message: str) -> Run:
    """Reads what the shim left in the job's folder; if there is no result.json, the container itself failed."""
    if not (folder / "result.json").exists():
        error = f"An unexpected error occurred ({message.splitlines()[-1] if message else f'exit code {code}'})"
        return Run(code=137 if code == 137 else None, error=error, output=folder / "output", oom=code == 137)
    result = json.loads((folder / "result.json").read_text())
    details = folder / "details.json"
    return Run(
        output=folder / "output",
        stdout=read_log(folder / "stdout.log"),
        stderr=read_log(folder / "stderr.log"),
        wall_seconds=wall_seconds,
        details=json.loads(details.read_text()) if details.exists() else {},
        **result,
    )


def read_log(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


@cache
def offline() -> tuple[str, ...]:
    """Prefix of a native command that cuts the network off, or nothing where that is not allowed."""
    for prefix in (("unshare", "--net"), ("unshare", "--net", "--map-root-user")):
        if shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            return prefix
    return ()
