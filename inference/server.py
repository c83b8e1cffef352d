"""The HTTP server of `serve`: which requests are let in, whose turn it is, and what is answered to what.

Python's own server, because `/invoke` and `/health` need no more; what each path does is in serve.py.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import score_request
from .errors import UserError
from .exits import describe, log, stderr_in_log

BODY = 1 << 20  # bytes of a request to /invoke that are read and ignored
CONNECTIONS, WAITING = 256, 64  # open at once; of these, requests that are read, wait or are answered
IN_FLIGHT = 256 << 20  # bytes of all their bodies
LAST_ANSWERS = 10  # seconds after the last task for callers to take their answers
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
OPENAPI = Path(__file__).with_name("openapi.json")
FOREIGN = "the request comes from another site or under another name; expected one from this machine; see --host"

Answer = tuple[int, dict[str, Any]]  # HTTP status, content


@dataclass(frozen=True)
class ScoreEndpoint:
    """The answers to `GET /` and `POST /score`."""

    about: dict[str, Any]
    score: Callable[[score_request.Request], dict[str, Any]]


class Busy(Exception):
    """More requests, or bytes of them, than the server holds at once."""


class Server(ThreadingHTTPServer):
    """Answers /health at any time and hands /invoke to `task`, and /score to `scorer`, in the one thread of `pool`."""

    daemon_threads = True  # an idle connection must not delay shutdown
    request_queue_size = CONNECTIONS

    def __init__(
        self,
        address: tuple[str, int],
        pool: ThreadPoolExecutor,
        task: Callable[[], dict[str, Any]],
        scorer: ScoreEndpoint,
    ) -> None:
        self.pool, self.task, self.scorer = pool, task, scorer
        self.turn = threading.Lock()  # held while a task runs
        self.held = threading.Condition()  # guards the three below
        self.connections = self.requests = self.bytes = 0
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
        try:
            with stderr_in_log():
                return 200, self.scorer.score(request)
        except Exception as error:
            return 500, {"error": describe(error)}

    @contextmanager
    def admitted(self, size: int) -> Iterator[None]:
        """Hold a request with a body of `size` bytes. Busy where too many, or too large ones, are held already."""
        with self.held:
            if self.requests >= WAITING or (self.requests and self.bytes + size > IN_FLIGHT):
                raise Busy
            self.requests, self.bytes = self.requests + 1, self.bytes + size
        try:
            yield
        finally:
            with self.held:
                self.requests, self.bytes = self.requests - 1, self.bytes - size
                self.held.notify_all()

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, unless there are too many."""
        with self.held:
            full = self.connections >= CONNECTIONS
            self.connections += not full
        if not full:
            super().process_request(request, client_address)
            return
        with suppress(OSError):
            request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self.held:
                self.connections -= 1

    def finish(self) -> None:
        """Wait for the current task, close the port, and let callers take the last answers."""
        with self.turn:
            self.server_close()
        with self.held:
            self.held.wait_for(lambda: not self.requests, LAST_ANSWERS)

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
        if self.is_foreign():
            self.answer(403, {"error": FOREIGN})
        elif self.path == "/health":
            self.answer(200, {"status": "ready"})
        elif self.path == "/":
            self.answer(200, self.server.scorer.about)
        elif self.path == "/openapi.json":
            self.answer(200, json.loads(OPENAPI.read_text(encoding="utf-8")))
        else:
            self.answer(*unknown(self.path))

    def do_POST(self) -> None:
        if self.is_foreign():
            self.answer(403, {"error": FOREIGN})
            return
        scoring = self.path == "/score"
        limit = score_request.BYTES if scoring else BODY
        try:
            length = self.length(limit, whole=scoring)
            with self.server.admitted(min(length, limit)):
                self.answer(*self.result(self.body(min(length, limit), length), scoring))
        except UserError as error:
            self.answer(400, {"error": str(error)})
        except Busy:
            self.answer(503, {"error": f"the server holds {WAITING} requests, or as many bytes as it can; try later"})

    def result(self, body: bytes, scoring: bool) -> Answer:
        """What to answer; computed when it is this request's turn, and sent after it. UserError for a bad request."""
        if scoring:
            request = score_request.parse(self.headers.get("Content-Type", ""), body)
            work: Callable[[], Answer] = partial(self.server.score, request)
        elif self.path == "/invoke":
            work = self.server.invoke
        else:
            return unknown(self.path)
        with self.server.turn:
            if self.left():
                log("note: a caller disconnected before its turn")
                return 503, {"error": "the caller disconnected"}
            if self.server.stopping:
                return 503, {"error": "the server is stopping"}
            return self.server.pool.submit(work).result()

    def is_foreign(self) -> bool:
        """Whether a web page of another site may have sent this to a server that is for this machine alone.

        A browser names the page's site in Origin, and in Host the name by which it was led here (DNS rebinding).
        """
        if self.server.server_address[0] not in LOOPBACK:
            return False
        hosts = [self.headers.get("Host"), urlsplit(self.headers.get("Origin", "")).netloc or None]
        if self.headers.get("Origin") == "null":
            return True
        return any(host is not None and host.rsplit(":", 1)[0] not in LOOPBACK and host != "::1" for host in hosts)

    def length(self, limit: int, whole: bool) -> int:
        """The length of the request's body. UserError if it is unknown, or, if `whole`, longer than `limit`."""
        text = self.headers.get("Content-Length", "" if whole else "0")
        if not (text.isascii() and text.isdecimal() and len(text) < 19):
            raise UserError(f"Content-Length is {text!r:.40}; expected a number of bytes")
        if whole and int(text) > limit:
            raise UserError(f"the request has {int(text):,} bytes; expected at most {limit:,}; split it")
        return int(text)

    def body(self, size: int, length: int) -> bytes:
        """The first `size` bytes of the request's body; unread ones would reset the connection before the response is
        read. UserError if it is cut short."""
        body = self.rfile.read(size)
        if len(body) < size:
            raise UserError(f"the request ended after {len(body):,} of {length:,} bytes; expected all of them")
        return body

    def left(self) -> bool:
        """Whether the caller has closed its side, so that nothing is computed for nobody."""
        try:
            poll = select.poll()  # select() fails from 1,024 descriptors on
            poll.register(self.connection, select.POLLIN)
            return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
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
