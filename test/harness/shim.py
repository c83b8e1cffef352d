"""Starts an algorithm's command as the platform's entry shim does. Runs as root in a container, natively as the caller.

    python shim.py JOB/job.json

Standard library and unpack.py beside it, because it runs in images that we know nothing about. It resets the folders,
"downloads" the input, unpacks the model tarball, limits data memory, drops to the image's user, runs the command, and
"uploads" the output of a job that exited with 0. One time limit counts all of it; at its end the command gets TERM (the
process group), and KILL five seconds later.
Beside job.json lie input/ (read), and output/, stdout.log, stderr.log, result.json (written).
"""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from unpack import SetupError, unpack

GRACE_SECONDS = 5


def find_user(user: str) -> tuple[int | None, int | None, list[int], str | None]:
    """Resolves Docker's USER into (uid, gid, groups, home); an unknown number keeps the caller's group and home."""
    match = re.fullmatch(r"([A-Za-z][A-Za-z0-9._-]*|[0-9]+)?(?::([A-Za-z][A-Za-z0-9._-]*|[0-9]+))?", user)
    if not match:
        raise SetupError(f"Invalid argument for the containers USER instruction ({user!r})")
    name, group = match.groups()
    uid, gid, home = None, None, None
    groups: list[int] = []
    if name is not None:
        try:
            entry = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
            uid, gid, home = entry.pw_uid, entry.pw_gid, entry.pw_dir
            groups = [line.gr_gid for line in grp.getgrall() if entry.pw_name in line.gr_mem]
        except KeyError:
            if not name.isdigit():
                raise SetupError(
                    f"The user defined in the containers USER instruction does not exist ({name!r})"
                ) from None
            uid = int(name)
    if group is not None:
        try:
            gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
        except KeyError:
            raise SetupError(
                f"The group defined in the containers USER instruction does not exist ({group!r})"
            ) from None
    return uid, gid, groups if gid is None else [gid, *sorted({*groups} - {gid})], home


def clean(folder: Path) -> None:
    """Removes what lies in a folder, not the folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def reset_folders(job: dict[str, Any], files: Path) -> None:
    """Puts /input, /output, /tmp and the folders below /opt/ml into the state that a program finds on the platform."""
    source, linked = Path(job["input_source"]), Path(job["input"])
    try:
        if job["link_input"]:
            if linked.is_dir() and not linked.is_symlink():
                clean(linked)
                linked.rmdir()
            linked.unlink(missing_ok=True)
            source.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(files / "input", source)
            linked.symlink_to(source)
        else:  # a read-only root: no link can be made
            source = linked
            shutil.copytree(files / "input", source, dirs_exist_ok=True)
        Path(job["output"]).mkdir(parents=True, exist_ok=True)
        clean(Path(job["output"]))
    except OSError as error:
        raise SetupError(f"The containers input and output directories could not be reset: {error}") from error
    for path in (source, *source.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    open_folders(job)


def open_folders(job: dict[str, Any]) -> None:
    """Makes the folders that every program may write to."""
    for name in (job["output"], job["tmp"], *job["writable"]):
        Path(name).mkdir(parents=True, exist_ok=True)
        Path(name).chmod(0o777)


def set_up_model(job: dict[str, Any]) -> None:
    """Unpacks the model tarball as `filter="data"` does (or copies a folder), and gives it to the image's user."""
    try:
        if os.path.isdir(job["model_source"]):
            shutil.copytree(job["model_source"], job["model"], dirs_exist_ok=True)
        else:
            unpack(job["model_source"], job["model"])
    except OSError as error:
        raise SetupError(f"Could not set up model: {error}") from error
    if job["user"]:
        uid, gid = (-1 if number is None else number for number in find_user(job["user"])[:2])
        for path in Path(job["model"]).rglob("*"):
            os.chown(path, uid, gid, follow_symlinks=False)


def oom_kills() -> int:
    """Number of processes that the kernel killed in this container for lack of memory (cgroup v2, then v1)."""
    for name in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        try:
            for line in Path(name).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        except OSError:
            continue
    return 0


