"""UBA: the unified budget-aware schedule.

Source: Tang et al., NeurIPS 2025, arXiv 2505.24452. The closed form is the paper's; the angle and the phases
are a reconstruction.
"""

from __future__ import annotations

import math

__all__ = ["chebyshev_steps", "uba", "uba_angle", "uba_shape"]


def uba_shape(theta: float, phi: float) -> float:
    """``2 (1 + cos th) / (2 phi + (2 - phi)(1 + cos th))``, from 1 at angle 0 to 0 at angle pi.

    It equals ``1 / (1 + (phi/2) tan^2(th/2))``. ``phi = 2`` is cosine annealing; a smaller ``phi`` stays high
    and drops late, a larger one decays early. The mid-point is ``2/(2 + phi)``, the mean ``1/(1 +
    sqrt(phi/2))``.
    """
    if not phi > 0:
        raise ValueError(f"lrkernels: phi must be > 0, got {phi}")
    c = 1.0 + math.cos(theta)
    return 2.0 * c / (2.0 * phi + (2.0 - phi) * c)


def uba_angle(t: int, T: int, offset: float = 0.0, phases: int = 1) -> float:
    """``th = pi (t + offset) / T`` within one of ``phases`` equal cycles; pi from T on. A reconstruction.

    ``offset=0`` is torch's cosine, t = 0..T; ``offset=0.5`` takes Chebyshev's nodes, t = 0..T-1.
    """
    if t >= T:
        return math.pi
    cycle = t * phases // T
    return math.pi * min(1.0, (t * phases - cycle * T + offset * phases) / T)


def uba(
    t: int,
    T: int,
    phi: float,
    *,
    lr_max: float = 1.0,
    lr_min: float = 0.0,
    offset: float = 0.0,
    phases: int = 1,
) -> float:
    """``lr_t = lr_min + (lr_max - lr_min) * uba_shape(th_t, phi)`` for a budget of ``T`` steps."""
    return lr_min + (lr_max - lr_min) * uba_shape(uba_angle(t, T, offset, phases), phi)


def chebyshev_steps(mu: float, L: float, T: int) -> list[float]:
    """The ``T`` steps that minimise the maximum over curvatures c in [mu, L] of ``prod_t |1 - lr_t c|``.

    ``1/lr_t = (L + mu)/2 - (L - mu)/2 * cos((2t + 1) pi / (2T))``, which is ``uba`` with ``lr_max = 1/mu``,
    ``lr_min = 1/L``, ``phi = 2 L/mu`` and ``offset=0.5``: where the formula comes from.
    """
    return [2.0 / (L + mu - (L - mu) * math.cos((2 * t + 1) * math.pi / (2 * T))) for t in range(T)]
