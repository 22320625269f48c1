"""GALA: the learning rate as an online learning problem on gradient alignment.

Source: Jiang, Kavis, Mokhtari 2025, arXiv 2506.08419. The surrogate loss and the practical form are the
paper's; the forms for AdamW and for consecutive gradients, and what happens when x does not move, are a
reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Gala", "gala_lr"]


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
      ``x_s``; two evaluations per step (``closures.gradients_at``). ``g_s`` is the gradient that made step s.
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
