"""The CUDA paths on fake tensors, which check devices, dtypes and shapes and compute nothing; CUDA's errors.

On a machine with a GPU, test/run_gpu.sh compares real answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from inference import adapters
from inference.backbones import BACKBONES, POOLS
from inference.device import choose_device
from inference.ensemble import Ensemble, Member
from inference.errors import UserError
from inference.report.attribution import attribute
from test.support.miniature import make_ensemble, overrides

CROPS = list(np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8))
CASES = [(name, pool) for name in BACKBONES for pool in (("avg",) if "lite" in name else POOLS)]


def really(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` outside the fake mode: files hold real tensors."""

    def call(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments)

    return call


class FakeFile:
    """A safetensors file whose tensors are read outside the fake mode, and are fake from then on."""

    mode: FakeTensorMode

    def __init__(self, file: Path) -> None:
        self.file = really(REAL_OPEN)(file)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.mode.from_tensor(really(self.file.get_tensor)(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def fake_adapter(file: Path) -> dict[str, torch.Tensor]:
    with mock.patch.object(adapters, "open_safetensors", REAL_OPEN):
        real = really(REAL_TENSORS)(file)  # they are checked by value
    return {name: FakeFile.mode.from_tensor(value) for name, value in real.items()}


REAL_OPEN, REAL_TENSORS = adapters.open_safetensors, adapters._read_tensors


def fake_numpy(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.device.type == "cpu", "a tensor on the GPU has no NumPy array"
    with unset_fake_temporarily():
        return torch.zeros(tensor.shape, dtype=tensor.dtype).numpy()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that PyTorch believes in; its tensors have a device, a dtype and a shape, and no values."""
    # torch.cuda.is_available stays False: fake tensors would start a real context
    monkeypatch.setattr("inference.ensemble.choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(adapters, "open_safetensors", FakeFile)
    monkeypatch.setattr(adapters, "_read_tensors", fake_adapter)
    monkeypatch.setattr(FakeTensor, "numpy", fake_numpy, raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as FakeFile.mode:
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """Miniature ensembles by backbone, pool and target set."""
    folders: dict[tuple[str, str, str], Path] = {}

    def make(backbone: str, pool: str, targets: str) -> Path:
        key = backbone, pool, targets
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("ensemble")
            with unset_fake_temporarily():
                make_ensemble(folders[key], backbone, targets, pool, folds=2)
        return folders[key]

    return make


@pytest.mark.parametrize(("backbone", "pool"), CASES)
def test_predict(backbone: str, pool: str, made: Any, gpu: None) -> None:
    targets = list(BACKBONES[backbone].targets)
    for chosen in targets if pool == BACKBONES[backbone].pool else targets[-1:]:
        folder = made(backbone, pool, chosen)
        every = pool == BACKBONES[backbone].pool and chosen == targets[-1]
        for precision in ("fp32", "bf16", "fp16") if every else ("bf16",):
            ensemble = Ensemble.load(folder, "cuda", precision)
            found = ensemble.predict(CROPS, tta="d4" if precision == "fp32" else None)
            assert found.fold_p.shape == (2, 2)
            member = ensemble.members[0]
            kept = [*member.weights._kept.values(), *member.weights._shared.values()]
            tensors = [part for value in kept for part in (value if isinstance(value, tuple) else (value,))]
            assert tensors and all(tensor.device.type == "cuda" for tensor in tensors)


@pytest.mark.parametrize("backbone", ["efficientnet-lite0", "virchow", "dinov3-vith16plus"])
def test_attribute(backbone: str, made: Any, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.report.attribution.GRID", 2)
    ensemble = Ensemble.load(made(backbone, BACKBONES[backbone].pool, next(iter(BACKBONES[backbone].targets))), "cuda")
    assert ensemble.precision == "bf16"
    assert attribute(ensemble, CROPS[0]).values.shape == (24, 24)


def to_fake_gpu(model: torch.nn.Module) -> torch.nn.Module:
    """As model.to("cuda"), which cannot exchange a real parameter for a fake one."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(
                    FakeFile.mode.from_tensor(value.detach()).to("cuda"), value.requires_grad
                )
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else FakeFile.mode.from_tensor(buffer).to("cuda")
    return model


@pytest.mark.parametrize(("backbone", "pool"), CASES)
def test_a_training_steps_forward_pass(backbone: str, pool: str, gpu: None) -> None:
    """PEFT's model on the GPU under autocast, and the loss. Autograd's engine needs a real GPU: test/run_gpu.sh."""
    from training.lora import freeze_statistics, lora_model
    from training.losses import focal

    row = BACKBONES[backbone]
    for targets in row.targets if pool == row.pool else list(row.targets)[-1:]:
        with unset_fake_temporarily():
            model = lora_model(backbone, None, 4, 8.0, 0.1, targets, pool, **overrides(backbone))
        freeze_statistics(to_fake_gpu(model))
        with torch.autocast("cuda", torch.bfloat16):
            out = model(torch.zeros(2, 3, row.size, row.size, device="cuda")).float().flatten()
        ones = torch.ones(2, device="cuda")
        loss = focal(out, ones, ones, 2.0)
        assert loss.requires_grad and (loss.device.type, loss.dtype) == ("cuda", torch.float32)


@pytest.mark.parametrize("planted", ["batch", "weights"])
def test_a_mixed_device_is_found(planted: str, made: Any, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what these tests are for does fail them."""
    ensemble = Ensemble.load(made("efficientnet-lite0", "avg", "late"), "cuda", "fp32")
    if planted == "batch":
        monkeypatch.setattr("inference.ensemble.views", lambda batch, tta: batch.cpu())
    else:
        monkeypatch.setattr(adapters.Weights, "_exact", lambda self, name: self._base.get_tensor(name).float())
    with pytest.raises(RuntimeError, match="device"):
        ensemble.predict(CROPS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_training_step_on_a_real_gpu(backbone: str) -> None:
    from training.lora import freeze_statistics, lora_model
    from training.losses import focal

    row = BACKBONES[backbone]
    model = lora_model(backbone, None, 4, 8.0, 0.1, list(row.targets)[-1], **overrides(backbone)).to("cuda")
    freeze_statistics(model)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.autocast("cuda", torch.bfloat16):
        out = model(torch.rand(2, 3, row.size, row.size, device="cuda")).float().flatten()
    ones = torch.ones(2, device="cuda")
    focal(out, ones, ones, 2.0).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in learnt)
    torch.optim.AdamW(learnt).step()


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    torch.AcceleratorError("CUDA error: out of memory"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_too_little_device_memory_halves_the_pass(error: Exception, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = Ensemble.load(made("efficientnet-lite0", "avg", "late"), "cpu", "fp32")
    pages = list(np.random.default_rng(1).integers(0, 256, (7, 40, 40, 3), np.uint8))
    expected = ensemble.predict(pages).p_atypical
    real, sizes, fits = Member._logits, [], 2

    def limited(self: Member, crops: list[np.ndarray], *more: Any) -> np.ndarray:
        sizes.append(len(crops))
        if len(crops) > fits:
            raise error
        return real(self, crops, *more)

    monkeypatch.setattr(Member, "_logits", limited)
    ensemble.members[0]._batch = 7
    np.testing.assert_allclose(ensemble.predict(pages).p_atypical, expected, atol=1e-6)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    fits = 0
    with pytest.raises(UserError, match="device memory with one crop"):
        ensemble.predict(pages)


def test_other_faults_of_a_gpu_are_not_taken_for_a_lack_of_memory(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = Ensemble.load(made("efficientnet-lite0", "avg", "late"), "cpu", "fp32")
    for words in ("CUDA error: an illegal memory access was encountered", "CUDA error: unspecified launch failure"):

        def broken(*_: Any, words: str = words) -> np.ndarray:
            raise RuntimeError(words)

        monkeypatch.setattr(Member, "_logits", broken)
        with pytest.raises(RuntimeError, match=words):
            ensemble.predict(CROPS)


def test_fp32_is_not_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert choose_device("auto").type == "cuda"
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_mean_the_cpu(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("inference.device.gpu_is_present", lambda: True)
    with pytest.raises(UserError, match="a GPU that PyTorch cannot use"):
        choose_device("auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(UserError):
        choose_device("cuda")
