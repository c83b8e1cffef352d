"""`training verify`: passes on what timm and PEFT compute too, fails on anything else, and says by how much."""

from __future__ import annotations

import re

import pytest
import torch

import inference.models
from test.support.miniature import make_ensemble, make_members
from test.support.published import shrink
from test.support.tables import tiny_table
from training.__main__ import main
from training.ensemble.verify import choose_crops


@pytest.mark.parametrize(("backbone", "tta"), [("efficientnet-lite0", "d4"), ("dinov3-vits16plus", "rot4")])
def test_an_ensemble_passes_fold_by_fold(backbone, tta, tmp_path, monkeypatch, capsys):
    if backbone != "efficientnet-lite0":
        shrink(monkeypatch, backbone)  # the command builds what the table says
    make_ensemble(tmp_path, backbone, tta=tta)
    assert main(["verify", str(tmp_path), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{backbone} with 3 folds, 4 generated crops, fp32 on cpu" in lines[0]
    assert all(re.match(rf"fold{n}: logits differ by at most .*: PASS$", lines[1 + n]) for n in range(3))
    assert re.match(r"fused +\d+\.\d s +\d+\.\d\d GiB", lines[4]) and lines[5].startswith("timm + PEFT")
    assert lines[6:] == ["PASS"]


def test_other_logits_fail_with_exit_code_1(tmp_path, monkeypatch, capsys):
    """One fold's head bias, off by a thousandth: two orders above the rounding of fp32."""
    make_ensemble(tmp_path)
    real = inference.models.logits
    moved = torch.tensor([[0.0], [1e-3], [0.0]])
    monkeypatch.setattr("inference.ensemble.logits", lambda *given: real(*given) + moved)
    assert main(["verify", str(tmp_path), "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert re.search(r"fold0: .* PASS\nfold1: .* FAIL\nfold2: .* PASS\n", printed.out)
    assert "FAIL, fold1's logits differ by 1.0e-03" in printed.err and printed.err.count("\n") == 1
    assert not printed.out.endswith("PASS\n")


@pytest.mark.parametrize("off", [0.0, 1e-3])
def test_every_fold_of_every_member_is_held_against_its_own_base(off, tmp_path, monkeypatch, capsys):
    """Two members with bases, crops, views and pools of their own; then the second one's last fold is off."""
    shrink(monkeypatch, "uni")
    members = {
        "lite": {"backbone": "efficientnet-lite0", "folds": 2, "tta": "rot4"},
        "uni": {"backbone": "uni", "folds": 2, "pool": "token+avg", "preprocess": {"crop": 48, "size": 112}},
    }
    make_members(tmp_path, members, weights=[0.25, 0.75])
    real = inference.models.logits
    moved = torch.tensor([[0.0], [off]])
    monkeypatch.setattr("inference.ensemble.logits", lambda *given: real(*given) + moved * bool(given[2].heads))
    assert main(["verify", str(tmp_path), "--device", "cpu"]) == (1 if off else 0)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "efficientnet-lite0 with 2 folds + uni with 2 folds, 4 generated crops, fp32 on cpu" in lines[0]
    ends = [re.fullmatch(r"(\S+): logits differ by at most \S+, allowed \S+: (\w+)", line) for line in lines[1:5]]
    assert [end and end.groups() for end in ends] == [
        ("lite-fold0", "PASS"),
        ("lite-fold1", "PASS"),
        ("uni-fold0", "PASS"),
        ("uni-fold1", "FAIL" if off else "PASS"),
    ]
    if off:
        assert "FAIL, uni-fold1's logits differ by 1.0e-03" in printed.err and printed.err.count("\n") == 1
    else:
        assert lines[-1] == "PASS" and not printed.err


def test_not_a_number_fails(tmp_path, monkeypatch, capsys):
    make_ensemble(tmp_path)
    monkeypatch.setattr("training.ensemble.verify.fold_logits", lambda *given: torch.full((1, 4), torch.nan).numpy())
    assert main(["verify", str(tmp_path), "--device", "cpu"]) == 1
    assert "FAIL" in capsys.readouterr().err


def test_an_altered_folder_is_refused_before_anything_is_compared(tmp_path, capsys):
    make_ensemble(tmp_path)
    file = tmp_path / "fold1" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert main(["verify", str(tmp_path)]) == 1
    assert "the manifest expects" in capsys.readouterr().err


def test_crops_of_the_users_own(tmp_path, capsys):
    """A table or a folder, its first sixteen; without one, the same crops each time."""
    table = tiny_table(tmp_path, crops=24)
    crops, words = choose_crops(table)
    assert len(crops) == 16 and words == f"the first 16 crops of {table}"
    assert len(choose_crops(tmp_path / "crops" / "3.png")[0]) == 1
    first, second = choose_crops(None)[0], choose_crops(None)[0]
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    (tmp_path / "weights").mkdir()
    make_ensemble(tmp_path / "weights")
    assert main(["verify", str(tmp_path / "weights"), "--data", str(table)]) == 0
    assert "the first 16 crops of" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "weights"), "--data", str(tmp_path / "nothing")]) == 1
