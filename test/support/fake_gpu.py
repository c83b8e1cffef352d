"""A GPU that PyTorch believes in: its tensors have a device, a dtype and a shape, and no values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import Node


def really(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` outside the fake mode: files hold real tensors."""

    def call(*arguments: Any, **named: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments, **named)

    return call


@contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Code inside may use device "cuda", and autocast on it, with tensors of the mode that this yields.

    `torch.cuda.is_available` stays False: fake tensors would start a real context.
    """
    patches = [
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (8, 0)),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),  # else autocast turns off
    ]
    for patch in patches:
        patch.start()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        for patch in patches:
            patch.stop()


@contextmanager
def trainable_on_fake_gpu() -> Iterator[None]:
    """Within `fake_gpu`, let `backward` and what reads a single value work too.

    A value on the GPU reads as zero (no gradient overflowed), one on the CPU as one (the optimizer counts steps there).
    """
    with (
        mock.patch.object(torch.Tensor, "backward", backward),
        mock.patch.object(FakeTensor, "item", lambda self: float(self.device.type == "cpu")),
    ):
        yield


def to_fake_gpu(model: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """As model.to("cuda"), which cannot exchange a real parameter for a fake one."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fake = torch.nn.Parameter(mode.from_tensor(value.detach()).to("cuda"), value.requires_grad)
                module._parameters[name] = fake
                for hook in (value._backward_hooks or {}).values():
                    fake.register_hook(hook)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else mode.from_tensor(buffer).to("cuda")
    return model


def backward(loss: torch.Tensor) -> None:
    """As `loss.backward()`, node after node: PyTorch's own engine asks the driver for each GPU's streams.

    As there, a gradient must be on the device of its tensor, else RuntimeError.
    """
    assert loss.grad_fn is not None, "the loss depends on nothing that is trained"
    waiting: dict[Node, list[torch.Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    with torch.no_grad():
        for node in in_order(loss.grad_fn):
            gradients = waiting.pop(node, None)
            if gradients is None:
                continue
            if hasattr(node, "variable"):
                accumulate(node.variable, gradients[0])
                continue
            found = node(*gradients)
            for (into, place), gradient in zip(
                node.next_functions, found if isinstance(found, tuple) else (found,), strict=True
            ):
                if into is None or gradient is None:
                    continue
                gradient = fitted(into, place, gradient)
                slots = waiting.setdefault(into, [None] * len(into._input_metadata))
                before = slots[place]
                slots[place] = gradient if before is None else before + gradient


def in_order(root: Node) -> list[Node]:
    """Every node of the graph, each after all nodes that lead to it."""
    done, seen, stack = list[Node](), {root}, [(root, iter(root.next_functions))]
    while stack:
        node, rest = stack[-1]
        after = next((into for into, _ in rest if into is not None and into not in seen), None)
        if after is None:
            done.append(node)
            stack.pop()
        else:
            seen.add(after)
            stack.append((after, iter(after.next_functions)))
    return done[::-1]


def fitted(node: Node, place: int, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient in the shape and dtype of its tensor; RuntimeError where the devices differ."""
    expected = node._input_metadata[place]
    if gradient.device != expected.device:
        raise RuntimeError(f"{node.name()} got a gradient on device {gradient.device}; expected {expected.device}")
    return gradient.sum_to_size(expected.shape).to(expected.dtype)


def accumulate(leaf: torch.Tensor, gradient: torch.Tensor | None) -> None:
    assert gradient is not None
    for hook in (leaf._backward_hooks or {}).values():
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
        if gradient.device != leaf.device:
            raise RuntimeError(f"a hook returned a gradient on device {gradient.device}; expected {leaf.device}")
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
