"""Alignment: gradient alignment in one pass (ours).

Does this gradient agree with the way we just moved? If so the rate grows, if not it shrinks. The learner
works on the logarithm of the rate, where follow-the-regularised-leader with a quadratic regulariser is a
running sum. Without normalisation and memory it is the multiplicative form of hypergradient descent (Baydin
et al. 2018, arXiv 1703.04782); the signal is that of GALA (see ``gala``), normalised, so that no curvature
has to be estimated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Alignment", "alignment_lr", "cosine"]


def cosine(dot: float, a_sq: float, b_sq: float) -> float:
    """``<a, b> / (|a| |b|)`` from dot product and squared norms; 0 where a norm is 0 or anything not finite."""
    lengths = math.sqrt(a_sq) * math.sqrt(b_sq)
    c = dot / lengths if lengths else 0.0
    return c if math.isfinite(c) else 0.0


def alignment_lr(
    c: Sequence[float], *, lr_0: float = 1.0, kappa: float = 0.2, bias: float = 0.0, lag: int = 1
) -> float:
    """``lr_t = lr_0 * exp(kappa * sum_{1 <= s <= t - lag} (c_s + bias))`` from ``c = [c_0, ..., c_t]``."""
    return lr_0 * math.exp(kappa * sum(c_s + bias for c_s in c[1 : len(c) - lag]))


@dataclass
class Alignment:
    """``lr_t = clip(lr_0 * exp(kappa * sum_{1 <= s <= t - lag} (c_s + bias)), min_lr, max_lr)``.

    ``c_t = <g_t, d_{t-1}> / (|g_t| |d_{t-1}|)``, where ``d_{t-1}`` is the previous update direction, what the
    rate multiplied. A step without a finite ``c`` adds nothing. With ``freeze_after=n`` only the first n
    steps count (s < n), after which the rate rests: left on, the rule works against an annealing.

    Args:
        lr_0: the first rate; with 1 the rate is the factor itself (default: 1).
        kappa: how fast the logarithm of the rate moves (default: 0.2).
        bias: added to every c, against short-horizon bias (default: 0).
        lag: 1 measures while updating, in one pass; 0 needs two (default: 1).
        freeze_after: the number of steps that count (default: None, all).
        min_lr: lower bound (default: 0).
        max_lr: upper bound (default: inf).
    """

    lr_0: float = 1.0
    kappa: float = 0.2
    bias: float = 0.0
    lag: int = 1
    freeze_after: int | None = None
    min_lr: float = 0.0
    max_lr: float = math.inf

    t: int = field(default=0, init=False)
    sum: float = field(default=0.0, init=False)

    @property
    def lr(self) -> float:
        """The rate that the sum stands for."""
        growth = math.exp(min(self.kappa * self.sum, 80.0))  # above that no float32 rate is finite
        return min(max(self.lr_0 * growth, self.min_lr), self.max_lr)

    def update(self, c: float) -> float:
        """Take ``c_t``, return ``lr_t``, and move on to step t + 1."""
        late = self.lr
        if 1 <= self.t and (self.freeze_after is None or self.t < self.freeze_after) and math.isfinite(c):
            self.sum += c + self.bias
        self.t += 1
        return late if self.lag else self.lr
