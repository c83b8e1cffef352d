"""`training import`: what other programs trained is answered as they answer it, or refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.backbones import build, lookup
from inference.ensemble import Ensemble
from inference.manifest import load_manifest
from test.support.foreign import SETTINGS, Classifier, adapt, crops, logits, make_base, run_import
from test.support.miniature import overrides
from test.support.published import timm_names
from training.__main__ import main
from training.adapters.names import place
from training.fit.lora import load_base

NAME = "dinov2-vits14"


def answers(folder: Path) -> torch.Tensor:
    """Logits (folds, N) of the imported ensemble."""
    return torch.tensor(Ensemble.load(folder / "out", "cpu", "fp32").predict(crops()).logits[0][:, 0])


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A two-block DINOv2 of `transformers` with q and v adapted and a head of two logits, and its own answers."""
    model = adapt(Classifier(make_base(NAME, tmp_path, monkeypatch), 2), ["q_proj", "v_proj"])
    model.save_pretrained(tmp_path / "adapter")
    return logits(model)


@pytest.mark.parametrize("positive", [0, 1])
def test_query_and_value_of_transformers_become_one_adapter(positive, source, tmp_path, capsys):
    options = ["--positive", str(positive), "--pool", "token"]
    assert run_import([tmp_path / "adapter"], NAME, tmp_path, *options) == 0
    expected = source[:, positive] - source[:, 1 - positive]
    torch.testing.assert_close(answers(tmp_path)[0], expected, atol=1e-4, rtol=0)
    assert re.search(
        r"adapter_model.safetensors: logits differ by at most \S+, allowed \S+: PASS", capsys.readouterr().out
    )
    member = load_manifest(tmp_path / "out").members[0]
    assert member.positions == "plain" and member.tta == "none"
    config = json.loads((member.folds[0] / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8  # q and v have four each
    assert config["target_modules"] == [f"blocks.{n}.attn.qkv" for n in range(2)]
    assert main(["verify", str(tmp_path / "out"), "--device", "cpu"]) == 0  # and timm with PEFT says the same


def older_names(folder: Path) -> None:
    """An adapter as transformers 4 names its layers."""
    file = folder / "adapter_model.safetensors"
    rules = {".attention.q_proj.": ".attention.attention.query.", ".attention.v_proj.": ".attention.attention.value."}
    state = {}
    for name, value in load_file(file).items():
        for present, older in rules.items():
            name = name.replace(present, older)
        state[name] = value
    save_file(state, file)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["query", "value"]}))


def test_names_of_transformers_4(source, tmp_path):
    older_names(tmp_path / "adapter")
    assert run_import([tmp_path / "adapter"], NAME, tmp_path, "--pool", "token") == 0
    torch.testing.assert_close(answers(tmp_path)[0], source[:, 1] - source[:, 0], atol=1e-4, rtol=0)


def test_the_classifier_of_transformers_says_its_pooling(tmp_path, monkeypatch):
    from transformers import Dinov2ForImageClassification

    backbone = make_base(NAME, tmp_path, monkeypatch)
    model = Dinov2ForImageClassification(backbone.config)
    model.dinov2.load_state_dict(backbone.state_dict())
    folds = [adapt(model, "all-linear", "classifier", seed) for seed in (1,)]
    folds[0].save_pretrained(tmp_path / "adapter")
    assert run_import([tmp_path / "adapter"], NAME, tmp_path) == 0
    found = logits(folds[0])
    torch.testing.assert_close(answers(tmp_path)[0], found[:, 1] - found[:, 0], atol=1e-4, rtol=0)
    assert load_manifest(tmp_path / "out").members[0].pool == "token+avg"


