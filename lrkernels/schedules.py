"""Learning-rate schedules: each is one formula, and a call of it gives a picklable ``step -> multiplier``.

``step`` counts completed updates, from 0; the multiplier is a fraction of the group's ``lr``. In the formulas
``x`` is the progress, from 0 to 1, through the part of the run that they shape. To add a schedule, write its
formula under ``@schedule``: its first parameter is the step, the others are what the user passes, and their
annotations say what is accepted. Schedules that watch training are settings records (``closed_loop``);
``product`` combines both kinds.
"""
# ruff: noqa: D417 - the docstrings are for the caller, who does not pass `step`

from __future__ import annotations

import functools
import inspect
import math
import operator
import reprlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Concatenate, NamedTuple, ParamSpec, TypeAlias, get_origin

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import check, warn
from .closed_loop import AlignmentSchedule, ClosedLoop, GalaSchedule, VolSchedule

__all__ = [
    "Product",
    "Schedule",
    "alignment",
    "constant",
    "cosine",
    "exponential",
    "gala",
    "inverse_sqrt",
    "join",
    "linear",
    "polynomial",
    "product",
    "refined",
    "schedule",
    "split",
    "staircase",
    "table",
    "uba",
    "volsched",
    "warmup",
    "wsd",
]

OpenLoop: TypeAlias = Callable[[int], float]
P = ParamSpec("P")

# ---- What an argument may be: a domain in its annotation, applied when a schedule is made ----


class Domain(NamedTuple):
    """The values an argument may take: in words, a conversion, and a test of the converted value."""

    words: str
    convert: Callable[[Any], Any]
    contains: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> Any:
        """Return the converted value, or raise a ``ValueError`` that says what to pass."""
        try:
            converted = self.convert(value)
            accepted = self.contains(converted)
        except (TypeError, ValueError, OverflowError):
            accepted = False
        check(accepted, f"{name} must be {self.words}, got {_short(value)}")
        return converted


def _short(value: Any) -> str:
    printer = reprlib.Repr()  # shortens long tables
    printer.maxother = 10_000  # but not the schedules inside a combinator
    return printer.repr(value)


def _vector(values: ArrayLike) -> tuple[float, ...]:
    return tuple(np.asarray(values, np.float64).tolist())


def _is_multiplier(value: float) -> bool:
    return 0 <= value < math.inf


def _is_increasing(values: Sequence[int]) -> bool:
    return all(low < high for low, high in zip((-1, *values), values, strict=False))


def _is_open_loop(member: Any) -> bool:
    return member is not None and split(member)[1] is None


# fmt: off
Steps = Annotated[int, Domain("a whole number of steps, at least 0", operator.index, lambda n: n >= 0)]
Count = Annotated[int, Domain("a whole number, at least 1", operator.index, lambda n: n >= 1)]
Multiplier = Annotated[float, Domain("a finite number, at least 0", float, _is_multiplier)]
Positive = Annotated[float, Domain("a finite number above 0", float, lambda x: 0 < x < math.inf)]
Growth = Annotated[float, Domain("a finite number, at least 1", float, lambda x: 1 <= x < math.inf)]
Shrinkage = Annotated[float, Domain("a number above 0, at most 1", float, lambda x: 0 < x <= 1)]
Offset = Annotated[float, Domain("a number from 0 to below 1", float, lambda x: 0 <= x < 1)]
Maximum = Annotated[float | None, Domain("None or a finite number, at least 1",
    lambda x: x if x is None else float(x), lambda x: x is None or 1 <= x < math.inf)]
Cooldown = Annotated[str, Domain("'linear', 'sqrt' or 'cosine'", str, lambda name: name in _COOLDOWNS)]
Table = Annotated[ArrayLike, Domain("one or more finite numbers, none below 0",
    _vector, lambda values: len(values) > 0 and all(map(_is_multiplier, values)))]
Boundaries = Annotated[Sequence[int], Domain("a list of increasing whole numbers, at least 0",
    lambda steps: tuple(map(operator.index, steps)), _is_increasing)]
Member = Annotated[OpenLoop, Domain("an open-loop schedule (product takes the others)",
    lambda member: member, _is_open_loop)]
Members = Annotated[Sequence[OpenLoop], Domain("a list of open-loop schedules (product takes the others)",
    tuple, lambda members: len(members) > 0 and all(map(_is_open_loop, members)))]
