"""Planning a run for a GPU: the batch that is chosen, the bytes that are estimated, and the same steps in any parts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from test.support.fake_gpu import fake_gpu, really, to_fake_gpu
from test.support.miniature import overrides
from test.support.tables import tiny_table
from training.__main__ import main
from training.fit import memory
from training.fit.loop import Training, adapted_model
from training.fit.lora import freeze_statistics
from training.fit.losses import focal
from training.fit.memory import GIB, Choice, Estimate, Held, choose, peak_on_gpu
from training.fit.recipe import Recipe

TARGETS = {"virchow": "qkv", "dinov3-vits16": "qkv", "efficientnet-lite0": "pointwise"}
SIDE = 112


def recipe(backbone: str = "virchow", **changes: Any) -> Recipe:
    settings = {"size": SIDE, "batch": 8, "precision": "fp32", "tta": "none", "targets": TARGETS[backbone]}
    return Recipe(backbone, **settings | changes)


def miniature(settings: Recipe) -> torch.nn.Module:
    sizes = overrides(settings.backbone)
    if sizes:
        sizes["img_size"] = SIDE
    return adapted_model(Training(settings, Path(), [], [], None, None, overrides=sizes), 0)


def estimate_of(settings: Recipe) -> Estimate:
    with torch.device("meta"):
        model = miniature(settings)
    return Estimate(settings, model)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 10**9), st.integers(1, 10**9), st.integers(0, 2 * 10**10))
def test_the_largest_batch_that_fits_is_chosen_and_the_step_keeps_its_crops(batch, accumulate, fixed, slope, available):
    settings = recipe(batch=batch, accumulate=accumulate)
    asked = []

    def needs(crops: int) -> float:
        asked.append(crops)
        return fixed + slope * crops

    choice = choose(settings, needs, available)
    step = batch * accumulate
    fits = [crops for crops in range(1, step + 1) if step % crops == 0 and fixed + slope * crops <= available]
    assert choice.batch == max(fits, default=0)
    assert asked == sorted(asked, reverse=True) == list(choice.needed)
    advice = choice.lines("measured")[-1]
    if choice.batch:
        settled = choice.settled()
        assert (settled.batch, settled.batch * settled.accumulate) == (choice.batch, step)
        assert f"batch={settled.batch}" in advice and f"accumulate={settled.accumulate}" in advice
    assert ("own" in advice) == (fixed + slope * batch <= available)
    assert ("does not fit" in advice) == (not fits)


def allocated(work: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator held during `work`, beside what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("backbone", TARGETS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_what_the_allocator_hands_out(backbone, checkpointing):
    """The same passes on real tensors, counted by the allocator, with a batch between the two that were estimated."""
    settings = recipe(backbone, checkpointing=checkpointing)
    estimate = estimate_of(settings)
    model = freeze_statistics(miniature(settings))
    parameters = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))

    def train() -> None:
        copies = [[p.detach().clone() for p in model.parameters() if p.requires_grad] for _ in range(memory.COPIES)]
        for _ in range(memory.PASSES):
            x = torch.zeros(4, 3, settings.size, settings.size).to(memory_format=torch.channels_last)
            focal(model(x).flatten(), torch.zeros(4), torch.ones(4), 0.0).backward()
        del copies

    assert estimate.training(4) == pytest.approx(parameters + allocated(train), rel=0.02)
    assert estimate.needs(1) >= estimate.validation > parameters


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


@pytest.mark.parametrize("backbone", TARGETS)
def test_a_gpu_keeps_for_the_backward_pass_what_the_estimate_counts(backbone, monkeypatch):
    """Bytes after a forward pass in bf16, on fake tensors of a GPU and of a CPU.

    Attention is the GPU's own kernel, asked for by name: without a driver PyTorch would choose another.
    """
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash)
    settings = recipe(backbone, precision="bf16")
    with fake_gpu() as mode:
        model = freeze_statistics(to_fake_gpu(really(miniature)(settings), mode))
        with Held(model) as held, torch.autocast("cuda", torch.bfloat16):
            x = torch.zeros(8, 3, settings.size, settings.size, device="cuda").to(memory_format=torch.channels_last)
            logits = model(x)
            on_gpu = held.now
    monkeypatch.undo()
    estimate = estimate_of(settings)
    freeze_statistics(estimate.model)
    with estimate.mode, Held(estimate.model) as held:
        crops = estimate.crops(8)
        kept = estimate.forward(crops, "none")
        assert held.now == pytest.approx(on_gpu, rel=0.02)
    del logits, kept


def test_a_gpu_that_has_too_few_bytes_is_no_crash(monkeypatch):
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 5 * GIB)

    def work(batch: int) -> None:
        if batch > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    choice = choose(recipe(), lambda batch: peak_on_gpu(torch.device("cuda"), lambda: work(batch)), 6 * GIB)
    assert (choice.batch, choice.needed) == (4, {8: math.inf, 4: 5 * GIB})
    assert choice.lines("measured") == [
        "memory of the GPU, measured: 8 crops at once more, 4 crops at once 5.00 GiB; 6.00 GiB may be used",
        "fits: --set batch=4 --set accumulate=2, the same steps of 8 crops",
    ]
    assert "checkpointing=true" in Choice(recipe(), 0, {1: 9.0}, 1.0).lines("measured")[-1]


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_plan_for_a_gpu_that_is_not_here(tmp_path, capsys, fresh_accelerator):
    """No weights, no GPU, and nothing is written."""
    table = tiny_table(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    words = ["fit", "--recipe", "lite0", "--data", str(table), "--plan", "--set", "folds=2", "--gpu-memory"]
    assert main([*words, "80"]) == 0
    out = capsys.readouterr().out
    assert "a GPU of 80 GiB that is not here, so no time" in out and " h a fold" not in out
    assert "memory of the GPU, estimated: 32 crops at once" in out and "fits: the recipe's own batch=32" in out
    assert main([*words, "1", "--set", "batch=1024", "--set", "tta=none"]) == 0
    assert re.search(r"fits: --set batch=(\d+) --set accumulate=\d+, the same steps of 1024", capsys.readouterr().out)
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["fit", "--data", str(table), "--gpu-memory", "8"]) == 1
    assert "expected it with --plan" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backbone", ["dinov2-vits14", "efficientnet-lite0"])
def test_the_estimate_holds_on_a_real_gpu(backbone):
    from training.fit.memory import try_step
    from training.fit.state import State

    settings = Recipe(backbone, batch=32, precision="bf16", tta="none")
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16")
    run = Training(settings, Path(), [], [], None, accelerator)
    with torch.device("meta"):
        model = adapted_model(run, 0)
    estimate = Estimate(settings, model)
    state = State(adapted_model(run, 0), settings, 10, accelerator, None)
    freeze_statistics(state.model)
    measured = peak_on_gpu(accelerator.device, lambda: try_step(state, 32))
    assert estimate.step(32) == pytest.approx(measured, rel=0.15)
