"""`training import` of what transformers 4 wrote, whose layers have other names than the installed transformers 5's.

test/support/transformers4/write.py made the files, and says in which environment it makes them again.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from inference.backbones import BACKBONES
from inference.ensemble import Ensemble
from inference.manifest import load_manifest
from test.support.foreign import run_import
from test.support.transformers4 import write
from training.__main__ import main

FILES = Path(write.__file__).parent
NAMES = {  # a layer as transformers 4 names it in PEFT's file
    "dinov2-vits14": "dinov2.encoder.layer.0.attention.attention.query",
    "dinov2-vits14-reg": "dinov2_with_registers.encoder.layer.0.attention.attention.query",
    "dinov3-vits16": "backbone.layer.0.attention.q_proj",
    "vit-b16": "vit.encoder.layer.0.attention.attention.query",
}


@pytest.mark.parametrize("name", write.MODELS)
def test_base_and_adapters_of_transformers_4(name, tmp_path, monkeypatch):
    row, answers = BACKBONES[name], json.loads((FILES / name / "answers.json").read_text())
    assert answers["versions"]["transformers"].startswith("4.")
    with safe_open(FILES / name / "adapter" / "adapter_model.safetensors", "pt") as stored:
        assert f"base_model.model.{NAMES[name]}.lora_A.weight" in stored.keys()  # noqa: SIM118
    small = dict(depth=2, embed_dim=write.WIDTH, num_heads=write.HEADS, patch_size=write.PATCH, mlp_ratio=1)
    kwargs = row.kwargs | small | {"img_size": write.NATIVE}
    monkeypatch.setitem(BACKBONES, name, replace(row, kwargs=kwargs, depth=2, heads=write.HEADS, base_sha256=""))
    source = ["--file", str(FILES / name / "model.safetensors"), "--output", str(tmp_path / "bases")]
    assert main(["base", name, *source, "--dtype", "fp32"]) == 0

    options = ["--crop", "all", "--pool", "token"] if name == "dinov3-vits16" else ["--crop", "all"]
    assert run_import([FILES / name / "adapter"], name, tmp_path, *options, settings=[]) == 0
    theirs = torch.tensor(answers["logits"])
    ours = Ensemble.load(tmp_path / "out", "cpu", "fp32").predict(list(write.crops())).logits[0][0, 0]
    allowed = 1e-4 if name == "vit-b16" else 1e-5  # its variances get 1e-12 there, and timm's 1e-6 here
    torch.testing.assert_close(torch.tensor(ours), theirs[:, 1] - theirs[:, 0], atol=allowed, rtol=0)
    assert np.ptp(ours) > 0.01  # and not one answer for all
    assert main(["verify", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert load_manifest(tmp_path / "out").provenance["imported"][0]["library"] == "transformers"
