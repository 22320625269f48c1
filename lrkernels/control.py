"""The small tensors that a step reads and writes beside the parameters, and what a user sees of them.

One control tensor on the device holds everything that changes while training: the schedule's position, the closed
loop's state, the statistics, the sums. The host writes settings and tables, and reads only when it is asked to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import schedules
from .checks import check, on_host, warn
from .closed_loop import AlignmentSchedule, ClosedLoop, GalaSchedule, VolSchedule
from .layout import RING_AT, STATS, STATS_AT, SUMS_AT, ClosedLoopKind, Control, Measure, Setting, Sum

__all__ = ["Controller", "Stats"]

#: Which measure each statistic needs.
MEASURED_BY = {
    "step": Measure(0),
    "lr": Measure(0),
    "grad_norm": Measure.NORMS,
    "grad_norm_l1": Measure.NORMS,
    "direction_cosine": Measure.DIRECTION,
    "alignment": Measure.PREVIOUS,
    "cosine": Measure.PREVIOUS,
    "curvature": Measure.MOVE,
    "clip": Measure.NORMS,
    "skipped": Measure(0),
}
PAGE = 1024  # rows of the ring when the whole history is kept: they are taken away each time it is full
FIRST_TABLE = 4096  # steps of the open-loop schedule tabulated at first; then twice as many, and so on
CAPTURED_TABLE = 100_000  # on CUDA, where a captured step is replayed and no host tabulates; to its end if it has one


class Stats(Mapping[str, Tensor]):
    """The last step's statistics: 0-dim float64 tensors on the device; only what is measured. Nothing waits."""

    def __init__(self, values: Tensor, names: list[str]) -> None:
        self._values, self._names = values, names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(f"lrkernels: {name!r} is not measured, only {self._names}; ask for it with track=")
        return self._values[STATS.index(name)].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def settings_row(closed_loop: ClosedLoop | None, given: Mapping[Setting, float]) -> Tensor:
    """Return what the decision is told, in the order of ``layout.Setting``; what is not ``given`` is off."""
    values: dict[Setting, float] = {**dict.fromkeys(Setting, 0.0), Setting.MAX_GRAD_NORM: math.inf, **given}
    if closed_loop is not None:
        values[Setting.MIN_LR], values[Setting.MAX_LR] = closed_loop.min_lr, closed_loop.max_lr
    match closed_loop:
        case AlignmentSchedule(kappa=kappa, bias=bias, lag=lag, freeze_after=freeze_after):
            values[Setting.CLOSED_LOOP] = ClosedLoopKind.ALIGNMENT
            values[Setting.KAPPA], values[Setting.BIAS], values[Setting.LAG] = kappa, bias, lag
            values[Setting.FREEZE_AFTER] = math.inf if freeze_after is None else freeze_after
        case GalaSchedule(delta=delta):
            values[Setting.CLOSED_LOOP], values[Setting.DELTA] = ClosedLoopKind.GALA, delta
        case VolSchedule() as vol:
            values[Setting.CLOSED_LOOP] = ClosedLoopKind.VOL_SCHED
            values[Setting.WINDOW], values[Setting.CAPACITY] = vol.window, vol.capacity
            values[Setting.SENSITIVITY] = vol.sensitivity
            values[Setting.WARMUP_STEPS], values[Setting.WARMUP_START] = vol.warmup_steps, vol.warmup_start
    return on_host([values[slot] for slot in Setting], torch.float64)