# fmt: on

# ---- What a schedule is ----


@dataclass(frozen=True, repr=False)
class Schedule:
    """An open-loop schedule: ``schedule(step)`` is the multiplier after ``step`` completed updates.

    It holds the function that made it and the arguments, so it can be pickled, copied, compared and printed.

    Attributes:
        factory: the function that made it, for example ``linear``.
        arguments: what was passed to it, by name, with the defaults.
        total_steps: the step from which the value no longer changes; None if it never does, or nobody knows.
    """

    factory: Callable[..., Schedule]
    arguments: dict[str, Any] = field(hash=False)
    total_steps: int | None

    def __call__(self, step: int) -> float:
        """Rise linearly from 0 over ``warmup_steps``, if any, then follow the formula and stay at its end."""
        warmup_steps = self.arguments.get("warmup_steps", 0)
        if step < warmup_steps:
            return step / warmup_steps
        if self.total_steps is not None:
            step = min(step, self.total_steps)
        return float(self.factory.__wrapped__(step, **self.arguments))  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={_short(value)}" for name, value in self.arguments.items())
        return f"{self.factory.__name__}({arguments})"


def schedule(
    settles: Callable[..., int | None],
) -> Callable[[Callable[Concatenate[int, P], float]], Callable[P, Schedule]]:
    """Turn a formula ``f(step, ...) -> float`` into a function ``f(...) -> Schedule``.

    Args:
        settles: called with the arguments by name, without the step; returns ``Schedule.total_steps``, and is
            the place to refuse arguments that contradict each other.

    Returns:
        A decorator for the formula. Arguments annotated with a ``Domain`` are converted and checked by it.
    """

    def decorate(formula: Callable[Concatenate[int, P], float]) -> Callable[P, Schedule]:
        _, *parameters = inspect.signature(formula, eval_str=True).parameters.values()
        annotated = [p for p in parameters if get_origin(p.annotation) is Annotated]
        domains = {p.name: p.annotation.__metadata__[0] for p in annotated}
        plain = [p.replace(annotation=p.annotation.__origin__) if p in annotated else p for p in parameters]
        signature = inspect.Signature(plain, return_annotation=Schedule)

        @functools.wraps(formula)
        def factory(*args: P.args, **kwargs: P.kwargs) -> Schedule:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = bound.arguments
            for name, domain in domains.items():
                arguments[name] = domain.check(name, arguments[name])
            return Schedule(factory, arguments, settles(**arguments))

        factory.__signature__ = signature  # type: ignore[attr-defined]
        return factory

    return decorate


def _never(**_: Any) -> None:
    return None


def _at_total_steps(total_steps: int, warmup_steps: int = 0, decay_steps: int = 1, **_: Any) -> int:
    need = warmup_steps + decay_steps
    check(total_steps >= need, f"total_steps must be at least {need}, warm-up and decay, got {total_steps}")
    return total_steps


def _end_of(member: OpenLoop, begin: int = 0) -> int | None:
    end = getattr(member, "total_steps", None)  # a plain callable does not say
    return None if end is None else begin + end


# ---- Schedules ----


@schedule(settles=lambda: 0)
def constant(step: int) -> float:
    """Stay at 1."""
    return 1.0


@schedule(settles=_at_total_steps)
def linear(step: int, total_steps: Count, warmup_steps: Steps = 0, final: Multiplier = 0.0) -> float:
    """Fall along a line: ``1 - (1 - final) * x``, the optimal non-adaptive schedule in the worst case.

    Args:
        total_steps: length of the run in steps, with the warm-up; the value is ``final`` from there on.
        warmup_steps: first a linear rise, ``step / warmup_steps`` (default: 0, none). The decay takes the rest.
        final: the last multiplier, a fraction of ``lr`` (default: 0).

    Raises:
        ValueError: if ``warmup_steps`` leaves no step for the decay, or an argument is out of range.

    Source: Defazio, Cutkosky, Mehta, Mishchenko, 2023, arXiv 2310.07831.
    """
    x = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + (1 - final) * (1 - x)