def test_several_folds_of_timm(tmp_path, monkeypatch):
    """A single logit, rsLoRA, a head of another name, and a class token's features."""
    make_base(NAME, tmp_path, monkeypatch)

    def fold(seed):
        model = build(lookup(NAME), 1, "token")
        load_base(model, tmp_path / "bases" / f"{NAME}.safetensors", "head")
        return adapt(model, ["attn.qkv", "fc1"], "head", seed, use_rslora=True)

    folds = [fold(seed) for seed in range(2)]
    for number, model in enumerate(folds):
        model.save_pretrained(tmp_path / str(number))
    sources = [tmp_path / "0", tmp_path / "1"]
    assert run_import(sources, NAME, tmp_path, "--pool", "token", "--positive", "0") == 0
    expected = -torch.stack([logits(model)[:, 0] for model in folds])  # a single logit is that of class 1
    torch.testing.assert_close(answers(tmp_path), expected, atol=1e-4, rtol=0)
    assert load_manifest(tmp_path / "out").members[0].positions == "antialiased"


def test_a_fold_that_is_answered_otherwise_writes_nothing(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.adapters.fused.joined", lambda *given: (torch.zeros(8, 96), torch.zeros(288, 8)))
    assert run_import([tmp_path / "adapter"], NAME, tmp_path, "--pool", "token") == 1
    printed = capsys.readouterr()
    assert "FAIL, its logits differ" in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".ensemble-*"))


def test_what_the_source_does_not_say_is_asked(source, tmp_path, capsys):
    assert run_import([tmp_path / "adapter"], NAME, tmp_path, settings=["--size", "112"]) == 1
    error = capsys.readouterr().err
    assert "does not say crop, kernel, mean, std, pool" in error and "--pool: token, avg, token+avg" in error
    with pytest.raises(SystemExit):
        main(["import", str(tmp_path / "adapter"), "--base", NAME, "--output", str(tmp_path / "out"), *SETTINGS])
    assert "--positive" in capsys.readouterr().err


PROCESSOR = {"do_resize": True, "size": {"height": 112, "width": 112}, "resample": 3, "do_center_crop": False}
PROCESSOR |= {"image_mean": [0.5, 0.4, 0.6], "image_std": [0.2, 0.3, 0.25], "rescale_factor": 1 / 255}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"size": {"shortest_edge": 112}, "crop_size": {"height": 112, "width": 112}, "do_center_crop": True}, None),
        ({"size": {"shortest_edge": 128}, "crop_size": 112, "do_center_crop": True}, "then crops 112 pixels"),
        ({"resample": 0}, "does not say kernel"),
        ({"rescale_factor": 1.0}, "does not say mean, std"),
        ({"size": {"longest_edge": 112}}, "does not say crop, size"),
    ],
)
def test_settings_of_an_image_processor(changes, message, source, tmp_path, capsys):
    file = tmp_path / "adapter" / "preprocessor_config.json"
    file.write_text(json.dumps(PROCESSOR | changes))
    assert run_import([tmp_path / "adapter"], NAME, tmp_path, "--pool", "token", settings=[]) == bool(message)
    if message:
        assert message in capsys.readouterr().err
    else:
        expected = {"crop": None, "size": 112, "kernel": "bicubic", "mean": [0.5, 0.4, 0.6], "std": [0.2, 0.3, 0.25]}
        assert load_manifest(tmp_path / "out").members[0].preprocess == expected


def test_settings_of_a_yaml_file(source, tmp_path, capsys):
    file = tmp_path / "adapter" / "config.yaml"
    text = "model: {pooling: token}\ndata:\n  crop: 40\n  image_size: 112\n  interpolation: bilinear\n"
    text += "  normalize: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}\n"
    file.write_text(text + "train: {crop: 64, img_size: 112}\n")
    assert run_import([tmp_path / "adapter"], NAME, tmp_path, settings=[]) == 1
    assert "says crop twice" in capsys.readouterr().err
    file.write_text("data: {tile: {size: 56, crop: 40}}\naugment: {crop: true, interpolation: bilinear}\n")
    assert run_import([tmp_path / "adapter"], NAME, tmp_path, settings=[]) == 1
    assert "does not say crop, size, mean, std" in capsys.readouterr().err
    file.write_text(text + "tile: {crop: 64, size: 56}\naugment: {crop: true, size: 56}\n")
    assert run_import([tmp_path / "adapter"], NAME, tmp_path, "--size", "98", settings=[]) == 0  # options come first
    member = load_manifest(tmp_path / "out").members[0]
    assert (member.preprocess["size"], member.preprocess["crop"], member.preprocess["kernel"]) == (98, 40, "bilinear")


