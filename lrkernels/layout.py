"""The slots of the small float64 tensors that every backend reads and writes; ``csrc/rules.h`` has the same lists."""

from __future__ import annotations

from enum import IntEnum, IntFlag, auto

__all__ = [
    "HYPERS",
    "RING_AT",
    "STATS",
    "STATS_AT",
    "SUMS_AT",
    "ClosedLoopKind",
    "Control",
    "Count",
    "Hyper",
    "Measure",
    "Rule",
    "Setting",
    "Sum",
    "Verb",
]

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

    GRAD_SQ = auto()  # |g|^2
    GRAD_ABS = auto()  # |g|_1
    DOT_DIRECTION = auto()  # <g, d>, d the last update's direction
    DIRECTION_SQ = auto()  # |d|^2
    DOT_PREV = auto()  # <g, g'>, g' the previous gradient
    PREV_SQ = auto()  # |g'|^2
    DIFF_SQ = auto()  # |g - g'|^2
    MOVE_SQ = auto()  # |x_{t+1} - x_t|^2, which APPLY adds up


class Control(_Slots):
    """What a step leaves for the next; the statistics, the sums and volsched's signals follow the last slot."""

    STEP = auto()  # completed updates: the schedule's position
    SKIPPED = auto()  # skipped steps
    ROWS = auto()  # rows written to the history
    FACTOR = auto()  # the closed loop's factor on the rate, as this step applies it
    NEXT_FACTOR = auto()  # and as decided from everything measured so far
    LOG_FACTOR = auto()  # alignment: the running sum of the exponent
    NUMERATOR = auto()  # gala: the sum of a_s
    DENOMINATOR = auto()  # gala: the sum of b_s
    SMOOTHNESS = auto()  # gala: the last L_s
    LAST_GRAD_SQ = auto()  # |g|^2 of the last completed step
    LAST_MOVE_SQ = auto()  # |x_{t+1} - x_t|^2 of the last completed step
    CLIP = auto()  # this step's clip factor
    LENGTH = auto()  # what this step's direction is divided by: its length, where it is normalised
    SKIP = auto()  # this step changes nothing
    FIRST_LR = auto()  # gala, volsched: the first group's rate before the first step, lr_0
    SIGNAL = auto()  # volsched: the value observed for this step; NaN when there is none
    SIGNALS = auto()  # volsched: how many values the ring has taken


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
