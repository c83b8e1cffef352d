"""Base weights: from the package to safetensors, the same bytes each time, nothing taken that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from inference.backbones import build
from inference.checksums import sha256
from training.__main__ import main


def make(folder: Path, *options: str) -> Path:
    assert main(["base", "efficientnet-lite0", "--output", str(folder), *options]) == 0
    return folder / "efficientnet-lite0.safetensors"


def test_the_packages_weights_give_the_bytes_that_the_default_expects(tmp_path):
    """In every place and at every time: a manifest names a base by its hash."""
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    expected = json.loads(Path("weights/default/ensemble.json").read_text())["base"]["sha256"]
    assert sha256(first) == sha256(second) == expected
    record = json.loads(first.with_suffix(".json").read_text())
    assert record["licence"] == "Apache-2.0" and record["sha256"] == expected


def test_a_local_file_in_timms_names_gives_the_same_tensors(tmp_path):
    state = load_file(make(tmp_path / "a"))
    torch.save(state, tmp_path / "local.pth")
    again = load_file(make(tmp_path / "b", "--file", str(tmp_path / "local.pth")))
    assert all(torch.equal(again[name], value) for name, value in state.items())


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "pickle"])
def test_what_does_not_fit_is_refused(change, tmp_path, capsys):
    state: dict = build("efficientnet-lite0", 0).state_dict()
    if change == "missing":
        del state["conv_stem.weight"]
    elif change == "unknown":
        state["extra.weight"] = torch.zeros(1)
    elif change == "shape":
        state["conv_stem.weight"] = torch.zeros(1, 3, 3, 3)
    else:
        state = {"conv_stem.weight": Path("a pickle may hold anything")}
    torch.save(state, tmp_path / "local.pth")
    arguments = ["base", "efficientnet-lite0", "--output", str(tmp_path), "--file", str(tmp_path / "local.pth")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(tmp_path) in error
    assert not list(tmp_path.glob("*.safetensors"))
