"""The slots of the small float64 tensors that every backend reads and writes; ``csrc/rules.h`` has the same lists."""

from __future__ import annotations

from enum import IntEnum, IntFlag, auto

__all__ = ["STATS", "ClosedLoopKind", "Control", "Count", "Hyper", "Measure", "Rule", "Setting", "Sum", "Verb"]

#: The statistics of a step, in the order of a history row.
STATS = (
    "step",
    "lr",
    "grad_norm",
    "grad_norm_l1",
    "direction_cosine",
    "alignment",
    "cosine",
    "curvature",
    "clip",
    "skipped",
)


class _Slots(IntEnum):
    """Members count from 0, as in C++."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[int]) -> int:
        return count


class Sum(_Slots):
    """What MEASURE adds up, over all elements of all gradients."""

    GRAD_SQ = auto()
    GRAD_ABS = auto()
    DOT_DIRECTION = auto()
    DIRECTION_SQ = auto()
    DOT_PREV = auto()
    PREV_SQ = auto()
    DIFF_SQ = auto()
    MOVE_SQ = auto()


class Control(_Slots):
    """What a step leaves for the next; the statistics, the sums and volsched's signals follow the last slot."""

    STEP = auto()
    SKIPPED = auto()
    ROWS = auto()
    FACTOR = auto()
    NEXT_FACTOR = auto()
    LOG_FACTOR = auto()
    NUMERATOR = auto()
    DENOMINATOR = auto()
    SMOOTHNESS = auto()
    LAST_GRAD_SQ = auto()
    LAST_MOVE_SQ = auto()
    CLIP = auto()
    LENGTH = auto()
    SKIP = auto()
    FIRST_LR = auto()
    SIGNAL = auto()
    SIGNALS = auto()


STATS_AT = len(Control)
SUMS_AT = STATS_AT + len(STATS)
RING_AT = SUMS_AT + len(Sum)


class Setting(_Slots):
    """What the decision is told once."""

    CLOSED_LOOP = auto()
    MAX_GRAD_NORM = auto()
    SKIP_NONFINITE = auto()
    MIN_LR = auto()
    MAX_LR = auto()
    KAPPA = auto()
    BIAS = auto()
    LAG = auto()
    FREEZE_AFTER = auto()
    DELTA = auto()
    WINDOW = auto()
    SENSITIVITY = auto()
    WARMUP_STEPS = auto()
    WARMUP_START = auto()
    CAPACITY = auto()
    NORMALIZE = auto()
    STOCHASTIC_ROUNDING = auto()


class ClosedLoopKind(_Slots):
    """Which closed loop decides the factor."""

    OPEN = auto()
    ALIGNMENT = auto()
    GALA = auto()
    VOL_SCHED = auto()


class Hyper(IntEnum):
    """One row per group; the slots from 2 on mean what the rule says."""

    WEIGHT_DECAY = 0
    MAXIMIZE = 1
    MOMENTUM = 2
    DAMPENING = 3
    NESTEROV = 4
    DECOUPLED = 5
    ZERO_INIT = 6
    BETA1 = 2
    BETA2 = 3
    EPS = 4
    AMSGRAD = 5


HYPERS = len(Hyper)


class Count(_Slots):
    """One row per parameter."""

    UPDATES = auto()
    HAS_PREV = auto()


class Rule(_Slots):
    """The update rules."""

    SGD = auto()
    ADAMW = auto()


class Measure(IntFlag):
    """What to take while the step runs."""

    NORMS = 1
    DIRECTION = 2
    PREVIOUS = 4
    MOVE = 8


class Verb(IntFlag):
    """Which part of a step one call runs."""

    MEASURE = 1
    DECIDE = 2
    APPLY = 4
    STEP = 7