def test_a_yaml_file_says_the_scale_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    model = adapt(Classifier(make_base(NAME, tmp_path, monkeypatch), 1), ["q_proj", "v_proj"], use_rslora=True)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.ckpt")
    (tmp_path / "config.yaml").write_text("loss: {name: focal, alpha: 0.25}\n")
    assert run_import([tmp_path / "last.ckpt"], NAME, tmp_path, "--pool", "token") == 1
    assert "alpha None; expected PEFT's adapter_config.json beside it, or --alpha" in capsys.readouterr().err
    lora = "lora: {r: 4, lora_alpha: 6, use_rslora: true}\n"
    (tmp_path / "config.yaml").write_text("loss: {name: focal, alpha: 0.25}\n" + lora)
    assert run_import([tmp_path / "last.ckpt"], NAME, tmp_path, "--pool", "token") == 0
    torch.testing.assert_close(answers(tmp_path)[0], logits(model)[:, 0], atol=1e-4, rtol=0)


def test_alpha_beside_the_settings_of_peft_is_refused(source, tmp_path, capsys):
    assert run_import([tmp_path / "adapter"], NAME, tmp_path, "--pool", "token", "--alpha", "99") == 1
    assert "whose adapter_config.json has lora_alpha; expected one; leave out --alpha" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("facebook/dinov2-small", "adapters name facebook/dinov2-small, --base is dinov2-vits14"),
        ("timm/vit_small_patch14_dinov2.lvd142m", None),
        ("hf-hub:mahmoodlab/UNI2-h", "which is uni2-h; expected that of --base dinov2-vits14; give --base uni2-h"),
    ],
)
def test_the_base_that_adapters_name_is_compared(named, message, source, tmp_path, capsys):
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": named}))
    assert run_import([tmp_path / "adapter"], NAME, tmp_path, "--pool", "token") == ("uni2-h" in str(message))
    printed = capsys.readouterr()
    assert message in printed.out + printed.err if message else "adapters name" not in printed.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"r": 3}, "has rank 4, its settings rank 3"),
        ({"lora_alpha": None}, "alpha None"),
        ({"use_dora": True}, "use_dora disagree"),
    ],
)
def test_refused_settings_are_named(changes, message, source, tmp_path, capsys):
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert run_import([tmp_path / "adapter"], NAME, tmp_path, "--pool", "token") == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


PREFIX = "base_model.model."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{PREFIX}fc.weight": None}, "expected one head of linear layers"),
        (
            {f"{PREFIX}fc.weight": torch.zeros(3, 96), f"{PREFIX}fc.bias": torch.zeros(3)},
            "fc.bias, fc.weight; expected",
        ),
        (
            {f"{PREFIX}norm_of_the_head.weight": torch.ones(96)},
            "norm_of_the_head.weight; expected one head of linear layers",
        ),
        ({f"{PREFIX}backbone.layernorm.weight": torch.ones(96)}, "backbone.layernorm.weight is not that of the base"),
        ({f"{PREFIX}decoder.0.lora_A.weight": torch.ones(4, 96)}, "decoder.0"),
        ({f"{PREFIX}fc.weight": torch.full((2, 96), torch.nan)}, "not finite"),
        ({f"{PREFIX}fc.weight": torch.zeros(2, 90)}, "the head sees 90 features; expected 96 with pooling token"),
        ({f"{PREFIX}x.lora_A.other.weight": torch.ones(4, 96)}, None),
    ],
)
def test_refused_tensors_are_listed(changes, message, source, tmp_path, capsys):
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(file) | changes
    save_file({name: value for name, value in state.items() if value is not None}, file)
    assert run_import([tmp_path / "adapter"], NAME, tmp_path, "--pool", "token") == 1
    error = capsys.readouterr().err
    assert (message or "expected one head of linear layers") in error and error.count("\n") == 1


LAYERS = {"r": 2, "rank_pattern": {"1.attention.v_proj": 3, "fc1": 5}, "alpha_pattern": {"q_proj": 9}}


