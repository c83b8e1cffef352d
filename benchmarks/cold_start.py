"""Cold start from process start to written answer: ours, the plain path, and the floor, on the same random weights.

    python -m benchmarks.cold_start --backbone virchow --crops 16 [--device cuda] [--json FILE]

Every run is a fresh process; the paths take turns. `--weights DIR...` compares ensembles with the official reference
container's way instead (one EfficientNetV2-M).
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
    options: dict[str, object] = {
        "--input": job,
        "--output": out,
        "--weights": ensemble,
        "--device": device,
        "--precision": precision,
        "--details": details,
    }
    wall, memory = timed([sys.executable, "-m", "inference", *(str(word) for pair in options.items() for word in pair)])
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


def measure(
    ensembles: dict[str, Path],
    plain: tuple[str, Path],
    crops: int,
    device: str,
    precision: str,
    repeats: int,
    cache: Path,
) -> dict[str, Any]:
    """All numbers of one comparison; seconds are medians over `repeats` runs in turn, after a warm-up of each.

    plain: the kind and folder of `benchmarks.plain`. Its answers are compared with those of the first ensemble where
    both compute the same, which is so for random weights.
    """
    job, out = workload.make_input(crops, cache), cache / "output"
    out.mkdir(parents=True, exist_ok=True)
    for ensemble in ensembles.values():
        run_ours(ensemble, job, out, device, precision)
    ours: dict[str, list[dict[str, Any]]] = {name: [] for name in ensembles}
    plain_runs = []
    for _ in range(repeats):
        for name, ensemble in ensembles.items():
            ours[name].append(run_ours(ensemble, job, out, device, precision))
        plain_runs.append(run_plain(*plain, job, out))
    first = next(iter(ensembles))
    result: dict[str, Any] = {
        "crops": crops,
        "device": ours[first][0]["device"],
        "precision": ours[first][0]["precision"],
        "machine": machine(),
        "repeats": repeats,
        "plain": medians(plain_runs),
        "ours": {},
    }
    for name, ensemble in ensembles.items():
        parts, members = floor_of(ensemble, crops, device, result["precision"])
        row = medians(ours[name])
        least = sum(parts.values())
        start = row["wall"] - row["seconds"]["forward"]
        result["ours"][name] = row | {
            "members": members,
            "floor": {"wall": least, "seconds": parts},
            "speedup": result["plain"]["wall"] / row["wall"],
            "memory_ratio": row["memory"] / result["plain"]["memory"],
            "floor_ratio": row["wall"] / least,
            "import_budget": start / parts["import torch"],  # all but the forward pass, in units of `import torch`
        }
    if plain[0] == "foundation":
        exact = run_ours(ensembles[first], job, out, device, "fp32")
        difference = lambda a, b: float(np.abs(np.subtract(a["p_atypical"], b["p_atypical"])).max())  # noqa: E731
        result["difference_fp32"] = difference(exact, plain_runs[0])
        result["difference"] = difference(ours[first][0], plain_runs[0])
    return result


def floor_of(ensemble: Path, crops: int, device: str, precision: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(seconds of each part of the floor, what each member computes)."""
    parts = {"import torch": floor.import_seconds(), "read the bases": 0.0, "multiply-adds": 0.0}
    members = []
    for member in load_manifest(ensemble).members:
        size, views, folds = member.preprocess["size"], TTA_VIEWS[member.tta], len(member.folds)
        flops = floor.multiply_adds(member.backbone, size, member.pool) * crops * views * folds
        tokens = crops * views * folds * (size // 14 if "14" in BACKBONES[member.backbone].timm else size // 16) ** 2
        parts["multiply-adds"] += flops / floor.matrix_rate(member.backbone, min(tokens, 4096), precision, device)
        parts["read the bases"] += member.base.stat().st_size / floor.read_rate(member.base)
        members.append({"backbone": member.backbone, "folds": folds, "views": views, "size": size})
    return parts, members


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
    lines = [
        f"{result['crops']} crops, {result['device']}, {result['precision']}",
        seconds_of("plain", result["plain"]),
    ]
    for name, row in result["ours"].items():
        members = [f"{m['backbone']} ({m['folds']} folds, views {m['views']}, {m['size']} px)" for m in row["members"]]
        lines += [f"{name}: {' + '.join(members)}", seconds_of("ours", row), seconds_of("floor", row["floor"])]
        lines.append(
            f"speedup {row['speedup']:.1f}, {1 / row['speedup']:.2f} of the plain path's time, memory "
            f"{row['memory_ratio']:.2f}, floor {row['floor_ratio']:.2f}, all but the forward pass "
            f"{row['import_budget']:.2f} times import torch"
        )
    if "difference" in result:
        lines.append(
            f"largest difference of P(atypical) from the plain path: {result['difference_fp32']:.1e} in fp32, "
            f"{result['difference']:.1e} in {result['precision']}"
        )
    return "\n".join(lines)


def seconds_of(name: str, part: dict[str, Any]) -> str:
    memory = f", peak {part['memory'] / 1e9:.2f} GB" if "memory" in part else ""
    phases = ", ".join(f"{key} {value:.2f}" for key, value in part["seconds"].items())
    return f"{name:>6}: {part['wall']:7.2f} s{memory}  ({phases})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold_start", description=__doc__.partition("\n")[0])
    either = parser.add_mutually_exclusive_group()
    help_ = "a foundation model with random weights, folds apart and averaged, against the plain path of three folds"
    either.add_argument("--backbone", choices=[name for name, row in BACKBONES.items() if row.depth], help=help_)
    help_ = "ensemble folders, against the official reference's way (default: weights/default weights/fast)"
    shipped = [ROOT / "weights" / name for name in ("default", "fast")]
    either.add_argument("--weights", type=Path, nargs="+", default=shipped, metavar="DIR", help=help_)
    parser.add_argument("--crops", type=int, default=16)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "benchmarks", help="random weights stay here")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    cache = options.cache
    if options.backbone:
        apart = workload.make(options.backbone, cache)
        averaged = workload.make_averaged(options.backbone, cache)
        ensembles, plain = {"folds apart": apart, "folds averaged": averaged}, ("foundation", apart)
    else:
        ensembles = {folder.name: folder for folder in options.weights}
        plain = ("reference", workload.make_reference(cache))
    result = measure(ensembles, plain, options.crops, options.device, options.precision, options.repeats, cache)
    print(show(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
