"""Evaluating a closure at other parameter values, without leaving a trace of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["gradients_at", "leaving_no_trace", "moved_to"]


@contextmanager
def moved_to(points: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Put parameters at other values for a while; they come back bit for bit."""
    here = {p: p.detach().clone() for p in points}
    try:
        _put(points)
        yield
    finally:
        _put(here)


def _put(points: Mapping[Tensor, Tensor]) -> None:
    with torch.no_grad():
        for p, x in points.items():
            p.copy_(x)
    torch.clear_autocast_cache()  # autocast may hold low-precision copies of the parameters


@contextmanager
def leaving_no_trace(devices: Iterable[int] = ()) -> Iterator[None]:
    """Forget what an evaluation did beside its result: random numbers drawn, and module buffers moved.

    Every module that runs has its buffers (BatchNorm's running statistics and counter, spectral norm's
    vectors, ...) saved before its first forward, through torch's global forward hook, and put back at the
    end.
    """
    saved: dict[nn.Module, list[tuple[str, Tensor, Tensor]]] = {}

    def save(module: nn.Module, _: object) -> None:
        for part in module.modules():
            if part not in saved:
                buffers = part.named_buffers(recurse=False)
                saved[part] = [(name, buffer, buffer.detach().clone()) for name, buffer in buffers]

    hook = nn.modules.module.register_module_forward_pre_hook(save)
    try:
        with torch.random.fork_rng(devices=list(devices), device_type="cuda"):
            yield
    finally:
        hook.remove()
        with torch.no_grad():
            for part, buffers in saved.items():
                for name, buffer, value in buffers:
                    setattr(part, name, buffer.copy_(value))


def gradients_at(
    points: Mapping[Tensor, Tensor], closure: Callable[[], object], params: Iterable[Tensor]
) -> dict[Tensor, Tensor]:
    """Gradients of ``closure`` with the parameters moved to ``points``; nothing changes, ``.grad`` included.

    Random numbers start from the same state as in the evaluation that follows, so that dropout draws the same
    masks.
    """
    params = list(params)
    grads = {p: p.grad for p in params}
    for p in params:
        p.grad = None
    try:
        with moved_to(points), leaving_no_trace({p.device.index for p in params if p.is_cuda}):
            closure()
        return {p: p.grad.detach().clone() for p in params if p.grad is not None}
    finally:
        for p in params:
            p.grad = grads[p]
