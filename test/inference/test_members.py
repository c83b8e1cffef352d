"""Ensembles of several members: the weighted mean of the members alone, in the memory of the largest, everywhere."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from inference import ensemble as module
from inference.averaging import average
from inference.ensemble import Ensemble, LoadedMember
from inference.errors import UserError
from inference.manifest import load_manifest
from inference.metrics import sigmoid
from release import preflight
from release.tarball import write_model_tarball
from test.harness import engines, layout, readout, served
from test.support.commands import inference
from test.support.image_files import stack, with_pillow
from test.support.miniature import make_members, overrides, random_base
from test.support.programs import messages
from test.support.stub import make_input, run_job

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "test/sample/stack_0.tiff"
TWO: dict[str, dict[str, Any]] = {
    "lite": {"backbone": "efficientnet-lite0", "folds": 2, "tta": "rot4"},
    "uni": {"backbone": "uni", "folds": 3, "preprocess": {"crop": None, "size": 112}},
}
ONE_BASE: dict[str, dict[str, Any]] = {
    "near": {"backbone": "efficientnet-lite0", "folds": 2, "targets": "late"},
    "far": {"backbone": "efficientnet-lite0", "folds": 1, "targets": "late", "preprocess": {"crop": 128}},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two members with bases, views and preprocessing of their own. Not to be changed."""
    folder = tmp_path_factory.mktemp("two")
    make_members(folder, TWO, weights=[0.25, 0.75], temperature=1.7, threshold=0.45)
    return folder


