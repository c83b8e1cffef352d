"""A training step's CUDA path on fake tensors: forward pass, loss, backward pass, optimizer step, averaged weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch._subclasses.fake_tensor import FakeTensorMode

from inference.backbones import BACKBONES, POOLS
from inference.device import DTYPES
from test.support.fake_gpu import backward, fake_gpu, really, to_fake_gpu, trainable_on_fake_gpu
from test.support.miniature import overrides
from training.fit import loop, lora
from training.fit.feed import Batch
from training.fit.loop import Training
from training.fit.losses import focal
from training.fit.recipe import Recipe
from training.fit.state import State

CASES = [
    (name, targets, row.pool, precision)
    for name, row in BACKBONES.items()
    for targets in row.targets
    for precision in DTYPES
] + [(name, "qv", pool, "bf16") for name, row in BACKBONES.items() if row.heads for pool in POOLS if pool != row.pool]


@pytest.fixture
def mode() -> Iterator[FakeTensorMode]:
    """The fake GPU as the device of every Accelerator."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with fake_gpu() as mode, trainable_on_fake_gpu():
        PartialState().device = torch.device("cuda")
        yield mode
    AcceleratorState._reset_state(reset_partial_state=True)


def take_a_step(mode: FakeTensorMode, backbone: str, targets: str, pool: str, precision: str) -> State:
    """One optimizer step of a miniature by the training loop's own code, its batch made on the CPU."""
    recipe = Recipe(
        backbone, pool=pool, rank=4, dropout=0.1, drop=0.1, targets=targets, gamma=2.0, precision=precision, ema=0.9
    )
    accelerator = Accelerator(  # the model lies on the fake GPU already: nothing moves there in place
        device_placement=False, mixed_precision="no" if precision == "fp32" else precision
    )
    run = Training(recipe, Path(), [], [], None, accelerator, overrides=overrides(backbone))
    model = to_fake_gpu(really(loop.adapted_model)(run, 0), mode)
    state = State(model, recipe, 10, accelerator, None)
    lora.freeze_statistics(state.model)
    size = BACKBONES[backbone].size
    loop.backward(state, Batch(torch.zeros(2, 3, size, size), torch.ones(2), torch.ones(2)))
    state.step()
    return state


@pytest.mark.parametrize(("backbone", "targets", "pool", "precision"), CASES)
def test_a_step(backbone: str, targets: str, pool: str, precision: str, mode: FakeTensorMode) -> None:
    state = take_a_step(mode, backbone, targets, pool, precision)
    moments = [value for kept in state.optimizer.state.values() for name, value in kept.items() if name != "step"]
    assert len(moments) == 2 * len(state.learnt)  # every trainable tensor had a gradient
    for tensor in (*state.learnt.values(), *state.average.values(), *moments):
        assert (tensor.device.type, tensor.dtype) == ("cuda", torch.float32)


def loss_on_the_cpu(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, gamma: float) -> torch.Tensor:
    return focal(logits, target, weight.cpu(), gamma)


def mask_on_the_cpu(b: torch.nn.Parameter) -> None:
    b.register_hook(lambda gradient: gradient * torch.ones(gradient.shape))


PLANTED = {
    "loss": (loop, "focal", loss_on_the_cpu),
    "backward pass": (lora, "separate_query_and_value", mask_on_the_cpu),
    "step": (State, "current", lambda self: {name: p.detach().cpu() for name, p in self.learnt.items()}),
}


@pytest.mark.parametrize("part", PLANTED)
def test_a_mixed_device_is_found(part: str, mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what these tests are for does fail them, in each part of a step."""
    monkeypatch.setattr(*PLANTED[part])
    with pytest.raises(RuntimeError, match="device"):
        take_a_step(mode, "virchow", "qv", "token", "bf16")


@pytest.mark.parametrize(("backbone", "targets"), [("virchow", "qv"), ("dinov3-vits16", "all"), ("uni", "attn")])
def test_the_stand_in_for_autograds_engine_computes_its_gradients(backbone: str, targets: str) -> None:
    torch.manual_seed(0)
    model = lora.lora_model(backbone, None, lora.Lora(4, 8.0, targets=targets), **overrides(backbone)).eval()
    learnt = [p for p in model.parameters() if p.requires_grad]
    for parameter in learnt:
        torch.nn.init.normal_(parameter, 0, 0.1)
    size = BACKBONES[backbone].size
    loss = model(torch.rand(2, 3, size, size)).square().mean()
    loss.backward(retain_graph=True)
    expected = [p.grad for p in learnt]
    model.zero_grad()
    backward(loss)
    for parameter, gradient in zip(learnt, expected, strict=True):
        assert parameter.grad is not None and gradient is not None and gradient.any()
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_training_step_on_a_real_gpu(backbone: str) -> None:
    row = BACKBONES[backbone]
    model = lora.lora_model(backbone, None, lora.Lora(4, 8.0, 0.1, list(row.targets)[-1]), **overrides(backbone)).to(
        "cuda"
    )
    lora.freeze_statistics(model)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.autocast("cuda", torch.bfloat16):
        out = model(torch.rand(2, 3, row.size, row.size, device="cuda")).float().flatten()
    ones = torch.ones(2, device="cuda")
    focal(out, ones, ones, 2.0).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in learnt)
    torch.optim.AdamW(learnt).step()