@pytest.mark.parametrize(
    "lora",
    [
        LAYERS,
        LAYERS | {"use_rslora": True},
        {"layers_to_transform": [1], "layers_pattern": "layer"},
        {"exclude_modules": r".*\.0\.mlp\.fc1"},
        {"bias": "lora_only"},
        {"use_dora": True},
        LAYERS | {"use_dora": True, "bias": "lora_only", "exclude_modules": ["v_proj"]},
    ],
    ids=["patterns", "rslora", "layers", "exclude", "bias", "dora", "all"],
)
def test_whatever_peft_merges_into_layers(lora, tmp_path, monkeypatch):
    backbone = make_base(NAME, tmp_path, monkeypatch)
    model = adapt(Classifier(backbone, 2, "token+avg"), ["q_proj", "v_proj", "fc1"], **lora)
    model.save_pretrained(tmp_path / "adapter")
    found = logits(model)
    assert run_import([tmp_path / "adapter"], NAME, tmp_path, "--pool", "token+avg") == 0
    torch.testing.assert_close(answers(tmp_path)[0], found[:, 1] - found[:, 0], atol=1e-4, rtol=0)
    assert main(["verify", str(tmp_path / "out"), "--device", "cpu"]) == 0


def test_a_file_that_lacks_a_block_is_refused(source, tmp_path, capsys):
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if ".1.attention.v" not in name}, file)
    assert run_import([tmp_path / "adapter"], NAME, tmp_path, "--pool", "token") == 1
    assert "lacks the adapter of backbone.encoder.layer.1.attention.v_proj" in capsys.readouterr().err


def step(model: torch.nn.Module) -> torch.optim.Optimizer:
    """An optimiser after one step of training, with moments in its state."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    sum(parameter.square().sum() for parameter in trained).backward()
    optimizer.step()
    return optimizer


def checkpoint(kind: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> Path:
    """The model's state as training programs keep it."""
    state = model.state_dict()
    only = {name: value for name, value in state.items() if "lora_" in name or "modules_to_save" in name}
    if kind == "safetensors":
        save_file({name: value.contiguous() for name, value in only.items()}, folder / "model.safetensors")
        return folder / "model.safetensors"
    if kind == "lightning":  # with the frozen base
        content = {"epoch": 3, "state_dict": {f"model.{name}": value for name, value in state.items()}}
        content["optimizer_states"] = [optimizer.state_dict()]
    elif kind == "parallel":
        content = {"model": {f"module.{name}": value for name, value in only.items()}}
        content["optimizer"] = optimizer.state_dict()
    else:
        short = {name.replace("base_model.model.", "").replace(".default", ""): value for name, value in only.items()}
        head = model.get_submodule("base_model.model.fc.modules_to_save.default").state_dict()
        content = {"lora": {name: value for name, value in short.items() if "lora_" in name}, "head": head}
    torch.save(content, folder / "last.pth")
    return folder / "last.pth"


@pytest.mark.parametrize("kind", ["lightning", "parallel", "apart", "safetensors"])
def test_checkpoints_of_training_programs(kind, tmp_path, monkeypatch):
    model = adapt(Classifier(make_base(NAME, tmp_path, monkeypatch), 1), ["q_proj", "v_proj"])
    file = checkpoint(kind, model, step(model), tmp_path)
    assert run_import([file], NAME, tmp_path, "--pool", "token", "--alpha", "6") == 0
    torch.testing.assert_close(answers(tmp_path)[0], logits(model)[:, 0], atol=1e-4, rtol=0)


def test_trained_biases_count_however_little_they_moved(tmp_path, monkeypatch):
    """By less than frozen weights of a checkpoint in bf16 may differ from the base's."""
    model = adapt(Classifier(make_base(NAME, tmp_path, monkeypatch), 1), ["q_proj", "v_proj"], bias="lora_only")
    file, name = tmp_path / "bases" / f"{NAME}.safetensors", "blocks.0.attn.qkv.bias"
    base = load_file(file)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".base_layer.bias"):
                parameter.zero_()  # as in the base
        base[name][:96].normal_()
        model.get_parameter(f"{PREFIX}backbone.encoder.layer.0.attention.q_proj.base_layer.bias").copy_(
            base[name][:96] * 1.003
        )
    save_file(base, file)
    state = {name: value.bfloat16() for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "last.pth")
    assert run_import([tmp_path / "last.pth"], NAME, tmp_path, "--pool", "token", "--alpha", "6") == 0
    [fold] = load_manifest(tmp_path / "out").members[0].folds
    bias = load_file(fold / "adapter_model.safetensors")[f"{PREFIX}blocks.0.attn.qkv.base_layer.bias"]
    query = state[f"{PREFIX}backbone.encoder.layer.0.attention.q_proj.base_layer.bias"].float()
    assert query.any()
    torch.testing.assert_close(bias[: len(query)], query, atol=0, rtol=0)


