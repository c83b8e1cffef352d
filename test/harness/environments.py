"""The harness's own environments, below .cache: packages that the algorithm does not need, or does not have yet."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes")


def make(folder: Path, requirements: str, purpose: str, *options: str) -> Path:
    """The Python of an environment in `folder` that holds exactly `requirements`; made again when they change.

    Args:
        requirements: text of a requirements file, pinned and hashed.
        purpose: for the line that is printed while it is made.
        options: more of pip's.
    Raises: RuntimeError where it cannot be made.
    """
    stamp, python = folder / "installed", folder / "bin/python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test workers may ask for it at once
        if stamp.exists() and stamp.read_text() == requirements:
            return python
        print(f"installing what {purpose} needs into {folder.parent.name}/{folder.name}", flush=True)
        command = ["uv", "venv", "--quiet", "--clear", "--seed", "--python", "3.11", str(folder)]
        if not shutil.which("uv"):
            own = sys.executable if sys.version_info[:2] == (3, 11) else "python3.11"
            command = [own, "-m", "venv", "--clear", str(folder)]
        run(command)
        pinned = folder / "requirements.txt"
        pinned.write_text(requirements)
        run([str(python), *PIP, *options, "-r", str(pinned)])
        stamp.write_text(requirements)
        return python


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]} cannot be started ({error.strerror}); install uv or Python 3.11") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise RuntimeError(f"{' '.join(command[:3])} failed: {said[-1]}")
