"""What does a large file of detections cost? `python -m benchmarks.detections`: a million points, 1% on the slide.

Runs `python -m inference slides` on a gzipped GeoJSON of points as QuPath writes them, with an ensemble that computes
nothing, in a process of its own. Prints its processor seconds and its peak memory.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

SIDE = 8192  # pixels of the slide
SHARE = 100  # one in so many detections lies on it


def write_detections(file: Path, count: int) -> None:
    from test.support.detection_files import features

    rng = np.random.default_rng(0)
    [feature] = features([(0.0, 0.0)])
    with gzip.open(file, "wt", compresslevel=1) as stream:
        stream.write('{"type": "FeatureCollection", "features": [')
        for n, (x, y) in enumerate(rng.uniform(64, SIDE - 64, (count, 2)).round(2).tolist()):
            feature["id"] = f"00000000-0000-4000-8000-{n:012}"
            feature["geometry"]["coordinates"] = [x + SIDE * bool(n % SHARE), y]
            stream.write((",\n" if n else "\n") + json.dumps(feature))
        stream.write("]}\n")


def predict(crops: Any) -> Any:
    """As Ensemble.predict, with the answer 0.5 for each crop."""
    half = np.full(len(crops), 0.5)
    return SimpleNamespace(p_atypical=half, fold_p=half[None], member_p=half[None], spread=half * 0)


def run(folder: Path) -> int:
    """The command, in this process; prints the peak of its memory (the kernel's maxrss counts the parent's too)."""
    from inference.__main__ import main
    from inference.ensemble import Ensemble
    from inference.manifest import load_manifest

    nothing = SimpleNamespace(
        device=SimpleNamespace(type="cpu"),
        precision="fp32",
        device_name="cpu",
        predict=predict,
        manifest=load_manifest(folder / "stub"),
    )
    command = ["slides", folder / "s.geojson.gz", "--output", folder / "out.geojson", "--csv", folder / "out.csv"]
    with mock.patch.object(Ensemble, "load", lambda *_: nothing):
        code = main([*map(str, command), "--weights", str(folder / "stub")])
    print(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        raise SystemExit(run(options.run))
    from test.support.pyramids import write_slide
    from test.support.stub import stub_manifest

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tile = np.random.default_rng(0).integers(0, 200, (1024, 1024, 3), dtype=np.uint8)
        write_slide(folder / "s.tif", [np.tile(tile, (SIDE // 1024, SIDE // 1024, 1))])
        stub_manifest(folder / "stub")
        write_detections(folder / "s.geojson.gz", options.count)
        command = [sys.executable, "-m", "benchmarks.detections", "--run", str(folder)]
        with (folder / "stderr").open("w") as errors:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, stderr=errors, env=environment)
        said = (folder / "stderr").read_text().splitlines()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        json.dumps(
            {
                "detections": options.count,
                "exit_code": done.returncode,
                "named": sum(line.startswith("not scored: ") for line in said),
                "core_seconds": round(used.ru_utime + used.ru_stime, 1),
                "peak_mib": int(done.stdout.split()[-1]) // 1024,
                "last": said[-1],
            }
        )
    )


if __name__ == "__main__":
    main()
