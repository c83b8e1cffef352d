"""`training import`: heads of several layers are answered as their source answers them, or refused in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import GELU, BatchNorm1d, Dropout, LayerNorm, Linear, ReLU, Sequential, SiLU, Tanh

from inference import models
from inference.backbones import build, lookup
from inference.ensemble import Ensemble
from inference.errors import UserError
from inference.manifest import load_manifest
from test.support.foreign import Classifier, adapt, check_job, crops, logits, make_base, run_import
from test.support.tables import tiny_table
from training.__main__ import main
from training.adapters.head import Said, named, read_head
from training.fit.averaged import average_adapters
from training.fit.lora import load_base

NAME = "dinov2-vits14"
WIDTH = 96
EPS = 1e-5


class Named(nn.Module):
    """A head whose layers have names, not in their order, and an activation that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.fc2, self.norm, self.fc1 = Linear(32, 2), LayerNorm(WIDTH), Linear(WIDTH, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.fc2(nn.functional.silu(self.fc1(self.norm(x))))
        return answer


# the source's layers, what is said of them, and the layers that a job computes; none: one linear layer
HEADS: dict[str, tuple[nn.Module, Said, str]] = {
    "norm": (Sequential(LayerNorm(WIDTH), Linear(WIDTH, 2)), Said((), EPS), "layer_norm 96, linear 96 to 1"),
    "eps": (Sequential(LayerNorm(WIDTH, eps=0.3), Linear(WIDTH, 1)), Said((), 0.3), "layer_norm 96, linear 96 to 1"),
    "mlp": (
        Sequential(Linear(WIDTH, 32), ReLU(), Linear(32, 2)),
        Said(("relu",)),
        "linear 96 to 32, relu, linear 32 to 1",
    ),
    "all": (
        Sequential(LayerNorm(WIDTH), Dropout(0.5), Linear(WIDTH, 32), GELU(), Dropout(0.5), Linear(32, 1)),
        Said(("none", "gelu"), EPS),
        "layer_norm 96, linear 96 to 32, gelu, linear 32 to 1",
    ),
    "three": (
        Sequential(Linear(WIDTH, 24), Tanh(), Linear(24, 12), SiLU(), Linear(12, 2)),
        Said(("tanh", "silu")),
        "linear 96 to 24, tanh, linear 24 to 12, silu, linear 12 to 1",
    ),
    "names": (Named(), Said(("none", "silu"), EPS), "layer_norm 96, linear 96 to 32, silu, linear 32 to 1"),
    "statistics inside": (
        Sequential(Linear(WIDTH, 32), BatchNorm1d(32), ReLU(), Linear(32, 2)),
        Said(("relu",), EPS),
        "linear 96 to 32, relu, linear 32 to 1",
    ),
    "statistics first": (
        Sequential(BatchNorm1d(WIDTH), ReLU(), Linear(WIDTH, 2)),
        Said(("relu",), EPS),
        "linear 96 to 96, relu, linear 96 to 1",
    ),
    "statistics alone": (Sequential(BatchNorm1d(WIDTH), Linear(WIDTH, 2)), Said((), EPS), ""),
    "statistics without weights": (Sequential(BatchNorm1d(WIDTH, affine=False), Linear(WIDTH, 1)), Said((), EPS), ""),
    "linear in effect": (Sequential(Linear(WIDTH, 32), Dropout(0.1), Linear(32, 2)), Said(("none",)), ""),
    "dropout first": (Sequential(Dropout(0.5), Linear(WIDTH, 2, bias=False)), Said(), ""),
}


def trained(kind: str, seed: int = 0) -> nn.Module:
    """The head of a case, in evaluation, its normalisations as if trained."""
    head = copy.deepcopy(HEADS[kind][0]).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in head.modules():
            if isinstance(module, BatchNorm1d):
                module.running_mean.normal_(0, 1)
                module.running_var.uniform_(0.2, 2)
        for parameter in head.parameters():
            parameter.normal_(0.2, 0.3)
    return head


def one_logit(answers: torch.Tensor, positive: int) -> torch.Tensor:
    """(N, classes) to the logit (N,) of the class `positive`."""
    z = answers[:, 0] if answers.shape[1] == 1 else answers[:, 1] - answers[:, 0]
    return z if positive else -z


def options_of(said: Said) -> list[str]:
    activation = ["--activation", *said.activations] if said.activations else []
    return [*activation, *(["--norm-eps", str(said.eps)] if said.eps else [])]


def state_of(head: nn.Module, name: str = "fc") -> dict[str, torch.Tensor]:
    """As a checkpoint's reader gives it: floating-point tensors in fp32, in an order that says nothing."""
    state = {f"{name}.{key}": value for key, value in head.state_dict().items() if value.is_floating_point()}
    return dict(sorted(state.items()))


@pytest.mark.parametrize("positive", [0, 1])
@pytest.mark.parametrize("kind", HEADS)
def test_a_state_dict_is_computed_as_its_modules_compute_it(kind, positive):
    head, (_, said, wanted) = trained(kind), HEADS[kind]
    found = read_head(Path("last.pth"), state_of(head), said)
    assert found is not None and found.features == WIDTH
    parts = found.one_logit(positive)
    assert (", ".join(str(part.layer) for part in parts) if len(parts) > 1 else "") == wanted
    features, tensors = 3 * torch.randn(7, WIDTH), named(parts)
    fp32 = lambda name: tensors[name.removeprefix("head.")][None]  # noqa: E731
    weights = SimpleNamespace(head=[part.layer for part in parts], fp32=fp32)
    if wanted:
        ours = models.head(features[None], weights)[0, :, 0]
    else:
        ours = models.linear(features[None], fp32("head.weight"), fp32("head.bias"))[0, :, 0]
    with torch.no_grad():
        expected = one_logit(head(features), positive)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("head", "said", "message"),
    [
        (Sequential(Linear(WIDTH, 32), GELU(), Linear(32, 2)), Said(), "between fc.0 and fc.2 is not in the file"),
        # a ModuleList's user may call a function between layers whose numbers leave no room
        (Sequential(Linear(WIDTH, 32), Linear(32, 2)), Said(), "expected 1 of gelu, relu, silu, tanh, none"),
        (HEADS["all"][0], Said(("gelu",), EPS), "fc.0 and fc.2, fc.2 and fc.5 is not in the file (1 said); expected 2"),
        (Named(), Said(("silu",), EPS), "between fc.norm and fc.fc1, fc.fc1 and fc.fc2"),
        (Linear(WIDTH, 2), Said(("gelu",)), "no activation (1 said); expected none said; leave out --activation"),
        (
            Sequential(LayerNorm(WIDTH), Linear(WIDTH, 2)),
            Said(),
            "eps is not in the file; expected it; give --norm-eps",
        ),
        (Linear(WIDTH, 2), Said((), EPS), "--norm-eps for a head without a normalisation"),
        (
            nn.ModuleDict({"a": Linear(96, 96), "b": Linear(96, 96), "c": Linear(96, 1)}),
            Said(("gelu", "gelu")),
            "fc.a, fc.b, fc.c fit each other in 2 orders; expected one; save the head as a torch.nn.Sequential",
        ),
    ],
)
def test_what_a_state_dict_does_not_say_is_asked(head, said, message):
    with pytest.raises(UserError, match="; expected") as caught:
        read_head(Path("last.pth"), state_of(head), said)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "head",
    [
        Sequential(Linear(WIDTH, 32), nn.PReLU(), Linear(32, 2)),
        Sequential(Linear(WIDTH, 32), GELU(), Linear(32, 3)),
        Sequential(Linear(WIDTH, 32), GELU(), Linear(30, 2)),
        Sequential(Linear(WIDTH, 32), LayerNorm(32)),
        Sequential(LayerNorm(WIDTH, bias=False), Linear(WIDTH, 2)),  # or an RMSNorm
        Sequential(nn.Conv1d(WIDTH, 2, 1)),
        Sequential(Linear(WIDTH, 1), GELU(), Linear(1, 1)),
        nn.ModuleDict({"fc_norm": LayerNorm(WIDTH), "head": Linear(WIDTH, 2)}),  # timm's, in place of the base's own
        nn.ModuleList(Linear(WIDTH, 2) for _ in range(2)),
        nn.ModuleDict({str(n) + "x": LayerNorm(WIDTH) for n in range(9)} | {"fc": Linear(WIDTH, 2)}),
    ],
)
def test_other_heads_are_none(head):
    assert read_head(Path("last.pth"), state_of(head), Said(("gelu",), EPS)) is None


