"""What only a real GPU can show: `python -m test.gpu`, or ./test/run_gpu.sh.

For every backbone of the table, as a miniature with random weights: logits in each precision on the GPU against fp32 on
the CPU. For the bundled ensemble: seconds of a whole job, of a warm pass, and peak device memory against the bound.
Then the tests marked gpu. Exit code 1 where something differs or a test fails, 2 where there is no GPU.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

try:
    import numpy as np
    import torch

    from inference.backbones import BACKBONES
    from inference.ensemble import Ensemble
    from inference.imageio.stack import read_stack
    from test.harness.layout import write_input
    from test.support.miniature import make_ensemble
except ModuleNotFoundError as error:
    sys.exit(f"no module {error.name} in this Python; expected the project's own; run ./test/run_gpu.sh")

ROOT = Path(__file__).resolve().parents[1]
STACK = ROOT / "test" / "sample" / "stack_0.tiff"
ALLOWED = {"fp32": 1e-3, "bf16": 0.5, "fp16": 0.1}  # of a miniature's logits, which are of the order of 1
MEMORY = 16 << 30  # bytes that the platform's GPU has


def compare(backbone: str, crops: list[np.ndarray], device: str = "cuda") -> bool:
    """One row: the largest difference of logits from fp32 on the CPU, in each precision."""
    row, cells, well = BACKBONES[backbone], [], True
    with tempfile.TemporaryDirectory() as folder:
        make_ensemble(Path(folder), backbone, targets=list(row.targets)[-1])
        expected = Ensemble.load(Path(folder), "cpu", "fp32").predict(crops).logits[0]
        for precision, allowed in ALLOWED.items():
            if precision == "fp16" and not row.fp16_safe:
                cells.append(f"{'-':>9}")
                continue
            found = Ensemble.load(Path(folder), device, precision).predict(crops).logits[0]
            worst = float(np.abs(found - expected).max())
            well &= worst <= allowed
            cells.append(f"{worst:9.5f}")
    print(f"{backbone:20} {' '.join(cells)}  {'' if well else 'TOO FAR'}", flush=True)
    return well


def bundled() -> bool:
    """A job in a process of its own, a warm pass, and the memory of both."""
    from random import Random

    with tempfile.TemporaryDirectory() as folder:
        write_input(STACK, Path(folder, "in"), "2026", Random(0))
        Path(folder, "out").mkdir()
        command = [sys.executable, "-m", "inference", f"--input={folder}/in", f"--output={folder}/out", "--device=cuda"]
        start = time.perf_counter()
        code = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
        cold = time.perf_counter() - start
    crops = read_stack(STACK)
    torch.cuda.reset_peak_memory_stats()  # of the backbones before
    ensemble = Ensemble.load(ROOT / "weights" / "default", "cuda")
    ensemble.predict(crops)
    start = time.perf_counter()
    for _ in range(10):
        ensemble.predict(crops)
    warm = (time.perf_counter() - start) / 10
    peak = ensemble.device_bytes()
    print(
        f"{ensemble.manifest.name} in {ensemble.precision}, {len(crops)} crops: job {cold:.2f} s (exit code {code}), "
        f"warm {warm:.3f} s, peak {peak >> 20:,} MiB of {MEMORY >> 20:,}"
    )
    return code == 0 and peak < MEMORY


def main() -> int:
    if not torch.cuda.is_available():
        print(
            "no GPU that PyTorch can use; expected an NVIDIA GPU and its driver; run on such a machine", file=sys.stderr
        )
        return 2
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    crops = list(np.random.default_rng(0).integers(0, 256, (4, 96, 96, 3), np.uint8))
    print(f"{'backbone':20} {' '.join(f'{name:>9}' for name in ALLOWED)}  largest difference of logits")
    well = [compare(backbone, crops) for backbone in BACKBONES]
    well.append(bundled())
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "test"], cwd=ROOT).returncode
    return 0 if all(well) and tests in (0, 5) else 1  # pytest's 5: no test is marked


if __name__ == "__main__":
    sys.exit(main())
