"""How much slower is a slide than its crops in memory? `python -m benchmarks.slides`: 10,000 detections on one slide.

Scores the same crops twice: with `python -m inference slides` from a generated slide of 0.25 um/px (deflate-compressed
tiles of 256 pixels of noise, which is the slowest to decode), and from memory. Prints wall seconds and processor
seconds (which other busy processes do not change) of both, the ratio of each, and the peak memory after a tenth of the
detections and after all of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from inference.__main__ import main as inference
from inference.ensemble import Ensemble
from inference.manifest import default_ensemble
from inference.slides.part import BATCH
from test.support.detection_files import qupath
from test.support.pyramids import write_slide

STEP = 130  # pixels from one detection to the next


def clocks() -> np.ndarray:
    """Seconds (2,): on the clock, and of processor time used by this process on all cores."""
    return np.array([time.perf_counter(), time.process_time()])


def peak() -> int:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def make_slide(folder: Path, columns: int) -> None:
    """The slide, and its pixels as a file from which crops can be taken without it."""
    pixels = np.random.default_rng(0).integers(0, 200, (STEP * columns, STEP * columns, 3), dtype=np.uint8)
    write_slide(folder / "slide.tif", [pixels])
    np.save(folder / "pixels.npy", pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detections", type=int, default=10_000)
    parser.add_argument("--weights", type=Path, default=default_ensemble())
    options = parser.parse_args()
    columns = int(np.ceil(options.detections**0.5))
    places = [(STEP // 2 + STEP * (n % columns), STEP // 2 + STEP * (n // columns)) for n in range(options.detections)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # in a process of its own: the peak of this one shall be the command's
        maker = multiprocessing.get_context("spawn").Process(target=make_slide, args=(folder, columns))
        maker.start()
        maker.join()

        def slides(number: int) -> np.ndarray:
            found, output = qupath(folder / f"{number}.geojson", places[:number]), folder / f"{number}-out.geojson"
            command = ["slides", found, "--slide", folder / "slide.tif", "--output", output, "--device", "cpu"]
            start = clocks()
            if inference([str(part) for part in [*command, "--weights", options.weights]]):
                raise SystemExit("the command failed")
            return clocks() - start

        slides(options.detections // 10)
        tenth = peak()
        from_slide = slides(options.detections)
        whole = peak()

        ensemble = Ensemble.load(options.weights, "cpu")
        pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        crops = [np.array(pixels[y - 64 : y + 64, x - 64 : x + 64]) for x, y in places]
        ensemble.predict(crops[:8])
        start = clocks()
        for first in range(0, len(crops), BATCH):
            ensemble.predict(crops[first : first + BATCH])
        memory = clocks() - start
    found = {
        "detections": options.detections,
        "from_memory_s": memory.round(1).tolist(),
        "from_slide_s": from_slide.round(1).tolist(),
        "ratio": (from_slide / memory).round(3).tolist(),
        "peak_mib_after_a_tenth": tenth,
        "peak_mib": whole,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
