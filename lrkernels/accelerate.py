"""accelerate's optimizer wrapper, which waits for ``step_was_skipped`` only when somebody reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from .fused import FusedOptimizer

__all__ = ["AcceleratedFused"]


class AcceleratedFused(AcceleratedOptimizer):
    """What ``accelerator.prepare`` makes of an optimizer, with ``step_was_skipped`` looked up when it is read.

    accelerate's own has to know it right after the step: under it a gradient scaler unscales, waits for its verdict
    and does not call ``step`` at all, so nothing counts what was skipped. Hand this to ``prepare`` in the optimizer's
    place: a scaled step is one call then, which honours the verdict on the device.

    Args:
        accelerator: the one whose ``prepare`` gets this.
        optimizer: ``FusedSGD`` or ``FusedAdamW``.
    """

    _is_accelerate_prepared = True  # prepare() takes it as it is
    optimizer: FusedOptimizer

    def __init__(self, accelerator: Accelerator, optimizer: FusedOptimizer) -> None:
        super().__init__(optimizer, device_placement=accelerator.device_placement, scaler=accelerator.scaler)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Step, unless gradients are being accumulated; nothing waits."""
        if not self.gradient_state.sync_gradients:
            return
        before = self.optimizer.stats["skipped"]
        if self.scaler is None:
            self.optimizer.step(closure)
        else:
            self.scaler.step(self.optimizer, closure)
            self.scaler.update()
        self._is_overflow = self.optimizer.stats["skipped"] != before

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped; waits for it."""
        return bool(self._is_overflow)
