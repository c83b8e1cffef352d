"""Cold start of an ensemble of members beside each member alone: seconds, and peak memory.

    python -m benchmarks.members --backbones virchow uni [--crops 16] [--device cuda] [--json FILE]
    python -m benchmarks.members --weights weights/mine

Every run is a fresh process; alone and together take turns. In fp32 the answers must be the weighted mean of those of
the members alone, to 1e-6: otherwise the command ends with an error. Backbones get random weights of the right shapes.
The platform's machine has 16 GB on host and GPU: `--backbones virchow dinov3-vith16plus uni` says how much is left;
without a GPU, that part is computed from the sizes of the tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import workload
from benchmarks.cold_start import ROOT, machine, run_ours
from inference.backbones import BACKBONES
from inference.commandline import DEVICES
from inference.manifest import PRECISIONS, Manifest, Member, load_manifest
from inference.metrics import sigmoid
from inference.weights import Weights

EXACT = 1e-6  # of P(atypical)
PLATFORM = 16e9  # bytes, of host memory and of a T4's


def alone(ensemble: Path, cache: Path) -> list[Path]:
    """A folder for each member of `ensemble`, made of links, as an ensemble of its own."""
    content = json.loads((ensemble / "ensemble.json").read_text())
    manifest = load_manifest(ensemble)
    folders = []
    for entry, member in zip(content["members"], manifest.members, strict=True):
        folder = cache / "alone" / f"{manifest.name}-{member.name}"
        folder.mkdir(parents=True, exist_ok=True)
        for source in (member.base, *member.folds):
            (folder / source.name).unlink(missing_ok=True)
            (folder / source.name).symlink_to(source.resolve())
        (folder / "ensemble.json").write_text(json.dumps(content | {"members": [entry], "weights": [1.0]}))
        folders.append(folder)
    return folders


def difference(runs: Sequence[dict[str, Any]], manifest: Manifest) -> float:
    """Largest difference of the last run's P(atypical) by all members from the weighted mean of each alone."""
    *each, together = (np.array(run["p_atypical"]) for run in runs)
    share = [member.weight for member in manifest.members]
    if manifest.averaging == "probability":
        expected = np.average(each, axis=0, weights=share)
    else:
        expected = sigmoid(np.average([np.log(p / (1 - p)) for p in each], axis=0, weights=share))
    return float(np.abs(together - expected).max())


def gpu_bytes(member: Member) -> int:
    """Bytes of a member's tensors on a GPU in fp16 or bf16: those that no fold changes once, others per fold."""
    weights = Weights(member.base, list(member.folds), torch.device("cpu"), torch.float16)
    sizes = {name: torch.Size(weights.shape(name)).numel() for name in weights.names}
    return 2 * sum(size * (len(member.folds) if name in weights.adapted else 1) for name, size in sizes.items())


def measure(ensemble: Path, crops: int, device: str, precision: str, repeats: int, cache: Path) -> dict[str, Any]:
    """Seconds are medians over `repeats` alternating runs, after one of each in fp32; peaks are maxima."""
    job, out = workload.make_input(crops, cache), cache / "output"
    out.mkdir(parents=True, exist_ok=True)
    manifest = load_manifest(ensemble)
    folders = [*alone(ensemble, cache), ensemble]
    off = difference([run_ours(folder, job, out, device, "fp32") for folder in folders], manifest)  # also a warm-up
    if off > EXACT:
        raise SystemExit(f"answers differ by {off:.1e} from the weighted mean of the members alone; expected {EXACT:g}")
    runs: list[list[dict[str, Any]]] = [[] for _ in folders]
    for _ in range(repeats):
        for found, folder in zip(runs, folders, strict=True):
            found.append(run_ours(folder, job, out, device, precision))
    median = statistics.median
    wall = [median(run["wall"] for run in found) for found in runs]
    computing = [median(sum(member["seconds"] for member in run["members"]) for run in found) for found in runs]
    start = median(run["wall"] - sum(m["seconds"] for m in run["members"]) for found in runs[:-1] for run in found)
    memory = [max(run["memory"] for run in found) for found in runs]
    return {
        "ensemble": manifest.name,
        "members": [member.name for member in manifest.members],
        "crops": crops,
        "device": runs[-1][0]["device"],
        "precision": runs[-1][0]["precision"],
        "machine": machine(),
        "repeats": repeats,
        "wall": wall,
        "computing": computing,
        "start": start,
        "memory": memory,
        "difference_fp32": off,
        "ratio": wall[-1] / (sum(computing[:-1]) + start),
        "device_memory": max(run["device_bytes"] for run in runs[-1]),
        "bases": [member.base.stat().st_size for member in manifest.members],
        "gpu_tensors": [gpu_bytes(member) for member in manifest.members],
    }


def show(result: dict[str, Any]) -> str:
    weights = "random weights" if result["ensemble"].startswith("random-") else "its own weights"
    lines = [
        f"{result['ensemble']} ({weights}): {result['crops']} crops, {result['device']}, {result['precision']}, "
        f"medians of {result['repeats']}"
    ]
    names = [*(f"{name} alone" for name in result["members"]), "all members"]
    for name, wall, computing, memory in zip(names, result["wall"], result["computing"], result["memory"], strict=True):
        lines.append(f"{name:>28}: {wall:7.2f} s, of which members {computing:7.2f}, peak {memory / 1e9:.2f} GB")
    lines.append(f"all members / (members alone + one start of {result['start']:.2f} s): {result['ratio']:.3f}")
    lines.append(
        f"answers in fp32: at most {result['difference_fp32']:.1e} from the weighted mean of the members alone"
    )
    largest, together = max(result["memory"][:-1]), result["memory"][-1]
    lines.append(
        f"host: {(together - largest) / 1e9:+.2f} GB over the largest member alone (bases "
        f"{', '.join(f'{size / 1e9:.2f}' for size in result['bases'])} GB), "
        f"{(PLATFORM - together) / 1e9:.1f} GB left of {PLATFORM / 1e9:g}"
    )
    tensors = max(result["gpu_tensors"])
    measured = f", {result['device_memory'] / 1e9:.2f} GB measured with activations" if result["device_memory"] else ""
    lines.append(
        f"GPU, computed: {tensors / 1e9:.2f} GB of tensors for the largest member{measured}, "
        f"{(PLATFORM - tensors) / 1e9:.1f} GB of {PLATFORM / 1e9:g} left for activations (widest layer 0.1 GB)"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.members", description=__doc__.partition("\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--backbones", nargs="+", choices=[name for name, row in BACKBONES.items() if row.depth])
    which.add_argument("--weights", type=Path, metavar="DIR", help="an ensemble folder of several members")
    parser.add_argument("--crops", type=int, default=16)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "benchmarks", help="random weights stay here")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    ensemble = options.weights or workload.make_mixed(options.backbones, options.cache)
    result = measure(ensemble, options.crops, options.device, options.precision, options.repeats, options.cache)
    print(show(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
