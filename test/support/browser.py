"""A headless Chromium through chromedriver's protocol (W3C WebDriver: JSON over HTTP), by the standard library alone.

Debian: apt-get install chromium chromium-driver. `find()` is None where they are missing.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from test.support.processes import until

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
KEYS = {
    "Left": "\ue012",
    "Up": "\ue013",
    "Right": "\ue014",
    "Down": "\ue015",
    "Enter": "\ue007",
    "Escape": "\ue00c",
    "Tab": "\ue004",
    "Home": "\ue011",
    "End": "\ue010",
}


def find() -> tuple[str, str] | None:
    """(browser, driver), or None where one is missing."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """One window. Errors of the protocol and of the page's scripts raise RuntimeError."""

    def __init__(self, address: str) -> None:
        self.address = address

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        content = None if method == "GET" else json.dumps(body or {}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, content, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def ready(self) -> bool:
        try:
            return bool(self.call("GET", "/status")["ready"])
        except OSError:
            return False

    def open(self, file: Path) -> float:
        """Open a page from disk; returns the seconds until its load event."""
        start = time.perf_counter()
        self.call("POST", "/url", {"url": file.resolve().as_uri()})
        return time.perf_counter() - start

    def run(self, script: str, *arguments: Any) -> Any:
        """The script's result; promises are awaited."""
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def choose(self, name: str, value: Any) -> None:
        """Give a form's element a value, as a hand would."""
        script = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        self.run(f"{script} for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind))", name, value)
        self.settle()

    def press(self, *keys: str) -> None:
        """Real key presses, by the names in KEYS or as text; what they change is drawn when it returns."""
        actions = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})
        self.settle()

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def view(self, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """Set the size of the page in CSS pixels and the preferred colour scheme; phone: as a telephone lays it out."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def settle(self) -> None:
        """Wait until the changes made by a script or a key are drawn."""
        frames = "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 30)))"
        self.run(f"return new Promise(done => {frames})")

    def screenshot(self, file: Path | None = None) -> bytes:
        png = base64.b64decode(self.call("GET", "/screenshot"))
        if file:
            file.write_bytes(png)
        return png

    def console(self) -> list[str]:
        """Messages since the last call: script errors, and whatever the page's policy refused."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser with its own profile; it ends with the `with` block."""
    found = find()
    if not found:
        raise RuntimeError("no Chromium with chromedriver; expected both; apt-get install chromium chromium-driver")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen([found[1], f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    window = Browser(f"http://127.0.0.1:{port}")
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--force-color-profile=srgb",
        "--window-size=1280,900",
    ]
    capabilities = {
        "browserName": "chrome",
        "goog:chromeOptions": {"binary": found[0], "args": flags},
        "goog:loggingPrefs": {"browser": "ALL"},
    }
    try:
        until(window.ready, "the browser's driver")
        session = window.call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]
        window.address += f"/session/{session}"
        yield window
        window.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(600)