def classifier(head: nn.Module, folder: Path, seed: int = 0) -> torch.nn.Module:
    """`head` on the two-block DINOv2 of `transformers` in `folder`, with LoRA, saved by PEFT."""
    from transformers import Dinov2Model

    model = Classifier(Dinov2Model.from_pretrained(folder / "published"), 2)
    model.fc = head
    adapted = adapt(model, ["q_proj", "v_proj"], "fc", seed)
    adapted.save_pretrained(folder / f"adapter{seed}")
    return adapted


def test_folds_with_an_mlp_from_import_to_job(tmp_path, monkeypatch, capsys):
    """Two folds of `transformers`: imported, verified, calibrated, run as a job on other crops, refused to average."""
    make_base(NAME, tmp_path, monkeypatch)
    folds = [classifier(trained("all", seed), tmp_path, seed) for seed in range(2)]
    out, sources = tmp_path / "out", [tmp_path / f"adapter{seed}" for seed in range(2)]
    assert run_import(sources, NAME, tmp_path, "--pool", "token", *options_of(HEADS["all"][1])) == 0
    printed = capsys.readouterr().out
    assert "the head is layer_norm 96, linear 96 to 32, gelu, linear 32 to 1" in printed
    assert "norm_eps 1e-05, by --norm-eps" in printed
    theirs = torch.stack([logits(model)[:, 0] for model in folds])
    ours = Ensemble.load(out, "cpu", "fp32").predict(crops()).logits[0][:, 0]
    torch.testing.assert_close(torch.tensor(ours), theirs, atol=1e-4, rtol=1e-5)
    assert main(["verify", str(out), "--device", "cpu"]) == 0  # and timm with PEFT says the same
    with pytest.raises(UserError, match=r"its head is not one linear layer; expected one, .* leave its folds apart"):
        average_adapters(load_manifest(out).members[0].folds, tmp_path / "mean", out / f"{NAME}.safetensors", NAME)

    data = tiny_table(tmp_path, 66, 10)
    assert main(["calibrate", str(out), "--data", str(data), "--device", "cpu"]) == 0
    shift = load_manifest(out).provenance["calibration"]
    again = Ensemble.load(out, "cpu", "fp32").predict(crops()).logits[0][:, 0]
    moved = again - ours
    assert np.ptp(moved) < 1e-4 and abs(moved.mean()) > 1e-3, shift  # of every fold alike, in its last layer
    manifest = load_manifest(out)
    assert manifest.members[0].precision["bf16"] is not None
    assert manifest.provenance["imported"][0]["head"].startswith("layer_norm 96")
    assert "as its head: layer_norm 96, linear 96 to 32, gelu, linear 32 to 1" in (out / "README.md").read_text()

    check_job(out, tmp_path)