class Code:
    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('a pickle was run')",))


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("no alpha", "alpha None; expected PEFT's adapter_config.json beside it, or --alpha"),
        ("other base", "backbone.layernorm.weight is not that of the base"),
        ("code", "expected tensors alone"),
        ("two", "lora_A.default.weight is there twice"),
        ("two adapters", "holds several adapters (default, other)"),
        ("two heads", "holds several adapters (default, other)"),
        ("two names of a head", "fc.weight is there twice"),
        ("moving average", "are one layer; expected one model, not also a copy such as its moving average"),
        ("no magnitude", "and use_dora disagree; expected a magnitude of all pairs with DoRA, else of none"),
        ("numbers", "holds no named tensors"),
    ],
)
def test_checkpoints_that_are_refused(problem, message, tmp_path, monkeypatch, capsys):
    dora = problem == "no magnitude"
    model = adapt(Classifier(make_base(NAME, tmp_path, monkeypatch), 1), ["q_proj", "v_proj"], use_dora=dora)
    state = dict(model.state_dict())
    saved = {name: value for name, value in state.items() if ".modules_to_save.default." in name}
    if problem == "two heads":
        state |= {name.replace(".default.", ".other."): value + 1 for name, value in saved.items()}
    elif problem == "two names of a head":
        state |= {name.replace(".modules_to_save.default.", "."): value + 1 for name, value in saved.items()}
    elif problem == "moving average":
        state |= {f"ema.{name}": value * 0.9 for name, value in state.items() if "lora_" in name}
    elif problem == "no magnitude":
        del state[next(name for name in state if "magnitude" in name)]
    elif problem == "other base":
        state["base_model.model.backbone.layernorm.weight"] = state["base_model.model.backbone.layernorm.weight"] * 1.01
    elif problem == "two":
        state = {"base_model.model.x.lora_A.default.weight": torch.ones(1), "x.lora_A.default.weight": torch.ones(1)}
    elif problem == "two adapters":
        state = {name.replace(".default.", f".{kind}."): state[name] for name in state for kind in ("default", "other")}
    elif problem == "code":
        state["more"] = Code()
    elif problem == "numbers":
        state = {"epoch": 3, "names": ["a"], "ids": torch.ones(3, dtype=torch.int64)}
    torch.save(state, tmp_path / "last.pth")
    alpha = [] if problem == "no alpha" else ["--alpha", "6"]
    assert run_import([tmp_path / "last.pth"], NAME, tmp_path, "--pool", "token", *alpha) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