class Controller:
    """Holds the control tensor, the settings, the schedule's table and the history ring of one optimizer."""

    @torch.inference_mode(False)  # steps outside of it write to these tensors
    def __init__(
        self,
        open_loop: Callable[[int], float] | None,
        closed_loop: ClosedLoop | None,
        settings: Mapping[Setting, float],
        history_size: int | None,
    ) -> None:
        self.open_loop, self.closed_loop = open_loop, closed_loop
        self.settings = settings_row(closed_loop, settings)
        signals = closed_loop.capacity if isinstance(closed_loop, VolSchedule) else 1
        self.control = self._fresh(RING_AT + signals)
        self.history = torch.full((history_size or PAGE, len(STATS)), math.nan, dtype=torch.float64, device="cpu")
        self.table = torch.ones(1, dtype=torch.float64, device="cpu")
        self.decay = on_host(self._decay(), torch.float64)
        self._tabulated: list[float] = []
        self._tables: list[Tensor] = []  # the shorter ones so far: a captured step has their addresses
        self._signal_given = self._warned = False
        self._started = False  # whether lr_0 is set
        self._steps = 0  # an upper bound of control[STEP], which the host does not read
        self._keep_all = history_size is None
        self._pages: list[tuple[Tensor, Tensor]] = []  # copies of the ring, and how many rows had been written
        self._calls = 0  # steps since: the ring has not gone round between two copies
        self.loads = 0  # checkpoints loaded; at each the history begins anew

    def _fresh(self, size: int) -> Tensor:
        """Return the control tensor of a run that has not begun."""
        loop = self.closed_loop
        start = loop.warmup_start if isinstance(loop, VolSchedule) and loop.warmup_steps > 1 else 1.0
        control = torch.zeros(size, dtype=torch.float64, device="cpu")
        control[Control.FACTOR] = control[Control.NEXT_FACTOR] = start
        control[Control.CLIP] = control[Control.LENGTH] = 1.0
        control[STATS_AT + 1 : SUMS_AT - 1] = math.nan  # all but the two counts, step and skipped
        control[Control.SIGNAL] = control[Control.FIRST_LR] = math.nan
        return control

    def _decay(self) -> list[float]:
        loop = self.closed_loop
        if not isinstance(loop, VolSchedule):
            return [1.0]
        steps = loop.total_steps - loop.warmup_steps
        decay = schedules.cosine(steps) if isinstance(loop.decay, str) else loop.decay
        values = [float(decay(step)) for step in range(steps + 1)]
        for step, value in enumerate(values):
            check(0.0 <= value < math.inf, f"volsched's decay is {value} at step {step}; it must be finite and >= 0")
        return values

    def to(self, device: torch.device) -> None:
        """Move the device's tensors."""
        for name in ("control", "history", "table", "decay"):
            setattr(self, name, getattr(self, name).to(device, non_blocking=True))

    def start_at(self, lr: float | Tensor) -> None:
        """Set lr_0 of gala and volsched, unless a checkpoint has brought it."""
        if not self._started:
            if isinstance(lr, Tensor):
                self.control[Control.FIRST_LR].copy_(lr.detach().reshape(()), non_blocking=True)
            else:
                self.control[Control.FIRST_LR].fill_(float(lr))  # on a GPU, to assign a number would wait
            self._started = True
            if isinstance(self.closed_loop, GalaSchedule | VolSchedule) and not isinstance(lr, Tensor) and lr == 0:
                warn(
                    "the first group's lr is 0, and the schedule sets all rates in proportion to it, so they stay as "
                    "they are; put a group that trains first"
                )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.control.device

    @property
    def is_new(self) -> bool:
        """Whether there was no step yet, or none since a checkpoint was loaded."""
        return self._calls == 0

    @property
    def sums(self) -> Tensor:
        """What MEASURE added up, as a view."""
        return self.control[SUMS_AT : SUMS_AT + len(Sum)]

    def before_step(self) -> None:
        """Make room: the schedule's next value in the table, the next row in the history."""
        if isinstance(self.closed_loop, VolSchedule) and not self._signal_given and not self._warned:
            warn("volsched has no signal for this step; call observe(value) before it")
            self._warned = True
        if self.open_loop is not None and self._steps >= len(self._tabulated):
            self._tabulate(self._steps)
        if self._keep_all and self._calls and self._calls % PAGE == 0:
            rows = self.control[Control.ROWS].to("cpu", non_blocking=True, copy=True)
            self._pages.append((self.history.to("cpu", non_blocking=True, copy=True), rows))

    def after_step(self) -> None:
        """Count a step that was made, or skipped on the device; one that was refused does not count."""
        self._signal_given = False
        self._steps += 1
        self._calls += 1

    def why_not_captured(self) -> str:
        """Return what stands against capturing the coming step in a graph, or an empty string."""
        if self.is_new:
            return "it is the first one"
        if self._keep_all:
            return "history_size=None copies the history to the host; give it a size"
        if self.open_loop is not None and self._steps >= len(self._tabulated):
            last = getattr(self.open_loop, "total_steps", None)
            if last is None or len(self._tabulated) <= last:
                return "its schedule has to be tabulated further"
        return ""

    def _tabulate(self, step: int) -> None:
        """Extend the table to ``step`` and well beyond it, or as far as the schedule has finite values."""
        schedule, done = self.open_loop, len(self._tabulated)
        assert schedule is not None
        last = getattr(schedule, "total_steps", None)
        on_gpu = self.device.type == "cuda"
        end = max(step + 1, 2 * done, FIRST_TABLE)
        if on_gpu:
            end = max(end, CAPTURED_TABLE if last is None else last + 1)
        for s in range(done, end if last is None else min(end, last + 1)):
            try:
                value = float(schedule(s))
            except Exception:  # a table's end, an overflow: an error only when training gets there
                if s > step:
                    break
                raise
            if not math.isfinite(value):
                check(s > step, f"the schedule {schedule!r} is {value} at step {s}; bound it")
                break
            self._tabulated.append(value)
        if len(self._tabulated) > done:
            self._tables.append(self.table)
            self.table = on_host(self._tabulated, torch.float64).to(self.device, non_blocking=True)

    def observe(self, value: float | Tensor) -> None:
        """Take volsched's signal for the coming step; other schedules leave it aside."""
        if isinstance(value, Tensor):
            one = value.numel() == 1
            check(one, f"observe() takes a number or a tensor of one element, got shape {tuple(value.shape)}")
            self.control[Control.SIGNAL].copy_(value.detach().reshape(()), non_blocking=True)
        elif math.isfinite(value):
            self.control[Control.SIGNAL].fill_(float(value))
        else:
            warn(f"observe() was given {value}; this step has no signal")
        self._signal_given = True

    def stats(self, measure: Measure, clipping: bool) -> Stats:
        """Return the last step's statistics, of those measured."""
        return Stats(self.control[STATS_AT : STATS_AT + len(STATS)], self._names(measure, clipping))

    def read_history(self, measure: Measure, clipping: bool) -> dict[str, NDArray[np.float64]]:
        """Return the kept rows, oldest first, one array per statistic; one copy to the host."""
        parts, done = [], 0
        for ring, written in [*self._pages, (self.history.cpu(), self.control[Control.ROWS])]:
            end = int(written)
            start = max(done, end - len(ring))
            parts.append(ring[torch.arange(start, end, device="cpu") % len(ring)])
            done = end
        rows = torch.cat(parts)
        return {name: rows[:, STATS.index(name)].numpy().copy() for name in self._names(measure, clipping)}

    @staticmethod
    def _names(measure: Measure, clipping: bool) -> list[str]:
        names = [name for name, needs in MEASURED_BY.items() if needs in measure]
        return names if clipping else [name for name in names if name != "clip"]

    def load(self, control: Tensor | None) -> None:
        """Continue from a checkpoint's control tensor, or begin anew without one; in place. The history is empty."""
        self.control.copy_(self._fresh(len(self.control)) if control is None else control)
        self.control[Control.ROWS].zero_()
        self.loads += 1
        self._started = not math.isnan(float(self.control[Control.FIRST_LR]))
        self._steps, self._calls, self._pages = int(self.control[Control.STEP]), 0, []
