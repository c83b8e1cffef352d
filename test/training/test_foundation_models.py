"""The roads of docs/foundation-models.md, command by command, on two-block models in the names of their publishers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from inference.backbones import BACKBONES
from inference.checksums import sha256
from inference.manifest import load_manifest
from test.support.published import meta_names, shrink, transformers_model
from test.support.tables import tiny_table
from training.__main__ import main

ROADS = {
    "virchow": ("virchow-r8", "pytorch_model.bin", 14),  # timm's names, a pickle
    "dinov3-vith16plus": ("dinov3-hplus-domain-focal", "pretrain.pth", 16),  # Meta's names
    "dinov2-vits14": ("default", "model.safetensors", 14),  # the names of `transformers`
}


@pytest.mark.parametrize("name", ROADS)
def test_a_road_from_the_published_file_to_verified_weights(name, tmp_path, monkeypatch, capsys):
    recipe, published, patch = ROADS[name]
    model = shrink(monkeypatch, name)
    if published == "model.safetensors":
        transformers_model(name, tmp_path)
    else:
        state = model.state_dict()
        torch.save(state if name == "virchow" else meta_names(state), tmp_path / published)
    bases, run, ensemble = tmp_path / "bases", tmp_path / "run", tmp_path / "weights" / name
    assert main(["base", name, "--file", str(tmp_path / published), "--output", str(bases)]) == 0
    base = bases / f"{name}.safetensors"

    data = tiny_table(tmp_path, 12, 4)
    changes = ["epochs=1", "batch=4", "folds=2", f"size={2 * patch}", "crop=24"]
    arguments = ["fit", "--recipe", recipe, "--data", str(data), "--run", str(run), "--base", str(base)]
    assert main([*arguments, *(f"--set={change}" for change in changes)]) == 0
    arguments = ["export", str(run), "--output", str(ensemble), "--bases", str(bases), "--include-base"]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(["verify", str(ensemble), "--data", str(data), "--device", "cpu"]) == 0

    assert capsys.readouterr().out.endswith("PASS\n")
    (member,) = load_manifest(ensemble).members
    assert member.base_sha256 == sha256(base) and member.licence["base"] == BACKBONES[name].licence
    for fold in member.folds:
        config = json.loads(Path(fold, "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == BACKBONES[name].source
