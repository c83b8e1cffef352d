"""`cluster` measured: two workers against one, memory over many crops, and what 10^8 crops would take.

python -m benchmarks.cluster workers [--crops 400]        the default ensemble, one worker of one core, then two
python -m benchmarks.cluster memory [--crops 1000000]     a tiny random network: the default would need a day
python -m benchmarks.cluster estimate --rate CROPS_PER_SECOND_OF_A_GPU [--gpus 8 64] [--crops 100000000]
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import threading
import time
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.cold_start import ROOT, machine
from inference.example.figures import FIGURES, draw
from test.support.miniature import make_ensemble
from test.support.ray_cluster import cluster

CACHE = ROOT / ".cache" / "benchmarks"
SHARD = 20  # crops per shard when workers are compared: many shards even at a dozen crops a second
DISTINCT = 512  # generated crops; a larger data set repeats them


def make_shards(folder: Path, crops: int, files: int) -> Path:
    """Parquet files with `crops` generated crops in all (128 x 128, JPEG, 5 kB each), in row groups of 1,024."""
    if folder.exists():
        return folder
    rng = np.random.default_rng(0)
    kinds = islice(cycle(kind for figures in FIGURES.values() for kind in figures), min(DISTINCT, crops))
    blobs = []
    for kind in kinds:
        stream = io.BytesIO()
        Image.fromarray(draw(kind, rng)).save(stream, "JPEG", quality=90)
        blobs.append(stream.getvalue())
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    schema = pa.schema({"image": pa.binary(), "slide": pa.string(), "number": pa.int64()})
    for number, part in enumerate(np.array_split(np.arange(crops), files)):
        with pq.ParquetWriter(
            partial / f"{number:05}.parquet", schema, compression="none", use_dictionary=False
        ) as out:
            for start in range(0, len(part), 1024):
                some = part[start : start + 1024].tolist()
                columns = [[blobs[n % len(blobs)] for n in some], [f"slide {n // 10_000}" for n in some], some]
                out.write_table(pa.table(columns, schema=schema))
    return partial.rename(folder)


def make_tiny(folder: Path) -> Path:
    """A random ensemble of one fold of the smallest network, at 32 pixels, without test-time augmentation."""
    if not folder.exists():
        folder.mkdir(parents=True)
        mean = [0.5, 0.5, 0.5]
        preprocess = {"crop": 32, "size": 32, "kernel": "bilinear", "mean": mean, "std": mean}
        make_ensemble(folder, folds=1, name="random-tiny", preprocess=preprocess)
    return folder


class Memory(threading.Thread):
    """Resident memory in MiB of the driver and of the largest worker, each second until the driver ends."""

    def __init__(self, driver: int, cluster: int, output: Path) -> None:
        super().__init__(daemon=True)
        self.driver, self.cluster, self.output = psutil.Process(driver), psutil.Process(cluster), output
        self.samples: list[dict[str, float]] = []
        self.start()

    def run(self) -> None:
        start = time.perf_counter()
        while True:
            try:
                driver = self.driver.memory_info().rss
                family = [(one.name(), one.memory_info().rss) for one in self.cluster.children(recursive=True)]
                if self.driver.status() == psutil.STATUS_ZOMBIE:
                    return
            except psutil.NoSuchProcess:
                if not self.driver.is_running():
                    return
                continue
            workers = [rss for name, rss in family if "ShardScorer" in name]
            ray = sum(rss for name, rss in family if name in ("raylet", "gcs_server"))
            if workers:
                shards = sum(1 for _ in self.output.glob("*.parquet"))
                self.samples.append(
                    {
                        "seconds": time.perf_counter() - start,
                        "shards": shards,
                        "driver": driver / 2**20,
                        "worker": max(workers) / 2**20,
                        "raylet and GCS": ray / 2**20,
                    }
                )
            time.sleep(1)


def score(data: Path, output: Path, cores: int, *more: object) -> tuple[float, float, list[dict[str, float]]]:
    """Seconds of the whole command and after the first shard, and memory samples; one worker per core."""
    with cluster(cores) as (address, pid):
        command = [
            sys.executable,
            "-m",
            "inference",
            "cluster",
            data,
            "--ray",
            address,
            "--output",
            output,
            "--workers",
            cores,
            "--device",
            "cpu",
            *more,
        ]
        start = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT)
        memory = Memory(process.pid, pid, output)
        if process.wait():
            raise SystemExit(process.returncode)
        seconds = time.perf_counter() - start
        memory.join()
    times = sorted(file.stat().st_mtime for file in output.glob("*.parquet"))
    return seconds, times[-1] - times[0], memory.samples


def workers(options: argparse.Namespace) -> dict[str, Any]:
    """Crops a second of the default ensemble on one and on two workers of one core each, over the same shards."""
    data = make_shards(CACHE / f"cluster-{options.crops}", options.crops, options.crops // SHARD)
    runs: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for _ in range(options.repeat):
        for cores, known in runs.items():
            with TemporaryDirectory() as folder:
                seconds, steady, _ = score(data, Path(folder) / "out", cores)
            known.append((seconds, steady))
            print(f"{cores} workers: {seconds:.1f} s, of these {steady:.1f} s after the first shard", flush=True)
    # what remains after the first shard; n workers finish n shards at about that time
    rates = {n: max((options.crops - n * SHARD) / steady for _, steady in known) for n, known in runs.items()}
    whole = {n: options.crops / min(seconds for seconds, _ in known) for n, known in runs.items()}
    print(
        f"after the first shard {rates[1]:.2f} and {rates[2]:.2f} crops a second: {rates[2] / rates[1]:.2f} times; "
        f"with start and end {whole[1]:.2f} and {whole[2]:.2f}: {whole[2] / whole[1]:.2f} times"
    )
    return {"runs": runs, "rates": rates, "whole": whole}


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Memory over many crops, without the first tenth, during which the workers fill their caches."""
    data = make_shards(CACHE / f"cluster-{options.crops}", options.crops, max(1, options.crops // 10_000))
    with TemporaryDirectory() as folder:
        ensemble = make_tiny(CACHE / "random-tiny")
        seconds, _, samples = score(data, Path(folder) / "out", 2, "--weights", ensemble, "--shard", 2048)
        rows = sum(pq.read_metadata(file).num_rows for file in (Path(folder) / "out").glob("*.parquet"))
    print(f"{rows:,} answers for {options.crops:,} crops in {seconds:.0f} s: {rows / seconds:.0f} a second")
    late = [one for one in samples if one["shards"] >= samples[-1]["shards"] / 10]
    result: dict[str, Any] = {"crops": options.crops, "answers": rows, "seconds": seconds}
    at = np.array([one["shards"] for one in late]) * options.crops / max(one["shards"] for one in samples)
    for name in ("driver", "worker", "raylet and GCS"):
        rss = np.array([one[name] for one in late])
        slope = float(np.polyfit(at / 1e6, rss, 1)[0]) if len(set(at)) > 1 else 0.0
        result[name] = {"first": rss[0], "last": rss[-1], "peak": max(one[name] for one in samples), "slope": slope}
        print(
            f"{name}: {rss[0]:.0f} MiB after a tenth, {rss[-1]:.0f} at the end, {result[name]['peak']:.0f} at most; "
            f"{slope:+.0f} MiB per million crops"
        )
    return result | {"samples": samples}


def estimate(options: argparse.Namespace) -> dict[str, Any]:
    """Hours on N GPUs, and the load on the storage and the driver."""
    shards = -(-options.crops // 4096)
    result = []
    for gpus in options.gpus:
        compute = options.crops / (gpus * options.rate * options.efficiency)
        # one driver hands out shards one by one: it cannot be faster than this, however many GPUs there are
        seconds = max(compute, shards * options.dispatch) + options.start
        bandwidth = options.crops * options.crop_bytes / seconds / 1e6
        result.append({"gpus": gpus, "hours": seconds / 3600, "MB/s": bandwidth, "shards/s": shards / seconds})
        print(f"{gpus:5} GPUs: {seconds / 3600:8.1f} h, {bandwidth:8.1f} MB/s read, {shards / seconds:6.2f} shards/s")
    return {"estimate": result}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    of_workers = commands.add_parser("workers", help=workers.__doc__)
    of_workers.add_argument("--crops", type=int, default=400)
    of_workers.add_argument("--repeat", type=int, default=3)
    of_workers.set_defaults(run=workers)
    of_memory = commands.add_parser("memory", help=memory.__doc__)
    of_memory.add_argument("--crops", type=int, default=1_000_000)
    of_memory.set_defaults(run=memory)
    of_estimate = commands.add_parser("estimate", help=estimate.__doc__)
    add = of_estimate.add_argument
    add("--rate", type=float, required=True, help="crops a second of one GPU with your ensemble, measured or assumed")
    add("--gpus", type=int, nargs="+", default=[1, 8, 64, 256])
    add("--crops", type=float, default=1e8)
    add("--efficiency", type=float, default=0.9, help="part of that rate that N GPUs reach together (default 0.9)")
    add("--dispatch", type=float, default=0.025, help="seconds of the driver for each shard (default 0.025)")
    add("--start", type=float, default=60, help="seconds until all workers have loaded the ensemble (default 60)")
    add("--crop-bytes", type=float, default=30e3, help="of a crop as it is stored (default 30,000: PNG, 128 pixels)")
    of_estimate.set_defaults(run=estimate)
    for command in (of_workers, of_memory, of_estimate):
        command.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    result = options.run(options)
    if options.json:
        options.json.write_text(json.dumps(result | {"machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