@pytest.fixture(scope="module")
def one_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One base at two crop sizes. Not to be changed."""
    folder = tmp_path_factory.mktemp("one-base")
    make_members(folder, ONE_BASE)
    return folder


def crops(count: int = 5) -> list[np.ndarray]:
    return list(np.random.default_rng(3).integers(0, 256, (count, 128, 128, 3), dtype=np.uint8))


def logit(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p))


@pytest.mark.parametrize("averaging", ["logit", "probability"])
@pytest.mark.parametrize("keep", [True, False])
def test_answers_are_the_weighted_mean_of_the_members_alone(averaging: str, keep: bool, two: Path) -> None:
    manifest = dataclasses.replace(load_manifest(two), averaging=averaging)
    alone = []
    for member in manifest.members:
        single = dataclasses.replace(manifest, members=(dataclasses.replace(member, weight=1.0),))
        alone.append(Ensemble(single, "cpu", "fp32").predict(crops()).p_atypical)
    found = Ensemble(manifest, "cpu", "fp32", keep=keep).predict(crops())
    if averaging == "logit":
        expected = sigmoid(0.25 * logit(alone[0]) + 0.75 * logit(alone[1]))
    else:
        expected = 0.25 * alone[0] + 0.75 * alone[1]
    assert np.abs(found.p_atypical - expected).max() < 1e-6
    assert np.abs(found.member_p - alone).max() < 1e-6
    assert [z.shape for z in found.logits] == [(2, 4, 5), (3, 1, 5)]
    assert found.fold_p.shape == (5, 5)
    spread = [np.ptp(found.fold_p[:2], axis=0), np.ptp(found.fold_p[2:], axis=0)]
    assert np.array_equal(found.member_spread, spread)
    assert np.ptp(found.fold_p) > 0.01  # the members are not the same network twice


def test_format_1_answers_as_format_2_with_one_member(tmp_path: Path) -> None:
    make_members(tmp_path, {"lite": TWO["lite"]}, averaging="probability", temperature=1.3)
    second = Ensemble.load(tmp_path, "cpu", "fp32")
    content = json.loads((tmp_path / "ensemble.json").read_text())
    [member] = content.pop("members")
    del member["name"], content["weights"]
    (tmp_path / "ensemble.json").write_text(json.dumps(content | member | {"format": 1}))
    first = Ensemble.load(tmp_path, "cpu", "fp32")
    assert first.manifest.members == (dataclasses.replace(second.manifest.members[0], name="efficientnet-lite0"),)
    for name in ("p_atypical", "member_p", "fold_p"):
        assert np.array_equal(getattr(first.predict(crops()), name), getattr(second.predict(crops()), name))


def test_an_average_is_never_above_1() -> None:
    """Eight equal weights, or any others, may add up to a little more than 1; an answer above 1 would fail the job."""
    weights = [0.7, 0.2, 0.1]
    assert sum(weights) < 1 < sum([0.1, 0.7, 0.2, 1e-16, 2e-16])
    for shares in (weights, [0.1, 0.7, 0.2, 1e-16, 2e-16]):
        certain = [np.full((1, 1, 1), 500.0)] * len(shares)
        assert average(certain, "probability", 1.0, shares) <= 1


def test_members_with_one_base_share_it(one_base: Path, tmp_path: Path) -> None:
    manifest = load_manifest(one_base)
    assert len(manifest.bases) == 1 and len({member.base for member in manifest.members}) == 1
    ensemble = Ensemble(manifest, "cpu", "fp32")
    ensemble.predict(crops(1))
    near, far = (member.weights for member in ensemble.members)
    name = "blocks.0.0.conv_dw"  # only later layers are adapted
    assert near.convolution(name, "blocks.0.0.bn1")[0] is far.convolution(name, "blocks.0.0.bn1")[0]
    adapted = sorted(near.adapted & far.adapted)[0]
    assert near[adapted] is not far[adapted] and near[adapted].shape[0] == 2 and far[adapted].shape[0] == 1
    with tarfile.open(write_model_tarball(one_base, tmp_path)) as archive:
        assert [name for name in archive.getnames() if "efficientnet" in name] == ["efficientnet-lite0.safetensors"]


def test_a_base_is_freed_after_its_last_member(one_base: Path, two: Path) -> None:
    for folder in (one_base, two):
        ensemble = Ensemble(load_manifest(folder), "cpu", "fp32", keep=False)
        ensemble.predict(crops(1))
        assert all(member._weights is None and not member._shared for member in ensemble.members)
    kept = Ensemble(load_manifest(two), "cpu", "fp32")
    kept.predict(crops(1))
    first = kept.members[0].weights
    kept.predict(crops(1))
    assert kept.members[0].weights is first


def test_computing_again_in_fp32_reads_only_what_was_checked(
    miniature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that overflow are computed again from the files, which may have been replaced in the meantime."""
    folder = Path(shutil.copytree(miniature, tmp_path / "copy"))
    expected = Ensemble.load(folder, "cpu", "fp32").predict(crops())
    ensemble, real = Ensemble.load(folder, "cpu", "bf16"), module.logits

    def overflowing(batch: torch.Tensor, weights: Any, *more: Any) -> torch.Tensor:
        return real(batch, weights, *more) * (1 if weights.dtype == torch.float32 else torch.inf)

    monkeypatch.setattr(module, "logits", overflowing)
    found = ensemble.predict(crops())
    assert found.recomputed == 5 and np.abs(found.p_atypical - expected.p_atypical).max() < 1e-6
    random_base("efficientnet-lite0", tmp_path / "other.safetensors", seed=7).replace(folder / "base.safetensors")
    with pytest.raises(UserError, match=r"base\.safetensors has SHA-256"):
        ensemble.predict(crops())


def test_out_of_memory_halves_the_pass_of_that_member_alone(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, passes = LoadedMember._logits, []

    def limited(self: LoadedMember, images: Any, tta: str, weights: Any) -> np.ndarray:
        passes.append((self.about.name, len(images)))
        if self.about.name == "uni" and len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, images, tta, weights)

    expected = Ensemble.load(two, "cpu", "fp32").predict(crops())
    monkeypatch.setattr(LoadedMember, "_first_batch", lambda self, tta: 5)
    monkeypatch.setattr(LoadedMember, "_logits", limited)
    found = Ensemble.load(two, "cpu", "fp32").predict(crops())
    assert passes == [("lite", 5), ("uni", 5), ("uni", 2), ("uni", 2), ("uni", 1)]
    assert np.abs(found.p_atypical - expected.p_atypical).max() < 1e-6


PEAK = r"""
import re, sys
from pathlib import Path
import numpy as np
from inference.ensemble import Ensemble
from inference.manifest import load_manifest
from inference.checksums import start_checks
manifest = load_manifest(Path(sys.argv[1]))
crops = [np.full((128, 128, 3), 128, np.uint8)]
Ensemble(manifest, "cpu", "fp32", checks=start_checks(manifest), keep=sys.argv[2] == "keep").predict(crops)
print(1024 * int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0]))
"""


