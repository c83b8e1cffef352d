"""Time limits, counted attempts, tasks that share a container, natively: what the platform counts and drops."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from test.harness import __main__ as command_line
from test.harness import engines, network, served
from test.support.programs import GOOD, make_stack


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_tasks_of_one_server_of_which_one_fails(
    bad: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first, a middle or the last of four: what was answered before it is worth nothing, the rest is not run."""
    server = (
        GOOD
        + f"""
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    count = 0
    def do_GET(self): self.send_response(200); self.end_headers()
    def do_POST(self):
        json.dump(answers, open(path, "w"))
        self.send_response(500 if Handler.count == {bad} else 201); self.end_headers()
        Handler.count += 1
    def log_message(self, *_): pass
http.server.HTTPServer(("", 4743), Handler).serve_forever()
"""
    )
    real = served.run_native

    def run(folder: Path, pks: list[str], weights: None, limits: engines.Limits) -> list[engines.Run]:
        return real(folder, pks, weights, limits, [sys.executable, "-c", server, "{input}", "{output}"])

    monkeypatch.setattr(served, "run_native", run)
    for number in range(4):
        make_stack(tmp_path / f"stack_{number}.tiff")
    options = ["--engine", "native", "--no-build", "--api", "invoke", "--strict", "--input", str(tmp_path)]
    assert command_line.main([*options, "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    worth = f"the answers of {bad} stack(s) count for nothing, {3 - bad} were not run"
    assert f"stack_{bad}.tiff failed, and with it the evaluation of all 4 stacks: {worth}" in said
    shown = "The job ended with exit code 1: no errors were reported in the logs"
    assert f"at most this is shown of stack_{bad}.tiff, and nothing in a phase that hides its jobs: {shown}" in said
    assert said.count("at most this is shown") == 1


def test_what_is_read_before_the_start_counts(tmp_path: Path) -> None:
    """A job that began 100 seconds ago, with a limit of 60, is ended at once."""
    engines.place_programs(tmp_path)
    job = engines.describe([sys.executable, "-c", "import time; time.sleep(3600)"], "/", engines.Limits(seconds=60))
    program = "import json, pathlib, shim, sys, time\n"
    program += "job, files = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])\n"
    program += "print(json.dumps(shim.run_command(job, files, time.monotonic() - 100)))"
    command = [sys.executable, "-c", program, json.dumps(job | {"user": ""}), tmp_path]
    ended = subprocess.run(command, cwd=tmp_path / "program", capture_output=True, text=True, check=True)
    result = json.loads(ended.stdout)
    assert result["timed_out"] and result["seconds"] >= 100


def test_calls_are_counted_as_in_the_example_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    """30 attempts, 5 seconds between two, 10 seconds for each; the clock and the server are played."""
    calls: list[float] = []
    pauses: list[float] = []

    def refuse(name: str, port: int, timeout: float) -> None:
        calls.append(timeout)
        raise ConnectionRefusedError("refused")

    command = ["-c", "server", *network.arguments()]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr("time.sleep", pauses.append)
    monkeypatch.setattr("http.client.HTTPConnection", refuse)
    with pytest.raises(SystemExit, match="30 calls of /health failed, the last one with: refused"):
        exec(network.CALLER, {})
    assert calls == [10.0] * 30
    assert pauses == [0, *[5.0] * 29]
