"""Settings that belong together: a learning-rate schedule, with the batch sizes it was made for."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from . import batch_sizes as batches
from . import schedules
from .checks import check, warn
from .schedules import Product, Schedule, schedule

__all__ = ["Recipe", "self_tuning", "sgdm"]


class Recipe(NamedTuple):
    """What ``sgdm`` returns.

    Attributes:
        schedule: the learning rate's multiplier, ``step -> float``.
        batch_sizes: the batch size, ``epoch -> int``, for ``ScheduledBatchSampler``.
        total_steps: length of the run in steps.
    """

    schedule: Schedule
    batch_sizes: Callable[[int], int]
    total_steps: int


@schedule(settles=lambda values, starts: starts[-1])
def by_epoch(step: int, values: Sequence[float], starts: Sequence[int]) -> float:
    """Hold one value per epoch: ``values[epoch]`` from step ``starts[epoch]`` on."""
    return values[bisect_right(starts, step) - 1]


_FALLS = ("constant", "inverse_sqrt", "cosine", "linear", "polynomial")
_LR_DECAYS = {
    "constant_batch": _FALLS,
    "increasing_batch": _FALLS,
    "increasing_batch_and_lr": ("constant",),
    "increasing_batch_warmup": ("constant", "cosine"),
}


def sgdm(
    kind: str,
    dataset_size: int,
    epochs: int,
    *,
    batch_size: int | None = None,
    max_batch_size: int | None = 4096,
    growth: float = 2,
    every: int | None = None,
    lr_decay: str = "constant",
    power: float = 2.0,
    final: float = 0.0,
    max_lr_ratio: float = 5.0,
    momentum: float = 0.9,
    warmup_epochs: int | None = None,
    warmup_every: int | None = None,
    drop_last: bool = False,
) -> Recipe:
    """Plan a run of SGD with momentum in which learning rate and batch size belong together.

    In epoch ``e``, at step ``t`` of ``T``, with ``r = max_lr_ratio``, ``E = every``, ``W = warmup_epochs``
    and ``w = warmup_every``, the batch size and the multiplier of ``lr`` are::

        constant_batch           constant   1,  1 / sqrt(t + 1),  c(e / epochs),
        increasing_batch         growing    1 - t / T  or  (1 - t / T) ** power:  see lr_decay
        increasing_batch_and_lr  growing    gamma ** (e // E),  gamma = r ** (E / (epochs - E))
        increasing_batch_warmup  growing    r ** (w / (W - w) * (e // w)) while e < W,
                                            then  r  or  r * c((e - W) / (epochs - W))

    with ``c(x) = (1 + cos(pi * x)) / 2``; decays that end at ``final`` are scaled as in ``schedules``.

    A growing batch is ``batch_sizes.exponential(batch_size, growth, every, max_batch_size, epochs)``. In
    theory a constant batch leaves a floor of noise; a growing batch converges, and faster with a growing rate
    as long as ``1 < gamma < min(growth, 1 / momentum ** 2)``; in the paper's experiments the warm-up does
    best. Defaults are the paper's (ResNet-18 on CIFAR-100, ``lr=0.1``, 300 epochs) with intervals that scale
    with ``epochs``.

    Args:
        kind: one of the four above.
        dataset_size: samples per epoch; with several processes per process, as the batch sizes are.
        epochs: length of the run.
        batch_size: samples per batch, in the first epoch if it grows (default: 128 constant, 8 growing).
        max_batch_size: size of the last batches, in samples (default: 4096). None grows without a bound.
        growth: factor of the batch size, above 1 (default: 2).
        every: epochs between two growths (default: ``epochs // 10``, 30 in the paper).
        lr_decay: ``"constant"`` (default), ``"inverse_sqrt"``, ``"cosine"`` (by epoch), ``"linear"`` or
            ``"polynomial"``; after a warm-up constant or cosine, with a growing rate only constant.
        power: of the polynomial decay (default: 2).
        final: multiplier at the end of a cosine, linear or polynomial decay (default: 0).
        max_lr_ratio: largest rate over ``lr``, where the rate grows (default: 5). The paper has 2, 5 and 10.
        momentum: the optimizer's, for the convergence condition (default: 0.9).
        warmup_epochs: length of the warm-up (default: ``epochs // 10``, 30 in the paper, and at least 2).
        warmup_every: epochs between two growths in it (default: ``warmup_epochs // 10``, 3 in the paper).
        drop_last: as in ``ScheduledBatchSampler`` (default: False).

    Returns:
        ``(schedule, batch_sizes, total_steps)``.

    Raises:
        ValueError: if a setting is out of range, or ``kind`` has no such ``lr_decay``.

    Warns:
        UserWarning: If ``gamma`` breaks the convergence condition.

    Source: Kondo, Iiduka, 2025, arXiv 2508.03105. Ours: where ``every`` does not divide ``epochs``, the last
    rung of the rate stays at the maximum, as the batch size does. For the paper's NSHB give ``FusedSGD``
    ``dampening=momentum`` and ``zero_init_momentum=True``.
    """
    check(kind in _LR_DECAYS, f"kind must be one of {', '.join(_LR_DECAYS)}, got {kind!r}")
    allowed = _LR_DECAYS[kind]
    check(lr_decay in allowed, f"lr_decay of {kind} must be one of {', '.join(allowed)}, got {lr_decay!r}")
    check(0 < max_lr_ratio < math.inf, f"max_lr_ratio must be finite and above 0, got {max_lr_ratio}")
    check(0 <= momentum < 1, f"momentum must be at least 0 and below 1, got {momentum}")
    every = max(1, epochs // 10) if every is None else every
    warmup_epochs = max(2, epochs // 10) if warmup_epochs is None else warmup_epochs
    warmup_every = max(1, warmup_epochs // 10) if warmup_every is None else warmup_every

    batch_sizes: Callable[[int], int]
    if kind == "constant_batch":
        batch_sizes = batches.constant(128 if batch_size is None else batch_size)
    else:
        initial, span = 8 if batch_size is None else batch_size, epochs if max_batch_size else None
        batch_sizes = batches.exponential(initial, growth, every, max_batch_size, span)
    steps = batches.steps_per_epoch(batch_sizes, dataset_size, epochs, drop_last)
    *starts, total_steps = itertools.accumulate(steps, initial=0)
    check(total_steps > 0, "the run has no step; raise epochs or dataset_size, or lower batch_size")

    if kind == "increasing_batch_and_lr":
        rate = by_epoch(_climb(max_lr_ratio, every, epochs, epochs), starts)
        _warn_of_divergence(max_lr_ratio ** (every / (epochs - every)), growth, momentum)
    elif kind == "increasing_batch_warmup":
        check(warmup_epochs < epochs, f"warmup_epochs must be below epochs={epochs}, got {warmup_epochs}")
        values = _climb(max_lr_ratio, warmup_every, warmup_epochs, epochs)
        if lr_decay == "cosine":
            fall = _cosine(epochs - warmup_epochs, final / max_lr_ratio)
            values[warmup_epochs:] = [max_lr_ratio * value for value in fall]
        rate = by_epoch(values, starts)
    else:
        rate = {
            "constant": schedules.constant(),
            "inverse_sqrt": schedules.inverse_sqrt(),
            "cosine": by_epoch(_cosine(epochs, final), starts),
            "linear": schedules.linear(total_steps, final=final),
            "polynomial": schedules.polynomial(total_steps, final=final, power=power),
        }[lr_decay]
    return Recipe(replace(rate, total_steps=total_steps), batch_sizes, total_steps)


def _climb(ratio: float, every: int, span: int, epochs: int) -> list[float]:
    """Climb from 1 to ``ratio`` by one factor, every few epochs within the first ``span``; then stay."""
    check(1 <= every < span, f"a rate cannot grow every {every} epochs within {span}; lower the interval")
    return [ratio ** min(1.0, epoch // every * every / (span - every)) for epoch in range(epochs)]


def _cosine(epochs: int, final: float) -> list[float]:
    return [schedules.cosine(epochs, final=final)(epoch) for epoch in range(epochs)]


def _warn_of_divergence(gamma: float, growth: float, momentum: float) -> None:
    bound = min(growth, 1 / max(momentum, 1e-6) ** 2)
    if not 1 < gamma < bound:
        warn(
            f"the rate grows by gamma = {gamma:.4g} at a time, but convergence is known only for 1 < gamma < "
            f"min(growth, 1 / momentum**2) = {bound:.4g}; change max_lr_ratio, every or momentum"
        )


def self_tuning(total_steps: int, **settings: Any) -> Product:
    """Find the rate in the first half of the run, then decay it linearly to zero.

    With ``n = total_steps // 2``::

        product(alignment(freeze_after=n), join([constant(), linear(total_steps - n)], [n]))

    Give the optimizer ``max_grad_norm=1`` as well, so that a first rate that is far too high does no harm.

    Args:
        total_steps: length of the run in steps, at least 2.
        **settings: for ``schedules.alignment``: ``kappa``, ``bias``, ``lag``, ``min_lr``, ``max_lr``.

    Raises:
        ValueError: if ``total_steps`` is below 2, or a setting is out of range.

    Source: this project.
    """
    check(total_steps >= 2, f"total_steps must be at least 2, got {total_steps}")
    half = total_steps // 2
    decay = schedules.join([schedules.constant(), schedules.linear(total_steps - half)], [half])
    return schedules.product(schedules.alignment(freeze_after=half, **settings), decay)
