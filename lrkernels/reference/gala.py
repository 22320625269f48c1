"""GALA: the learning rate as an online learning problem on gradient alignment.

Source: Jiang, Kavis, Mokhtari 2025, arXiv 2506.08419. The surrogate loss and the practical form are the
paper's; the forms for AdamW and for consecutive gradients, and what happens when x does not move, are a
reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = ["Gala", "gala_lr", "gradients_at", "leaving_no_trace", "moved_to"]


def gala_lr(
    a: Sequence[float],
    b: Sequence[float],
    *,
    lr_0: float,
    delta: float = 1e-12,
    min_lr: float = 0.0,
    max_lr: float = math.inf,
) -> float:
    """``lr_{t+1} = clip((delta lr_0 + sum a_s) / (delta + sum b_s), min_lr, max_lr)``.

    Follow-the-regularised-leader on ``l_s(lr) = -lr a_s + lr^2 b_s / 2`` around ``lr_0``; without
    losses and ``delta = 0`` the rate is ``lr_0``.
    """
    weight = delta + sum(b)
    lr = (delta * lr_0 + sum(a)) / weight if weight > 0 else lr_0
    return min(max(lr, min_lr), max_lr)


@dataclass
class Gala:
    """The rate that is best in hindsight for ``l_s(lr) = -lr <g'_{s+1}, g'_s> + L_s/2 |g_s|^2 lr^2``.

    ``a_s = <g'_{s+1}, g'_s>``, ``b_s = L_s |g_s|^2``, ``L_s = |g'_{s+1} - g'_s| / |x_{s+1} - x_s|``, and then
    ``gala_lr``.

    - ``mode="same_batch"`` (the paper's): both g' are gradients of the new batch, at ``x_{s+1}`` and at
      ``x_s``; two evaluations per step (``gradients_at``). ``g_s`` is the gradient that made step s.
    - ``mode="consecutive"`` (a reconstruction): ``g' = g``, the gradients that training computes anyway. For
      full or very large batches only: with noise ``|g_{s+1} - g_s|`` stays at the noise level however small
      the step, L grows as 1/lr and the rate collapses to zero. Use ``Alignment`` there.
    - For AdamW (a reconstruction): ``a_s = <g'_{s+1}, d_s>``, ``b_s = L_s |d_s|^2``, d the bias-corrected
      direction.

    The gradients are those before clipping and weight decay; the move is the real one. With momentum it is
    heavy ball on top of GALA: add ``max_grad_norm=1``, or the first ratio may jump far from a small ``lr_0``.
    In one dimension with curvature h and ``delta = 0``: ``lr_1 = 1/h - lr_0``.
    """

    lr_0: float = 1.0
    delta: float = 1e-12
    min_lr: float = 0.0
    max_lr: float = math.inf

    a: float = field(default=0.0, init=False)
    b: float = field(default=0.0, init=False)
    L: float | None = field(default=None, init=False)

    @property
    def lr(self) -> float:
        """The rate of the next step."""
        return gala_lr([self.a], [self.b], lr_0=self.lr_0, delta=self.delta, min_lr=self.min_lr, max_lr=self.max_lr)

    def update(self, a: float, length_sq: float, L: float | None) -> float:
        """Take ``a_s``, ``|g_s|^2`` (AdamW: ``|d_s|^2``) and ``L_s``, return ``lr_{s+1}``.

        Where x did not move L is not defined (None): the last one serves, otherwise the rate would overshoot.
        What is not finite, or has no L yet, adds nothing.
        """
        if L is None:
            L = self.L
        if L is not None and math.isfinite(a) and math.isfinite(L * length_sq):
            self.L = L
            self.a += a
            self.b += L * length_sq
        return self.lr


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
