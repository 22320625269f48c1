"""What a fused optimizer is asked for beside its rule's own arguments, and what follows from it for every step."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .checks import check, check_whole
from .closed_loop import AlignmentSchedule, ClosedLoop, GalaSchedule
from .layout import Measure, Rule, Setting
from .ops import check_backend_name

__all__ = ["DTYPES", "Options"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TRACKS = {
    "grad_norm": Measure.NORMS,
    "grad_norm_l1": Measure.NORMS,
    "direction": Measure.NORMS | Measure.DIRECTION,
    "alignment": Measure.NORMS | Measure.PREVIOUS | Measure.MOVE,
}
PREV_GRAD = ("store", "swap", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of ``FusedOptimizer``, whose docstring says what they mean. A wrong one is a ``ValueError``."""

    max_grad_norm: float | None
    track: Iterable[str]
    prev_grad: str
    process_group: Any
    backend: str | None
    history_size: int | None
    state_dtype: torch.dtype | None
    master_weights: bool
    stochastic_rounding: bool
    skip_nonfinite: bool
    normalize: bool = False

    def __post_init__(self) -> None:
        check(isinstance(self.track, Iterable), f"track takes names of {tuple(TRACKS)}, got {self.track!r}")
        names = (self.track,) if isinstance(self.track, str) else tuple(self.track)
        object.__setattr__(self, "track", names)
        unknown = [name for name in names if name not in TRACKS]
        check(not unknown, f"track takes names of {tuple(TRACKS)}, got {unknown}")
        check(self.prev_grad in PREV_GRAD, f"prev_grad must be one of {PREV_GRAD}, got {self.prev_grad!r}")
        limit = self.max_grad_norm
        positive = isinstance(limit, numbers.Real) and limit > 0
        check(limit is None or positive, f"max_grad_norm must be > 0 or None, got {limit!r}")
        if self.history_size is not None:
            check_whole("history_size", self.history_size, 1)
        for name in ("master_weights", "stochastic_rounding", "skip_nonfinite", "normalize"):
            value = getattr(self, name)
            check(isinstance(value, bool | np.bool_), f"{name} must be True or False, got {value!r}")
        known = self.state_dtype is None or self.state_dtype in DTYPES
        check(known, f"state_dtype must be None or one of {DTYPES}, got {self.state_dtype}")
        check(
            not (self.master_weights and self.stochastic_rounding),
            "master_weights=True keeps what stochastic_rounding=True rounds away: choose one",
        )
        check(
            not (self.normalize and self.clipping),
            "normalize=True makes every step as long as its rate, so max_grad_norm has nothing to clip: leave it out",
        )
        check_backend_name(self.backend)

    @property
    def clipping(self) -> bool:
        """Whether the global norm is clipped."""
        return self.max_grad_norm is not None

    def measures(self, rule: Rule, closed_loop: ClosedLoop | None) -> Measure:
        """Return what a step has to measure: what is tracked, and what its decision needs."""
        measure = Measure(0)
        for name in self.track:
            measure |= TRACKS[name]
        if self.clipping or self.skip_nonfinite:
            measure |= Measure.NORMS
        if isinstance(closed_loop, AlignmentSchedule) or self.normalize:
            measure |= TRACKS["direction"]
        if isinstance(closed_loop, GalaSchedule):
            measure |= TRACKS["alignment"]
            measure |= TRACKS["direction"] if rule == Rule.ADAMW else Measure(0)
        return measure

    def two_pass(self, closed_loop: ClosedLoop | None) -> bool:
        """Return whether a step decides about itself, so that it has to measure before it applies."""
        at_once = isinstance(closed_loop, AlignmentSchedule) and closed_loop.lag == 0
        loop_first = isinstance(closed_loop, GalaSchedule) or at_once
        return bool(self.clipping or self.skip_nonfinite or self.normalize or loop_first)

    def settings(self) -> dict[Setting, float]:
        """Return what of it the decision is told."""
        return {
            Setting.MAX_GRAD_NORM: math.inf if self.max_grad_norm is None else self.max_grad_norm,
            Setting.SKIP_NONFINITE: float(self.skip_nonfinite),
            Setting.NORMALIZE: float(self.normalize),
            Setting.STOCHASTIC_ROUNDING: float(self.stochastic_rounding),
        }
