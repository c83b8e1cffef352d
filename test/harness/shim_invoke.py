"""Starts an algorithm's server and hands it tasks, as the platform's entry shim does for images labelled `invoke`.

    python shim_invoke.py FOLDER/job.json

Beside shim.py, under the same conditions. The server starts once; each task has a folder of its own beside job.json
with input/ (read), and output/, stdout.log, stderr.log, result.json (written). The first failure ends the run. The
tasks together have the sum of their limits, and the start of the server is counted too.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import resource
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

import shim

CALL_SECONDS = 10.0  # of one health check
NOT_RUN = "The task was not run: an earlier one in this container failed"


def loopback_up() -> None:
    """Bring up the loopback interface: a new network namespace (native runs) starts without one."""
    with contextlib.suppress(OSError), socket.socket() as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 0x41))  # SIOCSIFFLAGS: up, running


def call(method: str, path: str, port: int, seconds: float) -> int:
    """Status of one request. OSError or HTTPException where there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request(method, path)
        return connection.getresponse().status
    finally:
        connection.close()


def wait_for_health(process: Any, port: int, seconds: float) -> None:
    """Returns when GET /health answers 200; SetupError when it does not in time, redirects, or the server has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            status = call("GET", "/health", port, min(CALL_SECONDS, seconds))
        except (OSError, http.client.HTTPException):
            status = 0
        if status == 200:
            return
        if 300 <= status < 400:
            raise shim.SetupError("Failed to start the algorithm container's inference server: /health redirects")
        if process.poll() is not None:  # the platform waits for its limit all the same
            raise shim.SetupError(
                f"The inference server ended with exit code {process.returncode} before it was healthy"
            )
        time.sleep(0.2)
    raise shim.SetupError(f"The inference server didn't pass the health check within {seconds:.0f} seconds")


def run_task(job: dict[str, Any], task: dict[str, Any], files: Path, deadline: float) -> dict[str, Any]:
    """One POST /invoke between a reset and an upload; returns result.json's content. deadline: of all tasks."""
    folder, start, kills = files / task["name"], time.monotonic(), shim.oom_kills()
    code, error, timed_out = 1, None, False
    shim.reset_folders(job | task, folder)
    try:
        allowed = min(job["time_limit"], deadline - time.monotonic())
        status = call("POST", "/invoke", job["port"], max(0.01, allowed))
        code = 0 if status == 201 else 1
    except TimeoutError:
        timed_out = True
    except ConnectionRefusedError as failure:
        error = f"Could not connect to invoke endpoint ({failure})"
    except (OSError, http.client.HTTPException) as failure:
        error = f"HTTP error calling invoke endpoint ({failure or type(failure).__name__})"
    seconds = time.monotonic() - start
    time.sleep(0.3)  # the last log lines may still be in a pipe
    (folder / "output").mkdir()
    if code == 0:
        error = shim.upload(Path(job["output"]), folder / "output")
    for name in (job["output"], job["input"]):
        shim.clean(Path(name))
    return {
        "code": None if error and code else code,
        "error": error,
        "timed_out": timed_out,
        "oom": shim.oom_kills() > kills,
        "seconds": seconds,
    }


def take_logs(files: Path, folder: Path, sizes: dict[str, int]) -> None:
    """Copies what was logged since `sizes` to the task's folder, and brings `sizes` up to date."""
    for name in sizes:
        log = (files / name).read_bytes() if (files / name).exists() else b""
        (folder / name).write_bytes(log[sizes[name] :])
        sizes[name] = len(log)


def main(argument: str) -> int:
    begin, files = time.monotonic(), Path(argument).resolve().parent
    job = json.loads(Path(argument).read_text())
    if job["tmp"] == "/tmp" and os.getpid() != 1:
        raise SystemExit("shim_invoke.py empties /input, /output and /tmp; outside a container give it other folders")
    server: dict[str, Any] = {"code": None}
    sizes = {"stdout.log": 0, "stderr.log": 0}
    process, failed = None, None
    deadline = begin + len(job["tasks"]) * job["time_limit"]
    try:
        loopback_up()
        shim.open_folders(job)
        if job["model_source"]:
            shim.set_up_model(job)
        process, readers = shim.start_command(job, files)
        wait_for_health(process, job["port"], min(job["start_limit"], deadline - time.monotonic()))
    except shim.SetupError as error:
        failed = str(error)
        if process is not None and process.poll() is not None:
            for reader in readers:  # the last log lines may still be in a pipe
                reader.join(5)
    for task in job["tasks"]:
        result: dict[str, Any] = {"code": None, "error": failed, "skipped": failed == NOT_RUN}
        result["timed_out"] = bool(failed) and not result["skipped"] and time.monotonic() >= deadline
        result["seconds"] = time.monotonic() - begin if result["timed_out"] else 0.0
        try:
            if not failed:
                result = run_task(job, task, files, deadline)
        except shim.SetupError as error:
            result["error"] = str(error)
        take_logs(files, files / task["name"], sizes)
        (files / task["name"] / "result.json").write_text(json.dumps(result))
        if result["code"] != 0 or result["error"]:
            failed = NOT_RUN
    if process is not None:
        server["code"] = shim.end_group(process)
        for reader in readers:
            reader.join(5)
    server["peak_mib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    (files / "server.json").write_text(json.dumps(server))
    for name in [job["output"], job["tmp"]]:
        if os.path.isdir(name):
            shim.clean(Path(name))
    owner = os.stat(argument)
    for path in files.rglob("*") if os.geteuid() == 0 else ():
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
