"""`python -m inference serve`: the platform's `invoke` interface. The ensemble is loaded once, each task is a request.

    GET  /health   200 once the ensemble is loaded and has computed; before that nobody listens
    POST /invoke   one task, /input to /output as in a job: 201, or 500 and one line on stderr where it fails

Tasks run one at a time in one thread, whatever number is asked at once. Nothing of a task is kept: the answers of the
one before are removed first, and input is read anew. TERM ends the server with exit code 0, after the task that runs.
Source: the platform's entry shim (sagemaker-shim 0.7 and later), which calls 127.0.0.1:4743 without a body.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commandline import add_ensemble_options
from .errors import UserError
from .exits import describe, log, stderr_in_log
from .job import Clock, answer_stack
from .manifest import default_ensemble

if TYPE_CHECKING:
    from .ensemble import Ensemble

PORT = 4743  # the platform's
BODY = 1 << 20  # bytes of a request that are read, to be ignored

Answer = tuple[int, dict[str, Any]]


def load(weights: Path, device: str, precision: str) -> Ensemble:
    """The ensemble, checked, loaded and warm: one grey crop has gone through it."""
    import numpy as np

    from .ensemble import Ensemble

    ensemble = Ensemble.load(weights, device, precision)
    ensemble.predict([np.full((64, 64, 3), 128, np.uint8)])
    return ensemble


def run_task(ensemble: Ensemble, input_dir: Path, output_dir: Path) -> dict[str, Any]:
    """Answer the stack in `input_dir`; returns the number of pages and the seconds. UserError as in a job."""
    clock = Clock(time.perf_counter())
    _, prediction = answer_stack(input_dir, output_dir, lambda: lambda: ensemble, clock)
    return {"pages": len(prediction.p_atypical), "seconds": round(sum(clock.seconds.values()), 3)}


class Server(ThreadingHTTPServer):
    """Answers /health at any time and hands /invoke to `task`, in the one thread of `pool`."""

    daemon_threads = True  # an idle connection must not hold up the end

    def __init__(self, address: tuple[str, int], pool: ThreadPoolExecutor, task: Callable[[], dict[str, Any]]) -> None:
        self.pool, self.task = pool, task
        self.turn = threading.Lock()  # held while a task runs and is answered
        self.stopping = False
        try:
            super().__init__(address, Handler)
        except OSError as error:
            raise UserError(
                f"cannot listen on {address[0]}:{address[1]} ({error.strerror}); expected a free port; use --port"
            ) from None

    def invoke(self) -> Answer:
        """Runs one task; a failure is one line on stderr, and the next task finds the server as it was."""
        try:
            with stderr_in_log():
                done = self.task()
        except Exception as error:
            line = f"error: {describe(error)}"
            print(line, file=sys.stderr, flush=True)
            return 500, {"error": line}
        log(f"task: {done['pages']} pages, {done['seconds']:.3f} seconds")
        return 201, done

    def stop(self, *_: object) -> None:
        """Stops listening; called by a signal, so another thread waits for the loop to end."""
        self.stopping = True
        threading.Thread(target=self.shutdown, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    """One connection. HTTP/1.0: each request has its own."""

    server: Server
    timeout = 60  # seconds for a client to send its request

    def do_GET(self) -> None:
        self.answer(*((200, {"status": "ready"}) if self.path == "/health" else unknown(self.path)))

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "0")
        self.rfile.read(min(int(length), BODY) if length.isdecimal() else 0)  # unread bytes would reset the connection
        if self.path != "/invoke":
            self.answer(*unknown(self.path))
            return
        with self.server.turn:
            if self.server.stopping:
                self.answer(503, {"error": "the server is stopping"})
            else:
                self.answer(*self.server.pool.submit(self.server.invoke).result())

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client gave up; the answers are in the output folder all the same
            log("note: nobody waited for the response")

    def log_message(self, *_: object) -> None:
        """Nothing: a line on stderr marks a task with a warning."""


def unknown(path: str) -> Answer:
    return 404, {"error": f"nothing at {path[:100]}; expected GET /health or POST /invoke"}


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", type=Path, default=Path("/input"), metavar="DIR", help="of every task (default /input)")
    add("--output", type=Path, default=Path("/output"), metavar="DIR", help="of every task (default /output)")
    add_ensemble_options(parser)
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1; in the image 0.0.0.0)")
    add("--port", type=int, default=PORT, help=f"default {PORT}, the platform's")


def run(options: argparse.Namespace) -> None:
    """Serve until TERM or an interrupt; UserError where the ensemble or the port cannot be had."""
    for number in (signal.SIGTERM, signal.SIGINT):  # while it loads there is nothing to finish
        signal.signal(number, lambda *_: os._exit(0))
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:  # PyTorch keeps its worker threads for the thread that first computed
        with stderr_in_log():
            ensemble = pool.submit(
                load, options.weights or default_ensemble(), options.device, options.precision
            ).result()
        server = Server((options.host, options.port), pool, lambda: run_task(ensemble, options.input, options.output))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, server.stop)
        log(f"ensemble {ensemble.manifest.name}, device {ensemble.device.type}, precision {ensemble.precision}")
        log(f"ready on {options.host}:{server.server_port} after {time.perf_counter() - start:.1f} seconds")
        server.serve_forever(poll_interval=0.1)
        with server.turn:  # the task that runs, and its response
            server.server_close()
    log("stopped")
