"""What is fuzzed of a job: the stack, `inputs.json`, the manifest and the adapters, each of any bytes.

A job around a stub ensemble must end with valid answers and a silent stderr, or with exit code 1, one line on stderr
and an empty output folder. Reading an adapter must give finite tensors or one UserError.
What is fuzzed is imported here, not where it is used: the fuzzer sees only what was imported while it instruments.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin  # noqa: F401
from safetensors.numpy import save_file

import inference.job  # noqa: F401
from inference.adapters import read_adapter
from inference.errors import UserError
from inference.imageio import metaimage, pixels, tiff  # noqa: F401
from inference.imageio import stack as stacks  # noqa: F401
from inference.manifest import upgraded
from test.support.image_files import stack, with_pillow
from test.support.stub import check_ended, make_input, run_job, stub_manifest

SLOWEST = 10  # seconds of processor time for one job
LAYERS = ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "patch_embed.proj"]


@cache
def workplace() -> Path:
    """A folder of this process."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    stub_manifest(folder / "ensemble")
    (folder / "output").mkdir()
    return folder


def job(content: bytes, name: str) -> None:
    """A job on a stack of these bytes."""
    folder = workplace() / "stack"
    shutil.rmtree(folder, ignore_errors=True)
    end(make_input(folder, content, name))


def inputs(content: bytes) -> None:
    """A job whose inputs.json holds these bytes."""
    end(make_input(workplace() / "listing", small_stack(), listing=content))


def manifest_with_head(folder: Path) -> dict[str, Any]:
    """A right manifest in format 2 whose member has a head of several layers."""
    content = upgraded(stub_manifest(folder))
    layers: list[dict[str, Any]] = [{"kind": "layer_norm", "features": 8, "eps": 1e-5}]
    layers += [{"kind": "linear", "inputs": 8, "outputs": 4}, {"kind": "gelu"}]
    content["members"][0]["head"] = [*layers, {"kind": "linear", "inputs": 4, "outputs": 1}]
    return content


def manifest(content: bytes) -> None:
    """A job whose ensemble.json holds these bytes."""
    folder = workplace() / "altered"  # of its own: the other targets need a whole one
    stub_manifest(folder)
    (folder / "ensemble.json").write_bytes(content)
    end(make_input(workplace() / "listing", small_stack()), folder)


def end(input_dir: Path, weights: Path | None = None) -> None:
    output = workplace() / "output"
    for file in output.iterdir():
        file.unlink()
    start = time.process_time()
    check_ended(run_job(input_dir, output, weights or workplace() / "ensemble"))
    assert time.process_time() - start < SLOWEST


@cache
def small_stack() -> bytes:
    return with_pillow([Image.fromarray(page) for page in stack(pages=2)])


@cache
def adapter() -> Path:
    """A right adapter for LAYERS."""
    folder = workplace() / "adapter"
    folder.mkdir()
    ones = {"lora_A.weight": np.ones((2, 4), np.float32), "lora_B.weight": np.ones((12, 2), np.float32)}
    state = {f"base_model.model.{layer}.{name}": value for layer in LAYERS[:2] for name, value in ones.items()}
    state["base_model.model.head.weight"] = np.ones((1, 4), np.float32)
    state["base_model.model.head.bias"] = np.ones(1, np.float32)
    save_file(state, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": "blocks\\.\\d+\\.attn\\.qkv",
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": ["head"],
        "use_rslora": False,
        "rank_pattern": {},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    read_adapter(folder, LAYERS)
    return folder


def adapter_file(content: bytes, name: str) -> None:
    """Reading an adapter one of whose files holds these bytes."""
    file = adapter() / name
    right = file.read_bytes()
    file.write_bytes(content)
    try:
        read = read_adapter(adapter(), LAYERS)
    except UserError as error:
        assert "\n" not in str(error) and "expect" in str(error) and str(error).count(";") >= 2, error
    else:
        assert read.lora.keys() <= set(LAYERS) and read.lora and np.isfinite(read.scale)
        assert all(tensor.isfinite().all() for pair in read.lora.values() for tensor in pair)
    finally:
        file.write_bytes(right)
