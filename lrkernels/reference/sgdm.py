"""SGD with momentum under learning-rate and batch-size schedules.

Source: Kondo, Iiduka 2025, arXiv 2508.03105. Four regimes: (i) constant batch and decaying rate, (ii) growing
batch and decaying rate, (iii) growing batch and growing rate, (iv) growing batch with a warm-up of the rate.
The theory: (i) leaves a noise floor, (ii) and (iii) converge, (iii) faster; (iv) is best in practice.

``e`` counts epochs from 0, ``t`` steps from 0, ``E`` is the number of epochs between two changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = [
    "batch_size",
    "converges",
    "cosine_rate",
    "growing_rate",
    "growth",
    "inverse_sqrt_rate",
    "nshb",
    "polynomial_rate",
    "shb",
    "steps",
    "warmup_rate",
]


def shb(x: float, m: float, g: float, lr: float, beta: float) -> tuple[float, float]:
    """Stochastic heavy ball: ``m = beta m + g``, ``x = x - lr m``, from m = 0; returns ``(x, m)``."""
    m = beta * m + g
    return x - lr * m, m


def nshb(x: float, m: float, g: float, lr: float, beta: float) -> tuple[float, float]:
    """Normalised heavy ball: ``m = beta m + (1 - beta) g``, ``x = x - lr m``, from m = 0; returns ``(x, m)``.

    In torch's words ``dampening=beta`` with a momentum buffer that starts at 0 (``zero_init_momentum=True``).
    """
    m = beta * m + (1.0 - beta) * g
    return x - lr * m, m


def batch_size(e: int, *, b_0: int, delta: float, E: int, b_max: int | None = None, epochs: int | None = None) -> int:
    """``b_e = ceil(b_0 delta^k)``, ``k = floor(e/E)``; with ``b_max``, bent to reach it at the last change.

    Then ``n = (epochs - E)/E``, ``a = (b_max - b_0)/(delta^n - 1)`` and
    ``b_e = min(ceil(a delta^k + b_0 - a), b_max)``.
    """
    k = e // E
    if b_max is None:
        return _ceil(b_0 * delta**k)
    if epochs is None:
        raise ValueError("lrkernels: a batch size that grows to b_max needs the number of epochs")
    a = (b_max - b_0) / (delta ** ((epochs - E) / E) - 1.0)
    return min(_ceil(a * delta**k + b_0 - a), b_max)


def _ceil(x: float) -> int:
    return math.ceil(x * (1.0 - 1e-12))  # 16.000000000000004 is 16


def steps(batch_sizes: Iterable[int], samples: int) -> int:
    """Steps of a run that goes once through all samples at each batch size: ``sum_e ceil(samples / b_e)``."""
    return sum(-(-samples // b) for b in batch_sizes)


def inverse_sqrt_rate(t: int, lr_0: float) -> float:
    """``lr_0 / sqrt(t + 1)``, per step; a decay of regimes (i) and (ii)."""
    return lr_0 / math.sqrt(t + 1)


def cosine_rate(e: int, lr_0: float, epochs: int, lr_min: float = 0.0) -> float:
    """``lr_min + (lr_0 - lr_min)(1 + cos(pi e/epochs))/2``, per epoch; a decay of regimes (i) and (ii)."""
    return lr_min + (lr_0 - lr_min) * (1.0 + math.cos(math.pi * e / epochs)) / 2.0


def polynomial_rate(t: int, lr_0: float, T: int, p: float = 2.0) -> float:
    """``lr_0 (1 - t/T)^p`` per step, T steps in all; p = 1 is linear; a decay of regimes (i) and (ii)."""
    return lr_0 * (1.0 - t / T) ** p


def growth(lr_0: float, lr_max: float, changes: float) -> float:
    """``gamma = (lr_max / lr_0)^(1/changes)``, the factor that reaches ``lr_max`` after so many changes."""
    return (lr_max / lr_0) ** (1.0 / changes)


def growing_rate(e: int, *, lr_0: float, lr_max: float, E: int, epochs: int) -> float:
    """``lr_e = lr_0 gamma^floor(e/E)``, ``gamma = (lr_max/lr_0)^(E/(epochs - E))``; regime (iii)."""
    return lr_0 * growth(lr_0, lr_max, (epochs - E) / E) ** (e // E)


def warmup_rate(
    e: int, *, lr_0: float, lr_max: float, w: int, W: int, epochs: int, lr_min: float | None = None
) -> float:
    """``lr_0 g^floor(e/w)`` for e < W, ``g = (lr_max/lr_0)^(w/(W - w))``; regime (iv).

    Then constant ``lr_max``, or with ``lr_min`` a cosine from ``lr_max`` to it over the ``epochs - W`` that
    are left.
    """
    if e < W:
        return lr_0 * growth(lr_0, lr_max, (W - w) / w) ** (e // w)
    return lr_max if lr_min is None else cosine_rate(e - W, lr_max, epochs - W, lr_min)


def converges(gamma: float, delta: float, beta: float) -> bool:
    """The condition of regime (iii): ``1 < gamma < min(delta, 1/beta^2)``."""
    return 1.0 < gamma < min(delta, 1.0 / beta**2 if beta else math.inf)
