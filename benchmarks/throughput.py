"""Steady state: crops per second of a loaded ensemble over many stacks.

python -m benchmarks.throughput [--weights DIR] [--stacks 20] [--precision auto] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from benchmarks import workload
from benchmarks.cold_start import ROOT, machine
from inference.ensemble import Ensemble
from inference.imageio.stack import read_stack
from inference.manifest import PRECISIONS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "default")
    parser.add_argument("--stacks", type=int, default=20)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    job = workload.make_input(16, ROOT / ".cache" / "benchmarks")
    ensemble = Ensemble.load(options.weights, options.device, options.precision)
    stack = next((job / "images").glob("*/*"))
    ensemble.predict(read_stack(stack))  # reads and fuses the weights
    start = time.perf_counter()
    crops = sum(len(ensemble.predict(read_stack(stack)).p_atypical) for _ in range(options.stacks))
    seconds = time.perf_counter() - start
    result = {
        "ensemble": ensemble.manifest.name,
        "device": ensemble.device.type,
        "precision": ensemble.precision,
        "stacks": options.stacks,
        "crops_per_second": crops / seconds,
        "machine": machine(),
    }
    print(
        f"{result['ensemble']} on {result['device']} in {result['precision']}: {crops / seconds:.1f} crops a second, "
        f"{crops} crops in {options.stacks} stacks"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