def peak(folder: Path, how: str) -> int:
    """Peak resident bytes of a process that predicts one crop; its `ru_maxrss` would count this process's too."""
    command = [sys.executable, "-c", PEAK, str(folder), how]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def test_peak_memory_is_that_of_the_largest_member_and_reading_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four members with bases of their own, 50 MB each."""
    monkeypatch.setitem(overrides.__globals__, "overrides", lambda backbone: dict(depth=1, embed_dim=1024))
    members = {}
    for name in ("a", "b", "c", "d"):
        random_base("uni", tmp_path / f"{name}.safetensors")
        members[name] = {"backbone": "uni", "folds": 1, "base": f"{name}.safetensors", "preprocess": {"size": 32}}
    size = (tmp_path / "a.safetensors").stat().st_size
    assert size > 50e6
    make_members(tmp_path, {"a": members["a"]})
    one = peak(tmp_path, "free")
    make_members(tmp_path, members)
    four, kept = peak(tmp_path, "free"), peak(tmp_path, "keep")
    assert four < one + 1.5 * size
    assert kept > four + 1.5 * size  # what this test would see if members were kept


def test_the_log_and_the_details_name_every_member(two: Path, tmp_path: Path) -> None:
    from PIL import Image

    pages = with_pillow([Image.fromarray(page) for page in stack(5, 3)])
    details = tmp_path / "details.json"
    job = make_input(tmp_path / "in", pages)
    ended = run_job(job, tmp_path / "out", two, "--precision", "fp32", "--details", str(details), stub=False)
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[1].startswith("member lite: efficientnet-lite0, 2 folds, tta rot4, precision fp32, weight 0.25, ")
    assert lines[2].startswith("member uni: uni, 3 folds, tta none, precision fp32, weight 0.75, ")
    found = json.loads(details.read_text())
    assert [member["name"] for member in found["members"]] == ["lite", "uni"]
    assert {"seconds", "weights_seconds", "precision", "spread", "folds"} <= found["members"][0].keys()
    for page in found["pages"]:
        assert len(page["member_p"]) == 2 and len(page["fold_p"]) == 5
        assert page["p_atypical"] == ended.answers[page["page"]]["confidence"]
    spreads = [
        np.ptp([page["fold_p"][part] for page in found["pages"]], axis=1).mean() for part in (slice(0, 2), slice(2, 5))
    ]
    assert [member["spread"] for member in found["members"]] == pytest.approx(spreads)


def test_a_table_of_scores_has_a_column_for_each_member(two: Path, tmp_path: Path) -> None:
    (tmp_path / "stack.tiff").write_bytes(SAMPLE.read_bytes())
    table = tmp_path / "out.csv"
    options = ["--weights", two, "--device", "cpu", "--precision", "fp32"]
    assert inference("score", tmp_path / "stack.tiff", "--csv", table, *options) == 0
    with table.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 16
    assert {"lite_p", "uni_p", "lite_fold_0", "lite_fold_1", "uni_fold_2", "spread"} <= rows[0].keys()


def test_harness_tarball_and_server_take_an_ensemble_of_two(two: Path, tmp_path: Path) -> None:
    """The same bytes from a job on the folder, a job on its model tarball and a task of the server."""
    tarball = write_model_tarball(two, tmp_path)
    assert messages(preflight.check_file(tarball), "FAIL") == ""
    answers = []
    for weights in (two, tarball):
        folder = tmp_path / f"run{len(answers)}"
        pk = layout.write_input(SAMPLE, folder / "job/input", "2026", Random(0))
        run = engines.run_native(folder / "job", pk, weights, engines.Limits(seconds=300))
        found, findings = readout.judge(run, layout.count_pages(SAMPLE))
        assert messages(findings) == "" and found is not None and len(found) == 16
        answers.append(found)
    pk = layout.write_input(SAMPLE, tmp_path / "served/0/input", "2026", Random(0))
    [run] = served.run_native(tmp_path / "served", [pk], two, engines.Limits(seconds=300))
    found, findings = readout.judge(run, layout.count_pages(SAMPLE))
    assert messages(findings) == ""
    answers.append(found)
    assert answers[0] == answers[1] == answers[2]
