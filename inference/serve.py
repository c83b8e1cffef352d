"""`python -m inference serve`: load the ensemble once and answer HTTP requests, the platform's `invoke` among them.

    GET  /health   200 once the ensemble is loaded and has computed; until then the port is closed
    POST /invoke   one task, /input to /output as in a job: 201, or 500 and one line on stderr if it fails
    POST /score    crops in the request, probabilities in the response: see inference/score_request.py
    GET  /         which ensemble answers, and what it expects; GET /openapi.json describes all of these

Tasks run one at a time in one thread, however many are requested at once. Nothing is kept between tasks: the previous
answers are removed first, and the input is read again. SIGTERM ends the server with exit code 0 after the current task.
Source: the platform's entry shim (sagemaker-shim 0.7 and later), which calls 127.0.0.1:4743 without a body.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import score_request
from .commandline import add_ensemble_options
from .errors import UserError
from .exits import describe, log, stderr_in_log
from .job import Clock, answer_stack
from .manifest import default_ensemble

if TYPE_CHECKING:
    from .ensemble import Ensemble

PORT = 4743  # the platform's
BODY = 1 << 20  # bytes of a request to /invoke that are read and ignored
OPENAPI = Path(__file__).with_name("openapi.json")

Answer = tuple[int, dict[str, Any]]


def load(weights: Path, device: str, precision: str) -> Ensemble:
    """Check and load the ensemble, and warm it up with one grey crop."""
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


@dataclass(frozen=True)
class Scorer:
    """The answers to `GET /` and `POST /score`."""

    about: dict[str, Any]
    score: Callable[[score_request.Request], dict[str, Any]]


class Server(ThreadingHTTPServer):
    """Answers /health at any time and hands /invoke to `task`, and /score to `scorer`, in the one thread of `pool`."""

    daemon_threads = True  # an idle connection must not delay shutdown

    def __init__(
        self,
        address: tuple[str, int],
        pool: ThreadPoolExecutor,
        task: Callable[[], dict[str, Any]],
        scorer: Scorer | None = None,
    ) -> None:
        self.pool, self.task, self.scorer = pool, task, scorer
        self.turn = threading.Lock()  # held while a task runs and is answered
        self.stopping = False
        try:
            super().__init__(address, Handler)
        except OSError as error:
            raise UserError(
                f"cannot listen on {address[0]}:{address[1]} ({error.strerror}); expected a free port; use --port"
            ) from None

    def invoke(self) -> Answer:
        """Run one task. A failure is one line on stderr and does not affect the next task."""
        try:
            with stderr_in_log():
                done = self.task()
        except Exception as error:
            line = f"error: {describe(error)}"
            print(line, file=sys.stderr, flush=True)
            return 500, {"error": line}
        log(f"task: {done['pages']} pages, {done['seconds']:.3f} seconds")
        return 201, done

    def score(self, request: score_request.Request) -> Answer:
        """Answer one request for scores; a failure is reported to the caller only, not on stderr."""
        assert self.scorer is not None
        try:
            with stderr_in_log():
                return 200, self.scorer.score(request)
        except Exception as error:
            return 500, {"error": describe(error)}

    def handle_error(self, *_: object) -> None:
        """Log a connection that ended early; on stderr it would flag the task with a warning."""
        log(f"note: a connection failed ({type(sys.exception()).__name__})")

    def stop(self, *_: object) -> None:
        """Stop listening. Runs in a signal handler, so another thread waits for the loop to end."""
        self.stopping = True
        threading.Thread(target=self.shutdown, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    """One connection with one request (HTTP/1.0)."""

    server: Server
    timeout = 60  # seconds for a client to send its request

    def do_GET(self) -> None:
        scorer = self.server.scorer
        if self.path == "/health":
            self.answer(200, {"status": "ready"})
        elif self.path == "/" and scorer:
            self.answer(200, scorer.about)
        elif self.path == "/openapi.json":
            self.answer(200, json.loads(OPENAPI.read_text(encoding="utf-8")))
        else:
            self.answer(*unknown(self.path))

    def do_POST(self) -> None:
        scoring = self.path == "/score" and self.server.scorer is not None
        limit = score_request.BYTES if scoring else BODY
        try:
            body = self.body(limit, whole=scoring)
            if self.path == "/invoke":
                work = self.server.invoke
            elif scoring:
                request = score_request.parse(self.headers.get("Content-Type", ""), body)
                work = partial(self.server.score, request)
            else:
                self.answer(*unknown(self.path))
                return
        except UserError as error:
            self.answer(400, {"error": str(error)})
            return
        with self.server.turn:
            if self.left():
                log("note: a caller disconnected before its turn")
            elif self.server.stopping:
                self.answer(503, {"error": "the server is stopping"})
            else:
                self.answer(*self.server.pool.submit(work).result())

    def body(self, limit: int, whole: bool) -> bytes:
        """The request's body. UserError if it is cut short or of unknown length, or, if `whole`, longer than `limit`.

        Up to `limit` bytes are always read: unread ones would reset the connection before the response is read.
        """
        text = self.headers.get("Content-Length", "" if whole else "0")
        if not (text.isascii() and text.isdecimal() and len(text) < 19):
            raise UserError(f"Content-Length is {text!r:.40}; expected a number of bytes")
        length = int(text)
        if whole and length > limit:
            raise UserError(f"the request has {length:,} bytes; expected at most {limit:,}; split it")
        body = self.rfile.read(min(length, limit))
        if len(body) < min(length, limit):
            raise UserError(f"the request ended after {len(body):,} of {length:,} bytes; expected all of them")
        return body

    def left(self) -> bool:
        """Whether the caller has closed its side, so that nothing is computed for nobody."""
        try:
            readable = select.select([self.connection], [], [], 0)[0]
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client gave up; the answers are in the output folder all the same
            log("note: the caller disconnected before the response")

    def log_message(self, *_: object) -> None:
        """Silent: a line on stderr would flag the task with a warning."""


def unknown(path: str) -> Answer:
    return 404, {
        "error": f"nothing at {path[:100]}; expected GET /, /health or /openapi.json, or POST /invoke or /score"
    }


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", type=Path, default=Path("/input"), metavar="DIR", help="input of every task (default /input)")
    add(
        "--output",
        type=Path,
        default=Path("/output"),
        metavar="DIR",
        help="output of every task (default /output)",
    )
    add_ensemble_options(parser)
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1; in the image 0.0.0.0)")
    add("--port", type=int, default=PORT, help=f"port to listen on (default {PORT}, the platform's)")


def run(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT; UserError if the ensemble cannot be loaded or the port is taken."""
    for number in (signal.SIGTERM, signal.SIGINT):  # while it loads there is nothing to finish
        signal.signal(number, lambda *_: os._exit(0))
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:  # PyTorch ties its worker threads to the thread that first computed
        with stderr_in_log():
            ensemble = pool.submit(
                load, options.weights or default_ensemble(), options.device, options.precision
            ).result()
        scorer = Scorer(score_request.about(ensemble), partial(score_request.score, ensemble))
        task = partial(run_task, ensemble, options.input, options.output)
        server = Server((options.host, options.port), pool, task, scorer)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, server.stop)
        log(f"ensemble {ensemble.manifest.name}, device {ensemble.device.type}, precision {ensemble.precision}")
        log(f"ready on {options.host}:{server.server_port} after {time.perf_counter() - start:.1f} seconds")
        server.serve_forever(poll_interval=0.1)
        with server.turn:  # wait for the current task and its response
            server.server_close()
    log("stopped")