def test_statistics_before_the_layer_of_timm(tmp_path, monkeypatch):
    """A checkpoint of an EfficientNet whose classifier has a batch normalisation: one linear layer again."""
    make = lookup("efficientnet-lite0")
    base = build(make, 0).eval()
    (tmp_path / "bases").mkdir()
    save_file(base.state_dict(), tmp_path / "bases" / "efficientnet-lite0.safetensors")
    model = build(make, 1).eval()
    load_base(model, tmp_path / "bases" / "efficientnet-lite0.safetensors", "classifier")
    width = model.classifier.in_features
    model.classifier = Sequential(BatchNorm1d(width), Linear(width, 2))
    adapted = adapt(model, ["conv_head"], "classifier")
    with torch.no_grad():
        for name, value in adapted.named_buffers():
            if "classifier.modules_to_save" in name and value.is_floating_point():
                value.uniform_(0.2, 0.6)
    torch.save({"model": adapted.state_dict()}, tmp_path / "last.pth")
    options = ["--pool", "avg", "--alpha", "6", "--norm-eps", "1e-5"]
    assert run_import([tmp_path / "last.pth"], "efficientnet-lite0", tmp_path, *options) == 0
    ours = torch.tensor(Ensemble.load(tmp_path / "out", "cpu", "fp32").predict(crops()).logits[0][0, 0])
    torch.testing.assert_close(ours, one_logit(logits(adapted), 1), atol=1e-4, rtol=1e-5)
    assert load_manifest(tmp_path / "out").members[0].head == ()


