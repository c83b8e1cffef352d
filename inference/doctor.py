"""`python -m inference doctor`: can this machine build, test and run the ensemble? One line per check, with its fix.

Standard library only until PyTorch itself is checked, so that it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

from . import __version__
from .checks import Check, Level, docker, passed
from .checksums import check_hashes
from .errors import UserError
from .exits import FAILED
from .manifest import Manifest, default_ensemble, ensemble_folder, holds_ensemble, load_manifest

ROOT = Path(__file__).resolve().parent.parent
JOB_GB = 16  # memory of the platform's machine
BUILD_GB = 30  # disk: the image, its build cache and one saved tarball
# oldest driver of each major version of CUDA, whose minor versions are compatible (NVIDIA's release notes, Linux)
DRIVERS = {11: (450, 80), 12: (525, 60), 13: (580, 65)}


EXTRAS = {"train": ("peft", "sklearn", "cv2", "matplotlib"), "slides": ("openslide", "shapely"), "ray": ("ray",)}


def output_of(*command: str) -> str | None:
    """stdout of a command, or None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def check_package() -> Iterator[Check]:
    """The version, and what is there of the packages that only some commands need."""
    yield Check("PASS", f"midog-lora {__version__}, in {Path(__file__).resolve().parent}")
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            fix = f"pip install 'midog-lora[{extra}]', or ./build.sh --engine native in a clone, if you need it"
            yield Check("WARN", f"extra {extra}: {', '.join(missing)} not installed", fix)
        else:
            yield Check("PASS", f"extra {extra}: {', '.join(modules)}")


def check_engine() -> Iterator[Check]:
    client = docker()
    version = client and output_of(client, "info", "--format", "{{.ServerVersion}}")
    if version:
        yield Check("PASS", f"container engine: Docker {version} through {client}")
        return
    fix = "start Docker (bare Debian: release/engine.sh start); without one, all runs natively, but exports no image"
    yield Check("WARN", "container engine: none found", fix)


def check_gpu(manifest: Manifest | None) -> Iterator[Check]:
    """PyTorch, the GPU with its driver, and what a job would choose on this machine."""
    if importlib.util.find_spec("torch") is None:
        yield Check(
            "FAIL",
            "PyTorch: not installed in this Python",
            "pip install torch, or in a clone ./build.sh --engine native, then .venv/bin/python",
        )
        return
    import torch

    from .backbones import lookup
    from .device import choose_device, choose_precision, gpu_is_present, native_precision

    cuda = torch.version.cuda
    yield Check("PASS", f"PyTorch {torch.__version__}, built for {f'CUDA {cuda}' if cuda else 'the CPU'}")
    listed = output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits")
    if listed:
        yield from check_driver(listed.splitlines()[0], cuda)
    elif gpu_is_present():
        yield Check("FAIL", "GPU: there is a device, but nvidia-smi fails", "install NVIDIA's driver, or reboot")
    else:
        yield Check("WARN", "GPU: none", "none needed for the small ensemble; large backbones take minutes per stack")
    try:
        device = choose_device("auto")
        members = manifest.members if manifest else ()
        precisions = [choose_precision("auto", device, m.precision, lookup(m.backbone).fp16_safe) for m in members]
        chosen = ", ".join(dict.fromkeys(precisions)) or native_precision(device)
        threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        yield Check("PASS", f"a job would compute on {device.type}{threads} in {chosen}")
    except UserError as error:
        yield Check("FAIL", f"a job would stop: {error}", "update the driver, or use --device cpu")


def check_driver(line: str, cuda: str | None) -> Iterator[Check]:
    """Compare a GPU, listed by nvidia-smi as "name, driver, MiB", with PyTorch's CUDA version ("12.8" or None)."""
    name, driver, memory = (part.strip() for part in line.rsplit(",", 2))
    size = f"{float(memory) / 1024:.0f} GiB" if memory.replace(".", "", 1).isdigit() else "memory unknown"  # e.g. [N/A]
    gpu = f"GPU: {name}, {size}, driver {driver}"
    if cuda is None:
        yield Check("FAIL", f"{gpu}, but this PyTorch has no CUDA", "install the versions pinned in requirements.txt")
        return
    needed = DRIVERS.get(int(cuda.split(".")[0]), (0, 0))
    have = tuple(int(part) for part in re.findall(r"\d+", driver)[:2])
    if have < needed:
        fix = f"update the driver to {needed[0]}.{needed[1]} or later"
        yield Check("FAIL", f"{gpu}, too old for CUDA {cuda}", fix)
    else:
        yield Check("PASS", f"{gpu}, new enough for CUDA {cuda}")


