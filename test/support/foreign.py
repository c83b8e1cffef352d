"""Adapters as other programs train and save them: by `transformers` or timm with PEFT, on two-block models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from inference.backbones import BACKBONES
from inference.ensemble import Ensemble
from inference.preprocess import Preprocess, to_batch
from test.support.published import shrink, transformers_model
from test.support.stacks import write_stack
from test.support.stub import make_input, run_job
from training.__main__ import main

SIZE = 112  # pixels; a multiple of 14 and of 16
MEAN, STD = (0.5, 0.4, 0.6), (0.2, 0.3, 0.25)
PREPROCESS = Preprocess(None, SIZE, "bicubic", MEAN, STD)
SETTINGS = ["--crop", "all", "--size", str(SIZE), "--kernel", "bicubic"]
SETTINGS += ["--mean", *map(str, MEAN), "--std", *map(str, STD)]


def crops(count: int = 3, side: int = 40) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(256, size=(count, side, side, 3), dtype=np.uint8))


def check_job(ensemble: Path, folder: Path) -> None:
    """A job with `ensemble`, run in `folder`, answers as the library does."""
    pages = np.stack(crops(2, 64))
    write_stack(folder / "stack.tiff", [Image.fromarray(page) for page in pages])
    job = make_input(folder / "input", (folder / "stack.tiff").read_bytes())
    ended = run_job(job, folder / "output", ensemble, "--precision", "fp32", stub=False)
    assert ended.code == 0, ended.err
    expected = Ensemble.load(ensemble, "cpu", "fp32").predict(list(pages)).p_atypical
    assert [answer["confidence"] for answer in ended.answers] == pytest.approx(expected.tolist(), abs=1e-5)


def make_base(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """Shrink `name` in the table, and write `folder`/bases/NAME.safetensors from a random model of `transformers`.

    Returns that model.
    """
    shrink(monkeypatch, name)
    model = transformers_model(name, folder / "published")
    source = folder / "published" / "model.safetensors"
    arguments = ["base", name, "--file", str(source), "--output", str(folder / "bases"), "--dtype", "fp32"]
    assert main(arguments) == 0
    return model


class Classifier(torch.nn.Module):
    """A backbone of `transformers` with a linear layer on pooled tokens, as people write it."""

    def __init__(self, backbone: torch.nn.Module, classes: int, pool: str = "token", prefix: int = 1) -> None:
        super().__init__()
        self.backbone, self.pool, self.prefix = backbone, pool, prefix
        width = backbone.config.hidden_size
        self.fc = torch.nn.Linear(width * len(pool.split("+")), classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        more = {"interpolate_pos_encoding": True} if self.backbone.config.model_type == "vit" else {}
        tokens = self.backbone(pixel_values=x, **more).last_hidden_state
        parts = {"token": tokens[:, 0], "avg": tokens[:, self.prefix :].mean(1)}
        return self.fc(torch.cat([parts[part] for part in self.pool.split("+")], 1))


def adapt(model: torch.nn.Module, targets: Sequence[str] | str, head: str = "fc", seed: int = 0, **lora: Any) -> Any:
    """`model` with random LoRA and head, as if trained, in PEFT's wrapper."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6} | lora
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=[head], **settings)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                scale = 1 + 0.1 * torch.randn_like(parameter) if "magnitude" in name else None
                parameter.normal_(0, 0.1) if scale is None else parameter.mul_(scale)
    return adapted


def logits(model: torch.nn.Module, preprocess: Preprocess = PREPROCESS, count: int = 3) -> torch.Tensor:
    """The model's own answers (N, classes) for `crops`."""
    with torch.inference_mode():
        found = model(to_batch(crops(count), preprocess))
    return getattr(found, "logits", found)


def run_import(sources: Sequence[Path], name: str, folder: Path, *options: str, settings: list[str] = SETTINGS) -> int:
    """`training import` of the sources on `folder`/bases into `folder`/out."""
    arguments = ["import", *map(str, sources), "--base", name, "--output", str(folder / "out"), *settings]
    arguments += ["--bases", str(folder / "bases"), "--include-base", "--device", "cpu"]
    positive = [] if "--positive" in options else ["--positive", "1"]
    return main([*arguments, *positive, *options])


def blocks_of(name: str) -> int:
    return BACKBONES[name].depth