def test_settings_say_the_activation_and_heads_of_folds_agree(tmp_path, monkeypatch, capsys):
    make_base(NAME, tmp_path, monkeypatch)
    model = classifier(trained("mlp"), tmp_path)
    (tmp_path / "adapter0" / "config.yaml").write_text("backbone: {activation: gelu}\nhead: {activation: ReLU}\n")
    assert run_import([tmp_path / "adapter0"], NAME, tmp_path, "--pool", "token") == 0
    assert "activation ['relu'], by config.yaml" in capsys.readouterr().out
    ours = torch.tensor(Ensemble.load(tmp_path / "out", "cpu", "fp32").predict(crops()).logits[0][0, 0])
    torch.testing.assert_close(ours, one_logit(logits(model), 1), atol=1e-4, rtol=1e-5)

    classifier(Sequential(Linear(WIDTH, 16), ReLU(), Linear(16, 2)), tmp_path, 1)
    sources, options = [tmp_path / "adapter0", tmp_path / "adapter1"], ["--pool", "token", "--activation", "relu"]
    (tmp_path / "out").rename(tmp_path / "one")
    assert run_import(sources, NAME, tmp_path, *options) == 1
    assert "the folds' heads differ (linear 96 to 16, relu, linear 16 to 2 and linear 96" in capsys.readouterr().err

    # a manifest that says another head than the file, and heads that are none
    file = tmp_path / "one" / "ensemble.json"
    right = json.loads(file.read_text())
    layers = right["members"][0]["head"]
    for head, message in [
        (
            [layers[0] | {"outputs": 30}, layers[1], layers[2] | {"inputs": 30}],
            "head.0.weight is missing or not (30, 96",
        ),
        ([layers[0], {"kind": "layer_norm", "features": 32, "eps": EPS}, layers[2]], "head.1.weight is missing"),
        ([layers[0], {"kind": "exec"}, layers[2]], r"head[1] is {'kind': 'exec'}; expected linear"),
        ([layers[0] | {"eps": 1}, layers[2]], "head[0] is"),
        ([layers[0], {"kind": "layer_norm", "features": 31, "eps": EPS}, layers[2]], "expected 32 features"),
        ([layers[0], layers[1]], "ends in relu; expected one logit"),
        ([layers[2]], "expected a list of 2 to 16 layers"),
        ([{"kind": "layer_norm", "features": 96, "eps": 2}, layers[0], layers[2]], "head[0] is"),
    ]:
        right["members"][0]["head"] = head
        file.write_text(json.dumps(right))
        with pytest.raises(UserError, match="; expected") as caught:
            Ensemble.load(tmp_path / "one", "cpu", "fp32").predict(crops())
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_head_of_timm_with_a_norm_of_its_own(tmp_path, monkeypatch):
    """`head.norm` is not the backbone's `norm`, and the whole frozen model lies in the checkpoint."""
    make_base(NAME, tmp_path, monkeypatch)
    model = build(lookup(NAME), 1, "token")
    load_base(model, tmp_path / "bases" / f"{NAME}.safetensors", "head")
    model.head = trained("names")
    adapted = adapt(model, ["attn.qkv"], "head")
    torch.save(adapted.state_dict(), tmp_path / "last.pth")
    options = ["--pool", "token", "--alpha", "6", *options_of(HEADS["names"][1])]
    assert run_import([tmp_path / "last.pth"], NAME, tmp_path, *options) == 0
    ours = torch.tensor(Ensemble.load(tmp_path / "out", "cpu", "fp32").predict(crops()).logits[0][0, 0])
    torch.testing.assert_close(ours, one_logit(logits(adapted), 1), atol=1e-4, rtol=1e-5)
    [fold] = load_manifest(tmp_path / "out").members[0].folds
    assert "base_model.model.head.3.weight" in load_file(fold / "adapter_model.safetensors")