@schedule(settles=_at_total_steps)
def cosine(step: int, total_steps: Count, warmup_steps: Steps = 0, final: Multiplier = 0.0) -> float:
    """Fall along half a cosine: ``final + (1 - final) * (1 + cos(pi * x)) / 2``.

    Args:
        total_steps: length of the run in steps, with the warm-up; the value is ``final`` from there on.
        warmup_steps: first a linear rise, ``step / warmup_steps`` (default: 0, none). The decay takes the rest.
        final: the last multiplier, a fraction of ``lr`` (default: 0).

    Raises:
        ValueError: if ``warmup_steps`` leaves no step for the decay, or an argument is out of range.

    Source: Loshchilov, Hutter, 2017, arXiv 1608.03983, equation 5, without restarts.
    """
    x = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + (1 - final) * (1 + math.cos(math.pi * x)) / 2


@schedule(settles=_at_total_steps)
def polynomial(
    step: int, total_steps: Count, warmup_steps: Steps = 0, final: Multiplier = 0.0, power: Positive = 1.0
) -> float:
    """Fall along a power of what is left of the run: ``final + (1 - final) * (1 - x) ** power``.

    Args:
        total_steps: length of the run in steps, with the warm-up; the value is ``final`` from there on.
        warmup_steps: first a linear rise, ``step / warmup_steps`` (default: 0, none). The decay takes the rest.
        final: the last multiplier, a fraction of ``lr`` (default: 0).
        power: above 1 falls early, below 1 falls late (default: 1, a line).

    Raises:
        ValueError: if ``warmup_steps`` leaves no step for the decay, or an argument is out of range.
    """
    x = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + (1 - final) * (1 - x) ** power


@schedule(settles=_never)
def inverse_sqrt(step: int, warmup_steps: Steps = 0) -> float:
    """Fall with the root of the steps: ``sqrt(warmup_steps / step)``; no warm-up: ``1 / sqrt(step + 1)``.

    Args:
        warmup_steps: first a linear rise, ``step / warmup_steps``, up to 1 (default: 0, none).

    Raises:
        ValueError: if ``warmup_steps`` is not a whole number, at least 0.

    Source: Vaswani et al., 2017, arXiv 1706.03762, equation 3, scaled to peak at 1.
    """
    return math.sqrt(warmup_steps / step) if warmup_steps else 1 / math.sqrt(step + 1)


