"""A server is called by name on a network of its own: one that listens on loopback only, or redirects, fails there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from inference.checks import docker
from test.harness import network

BASE = os.environ.get("BASE_IMAGE", "python:3.11-slim-bookworm")
IMAGE = f"midog-lora-network-{os.getpid()}"
SERVER = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(os.environ.get("STATUS", "200")) if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer((os.environ.get("ADDRESS", ""), 4743), Handler).serve_forever()
"""

pytestmark = [
    pytest.mark.docker,
    pytest.mark.skipif(docker() is None, reason="no Docker engine answers (release/engine.sh start)"),
]


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    text = f"FROM {BASE}\nENV PROGRAM='{SERVER.strip().encode().hex()}'\n"
    text += """CMD ["python3", "-c", "import os; exec(bytes.fromhex(os.environ['PROGRAM']))"]\n"""
    command = [str(docker()), "build", "--quiet", "--tag", IMAGE, "-"]
    subprocess.run(command, input=text, text=True, check=True, capture_output=True)
    yield IMAGE
    subprocess.run([str(docker()), "image", "rm", "--force", IMAGE], capture_output=True)


def test_a_server_is_reached_by_name(image: str) -> None:
    check = network.check_health(image, [], attempts=100, pause=0.2)
    assert check.level == "PASS", check


@pytest.mark.parametrize(
    ("variable", "message"), [("ADDRESS=127.0.0.1", "refused"), ("STATUS=302", "redirects"), ("STATUS=500", "500")]
)
def test_what_fails_on_the_platform_fails(image: str, variable: str, message: str) -> None:
    many = 100 if "302" in variable else 15
    check = network.check_health(image, ["--env", variable], attempts=many, pause=0.2)
    assert check.level == "FAIL" and message in check.message, check


def test_nothing_outside_is_reached(image: str) -> None:
    program = "import socket; socket.create_connection(('192.0.2.1', 80), 1)"
    with network.internal_network() as name:
        done = network.client("run", "--rm", "--network", name, "--entrypoint", "python3", image, "-c", program)
    assert done.returncode == 1 and "Error" in done.stderr
