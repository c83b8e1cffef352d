"""A server called by name from a second container, on a network without a way out: the example algorithms' test."""

from __future__ import annotations

import contextlib
import subprocess
import uuid
from collections.abc import Iterator, Sequence

from inference.checks import Check, docker

PORT = 4743
ATTEMPTS, PAUSE_SECONDS, CALL_SECONDS = 30, 5.0, 10.0
# run in the second container: 0 when /health answers 200; else prints why
CALLER = """
import http.client, sys, time
name, port, attempts, pause, seconds = sys.argv[1], *map(float, sys.argv[2:])
for attempt in range(int(attempts)):
    time.sleep(pause if attempt else 0)
    try:
        connection = http.client.HTTPConnection(name, int(port), timeout=seconds)
        connection.request("GET", "/health")
        said = status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        said, status = error or type(error).__name__, 0
    if status == 200:
        sys.exit(0)
    if 300 <= status < 400:
        sys.exit("/health redirects")
sys.exit(f"{int(attempts)} calls of /health failed, the last one with: {said}")
"""


def client(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([docker() or "docker", *arguments], capture_output=True, text=True)


@contextlib.contextmanager
def internal_network() -> Iterator[str]:
    """The name of a network whose containers reach each other and nothing else. RuntimeError if it cannot be made."""
    name = f"harness-{uuid.uuid4()}"
    made = client("network", "create", "--internal", name)
    if made.returncode:
        raise RuntimeError(f"the engine makes no internal network: {made.stderr.strip()}")
    try:
        yield name
    finally:
        client("network", "rm", name)


def arguments(attempts: int = ATTEMPTS, pause: float = PAUSE_SECONDS) -> list[str]:
    """Of the caller, after the server's name."""
    return [str(number) for number in (PORT, attempts, pause, CALL_SECONDS)]


def check_health(image: str, options: Sequence[str], attempts: int = ATTEMPTS, pause: float = PAUSE_SECONDS) -> Check:
    """Starts `image` as it is and waits for its health, called by name. options: more of `docker run`, its limits."""
    with internal_network() as network:
        server = f"server-{uuid.uuid4()}"
        try:
            started = client("run", "--detach", "--name", server, "--network", network, *options, image)
            if started.returncode:
                return Check("FAIL", f"the server cannot be started: {started.stderr.strip()[-200:]}")
            command = [
                "--network",
                network,
                "--entrypoint",
                "python3",
                image,
                "-c",
                CALLER,
                server,
                *arguments(attempts, pause),
            ]
            called = client("run", "--rm", *command)
        finally:
            client("rm", "--force", server)
    if called.returncode:
        said = (called.stderr.strip().splitlines() or ["no message"])[-1]
        fix = f"listen on 0.0.0.0:{PORT} and answer 200 once the model is loaded"
        return Check("FAIL", f"called by name from a second container: {said}", fix)
    return Check("PASS", "the server answers /health to a second container that calls it by name")
