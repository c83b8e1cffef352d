"""From a few steps of `transformers` and PEFT on real DINOv2 weights to a job's answers and a model tarball."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from inference.backbones import lookup
from inference.checksums import sha256
from inference.ensemble import Ensemble
from inference.manifest import BASES, load_manifest
from inference.preprocess import Preprocess
from test.support.foreign import Classifier, check_job, crops, logits
from test.support.tables import tiny_table
from training.__main__ import main
from training.adapters.reference import transformers_backbone

NAME = "dinov2-vits14"
BASE = BASES / f"{NAME}.safetensors"
MEAN, STD = lookup(NAME).mean, lookup(NAME).std
PREPROCESS = Preprocess(None, 168, "bicubic", MEAN, STD)

pytestmark = pytest.mark.skipif(not BASE.is_file(), reason="no base: python -m training base dinov2-vits14")


def trained(folder: Path) -> torch.nn.Module:
    """q and v of the real DINOv2 ViT-S after a few steps, saved by PEFT."""
    backbone, _ = transformers_backbone(lookup(NAME), load_file(BASE), "token")
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["fc"])
    model = get_peft_model(Classifier(backbone, 2), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, labels = torch.randn(4, 3, 56, 56), torch.tensor([0, 1, 0, 1])
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    model.eval().save_pretrained(folder)
    return model


def run_import(source: Path, out: Path, size: int, *more: str) -> int:
    normal = ["--mean", *map(str, MEAN), "--std", *map(str, STD), "--kernel", "bicubic", "--crop", "all"]
    arguments = ["import", str(source), "--base", NAME, "--output", str(out), "--positive", "1", "--pool", "token"]
    return main([*arguments, *normal, "--size", str(size), "--device", "cpu", "--include-base", *more])


def test_dinov2_answers_as_transformers_and_peft_do(tmp_path):
    """At 168 pixels, whose positions are resampled without antialiasing, and at the native 518."""
    model = trained(tmp_path / "adapter")
    for size, count in ((168, 3), (518, 1)):
        assert run_import(tmp_path / "adapter", tmp_path / str(size), size) == 0
        found = logits(model, dataclasses.replace(PREPROCESS, size=size), count)
        ours = Ensemble.load(tmp_path / str(size), "cpu", "fp32").predict(crops(count)).logits[0][0, 0]
        torch.testing.assert_close(torch.tensor(ours), found[:, 1] - found[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", ["adapter", "checkpoint", "merged"])
def test_the_whole_road(form, tmp_path, capsys):
    """Import, calibrate, verify, job and tarball, from each kind of source."""
    model = trained(tmp_path / "adapter")
    source, more = tmp_path / "adapter", ["--licence", "CC-BY-4.0"]
    if form != "adapter":
        state = model.state_dict() if form == "checkpoint" else model.merge_and_unload().state_dict()
        source = tmp_path / "last.pth"
        torch.save({"state_dict": state}, source)
        more += ["--alpha", "16"] if form == "checkpoint" else []
    data, out = tiny_table(tmp_path, 66, 10), tmp_path / "mine"
    assert run_import(source, out, 56, "--data", str(data), *more) == 0
    assert "the first 16 crops of" in capsys.readouterr().out
    assert load_manifest(out).members[0].precision["bf16"] is not None  # measured on real crops
    assert main(["calibrate", str(out), "--data", str(data), "--device", "cpu"]) == 0
    assert main(["verify", str(out), "--data", str(data), "--device", "cpu"]) == 0
    manifest = load_manifest(out)
    assert manifest.provenance["calibration"]["of"] == "a held-out set, not out of fold"
    assert manifest.provenance["imported"][0]["library"] == "transformers"

    check_job(out, tmp_path)
    assert packed(out, tmp_path / "packed") == {
        file.relative_to(out).as_posix(): sha256(file) for file in out.rglob("*") if file.is_file()
    }


def packed(ensemble: Path, output: Path) -> dict[str, str]:
    """The hashes of all that the model tarball of `./export.sh` holds, by name; no Docker is asked."""
    script = Path(__file__).resolve().parents[2] / "export.sh"
    command = ["bash", str(script), "--only", "model", "--ensemble", str(ensemble), "--output", str(output)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DOCKER": "/bin/false"})
    assert ended.returncode == 0, ended.stderr
    [target] = output.glob("*.tar.gz")
    with tarfile.open(target) as archive:
        archive.extractall(output / "model", filter="data")  # as the platform does
    found = (output / "model").rglob("*")
    return {file.relative_to(output / "model").as_posix(): sha256(file) for file in found if file.is_file()}