@schedule(settles=_never)
def exponential(step: int, decay: Shrinkage, every: Count = 1) -> float:
    """Shrink by a factor at regular intervals: ``decay ** (step // every)``.

    Args:
        decay: the factor, above 0 and at most 1.
        every: the interval in steps (default: 1).

    Raises:
        ValueError: if an argument is out of range.
    """
    return decay ** (step // every)


def _staircase_top(growth: float, every: int, maximum: float | None) -> int | None:
    if growth == 1:
        return 0
    if maximum is None:
        return None
    stairs = math.ceil(math.log(maximum) / math.log(growth))
    stairs += growth**stairs < maximum  # where the logarithms were rounded down to a whole number
    return stairs * every


@schedule(settles=_staircase_top)
def staircase(step: int, growth: Growth, every: Count, maximum: Maximum = None) -> float:
    """Grow by a factor at regular intervals: ``min(growth ** (step // every), maximum)``.

    Made for batch sizes that grow at the same steps: training converges while ``growth`` stays below both the
    batches' own factor and ``1 / momentum ** 2``.

    Args:
        growth: the factor, at least 1.
        every: the interval in steps.
        maximum: the last multiplier (default: None, no limit).

    Raises:
        ValueError: if an argument is out of range.

    Source: Kondo, Iiduka, 2025, arXiv 2508.03105, case (iii).
    """
    height = growth ** (step // every)
    return height if maximum is None else min(height, maximum)


_COOLDOWNS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


@schedule(settles=_at_total_steps)
def wsd(
    step: int,
    total_steps: Count,
    warmup_steps: Steps,
    decay_steps: Count,
    final: Multiplier = 0.0,
    decay: Cooldown = "linear",
) -> float:
    """Warm up, stay at 1, decay: ``final + (1 - final) * c(x)`` with ``x`` the progress through the decay.

    Args:
        total_steps: length of the run in steps; the value is ``final`` from there on.
        warmup_steps: length of the linear rise, ``step / warmup_steps``; 0 for none.
        decay_steps: length of the decay at the end.
        final: the last multiplier, a fraction of ``lr`` (default: 0).
        decay: the shape ``c``: ``"linear"``, ``1 - x`` (default); ``"sqrt"``, ``1 - sqrt(x)``; ``"cosine"``,
            ``(1 + cos(pi * x)) / 2``.

    Raises:
        ValueError: if warm-up and decay are longer than the run, or an argument is out of range.

    Source: Hu et al., 2024, arXiv 2404.06395; the sqrt cooldown: Hägele et al., 2024, arXiv 2405.18392.
    """
    x = max(0.0, (step - (total_steps - decay_steps)) / decay_steps)
    return final + (1 - final) * _COOLDOWNS[decay](x)


@schedule(settles=_at_total_steps)
def uba(
    step: int,
    total_steps: Count,
    phi: Positive,
    warmup_steps: Steps = 0,
    final: Multiplier = 0.0,
    offset: Offset = 0.0,
    phases: Count = 1,
) -> float:
    """Fall along UBA's curve: ``final + (1 - final) / (1 + phi / 2 * tan(pi * x / 2) ** 2)``.

    At step ``t`` of the ``T`` after the warm-up, ``x = (t + offset) / T``. With ``final`` 0 the mid-point is
    ``2 / (2 + phi)`` and the mean ``1 / (1 + sqrt(phi / 2))``. The curve is the paper's unified budget-aware
    schedule; ``offset`` and ``phases`` are a reconstruction.

    Args:
        total_steps: length of the run in steps, with the warm-up; the value is ``final`` from there on.
        phi: above 0. 2 is the cosine, less stays high and drops late, more falls early. A guess of ours, not
            the paper's: 5 for SGD, 0.5 for AdamW; in our own runs 5 was nowhere best, and 0.25 to 1 were.
        warmup_steps: first a linear rise, ``step / warmup_steps`` (default: 0, none). The decay takes the rest.
        final: the last multiplier, a fraction of ``lr`` (default: 0).
        offset: 0 takes the angles of the cosine, 0.5 Chebyshev's nodes: for a quadratic of condition number K,
            ``phi`` 2 K and ``final`` 1 / K then minimise the worst case (default: 0).
        phases: how often the curve is run, over equal parts of the steps after the warm-up (default: 1).

    Raises:
        ValueError: if ``warmup_steps`` leaves no step for the decay, or an argument is out of range.

    Source: Tang et al., 2025, arXiv 2505.24452.
    """
    if step == total_steps:
        return final
    budget = total_steps - warmup_steps
    t = (step - warmup_steps) * phases % budget / phases  # within the phase, which takes budget / phases
    x = min((t + offset) * phases / budget, 1.0)
    c = 1 + math.cos(math.pi * x)  # tan(pi * x / 2) ** 2 = (2 - c) / c, and c ends at 0
    return final + (1 - final) * 2 * c / (2 * c + phi * (2 - c))


@schedule(settles=lambda values: len(values))
def table(step: int, values: Table) -> float:
    """Read the multiplier of each step from a list, ``values[step]``, and stay at the last one.

    Args:
        values: one multiplier per step; a list or a one-dimensional array.

    Raises:
        ValueError: if there is none, or one is negative or not finite.
    """
    return values[min(step, len(values) - 1)]  # type: ignore[index, arg-type, return-value]


def running_median(norms: NDArray, smoothing: float) -> tuple[NDArray, int]:
    """Return the median around each norm, mirrored at the end and held at the start, and the width of its window."""
    from scipy import ndimage  # takes long to import, and nothing else needs it

    width = 2 * (int(smoothing * norms.size) // 2) + 1
    padded = np.pad(norms, (0, width), mode="reflect")
    return ndimage.median_filter(padded, width, mode="nearest")[: norms.size], width


_CLAMP = 1e-6  # a norm below this fraction of the median counts as zero
_USEFUL = 0.6  # share of the steps that the weights must amount to; published shapes come to 0.75 and more
_POWERS = {"l2": 2, "l1": 1}


def refined(
    grad_norms: ArrayLike, total_steps: int | None = None, *, norm: str = "l2", smoothing: float = 0.1
) -> Schedule:
    """Compute the schedule that would have suited an earlier run, from the gradient norms it recorded.

    With ``G`` the running median of the norms, ``w = G ** -2`` (``"l2"``) or ``1 / G`` (``"l1"``),
    ``s[t] = w[t] * sum(w[t + 1:])``, the multiplier is ``s / max(s)``: big early norms give a warm-up,
    falling late norms a fast decay, and constant norms a linear one. The last value is 0.

    Args:
        grad_norms: one norm per step, of the gradient before clipping. Those that are not finite are dropped
            with a warning; after smoothing, those below a millionth of the median are raised to it.
        total_steps: length of the coming run in steps, to which the schedule is interpolated linearly
            (default: None, as many as there are finite norms).
        norm: what was recorded: ``"l2"`` for SGD (default), ``"l1"`` for Adam and other coordinate-wise ones.
        smoothing: width of the running median as a fraction of the run, 0 to 1 (default: 0.1).

    Returns:
        A ``table``. A warning says that it is degenerate if one step holds most of the weight, more than
        5 % of the norms were raised, or the weights of a smoothed record amount to fewer than 60 % of the
        steps, ``sum(w) ** 2 / sum(w ** 2)``: the earlier run drove its gradient towards zero, and the
        schedule waits for the end, or a few norms stand out.

    Raises:
        ValueError: if a norm is negative, none is finite, or another argument is out of range.

    Source: Defazio, Cutkosky, Mehta, Mishchenko, 2023, arXiv 2310.07831.
    """
    recorded = np.asarray(grad_norms, np.float64)
    check(recorded.ndim == 1, f"grad_norms must be one norm per step, got shape {recorded.shape}")
    check(not (recorded < 0).any(), "grad_norms must not be negative")
    check(norm in _POWERS, f"norm must be 'l2' or 'l1', got {norm!r}")
    check(0 <= smoothing <= 1, f"smoothing must be a fraction from 0 to 1, got {smoothing}")
    norms = recorded[np.isfinite(recorded)]
    check(norms.size > 0, f"grad_norms must hold a finite norm, got none among {recorded.size}")
    length = norms.size if total_steps is None else total_steps
    whole = isinstance(length, (int, np.integer))
    check(whole and length >= 1, f"total_steps must be a whole number, at least 1, got {total_steps}")

    dropped = recorded.size - norms.size
    if dropped:
        warn(f"dropped {dropped} of {recorded.size} gradient norms that are not finite")
    if norms.size == 1 or length == 1:
        return table(np.ones(length))

    smooth, width = running_median(norms, smoothing)
    unit = np.median(smooth[smooth > 0]) if smooth.any() else 1.0
    weights = np.maximum(smooth / unit, _CLAMP) ** -_POWERS[norm]
    shares = weights / weights.sum()
    clamped, heaviest, amount = (smooth < _CLAMP * unit).mean(), shares.max(), 1 / (norms.size * shares @ shares)
    if clamped > 0.05 or heaviest > 0.5 or (width > 1 and amount < _USEFUL):  # unsmoothed weights are noise
        warn(
            f"this refined schedule is degenerate: {clamped:.1%} of the gradient norms are almost zero, one step holds "
            f"{heaviest:.1%} of all weight, and the weights amount to {amount:.1%} of the steps; linear(total_steps) "
            "is the safer choice"
        )

    still_to_come = np.append(np.cumsum(weights[:0:-1])[::-1], 0.0)
    values = weights * still_to_come
    positions = np.linspace(0, norms.size - 1, length)
    return table(np.interp(positions, np.arange(norms.size), values / values.max()))


# ---- Combinators: members are schedules from here or any ``step -> multiplier`` ----


@schedule(settles=lambda steps, then, start: _end_of(then, steps))
def warmup(step: int, steps: Steps, then: Member, start: Multiplier = 0.0) -> float:
    """Rise linearly to 1, ``start + (1 - start) * step / steps``, then follow ``then`` from its own step 0.

    Args:
        steps: length of the rise.
        then: the schedule that follows.
        start: the first multiplier (default: 0).

    Raises:
        ValueError: if an argument is out of range, or ``then`` is closed-loop.

    Source: Goyal et al., 2017, arXiv 1706.02677, section 2.2.
    """
    return start + (1 - start) * step / steps if step < steps else then(step - steps)


def _join_end(schedules: Sequence[OpenLoop], boundaries: Sequence[int]) -> int | None:
    counts = f"got {len(boundaries)} for {len(schedules)} schedules"
    check(len(boundaries) == len(schedules) - 1, f"boundaries must be one fewer than schedules, {counts}")
    return _end_of(schedules[-1], *boundaries[-1:])


@schedule(settles=_join_end)
def join(step: int, schedules: Members, boundaries: Boundaries) -> float:
    """Follow one schedule after another, each from its own step 0.

    Args:
        schedules: two or more, in order.
        boundaries: the step at which each schedule but the first begins, increasing.

    Raises:
        ValueError: if the boundaries do not increase or are not one fewer than the schedules, or if one of
            these is closed-loop.
    """
    index = bisect_right(boundaries, step)
    return schedules[index](step - (0, *boundaries)[index])


@dataclass(frozen=True, repr=False)
class Product:
    """What ``product`` returns: schedules whose multipliers multiply, at most one of them closed-loop."""

    schedules: tuple[OpenLoop | ClosedLoop, ...]

    @property
    def open_loop(self) -> OpenLoop | None:
        """The open-loop members as one schedule; None if there is none."""
        members = [s for s in self.schedules if not isinstance(s, ClosedLoop)]
        return Product(tuple(members)) if len(members) > 1 else next(iter(members), None)

    @property
    def closed_loop(self) -> ClosedLoop | None:
        """The closed-loop member; None if there is none."""
        return next((s for s in self.schedules if isinstance(s, ClosedLoop)), None)

    @property
    def total_steps(self) -> int | None:
        """The step from which no member changes; None if one never settles, or that is not known."""
        ends = [_end_of(s) for s in self.schedules if not isinstance(s, ClosedLoop)]
        return None if self.closed_loop or None in ends else max(end for end in ends if end is not None)

    def __call__(self, step: int) -> float:
        """Multiply the members' values."""
        if self.closed_loop:
            raise TypeError(
                f"lrkernels: {self!r} has no value by itself: a closed loop needs an optimizer that watches "
                "training; pass it as schedule= to FusedSGD or FusedAdamW"
            )
        return float(math.prod(s(step) for s in self.schedules if not isinstance(s, ClosedLoop)))

    def __repr__(self) -> str:
        return f"product({', '.join(map(repr, self.schedules))})"


def product(*schedules: OpenLoop | ClosedLoop) -> Product:
    """Multiply schedules, of which one may be closed-loop: ``product(alignment(), linear(1000))``.

    Args:
        *schedules: one or more; products among them are taken apart.

    Returns:
        A ``Product``: a schedule itself if it has no closed-loop member.

    Raises:
        TypeError: if a member is not a schedule.
        ValueError: if there is no member, or more than one is closed-loop.
    """
    members: list[OpenLoop | ClosedLoop] = []
    for member in schedules:
        check(member is not None, "product takes schedules, got None")
        split(member)  # refuses what is no schedule
        members += member.schedules if isinstance(member, Product) else [member]
    check(len(members) > 0, "product needs at least one schedule")
    watching = sum(isinstance(member, ClosedLoop) for member in members)
    check(watching <= 1, f"product takes at most one closed-loop schedule, got {watching}")
    return Product(tuple(members))


def split(schedule: OpenLoop | ClosedLoop | None) -> tuple[OpenLoop | None, ClosedLoop | None]:
    """Take an optimizer's ``schedule`` argument apart into its open-loop and its closed-loop part.

    Args:
        schedule: none, a ``step -> multiplier``, a closed-loop schedule, or a product.

    Returns:
        The open-loop part and the closed-loop part, each None if there is none.

    Raises:
        TypeError: if it is anything else, or a function of this module that was not called.
    """
    if schedule is None or isinstance(schedule, ClosedLoop):
        return None, schedule
    if isinstance(schedule, Product):
        return schedule.open_loop, schedule.closed_loop
    if inspect.isfunction(schedule) and schedule.__module__ == __name__:
        raise TypeError(f"lrkernels: schedules.{schedule.__name__} makes a schedule: call it")
    if not callable(schedule):
        wanted = "None, a callable step -> multiplier, or a schedule from lrkernels.schedules"
        raise TypeError(f"lrkernels: schedule must be {wanted}, got {_short(schedule)}")
    return schedule, None


# ---- Closed-loop schedules: settings for the optimizer, which watches training ----


def alignment(
    kappa: float = 0.2,
    bias: float = 0.0,
    lag: int = 1,
    freeze_after: int | None = None,
    min_lr: float = 0.0,
    max_lr: float = math.inf,
) -> AlignmentSchedule:
    """Raise the rate while gradients agree with the last update direction, lower it while they disagree.

    ``lr[t] = clip(lr[0] * exp(kappa * sum(c + bias)), min_lr, max_lr)``, where ``c`` is the cosine between a
    gradient and the update direction before it, summed up to step ``t - lag``.

    Args:
        kappa: how fast the logarithm of the rate moves (default: 0.2). Without momentum it
            climbs slowly: a larger one gets there sooner, a smaller one is steadier once there.
        bias: added to every cosine (default: 0). Above 0 the rate settles higher.
        lag: 1, this step's cosine acts at the next one, in one pass over memory; 0, at once, in two (default: 1).
        freeze_after: the factor stays after this many steps, for a decay to follow (default: None, never).
        min_lr: lower bound of the rate (default: 0).
        max_lr: upper bound of the rate (default: none).

    Raises:
        ValueError: if an argument is out of range.

    Source: this project. Without normalisation and memory it is the multiplicative hypergradient descent of
    Baydin et al., 2018, arXiv 1703.04782.
    """
    return AlignmentSchedule(min_lr, max_lr, kappa, bias, lag, freeze_after)


def gala(delta: float = 1e-12, min_lr: float = 0.0, max_lr: float = math.inf, mode: str = "same_batch") -> GalaSchedule:
    """Take the rate that would have been best so far in hindsight, from how successive gradients align.

    ``lr[t + 1] = clip((delta * lr[0] + sum(a)) / (delta + sum(b)), min_lr, max_lr)``, where ``a`` is the dot
    product of the gradients after and before a step, ``b`` the squared gradient norm times the curvature.

    Args:
        delta: weight of the first rate (default: 1e-12, in effect none after the first step). The paper's value
            is not known.
        min_lr: lower bound of the rate (default: 0).
        max_lr: upper bound of the rate (default: none).
        mode: ``"same_batch"`` (default), the paper's: both gradients are of the new batch, so ``step`` takes
            a closure and evaluates it twice. ``"consecutive"``: the gradients that training computes anyway,
            for full or very large batches only: with noise the rate collapses; ``alignment`` is for that.

    Raises:
        ValueError: if an argument is out of range.

    Source: Jiang, Kavis, Mokhtari, 2025, arXiv 2506.08419; ``delta``, momentum and Adam are a reconstruction.
    """
    return GalaSchedule(min_lr, max_lr, delta, mode)


def volsched(
    total_steps: int,
    window: int = 50,
    sensitivity: float = 0.05,
    min_lr: float = 0.0,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
    history: int | None = None,
    decay: str | OpenLoop = "cosine",
    max_lr: float = math.inf,
) -> VolSchedule:
    """Raise the rate while the training accuracy is calm, lower it while it is wild; on top of a decay.

    Every ``window`` steps ``lr = clip(lr * M * A, min_lr, max_lr)`` with
    ``M = 1 + sign(rho - 1) * log(1 + sensitivity * abs(rho - 1))``, where ``rho`` is the standard deviation
    of all kept log returns of the signal over that of the last ``window``, and ``A`` the ratio by which the
    decay fell. The optimizer's ``observe`` takes the signal.

    Args:
        total_steps: length of the run in steps, with the warm-up.
        window: steps between two decisions, and the returns that count as recent (default: 50).
        sensitivity: how much the volatility counts (default: 0.05 (0.1 is unstable in the paper)).
        min_lr: lower bound of the rate (default: 0).
        warmup_steps: length of a linear rise, during which the signal is recorded too (default: 0).
        warmup_start: the first multiplier of the rise (default: 0).
        history: how many values of the signal are kept (default: None, 10 windows).
        decay: ``"cosine"`` (default) or any open-loop schedule, counted from the end of the warm-up.
        max_lr: upper bound of the rate (default: none, as in the paper).

    Raises:
        ValueError: if an argument is out of range.

    Source: Ren, 2025, arXiv 2507.10575.
    """
    check(isinstance(decay, str) or _is_open_loop(decay), "decay must be 'cosine' or an open-loop schedule")
    return VolSchedule(min_lr, max_lr, total_steps, window, sensitivity, warmup_steps, warmup_start, history, decay)
