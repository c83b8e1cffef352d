"""A Ray cluster on this machine, for tests and benchmarks.

`python -m test.support.ray_cluster CORES` prints its address and ends when its stdin does. Its processes end with this
one, however it ends; `ray stop` would end every cluster of the machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from typing import Any


def authenticate() -> None:
    """Put a cluster's token into the environment, where commands find it. Ray reads it when it is first imported."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextlib.contextmanager
def cluster(cores: int = 2) -> Iterator[tuple[str, int]]:
    """Address and process id."""
    before = dict(os.environ)
    authenticate()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    command = [sys.executable, "-m", "test.support.ray_cluster", str(cores)]
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout and process.stdin
            yield process.stdout.readline().strip(), process.pid
            process.stdin.close()
    finally:
        os.environ.clear()
        os.environ |= before


if __name__ == "__main__":
    import ray

    quiet: Any = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    for attempt in range(6):  # Ray gives one of its parts 30 s to start, which may be too short on a busy machine
        try:
            context: Any = ray.init("local", num_cpus=int(sys.argv[1]), **quiet)
            print(context.address_info["gcs_address"], flush=True)
            break
        except Exception:
            ray.shutdown()
            if attempt == 5:
                raise
    sys.stdin.read()
