"""VolSched: calm training raises the learning rate, wild training lowers it.

Source: Ren 2025, arXiv 2507.10575. The signal is the training mini-batch accuracy, one value per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..checks import warn
from ..closed_loop import VolSchedule

__all__ = ["VolSched", "cosine_decay", "decay_ratio", "volsched_multiplier"]


def volsched_multiplier(history: Sequence[float], window: int = 50, sensitivity: float = 0.05) -> float:
    """``M = 1 + sign(rho - 1) * ln(1 + w |rho - 1|)``, with ``rho = s_all / s_N``.

    ``r_i = ln(x_{i+1} / x_i)``; ``s_all`` and ``s_N`` are the standard deviations (ddof 1) of all kept ``r``
    and of the last ``N`` of them. 1 with fewer than ``N + 1`` values, where ``s_N`` is 0 or where anything is
    not finite.

    Args:
        history: the signal x, oldest value first; values below 1e-8 count as 1e-8.
        window: N (default: 50).
        sensitivity: w (default: 0.05).
    """
    if len(history) < window + 1:
        return 1.0
    x = np.maximum(np.asarray(history, dtype=np.float64), 1e-8)
    if not np.isfinite(x).all():
        return 1.0
    r = np.log(x[1:] / x[:-1])
    s_all, s_N = float(np.std(r, ddof=1)), float(np.std(r[-window:], ddof=1))
    if s_N == 0.0:
        return 1.0
    rho = s_all / s_N
    return 1.0 + math.copysign(1.0, rho - 1.0) * math.log(1.0 + sensitivity * abs(rho - 1.0))


def cosine_decay(e: int, T: int) -> float:
    """``s(e) = (1 + cos(pi e/T)) / 2``, the global decay of the paper."""
    return (1.0 + math.cos(math.pi * e / T)) / 2.0


def decay_ratio(s: Callable[[int], float], e: int, N: int, T: int) -> float:
    """``A = s(min(e, T)) / s(e - N)``, what the decay s does over one window; 0 once s has been 0."""
    before = s(e - N)
    return s(min(e, T)) / before if before else 0.0


@dataclass
class VolSched:
    """``lr <- clip(lr * M * A, min_lr, max_lr)`` every ``window`` steps after a linear warm-up.

    With e steps since the warm-up and ``T = total_steps - warmup_steps``, the rate moves where ``e > 0`` and
    ``e mod N = 0``, for the last time at the first such ``e >= T``. M compounds; with ``M = 1`` this is
    cosine annealing sampled every N steps. Warm-up over W steps: ``lr_0 (q + (1 - q) e/(W - 1))``, and
    ``lr_0`` for W = 1; the signal is recorded during it too.

    The clamp of e at T and ``max_lr`` are ours: as published the rate can rise again after T, without an
    upper bound.
    """

    lr_0: float = 1.0
    total_steps: int = 0
    window: int = 50
    sensitivity: float = 0.05
    min_lr: float = 0.0
    max_lr: float = math.inf
    warmup_steps: int = 0
    warmup_start: float = 0.0
    capacity: int = 500
    decay: Callable[[int], float] | None = None

    t: int = field(default=0, init=False)
    level: float = field(default=0.0, init=False)  # the rate, warm-up apart
    signal: list[float] = field(default_factory=list, init=False)

    @classmethod
    def from_settings(cls, lr_0: float, s: VolSchedule) -> VolSched:
        """Make the rule that ``schedules.volsched`` describes, starting at ``lr_0``."""
        return cls(
            lr_0,
            s.total_steps,
            s.window,
            s.sensitivity,
            s.min_lr,
            s.max_lr,
            s.warmup_steps,
            s.warmup_start,
            s.capacity,
            s.decay if callable(s.decay) else None,
        )

    def __post_init__(self) -> None:
        self.level = self.lr_0

    @property
    def lr(self) -> float:
        """The rate of step t."""
        if self.t < self.warmup_steps > 1:
            u = self.t / (self.warmup_steps - 1)
            return self.lr_0 * (self.warmup_start + (1.0 - self.warmup_start) * u)
        return self.level

    def update(self, x: float | None) -> float:
        """Take the signal of step t (None: there was none), return ``lr_t``, and move on to step t + 1."""
        lr = self.lr
        if x is not None and math.isfinite(x):
            self.signal = [*self.signal, x][-self.capacity :]
        elif x is not None:
            warn(f"volsched skipped a signal that is not finite ({x})")
        self.t += 1
        e, T, N = self.t - self.warmup_steps, self.total_steps - self.warmup_steps, self.window
        if e > 0 and e % N == 0 and e - N < T:
            M = volsched_multiplier(self.signal, N, self.sensitivity)
            A = decay_ratio(self.decay or (lambda i: cosine_decay(i, T)), e, N, T)
            self.level = min(max(self.level * M * A, self.min_lr), self.max_lr)
        return lr
