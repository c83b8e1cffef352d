"""The image to run: built if it is missing or stale, and checked as an upload would be, without saving it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tarfile
from datetime import datetime

from inference.checks import Check
from inference.phase import DEFAULT, VARIABLE
from release import preflight
from release.savedimage import Layer
from test.harness import engines, served

LIST = """
import json, os
files = []
for folder, names, others in os.walk("/"):
    names[:] = [name for name in names if not os.path.ismount(os.path.join(folder, name))]
    for path in (os.path.join(folder, name) for name in names + others):
        about = os.lstat(path)
        link = os.readlink(path) if os.path.islink(path) else ""
        files.append((path[1:], about.st_mode, about.st_uid, about.st_size, link))
names = [name for name in ("etc/passwd", "etc/group") if os.path.isfile("/" + name)]
print(json.dumps([files, {name: open("/" + name, errors="replace").read() for name in names}]))
"""
TYPES = {stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE}


def build(engine: str, image: str, api: str | None = None) -> None:
    """Calls build.sh if something is missing, older than its sources, or not labelled `api`.

    An image that was built with another ensemble keeps it. Raises: RuntimeError when it fails.
    """
    command = [str(engines.ROOT / "build.sh"), "--engine", engine]
    if engine == "docker":
        about, ensemble = engines.inspect(image), bundled(image)
        sources = [engines.ROOT / name for name in ("Dockerfile", "requirements/job.txt", "inference", ensemble)]
        files = [
            file for source in sources for file in [source, *source.rglob("*.*")] if "__pycache__" not in file.parts
        ]
        newest = max((file.stat().st_mtime for file in files if file.is_file()), default=0)
        if about and datetime.fromisoformat(about["Created"][:19] + "+00:00").timestamp() > newest:
            if api in (None, served.api_method(image)) and phase_of(image) == wanted_phase():
                return
            if phase_of(image) != wanted_phase():
                print(f"{image} was built for {phase_of(image)}: building it for {wanted_phase()}", flush=True)
            else:
                print(f"{image} is labelled {served.api_method(image)}: building it for {api}", flush=True)
        command += ["--ensemble", ensemble, *(["--api", api] if api else [])]
    # natively, build.sh itself knows what is installed, and prints nothing when that is everything
    done = subprocess.run(command, env=os.environ | {"IMAGE": image})
    if done.returncode:
        fix = "; without a reachable registry, name a base image that is here with BASE_IMAGE=, or use --engine native"
        raise RuntimeError(f"build.sh --engine {engine} failed (see above){fix if engine == 'docker' else ''}")


def wanted_phase() -> str:
    """The phase's file that this run is for, below this folder."""
    return os.path.relpath(os.environ.get(VARIABLE) or DEFAULT, engines.ROOT)


def phase_of(image: str) -> str:
    """The phase's file, below this folder, that build.sh put into `image`."""
    labels = (engines.inspect(image) or {}).get("Config", {}).get("Labels") or {}
    return labels.get("midog-lora.phase", os.path.relpath(DEFAULT, engines.ROOT))


def bundled(image: str) -> str:
    """The folder, below this one, of the ensemble that build.sh put into `image`, or would put there."""
    labels = (engines.inspect(image) or {}).get("Config", {}).get("Labels") or {}
    return labels.get("midog-lora.ensemble", "weights/default")


def check(image: str) -> list[Check]:
    """What preflight would say of the saved image: its settings from the engine, its files from a container.

    Raises: RuntimeError when there is no such image, or nothing in it can be started.
    """
    about = engines.inspect(image)
    if about is None:
        raise RuntimeError(f"no image {image}; build it with ./build.sh")
    return preflight.check_content(about["Architecture"], about["Config"], list_files(image))


def list_files(image: str) -> Layer:
    """All files of an image, and its passwd and group, as one layer. RuntimeError where they cannot be listed."""
    command = [engines.docker() or "docker", "run", "--rm", "--network", "none", "--user", "0"]
    done = subprocess.run([*command, "--entrypoint", "python3", image, "-c", LIST], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"cannot list the files of {image} ({said}); the harness needs a python3 in it")
    files, texts = json.loads(done.stdout)
    root = Layer(texts=texts)
    for path, mode, owner, size, link in files:
        entry = root.files[path] = tarfile.TarInfo(path)
        entry.type, entry.mode = TYPES.get(stat.S_IFMT(mode), tarfile.FIFOTYPE), stat.S_IMODE(mode)
        entry.uid, entry.size, entry.linkname = owner, size, link
    return root