OTHERS = {
    "dinov3-vits16": (["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"], "avg", 5),
    "dinov3-vits16plus": ("all-linear", "token", 5),
    "dinov3-vits16-qkvb": (["q_proj", "v_proj"], "token", 5),
    "dinov3-vits16plus-qkvb": ("all-linear", "token+avg", 5),
    "dinov2-vits14-reg": (["q_proj", "v_proj", "fc2"], "token+avg", 5),
    "vit-b16": ("all-linear", "token", 1),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_other_backbones_of_transformers(name, lora, tmp_path, monkeypatch):
    """Also at another grid than the base's own. DINOv3's positions are rotations; registers' are antialiased."""
    targets, pool, prefix = OTHERS[name]
    model = adapt(Classifier(make_base(name, tmp_path, monkeypatch), 2, pool, prefix), targets, **lora)
    model.save_pretrained(tmp_path / "adapter")
    found = logits(model)
    assert run_import([tmp_path / "adapter"], name, tmp_path, "--pool", pool) == 0
    torch.testing.assert_close(answers(tmp_path)[0], found[:, 1] - found[:, 0], atol=1e-4, rtol=0)
    assert load_manifest(tmp_path / "out").members[0].positions == ("plain" if name == "vit-b16" else "antialiased")


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_a_checkpoint_of_dinov3_with_biases(bias, tmp_path, monkeypatch):
    """It holds those of the base, or its own."""
    name = "dinov3-vits16-qkvb"
    model = adapt(Classifier(make_base(name, tmp_path, monkeypatch), 1, "token", 5), ["q_proj", "v_proj"], bias=bias)
    torch.save(model.state_dict(), tmp_path / "last.pth")
    assert run_import([tmp_path / "last.pth"], name, tmp_path, "--pool", "token", "--alpha", "6") == 0
    torch.testing.assert_close(answers(tmp_path)[0], logits(model)[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("merged", [False, True])
def test_trained_biases_that_the_base_has_no_place_for_name_the_way_out(merged, tmp_path, monkeypatch, capsys):
    name = "dinov3-vits16"
    model = adapt(Classifier(make_base(name, tmp_path, monkeypatch), 1, "token", 5), ["q_proj"], bias="lora_only")
    if merged:
        torch.save(model.merge_and_unload().state_dict(), tmp_path / "last.pth")
    else:
        model.save_pretrained(tmp_path / "adapter")
    source = tmp_path / ("last.pth" if merged else "adapter")
    assert run_import([source], name, tmp_path, "--pool", "token") == 1
    error = capsys.readouterr().err
    assert "q_proj.bias is not zero" in error or "q_proj.base_layer.bias is not zero" in error
    assert "give --base with '-qkvb' after the name" in error and error.count("\n") == 1


@pytest.mark.parametrize("change", [0.0, 0.5])
def test_a_checkpoint_of_timms_own_dinov3_with_biases(change, tmp_path, monkeypatch, capsys):
    import timm

    name = "dinov3-vits16-qkvb"
    make_base(name, tmp_path, monkeypatch)
    row, base = lookup(name), load_file(tmp_path / "bases" / f"{name}.safetensors")
    model = timm.create_model(f"{row.timm}_qkvb", num_classes=1, global_pool="token", **overrides(name))
    model.load_state_dict(timm_names(base), strict=False)  # all but the head
    adapted = adapt(model, ["attn.qkv", "fc1"], "head")
    state = {key: value.clone() for key, value in adapted.state_dict().items()}
    state["base_model.model.blocks.1.attn.v_bias"] += change
    torch.save(state, tmp_path / "last.pth")
    code = run_import([tmp_path / "last.pth"], name, tmp_path, "--pool", "token", "--alpha", "6")
    if change:
        assert code == 1 and "blocks.1.attn.v_bias is not that of the base" in capsys.readouterr().err
        return
    assert code == 0
    found, bypassed = answers(tmp_path)[0], logits(adapted)[:, 0]
    assert (bypassed - found).abs().max() > 1e-3  # why `build` has no module of timm's with biases
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    for source in (adapted, adapted.merge_and_unload()):
        torch.testing.assert_close(found, logits(source)[:, 0], atol=1e-4, rtol=0)


def test_every_name_of_both_eras_has_its_place():
    """Of transformers 4 and 5, below any wrapper, and of timm."""
    shapes = {f"blocks.11.{layer}.weight": (8, 8) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    shapes |= {"patch_embed.proj.weight": (8, 3, 2, 2)}
    gated = {f"blocks.11.mlp.{layer}.weight": (8, 8) for layer in ("fc1_g", "fc1_x", "fc2")}
    packed = {"blocks.11.mlp.fc1.weight": (16, 8), "blocks.11.mlp.fc2.weight": (8, 8)}
    cases = [
        ("encoder.layer.11.attention.attention.query", shapes, "attn.qkv", 0, 3),  # 4: ViT, DINOv2
        ("model.encoder.layer.11.attention.q_proj", shapes, "attn.qkv", 0, 3),  # 5: DINOv2
        ("vit.layers.11.attention.k_proj", shapes, "attn.qkv", 1, 3),  # 5: ViT
        ("layer.11.attention.v_proj", shapes, "attn.qkv", 2, 3),  # 4: DINOv3
        ("net.model.layer.11.attention.v_proj", shapes, "attn.qkv", 2, 3),  # 5: DINOv3
        ("encoder.layer.11.attention.output.dense", shapes, "attn.proj", 0, 1),
        ("encoder.layer.11.intermediate.dense", shapes, "mlp.fc1", 0, 1),
        ("encoder.layer.11.output.dense", shapes, "mlp.fc2", 0, 1),
        ("layer.11.mlp.up_proj", shapes, "mlp.fc1", 0, 1),
        ("layer.11.mlp.up_proj", gated, "mlp.fc1_x", 0, 1),
        ("layer.11.mlp.gate_proj", gated, "mlp.fc1_g", 0, 1),
        ("layer.11.mlp.down_proj", gated, "mlp.fc2", 0, 1),
        ("encoder.layer.11.mlp.gate_proj", packed, "mlp.fc1", 0, 2),  # gate, then value
        ("encoder.layer.11.mlp.up_proj", packed, "mlp.fc1", 1, 2),
        ("encoder.layer.11.mlp.weights_in", packed, "mlp.fc1", 0, 1),
        ("backbone.encoder.blocks.11.attn.qkv", shapes, "attn.qkv", 0, 1),
    ]
    for name, known, layer, part, parts in cases:
        found = place(name, known)
        assert found and (found.name, found.part, found.parts) == (f"blocks.11.{layer}", part, parts), name
    for name in ("encoder.layer.12.attention.q_proj", "layer.11.attention.gate", "decoder.attn.qkv", "qkv"):
        assert place(name, shapes) is None, name


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_merged_weights_are_taken_apart_again(bias, tmp_path, monkeypatch, capsys):
    model = adapt(Classifier(make_base(NAME, tmp_path, monkeypatch), 2), ["q_proj", "v_proj", "fc1"], bias=bias)
    merged = model.merge_and_unload().eval()
    torch.save({"epoch": 1, "model": merged.state_dict()}, tmp_path / "merged.pth")
    assert run_import([tmp_path / "merged.pth"], NAME, tmp_path, "--pool", "token") == 0
    assert "6 layers differ from the base by rank 4 to 4; what is left out is at most" in capsys.readouterr().out
    found = logits(merged)
    torch.testing.assert_close(answers(tmp_path)[0], found[:, 1] - found[:, 0], atol=1e-4, rtol=0)


def test_merged_weights_of_timm_are_taken_apart_again(tmp_path, monkeypatch):
    make_base(NAME, tmp_path, monkeypatch)
    model = build(lookup(NAME), 1, "token")
    load_base(model, tmp_path / "bases" / f"{NAME}.safetensors", "head")
    merged = adapt(model, ["attn.qkv", "fc1"], "head", bias="lora_only").merge_and_unload().eval()
    torch.save(merged.state_dict(), tmp_path / "merged.pth")
    assert run_import([tmp_path / "merged.pth"], NAME, tmp_path, "--pool", "token") == 0
    torch.testing.assert_close(answers(tmp_path)[0], logits(merged)[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("half", "or more; expected a low rank, of adapters merged in fp32"),
        ("whole", "differs from the base by rank"),
        ("norm", "backbone.layernorm.weight is not that of the base; expected changes in linear layers alone"),
        ("nothing", "has neither adapters nor merged ones (nothing differs"),
    ],
)
def test_merged_weights_that_are_refused(problem, message, tmp_path, monkeypatch, capsys):
    model = adapt(Classifier(make_base(NAME, tmp_path, monkeypatch), 2), ["q_proj"])
    state = (model.unload() if problem == "nothing" else model.merge_and_unload()).state_dict()
    if problem == "half":
        state = {name: value.half() for name, value in state.items()}
    elif problem == "whole":
        state["backbone.encoder.layer.0.mlp.fc1.weight"] += torch.randn(384, 96)
    elif problem == "norm":
        state["backbone.layernorm.weight"] += 0.1
    torch.save(state, tmp_path / "merged.pth")
    assert run_import([tmp_path / "merged.pth"], NAME, tmp_path, "--pool", "token") == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
