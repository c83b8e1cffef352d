"""How much slower is a slide than its crops in memory? `python -m benchmarks.slides`: 10,000 detections on one slide.

Scores the same crops twice: from memory, and with `python -m inference slides` from a generated slide of 0.25 um/px
(deflate-compressed tiles of 256 pixels of noise, which is the slowest to decode). Prints wall seconds and
processor seconds (which other busy processes do not change), the ratio of each, and the growth of peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from inference.__main__ import main as inference
from inference.ensemble import Ensemble
from inference.manifest import default_ensemble
from inference.slides.scoring import BATCH
from test.support.detection_files import qupath
from test.support.pyramids import write_slide


def clocks() -> np.ndarray:
    """Seconds (2,): on the clock, and of processor time used by this process on all cores."""
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detections", type=int, default=10_000)
    parser.add_argument("--weights", type=Path, default=default_ensemble())
    options = parser.parse_args()
    columns = int(np.ceil(options.detections**0.5))
    side = 130 * columns
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 200, (side, side, 3), dtype=np.uint8)
    places = [(65 + 130 * (n % columns), 65 + 130 * (n // columns)) for n in range(options.detections)]
    with tempfile.TemporaryDirectory() as folder:
        slide = write_slide(Path(folder) / "slide.tif", [pixels])
        detections = qupath(Path(folder) / "found.geojson", places)
        crops = [np.ascontiguousarray(pixels[y - 64 : y + 64, x - 64 : x + 64]) for x, y in places]
        del pixels
        ensemble = Ensemble.load(options.weights, "cpu")
        ensemble.predict(crops[:8])
        start = clocks()
        for first in range(0, len(crops), BATCH):
            ensemble.predict(crops[first : first + BATCH])
        memory = clocks() - start
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = clocks()
        command = ["slides", detections, "--slide", slide, "--output", Path(folder) / "out.geojson", "--device", "cpu"]
        if inference([str(part) for part in [*command, "--weights", options.weights]]):
            raise SystemExit("the command failed")
        from_slide = clocks() - start
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    found = {
        "detections": options.detections,
        "from_memory_s": memory.round(1).tolist(),
        "from_slide_s": from_slide.round(1).tolist(),
        "ratio": (from_slide / memory).round(3).tolist(),
        "peak_memory_grew_mb": grown // 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
