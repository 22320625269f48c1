"""What a closed-loop schedule is told: one frozen record of settings for each method.

The records hold settings only. The mathematics is in ``rules`` (fused) and in ``reference`` (the papers' own symbols);
the state lives on the device, in the optimizer's control tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["AlignmentSchedule", "ClosedLoop", "GalaSchedule", "VolSchedule"]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"lrkernels: {message}")


@dataclass(frozen=True)
class ClosedLoop:
    """A schedule that watches training; ``schedules.product`` combines it with open-loop ones."""

    min_lr: float = 0.0
    max_lr: float = math.inf

    def __post_init__(self) -> None:
        """Check the bounds that every closed loop has."""
        _check(0.0 <= self.min_lr <= self.max_lr, f"need 0 <= min_lr <= max_lr, got {self.min_lr}, {self.max_lr}")


@dataclass(frozen=True)
class AlignmentSchedule(ClosedLoop):
    """Settings of ``schedules.alignment``."""

    kappa: float = 0.2
    bias: float = 0.0
    lag: int = 1
    freeze_after: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings the rule is not defined for."""
        super().__post_init__()
        _check(math.isfinite(self.kappa) and self.kappa >= 0, f"kappa must be finite and >= 0, got {self.kappa}")
        _check(math.isfinite(self.bias), f"bias must be finite, got {self.bias}")
        _check(self.lag in (0, 1), f"lag must be 0 (two passes) or 1 (one pass), got {self.lag}")
        _check(
            self.freeze_after is None or self.freeze_after >= 0, f"freeze_after must be >= 0, got {self.freeze_after}"
        )


@dataclass(frozen=True)
class GalaSchedule(ClosedLoop):
    """Settings of ``schedules.gala``."""

    delta: float = 1e-12
    mode: str = "same_batch"

    def __post_init__(self) -> None:
        """Refuse settings the rule is not defined for."""
        super().__post_init__()
        _check(math.isfinite(self.delta) and self.delta >= 0, f"delta must be finite and >= 0, got {self.delta}")
        modes = ("same_batch", "consecutive")
        _check(self.mode in modes, f"mode must be one of {modes}, got {self.mode!r}")


@dataclass(frozen=True)
class VolSchedule(ClosedLoop):
    """Settings of ``schedules.volsched``; ``decay`` is ``"cosine"`` or any open-loop schedule."""

    total_steps: int = 0
    window: int = 50
    sensitivity: float = 0.05
    warmup_steps: int = 0
    warmup_start: float = 0.0
    history: int | None = None
    decay: str | Callable[[int], float] = "cosine"

    def __post_init__(self) -> None:
        """Refuse settings the rule is not defined for."""
        super().__post_init__()
        _check(self.total_steps > self.warmup_steps >= 0, "need total_steps > warmup_steps >= 0")
        _check(self.window >= 2, f"window must be at least 2, got {self.window}")
        _check(math.isfinite(self.sensitivity), f"sensitivity must be finite, got {self.sensitivity}")
        _check(self.history is None or self.history > self.window, "history must be larger than the window")
        _check(self.decay == "cosine" or callable(self.decay), "decay must be 'cosine' or an open-loop schedule")

    @property
    def capacity(self) -> int:
        """The number of signal values that are kept."""
        return 10 * self.window if self.history is None else self.history
