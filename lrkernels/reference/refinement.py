"""Linear decay, and the schedule refined from the gradient norms of an earlier run.

Source: Defazio, Cutkosky, Mehta, Mishchenko 2023, "When, Why and How Much? Adaptive Learning Rate Scheduling
by Refinement", arXiv 2310.07831. Written from the mathematics alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..checks import warn

__all__ = ["last_iterate_bound", "linear_decay", "refined", "running_median", "schedule_from_weights"]

FLOOR = 1e-6  # the smallest norm that counts, as a fraction of the median: below it 1/G says nothing
POWER = {"l2": 2, "l1": 1}  # w = G^-2 for SGD, w = G^-1 for Adam and other coordinate-wise methods


def linear_decay(t: int, T: int) -> float:
    """``1 - t/T``: the best schedule that does not look at the gradients (weights ``w_t = D/(G sqrt T)``)."""
    return 1.0 - min(t, T) / T


def schedule_from_weights(w: Sequence[float]) -> list[float]:
    """``lr_t = w_t * sum_{p>t} w_p / sum_p w_p`` for weights ``w_t >= 0``; the last value is 0."""
    lr, tail = [0.0] * len(w), 0.0
    for t in reversed(range(len(w))):
        lr[t] = w[t] * tail
        tail += w[t]
    return [value / tail for value in lr]


def last_iterate_bound(w: Sequence[float], G: Sequence[float], D: float) -> float:
    """``E[f(x_T) - f*] <= D^2/(2W) + sum w_t^2 G_t^2 / (2W)``, ``W = sum w``, with their schedule."""
    return (D**2 + sum((w_t * G_t) ** 2 for w_t, G_t in zip(w, G, strict=True))) / (2.0 * sum(w))


def running_median(G: Sequence[float], smoothing: float) -> list[float]:
    """Median over a window of ``2*(int(smoothing*T)//2) + 1`` values.

    The left edge repeats the first value; the right edge is mirrored without repeating the edge.
    """
    half = int(smoothing * len(G)) // 2
    left, right = np.pad(G, (half, 0), mode="edge"), np.pad(G, (0, half), mode="reflect")
    padded = np.concatenate([left[:half], right])
    return [float(np.median(padded[t : t + 2 * half + 1])) for t in range(len(G))]


def refined(
    grad_norms: Sequence[float], total_steps: int | None = None, *, norm: str = "l2", smoothing: float = 0.1
) -> np.ndarray:
    """Turn the gradient norms that a run recorded into the schedule of the next run.

    Formula: ``Ghat = running_median(G)``, ``w = Ghat^-2`` (l2) or ``Ghat^-1`` (l1), ``s_t = w_t * sum_{p>t}
    w_p``, ``schedule = s / max(s)``. Large early norms become a warm-up, falling late ones a fast annealing.

    Args:
        grad_norms: one norm per step; non-finite ones are dropped with a warning.
        total_steps: length of the result, by linear interpolation (default: as many as there are
            finite norms).
        norm: what was recorded, ``"l2"`` for SGD or ``"l1"`` for Adam (default: ``"l2"``).
        smoothing: the median's window as a fraction of the run, tau (default: 0.1).
    """
    recorded = np.asarray(grad_norms, dtype=np.float64)
    G = recorded[np.isfinite(recorded)]
    if not G.size:
        raise ValueError("lrkernels: refinement needs at least one finite gradient norm")
    if G.size < recorded.size:
        warn(f"dropped {recorded.size - G.size} non-finite gradient norms")
    Ghat = np.asarray(running_median(G.tolist(), smoothing))
    Ghat = Ghat / (float(np.median(Ghat[Ghat > 0])) if (Ghat > 0).any() else 1.0)
    if (Ghat < FLOOR).any():
        count = int((Ghat < FLOOR).sum())
        warn(f"degenerate schedule, {count} norms are all but zero")
    s = np.asarray(schedule_from_weights((np.maximum(Ghat, FLOOR) ** -POWER[norm]).tolist()))
    length = s.size if total_steps is None else total_steps
    if s.size == 1 or length == 1:
        return np.ones(length)
    return np.interp(np.linspace(0, s.size - 1, length), np.arange(s.size), s / s.max())
