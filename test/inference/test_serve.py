"""The server of the platform's invoke interface: statuses, one line on stderr, no state between tasks, a clean end."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from inference.checks import passed
from inference.contract import OUTPUT
from inference.errors import UserError
from inference.server import ScoreEndpoint, Server
from test.harness import engines, layout, readout, served
from test.support.miniature import make_ensemble
from test.support.processes import connections, until
from test.support.programs import messages

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "test/sample/stack_0.tiff"


NO_SCORES = ScoreEndpoint({}, lambda request: {})


def free_port() -> int:
    with socket.socket() as any_socket:
        any_socket.bind(("127.0.0.1", 0))
        return any_socket.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def call(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request(method, path, body)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read() or b"{}")


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    make_ensemble(folder)
    return folder


def start(ensemble: Path, folder: Path, port: int) -> subprocess.Popen[str]:
    places = [f"--{name}={folder / name}" for name in ("input", "output")]
    command = [sys.executable, "-m", "inference", "serve", f"--weights={ensemble}", "--device=cpu", f"--port={port}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *places], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_tasks_of_a_real_server_do_not_meet(ensemble: Path, tmp_path: Path) -> None:
    """A good task, a bad one, no task, and the first again: each is answered as if it were alone."""
    (tmp_path / "output").mkdir()
    port = free_port()
    server = start(ensemble, tmp_path, port)
    answer, statuses, answers = tmp_path / "output" / OUTPUT, [], []
    try:
        until(lambda: server.poll() is not None or listens(port), "the server to listen")
        assert call(port, "GET", "/health") == (200, {"status": "ready"})
        for task in ("good", "bad", "none", "good"):
            shutil.rmtree(tmp_path / "input", ignore_errors=True)
            if task != "none":
                layout.write_input(SAMPLE, tmp_path / "input", "2026", Random(len(statuses)))
            if task == "bad":
                [stack] = (tmp_path / "input/images" / layout.SLUG).iterdir()
                stack.write_bytes(b"II*\0 no stack")
            status, content = call(port, "POST", "/invoke", b"ignored")
            statuses.append(status)
            assert ("error" in content) == (status != 201)
            assert answer.exists() == (status == 201)  # also the answers of the task before are gone
            answers.append(answer.read_bytes() if answer.exists() else None)
        assert call(port, "GET", "/")[0] == 200 and call(port, "POST", "/health")[0] == 404
    finally:
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=600)
    assert statuses == [201, 500, 500, 201]
    assert answers[0] == answers[3] is not None
    assert server.returncode == 0
    assert len(err.splitlines()) == 2, err
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert out.splitlines()[-1] == "stopped"
    assert out.count("task: 16 pages") == 2


@pytest.fixture
def server() -> Iterator[Callable[..., Server]]:
    """A server in this process whose task is a function."""
    with ThreadPoolExecutor(1) as pool:
        made = []

        def make(task: Callable[[], dict[str, object]]) -> Server:
            made.append(Server(("127.0.0.1", 0), pool, task, NO_SCORES))
            threading.Thread(target=made[-1].serve_forever, args=(0.01,)).start()
            return made[-1]

        yield make
        for one in made:
            one.shutdown()
            one.server_close()


def test_tasks_run_one_at_a_time_and_health_answers_meanwhile(server: Callable[..., Server]) -> None:
    running, most = [0], [0]
    begun, go = threading.Event(), threading.Event()

    def task() -> dict[str, object]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        begun.set()
        assert go.wait(600)
        running[0] -= 1
        return {"pages": 1, "seconds": 0.0}

    port = server(task).server_port
    with ThreadPoolExecutor(4) as callers:
        calls = [callers.submit(call, port, "POST", "/invoke") for _ in range(4)]
        assert begun.wait(600)
        assert call(port, "GET", "/health")[0] == 200
        go.set()
        assert [one.result()[0] for one in calls] == [201] * 4
    assert most == [1]


def test_the_task_that_runs_is_finished_before_the_end(server: Callable[..., Server]) -> None:
    begun, go = threading.Event(), threading.Event()

    def task() -> dict[str, object]:
        begun.set()
        go.wait(600)
        return {"pages": 1, "seconds": 0.0}

    one = server(task)
    with ThreadPoolExecutor(2) as callers:
        first = callers.submit(call, one.server_port, "POST", "/invoke")
        assert begun.wait(600)
        before = connections()
        second = callers.submit(call, one.server_port, "POST", "/invoke")
        until(lambda: connections() > before, "the second to be taken")
        one.stop()
        go.set()
        assert first.result()[0] == 201
        assert second.result()[0] == 503


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("found no stack\nexpected one"), "error: found no stack expected one"),
        (MemoryError(), "error: out of memory"),
        (RuntimeError("boom"), "error: unexpected RuntimeError: boom"),
    ],
)
def test_a_failing_task_is_one_line(
    server: Callable[..., Server], error: Exception, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    failures = [error]

    def task() -> dict[str, object]:
        print("a library warns", file=sys.stderr)
        if failures:
            raise failures.pop()
        return {"pages": 1, "seconds": 0.0}

    port = server(task).server_port
    status, content = call(port, "POST", "/invoke")
    assert (status, str(content["error"]).startswith(line)) == (500, True)
    assert call(port, "POST", "/invoke")[0] == 201
    said = capfd.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith(line)
    assert "a library warns" in said.out


def test_a_taken_port_and_missing_weights_are_one_line(ensemble: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="expected a free port"):
            Server(("127.0.0.1", taken.getsockname()[1]), ThreadPoolExecutor(1), dict, NO_SCORES)
    done = start(tmp_path, tmp_path, free_port())
    err = done.communicate(timeout=600)[1]
    assert done.returncode == 1
    assert err.count("\n") == 1, err
    assert "no ensemble.json" in err


def test_the_harness_runs_several_tasks_through_one_server(ensemble: Path, tmp_path: Path) -> None:
    pks = [layout.write_input(SAMPLE, tmp_path / f"{k}/input", "2026", Random(k)) for k in range(3)]
    [stack] = (tmp_path / "1/input/images" / layout.SLUG).iterdir()
    stack.unlink()
    runs = served.run_native(tmp_path, pks, ensemble, engines.Limits(seconds=300))
    findings = [readout.judge(run, 16)[1] for run in runs]
    assert passed(findings[0]), messages(findings[0])
    assert "exit code 1: error: no image among 0 files" in messages(findings[1])
    assert "not run: an earlier one in this container failed" in messages(findings[2])
    assert json.loads((tmp_path / "server.json").read_text())["code"] == 0
    assert b"ready on" in runs[0].stdout


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit('no GPU')", "ended with exit code 1 before it was healthy"),
        ("import time; time.sleep(60)", "didn't pass the health check within 2 seconds"),
        ("import time; time.sleep(61)", "Time limit exceeded"),  # of the task, which the server's start counts against
        ("REDIRECT", "/health redirects"),
        ("HANG", "Time limit exceeded"),
        ("CLOSE", "HTTP error calling invoke endpoint"),
    ],
)
def test_the_harness_catches_broken_servers(program: str, message: str, tmp_path: Path) -> None:
    short = program == "HANG" or "61" in program
    if program.isupper():
        health = "302" if program == "REDIRECT" else "200"
        program = f"""
import http.server, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response({health}); self.end_headers()
    def do_POST(self): {"time.sleep(3600)" if short else "self.connection.close()"}
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("", 4743), Handler).serve_forever()
"""
    pk = layout.write_input(SAMPLE, tmp_path / "0/input", "2026", Random(0))
    limits = engines.Limits(seconds=1 if short else 300, start_seconds=2 if program.startswith("import time") else 300)
    [run] = served.run_native(tmp_path, [pk], None, limits, [sys.executable, "-c", program])
    assert message in messages(readout.judge(run, 16)[1])
