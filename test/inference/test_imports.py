"""The import budget of a job: what it must not load, because every job pays for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

from test.harness.layout import write_input
from test.support.miniature import make_ensemble

HEAVY = {
    "timm",
    "torchvision",
    "peft",
    "transformers",
    "accelerate",
    "pandas",
    "sklearn",
    "scipy",
    "matplotlib",
    "cv2",
    "SimpleITK",
    "shapely",
    "ray",
    "tensorboard",
    "huggingface_hub",
}


def test_a_job_loads_torch_and_little_else(tmp_path):
    (tmp_path / "ensemble").mkdir()
    make_ensemble(tmp_path / "ensemble", folds=1)
    write_input(Path("test/sample/stack_0.tiff"), tmp_path / "in", "2026", Random(0))
    (tmp_path / "out").mkdir()
    arguments = ["--input", "in", "--output", "out", "--weights", "ensemble"]
    arguments = [str(tmp_path / a) if not a.startswith("--") else a for a in arguments]
    program = (
        "import json, sys; from inference.__main__ import main; code = main(sys.argv[1:]); "
        "print(json.dumps([code, sorted({name.partition('.')[0] for name in sys.modules})]))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    assert "torch" in modules
    assert not HEAVY & set(modules)


def test_nothing_imports_torch_before_the_input_is_read():
    program = (
        "import sys; import inference.__main__, inference.manifest, inference.contract; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
