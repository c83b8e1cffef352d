"""Compare an ensemble's fused folds with the reference libraries: timm's model, PEFT's own merge, crop by crop, fp32.

What the container computes is this project's own code. This command loads the same folder as anybody else would,
and prints how far each fold's logits differ, and the time and memory that each way takes.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from timm.layers import resample_abs_pos_embed

from inference.answers import pages_of
from inference.backbones import build, lookup
from inference.commandline import DEVICES
from inference.device import choose_device
from inference.ensemble import Ensemble
from inference.errors import UserError
from inference.head import HeadLayer
from inference.hub import FORM, local_folder
from inference.imageio.listing import list_crops
from inference.imageio.stack import read_stack
from inference.manifest import Member, ensemble_folder, load_manifest
from inference.preprocess import Preprocess, to_batch, views
from inference.progress import speaking

from ..fit.lora import load_base

GENERATED = 4  # crops without --data
MOST = 16  # crops of --data: the plain path takes seconds for each on a foundation model
MODULES = {"gelu": torch.nn.GELU, "relu": torch.nn.ReLU, "silu": torch.nn.SiLU, "tanh": torch.nn.Tanh}
TOLERANCE = 1e-5  # of logits, relative to the largest where that is above 1; rounding of fp32 stays below it


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ensemble", type=ensemble_folder, help=f"an ensemble folder, such as weights/mine, or {FORM}")
    parser.add_argument(
        "--data", type=Path, help=f"a folder, file or CSV of crops; its first {MOST} are taken (default: generated)"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto")


def run(options: argparse.Namespace) -> None:
    folder = local_folder(options.ensemble)
    crops, origin = choose_crops(options.data)
    with torch.backends.cudnn.flags(allow_tf32=False):  # a GPU would round convolutions to ten bits
        fault = verify(folder, crops, options.device, origin)
    if fault:
        raise UserError(
            f"{options.ensemble}: FAIL, {fault}; expected what timm and PEFT compute; do not upload it, export it again"
        )
    print("PASS")


def choose_crops(data: Path | None) -> tuple[list[np.ndarray], str]:
    """Crops, uint8 (H, W, 3), and a phrase that says where they are from."""
    if data is None:
        generator = np.random.default_rng(0)
        shape = (GENERATED, 128, 128, 3)
        return list(generator.integers(256, size=shape, dtype=np.uint8)), f"{GENERATED} generated crops"
    crops: list[np.ndarray] = []
    items = list_crops([data])
    for item in items:
        crops += [crop for _, crop in pages_of(read_stack(Path(item.path)), item.page)]
        if len(crops) >= MOST:
            break
    return crops[:MOST], f"the first {len(crops[:MOST])} crops of {data}"


@dataclass(frozen=True)
class Cost:
    seconds: float
    gib: float


def measure(device: torch.device, work: Callable[[], list[np.ndarray]]) -> tuple[list[np.ndarray], Cost]:
    """The result of `work`, its seconds, and the peak memory meanwhile: the GPU's, or this whole process's."""
    gc.collect()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak starts again from what is resident
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    if cuda:
        peak = torch.cuda.max_memory_allocated(device)
    else:
        status = Path("/proc/self/status").read_text()
        peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    return result, Cost(seconds, peak / 2**30)


def verify(folder: Path, crops: Sequence[np.ndarray], device: str, origin: str) -> str:
    """Print the comparison; returns what is wrong, or nothing. UserError where the folder cannot be loaded."""
    manifest, where = load_manifest(folder), choose_device(device)
    folds = [(member, fold) for member in manifest.members for fold in member.folds]
    together = lambda: [fold for z in Ensemble.load(folder, device, "fp32").predict(crops).logits for fold in z]  # noqa: E731
    alone = lambda member, fold, dtype=torch.float32: fold_logits(member, fold, crops, where, dtype)  # noqa: E731
    with speaking("computing the fused ensemble"):
        fused, ours = measure(where, together)  # of each fold (V, N)
    with speaking("computing the same with timm and PEFT"):
        plain, theirs = measure(where, lambda: [alone(*fold) for fold in folds])
    kinds = " + ".join(f"{member.backbone} with {len(member.folds)} folds" for member in manifest.members)
    print(f"{folder}: {kinds}, {origin}, fp32 on {where}")
    problem = ""
    for (member, fold), ours_of_fold, expected in zip(folds, fused, plain, strict=True):
        difference = float(np.abs(ours_of_fold - expected).max())
        allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()))
        if not difference <= allowed:  # fp32 itself may be coarser: random or very deep networks need more
            exact = alone(member, fold, torch.float64)
            difference = float(np.abs(ours_of_fold - exact).max())
            allowed = max(allowed, 2 * float(np.abs(expected - exact).max()))
        passed = difference <= allowed
        print(f"{fold.name}: logits differ by at most {difference:.1e}, allowed {allowed:.1e}: {verdict(passed)}")
        if not passed and not problem:
            problem = f"{fold.name}'s logits differ by {difference:.1e}, allowed {allowed:.1e}"
    print(f"fused        {ours.seconds:8.1f} s {ours.gib:7.2f} GiB  loaded, all folds in one pass")
    print(f"timm + PEFT  {theirs.seconds:8.1f} s {theirs.gib:7.2f} GiB  loaded, fold after fold, crop by crop")
    return problem


def verdict(passed: bool) -> str:
    return "PASS" if passed else "FAIL"


def fold_logits(
    member: Member, fold: Path, crops: Sequence[np.ndarray], device: torch.device, dtype: torch.dtype
) -> np.ndarray:
    """Logits (V, N) of one fold by timm and PEFT alone; only the resized crops come from this project."""
    backbone = lookup(member.backbone)
    model = build(backbone, 1, member.pool)
    load_base(model, member.base, backbone.head)
    if member.head:
        model.set_submodule(backbone.head, torch.nn.Sequential(*map(head_module, member.head)))
    if member.positions == "plain":
        resample_plainly(model, member.preprocess["size"])
    merged = PeftModel.from_pretrained(model, fold).merge_and_unload().to(device, dtype).eval()
    preprocess = Preprocess(**member.preprocess)
    answers = []
    with torch.inference_mode():
        for crop in crops:
            batch = views(to_batch([crop], preprocess), member.tta).to(device, dtype)
            answers.append(merged(batch)[:, 0].double().cpu().numpy())
    return np.stack(answers, axis=1)


def head_module(layer: HeadLayer) -> torch.nn.Module:
    """PyTorch's own module of a layer, without its weights."""
    if layer.kind == "linear":
        return torch.nn.Linear(layer.inputs, layer.outputs)
    if layer.kind == "layer_norm":
        return torch.nn.LayerNorm(layer.features, layer.eps)
    return MODULES[layer.kind]()


def resample_plainly(model: Any, size: int) -> None:
    """Resample a timm ViT's positions to inputs of `size` pixels without antialiasing, which timm always applies."""
    if getattr(model, "pos_embed", None) is None:
        return
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    grid = tuple(size // side for side in model.patch_embed.patch_size)
    table = resample_abs_pos_embed(model.pos_embed.data, grid, num_prefix_tokens=prefix, antialias=False)
    model.pos_embed, model.patch_embed.grid_size = torch.nn.Parameter(table), grid
