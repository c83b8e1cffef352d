"""Cold start from process start to written answer: ours, the plain path, and the floor, on the same random weights.

    python -m benchmarks.cold_start --backbone virchow --crops 16 [--device cuda] [--json FILE]

Every run is a fresh process; the two paths take turns. `--backbone default` compares the shipped ensemble with the
official reference container's way instead (one EfficientNetV2-M).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import floor, workload
from inference.backbones import BACKBONES
from inference.manifest import PRECISIONS, TTA_VIEWS, load_manifest

ROOT = Path(__file__).resolve().parent.parent


LAUNCH = """
import os, sys, time
start = time.perf_counter()
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(process, 0)
print(status, time.perf_counter() - start, usage.ru_maxrss * 1024, file=sys.stderr)
"""


def timed(command: list[str]) -> tuple[float, int]:
    """(wall seconds, peak resident bytes) of a process that must succeed.

    A small process starts it, because Linux counts the memory of the parent into the peak of the child.
    """
    launcher = [sys.executable, "-S", "-c", LAUNCH, *command]
    done = subprocess.run(launcher, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    *said, last = done.stderr.splitlines()
    status, wall, memory = last.split()
    if int(status):
        raise SystemExit(f"{' '.join(command)} failed with status {status}: {' '.join(said)}")
    return float(wall), int(memory)


def run_ours(ensemble: Path, job: Path, out: Path, device: str, precision: str) -> dict[str, Any]:
    details = out / "details.json"
    command = [
        sys.executable,
        "-m",
        "inference",
        "--input",
        str(job),
        "--output",
        str(out),
        "--weights",
        str(ensemble),
        "--device",
        device,
        "--precision",
        precision,
        "--details",
        str(details),
    ]
    wall, memory = timed(command)
    found = json.loads(details.read_text())
    # read, fused and converted layer by layer, as the first pass reaches them
    weights = sum(member["weights_seconds"] for member in found["members"])
    found["seconds"] |= {"weights": weights, "forward": found["seconds"].pop("predict") - weights}
    return found | {"wall": wall, "memory": memory, "p_atypical": [page["p_atypical"] for page in found["pages"]]}


def run_plain(kind: str, folder: Path, job: Path, out: Path) -> dict[str, Any]:
    stack = next((job / "images").glob("*/*"))
    file = out / "plain.json"
    wall, memory = timed([sys.executable, "-m", "benchmarks.plain", kind, str(folder), str(stack), str(file)])
    return json.loads(file.read_text()) | {"wall": wall, "memory": memory}


def measure(backbone: str, crops: int, device: str, precision: str, repeats: int, cache: Path) -> dict[str, Any]:
    """All numbers of one comparison; seconds are medians over `repeats` alternating runs, after a warm-up of each."""
    job, out = workload.make_input(crops, cache), cache / "output"
    out.mkdir(parents=True, exist_ok=True)
    default = backbone == "default"
    ensemble = ROOT / "weights" / "default" if default else workload.make(backbone, cache)
    plain_folder = workload.make_reference(cache) if default else ensemble
    kind = "reference" if default else "foundation"
    run_ours(ensemble, job, out, device, precision)
    ours, plain = [], []
    for _ in range(repeats):
        ours.append(run_ours(ensemble, job, out, device, precision))
        plain.append(run_plain(kind, plain_folder, job, out))
    manifest = load_manifest(ensemble)
    exact = run_ours(ensemble, job, out, device, "fp32") if not default else None
    precision = ours[0]["precision"]
    parts = {"import torch": floor.import_seconds(), "read the bases": 0.0, "multiply-adds": 0.0}
    about = []
    for member in manifest.members:
        size, views, folds = member.preprocess["size"], TTA_VIEWS[member.tta], len(member.folds)
        flops = floor.multiply_adds(member.backbone, size, member.pool) * crops * views * folds
        tokens = crops * views * folds * (size // 14 if "14" in BACKBONES[member.backbone].timm else size // 16) ** 2
        parts["multiply-adds"] += flops / floor.matrix_rate(member.backbone, min(tokens, 4096), precision, device)
        parts["read the bases"] += member.base.stat().st_size / floor.read_rate(member.base)
        about.append({"backbone": member.backbone, "folds": folds, "views": views, "size": size})
    result: dict[str, Any] = {
        "members": about,
        "crops": crops,
        "device": ours[0]["device"],
        "precision": precision,
        "machine": machine(),
        "repeats": repeats,
        "ours": medians(ours),
        "plain": medians(plain),
        "floor": {"wall": sum(parts.values()), "seconds": parts},
    }
    result["speedup"] = result["plain"]["wall"] / result["ours"]["wall"]
    result["memory_ratio"] = result["ours"]["memory"] / result["plain"]["memory"]
    result["floor_ratio"] = result["ours"]["wall"] / result["floor"]["wall"]
    rest = result["ours"]["wall"] - result["ours"]["seconds"]["forward"]
    result["import_budget"] = rest / parts["import torch"]  # all but the forward pass, in units of `import torch`
    if exact:
        difference = lambda a, b: float(np.abs(np.subtract(a["p_atypical"], b["p_atypical"])).max())  # noqa: E731
        result["difference_fp32"] = difference(exact, plain[0])
        result["difference"] = difference(ours[0], plain[0])
    return result


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median wall seconds, peak memory and seconds by phase of several runs."""
    median = statistics.median
    return {
        "wall": median(run["wall"] for run in runs),
        "memory": median(run["memory"] for run in runs),
        "device_memory": runs[0]["device_bytes"],
        "seconds": {phase: median(run["seconds"][phase] for run in runs) for phase in runs[0]["seconds"]},
    }


def machine() -> dict[str, str]:
    with open("/proc/cpuinfo") as lines:
        cpu = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
        )
    return {
        "cpu": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def show(result: dict[str, Any]) -> str:
    members = [
        f"{one['backbone']} ({one['folds']} folds, views {one['views']}, {one['size']} px)" for one in result["members"]
    ]
    lines = [
        f"{' + '.join(members)}: {result['crops']} crops, {result['device']}, {result['precision']}; "
        "random unless 'default'"
    ]
    for name in ("plain", "ours", "floor"):
        part = result[name]
        memory = f", peak {part['memory'] / 1e9:.2f} GB" if "memory" in part else ""
        phases = ", ".join(f"{key} {value:.2f}" for key, value in part["seconds"].items())
        lines.append(f"{name:>6}: {part['wall']:7.2f} s{memory}  ({phases})")
    lines.append(
        f"speedup {result['speedup']:.1f}, memory {result['memory_ratio']:.2f}, floor {result['floor_ratio']:.2f}, "
        f"all but the forward pass {result['import_budget']:.2f} times import torch"
    )
    if "difference" in result:
        lines.append(
            f"largest difference of P(atypical) from the plain path: {result['difference_fp32']:.1e} in fp32, "
            f"{result['difference']:.1e} in {result['precision']}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold_start", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--backbone", default="virchow", choices=["default", *(n for n, r in BACKBONES.items() if r.depth)]
    )
    parser.add_argument("--crops", type=int, default=16)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "benchmarks", help="random weights stay here")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    result = measure(options.backbone, options.crops, options.device, options.precision, options.repeats, options.cache)
    print(show(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
