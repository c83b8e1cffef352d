"""An S3 server on loopback: moto's, from .cache/shim, where sagemaker.install puts it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from test.harness import engines

HOME = engines.ROOT / ".cache/shim"
BUCKET = "harness"


class Bucket:
    """The part of S3 that is needed here: objects by key, over HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url

    def put(self, key: str, data: bytes = b"") -> str:
        """Stores an object (with an empty key, the bucket itself); returns its s3:// address."""
        self._call("PUT", key, data)
        return f"s3://{BUCKET}/{key}"

    def get(self, key: str) -> bytes | None:
        """The object's content, or None when there is no such object."""
        try:
            return self._call("GET", key)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def _call(self, method: str, key: str, data: bytes | None = None) -> bytes:
        place = f"{self.url}/{BUCKET}" + (f"/{urllib.parse.quote(key)}" if key else "")
        headers = {"Content-Type": "application/octet-stream", "Authorization": "AWS x:x"}  # not a form, not anonymous
        request = urllib.request.Request(place, data=data, headers=headers, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return answer.read()


@contextlib.contextmanager
def s3_server() -> Iterator[Bucket]:
    """An S3 server on loopback with an empty bucket, in memory."""
    with socket.socket() as any_socket:
        any_socket.bind(("127.0.0.1", 0))
        port = any_socket.getsockname()[1]
    command = [str(HOME / "bin/python"), str(HOME / "bin/moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            bucket = Bucket(f"http://127.0.0.1:{port}")
            deadline = time.monotonic() + 600
            while True:
                try:
                    bucket.put("")
                    break
                except OSError:
                    if server.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        raise RuntimeError(f"moto's server did not start: {log.read()[-300:]!r}") from None
                    time.sleep(0.2)
            yield bucket
        finally:
            server.terminate()
            server.wait()
