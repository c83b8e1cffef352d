"""A job's CUDA paths on fake tensors, which check devices, dtypes and shapes and compute nothing; CUDA's errors.

On a machine with a GPU, test/run_gpu.sh compares real answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from inference import adapters, weights
from inference.backbones import BACKBONES, POOLS
from inference.device import choose_device
from inference.ensemble import Ensemble, LoadedMember
from inference.errors import UserError
from inference.report.attribution import attribute
from test.support.fake_gpu import fake_gpu, really
from test.support.miniature import make_ensemble

CROPS = list(np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8))
CASES = [(name, pool) for name in BACKBONES for pool in (("avg",) if "lite" in name else POOLS)]


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
    real = really(REAL_TENSORS)(file)  # they are checked by value
    return {name: FakeFile.mode.from_tensor(value) for name, value in real.items()}


REAL_OPEN, REAL_TENSORS = adapters.open_safetensors, adapters._read_tensors


def fake_numpy(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.device.type == "cpu", "a tensor on the GPU has no NumPy array"
    with unset_fake_temporarily():
        return torch.zeros(tensor.shape, dtype=tensor.dtype).numpy()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fake GPU, with what an ensemble's files hold as fake tensors."""
    monkeypatch.setattr("inference.ensemble.choose_device", torch.device)
    monkeypatch.setattr(weights, "open_safetensors", FakeFile)
    monkeypatch.setattr(adapters, "_read_tensors", fake_adapter)
    monkeypatch.setattr(FakeTensor, "numpy", fake_numpy, raising=False)
    with fake_gpu() as FakeFile.mode:
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


@pytest.mark.parametrize("planted", ["batch", "weights"])
def test_a_mixed_device_is_found(planted: str, made: Any, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what these tests are for does fail them."""
    ensemble = Ensemble.load(made("efficientnet-lite0", "avg", "late"), "cuda", "fp32")
    if planted == "batch":
        monkeypatch.setattr("inference.ensemble.views", lambda batch, tta: batch.cpu())
    else:
        monkeypatch.setattr(weights.Weights, "_exact", lambda self, name: self._base.get_tensor(name).float())
    with pytest.raises(RuntimeError, match="device"):
        ensemble.predict(CROPS)


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
    real, sizes, fits = LoadedMember._logits, [], 2

    def limited(self: LoadedMember, crops: list[np.ndarray], *more: Any) -> np.ndarray:
        sizes.append(len(crops))
        if len(crops) > fits:
            raise error
        return real(self, crops, *more)

    monkeypatch.setattr(LoadedMember, "_logits", limited)
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

        monkeypatch.setattr(LoadedMember, "_logits", broken)
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