def start_command(job: dict[str, Any], files: Path) -> tuple[subprocess.Popen[bytes], list[threading.Thread]]:
    """Starts the command as the image's user; two threads write its streams into stdout.log and stderr.log."""
    env = {k: v for k, v in os.environ.items() if not k.lower().startswith("grand_challenge_")} | job["env"]
    env.pop("PYTHONCOERCECLOCALE", None)  # set by the caller to keep this Python from adding LC_CTYPE
    identity: dict[str, Any] = {}
    if job["user"]:
        uid, gid, groups, home = find_user(job["user"])
        identity = {"user": uid, "group": gid, "extra_groups": groups}
        if home is not None:
            env["HOME"] = home
    limit = job["data_limit"]

    def limit_data() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    defined = "the containers ENTRYPOINT and CMD instructions"
    try:
        process = subprocess.Popen(
            job["command"],
            cwd=job["cwd"] or "/",
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=limit_data,
            **identity,
        )
    except PermissionError as error:
        message = "The user defined in the containers USER instruction does not have permission to execute the command"
        raise SetupError(f"{message} defined by {defined} ({error})") from error
    except FileNotFoundError as error:
        raise SetupError(f"The command defined by {defined} does not exist ({error})") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise SetupError(f"The command {job['command']} could not be started: {error}") from error
    readers = []
    for stream, name in ((process.stdout, "stdout.log"), (process.stderr, "stderr.log")):
        readers.append(threading.Thread(target=copy_log, args=(stream, files / name), daemon=True))
        readers[-1].start()
    return process, readers


def copy_log(stream: Any, path: Path) -> None:
    """Writes a stream to a file as it arrives."""
    with path.open("wb", buffering=0) as log:
        while chunk := stream.read1(2**16):
            log.write(chunk)


def end_group(process: subprocess.Popen[bytes]) -> int:
    """TERM to the process group, KILL after the grace period; returns the exit code."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def run_command(job: dict[str, Any], files: Path, start: float) -> dict[str, Any]:
    """Runs the command to its end or to the limit of the job, which began at `start`; its part of result.json."""
    kills = oom_kills()
    process, readers = start_command(job, files)
    timed_out = False
    try:
        code = process.wait(max(0, start + job["time_limit"] - time.monotonic()))
    except subprocess.TimeoutExpired:
        timed_out = True
        code = end_group(process)
    # the platform reads both streams to their end: a child that keeps them open keeps the job
    deadline = time.monotonic() + (GRACE_SECONDS if timed_out else min(30, job["time_limit"]))
    for reader in readers:
        reader.join(max(0, deadline - time.monotonic()))
    held = any(reader.is_alive() for reader in readers)
    with contextlib.suppress(ProcessLookupError):  # whatever the job left running
        os.killpg(process.pid, signal.SIGKILL)
    return {
        "code": code,
        "timed_out": timed_out,
        "streams_held": held,
        "oom": oom_kills() > kills,
        "seconds": time.monotonic() - start,
        "peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


def upload(output: Path, target: Path) -> str | None:
    """Copies every regular file below /output, following links; returns the error that a link to no file causes."""
    for path in sorted(output.rglob("*")):
        place = target / path.relative_to(output)
        if path.is_symlink() and not path.is_file():
            kind = "a link to a folder" if path.exists() else "a dangling link"
            return f"{path.name} is {kind}: the upload of the output breaks"
        if stat.S_ISREG(path.stat().st_mode):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    return None


def main(argument: str) -> int:
    """Runs the job that a job.json describes; returns 0 even when the job failed (result.json says so)."""
    start, files = time.monotonic(), Path(argument).resolve().parent
    job = json.loads(Path(argument).read_text())
    if job["tmp"] == "/tmp" and os.getpid() != 1:
        raise SystemExit("shim.py empties /input, /output and /tmp; outside a container give it other folders")
    result: dict[str, Any] = {"code": None, "error": None}
    try:
        reset_folders(job, files)
        if job["model_source"]:
            set_up_model(job)
        result.update(run_command(job, files, start))
        (files / "output").mkdir()
        if result["code"] == 0:
            result["error"] = upload(Path(job["output"]), files / "output")
        if job["details"] and os.path.exists(job["details"]):
            shutil.copyfile(job["details"], files / "details.json")
    except SetupError as error:
        result["error"] = str(error)
    (files / "result.json").write_text(json.dumps(result))
    for name in [job["output"], job["tmp"]]:  # nothing stays behind, and the caller may remove the folders
        if os.path.isdir(name):
            clean(Path(name))
    owner = os.stat(argument)  # the caller, also where user numbers are mapped
    for path in files.rglob("*") if os.geteuid() == 0 else ():
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