def check_memory(text: str | None = None) -> Iterator[Check]:
    """Compare /proc/meminfo (or `text`) with the platform's machine."""
    try:
        text = Path("/proc/meminfo").read_text() if text is None else text
        total, free = (int(re.findall(rf"{key}: *(\d+)", text)[0]) / 2**20 for key in ("MemTotal", "MemAvailable"))
    except (OSError, IndexError):
        yield Check("WARN", "memory: unknown, there is no /proc/meminfo", "check it by hand: 16 GiB is what a job gets")
        return
    memory = f"memory: {total:.0f} GiB, {free:.0f} GiB available"
    if free < 2:
        yield Check("FAIL", memory, "close other programs; a job with the small ensemble takes about 1 GiB")
    elif total < JOB_GB - 1:
        yield Check(
            "WARN", f"{memory}, less than the platform's {JOB_GB}", "use --memory for the harness, and small batches"
        )
    else:
        yield Check("PASS", memory)


def check_disk(folder: Path = ROOT) -> Iterator[Check]:
    free = shutil.disk_usage(folder).free / 1e9
    disk = f"disk: {free:.0f} GB free at {folder}"
    if free < 5:
        yield Check("FAIL", disk, "free at least 5 GB; docker system prune removes old images")
    elif free < BUILD_GB:
        yield Check("WARN", f"{disk}; building and exporting the image takes about {BUILD_GB}", "docker system prune")
    else:
        yield Check("PASS", disk)


def check_ensemble(folder: Path) -> Iterator[Check]:
    """Check the manifest, every hash and the base weights; one line each."""
    if not holds_ensemble(folder):
        fix = "name one with --weights, or create one with 'python -m training export'"
        yield Check("FAIL", f"ensemble: none in {folder}", fix)
        return
    try:
        manifest = load_manifest(folder)
    except UserError as error:
        fix = "python -m training base --all makes those of the default ensemble, as does ./build.sh in a clone"
        yield Check("FAIL", f"ensemble: {error}", fix)
        return
    members = ", ".join(f"{len(member.folds)} folds on {member.backbone}" for member in manifest.members)
    ensemble = f"{manifest.name}: {members}, threshold {manifest.threshold:.3f}"
    files: list[tuple[str, list[tuple[Path, str]]]] = [
        (f"ensemble {ensemble}, {len(manifest.files)} files", list(manifest.files.items())),
        *((f"base weights {base}", [(base, digest)]) for base, digest in manifest.bases.items()),
    ]
    for name, part in files:
        try:
            check_hashes(part)
            yield Check("PASS", f"{name}, SHA-256 as in the manifest")
        except UserError as error:
            yield Check("FAIL", str(error), "copy or export it again")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", type=ensemble_folder, metavar="DIR", help="ensemble folder (default: as for a job)"
    )


def run(options: argparse.Namespace) -> int:
    """Print each check as it finishes; exit code 1 if any failed."""
    folder = options.weights or default_ensemble()
    try:
        manifest = load_manifest(folder)
    except UserError:
        manifest = None  # check_ensemble reports it
    checks: list[Callable[[], Iterator[Check]]] = [
        check_package,
        check_engine,
        lambda: check_gpu(manifest),
        check_memory,
        check_disk,
        lambda: check_ensemble(folder),
    ]
    findings = []
    for check in checks:
        for line in check():
            print(line, flush=True)
            findings.append(line)
    levels = [line.level for line in findings]
    print(", ".join(f"{levels.count(level)} {level}" for level in get_args(Level)))
    return 0 if passed(findings) else FAILED
