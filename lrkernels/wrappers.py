"""The methods that watch training, for every other torch optimizer: eager, on the rules of ``reference``."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from . import schedules
from .checks import check, warn
from .closed_loop import AlignmentSchedule, ClosedLoop, GalaSchedule
from .closures import gradients_at
from .optim import FusedSGD
from .reference import Alignment as AlignmentRule
from .reference import Gala, VolSched, cosine

__all__ = ["GALA", "Alignment", "VolSchedLR"]

Rule: TypeAlias = AlignmentRule | Gala | VolSched
Work: TypeAlias = list[tuple[int, Tensor]]  # every parameter with a gradient, after the index of its group
Pairs: TypeAlias = Iterable[tuple[str, Tensor, Tensor]]


def _position(rule: Rule) -> dict[str, Any]:
    """Return what a rule has learnt, as plain numbers for a checkpoint."""
    return {"lr_0": rule.lr_0} | {f.name: getattr(rule, f.name) for f in fields(rule) if not f.init}


def _set_position(rule: Rule, position: dict[str, Any]) -> None:
    for name, value in position.items():
        setattr(rule, name, value)


def _dots(pairs: Pairs) -> dict[str, float]:
    """Add up the dot products ``name, a, b`` of each name in float64; one copy to the host."""
    named = [(name, (a.double() * b.double()).sum()) for name, a, b in pairs]
    device = named[0][1].device
    values = torch.stack([value.to(device) for _, value in named]).tolist()
    totals: dict[str, float] = defaultdict(float)
    for (name, _), value in zip(named, values, strict=True):
        totals[name] += value
    return totals


# ---- A scheduler of torch's ----


class VolSchedLR(LRScheduler):
    """``schedules.volsched`` for any torch optimizer; ``step(value)`` takes the signal, after ``optimizer.step()``.

    It sets the rate of the first group, and those of the others in proportion to their first rates.

    Args:
        optimizer: whose rates to set.
        total_steps: length of the run in steps, with the warm-up.
        window: steps between two decisions, and the returns that count as recent (default: 50).
        sensitivity: how much the volatility counts (default: 0.05).
        min_lr: lower bound of the first group's rate (default: 0).
        warmup_steps: length of a linear rise, during which the signal is recorded too (default: 0).
        warmup_start: the first multiplier of the rise (default: 0).
        history: how many values of the signal are kept (default: None, 10 windows).
        decay: ``"cosine"`` (default) or any open-loop schedule, counted from the end of the warm-up.
        max_lr: upper bound of the first group's rate (default: none).
        last_epoch: where the run goes on, at the rates that the groups have, but without the signal so far, which only
            ``load_state_dict`` brings (default: -1, a new run).

    Raises:
        ValueError: if an argument is out of range.

    Source: Ren, 2025, arXiv 2507.10575.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        window: int = 50,
        sensitivity: float = 0.05,
        min_lr: float = 0.0,
        warmup_steps: int = 0,
        warmup_start: float = 0.0,
        history: int | None = None,
        decay: str | Callable[[int], float] = "cosine",
        max_lr: float = math.inf,
        last_epoch: int = -1,
    ) -> None:
        self.closed_loop = schedules.volsched(
            total_steps, window, sensitivity, min_lr, warmup_steps, warmup_start, history, decay, max_lr
        )
        super().__init__(optimizer, last_epoch)

    def _make_rule(self) -> VolSched:
        rule = VolSched.from_settings(float(self.base_lrs[0]), self.closed_loop)
        rule.t = self.last_epoch + 1
        if rule.t > self.closed_loop.warmup_steps:
            rule.level = float(self.optimizer.param_groups[0]["lr"])
        return rule

    def step(self, value: float | Tensor | None = None) -> None:
        """Take the signal of the step just done, and set the rates of the next.

        Args:
            value: the training batch's accuracy; a tensor is waited for. One that is missing or not finite is left out
                with a warning; the step counts.
        """
        if self._step_count == 0:  # torch's constructor calls
            self._rule = self._make_rule()
        else:
            if value is None:
                warn("VolSchedLR.step() was given no signal; this step has none")
            self._rule.update(None if value is None else float(value))
        super().step()

    def get_lr(self) -> list[float | Tensor]:
        """Return the rates of the next step."""
        rule = self._rule
        factor = rule.lr / rule.lr_0 if rule.lr_0 else 1.0
        return [lr * factor for lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the signal so far and the base rates: plain numbers, no settings."""
        own = {key: value for key, value in super().state_dict().items() if key not in ("closed_loop", "_rule")}
        return {**own, "rule": _position(self._rule)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict``; as with torch's schedulers, the optimizer's own checkpoint brings the rates."""
        own = dict(state_dict)
        _set_position(self._rule, own.pop("rule"))
        super().load_state_dict(own)


# ---- Optimizers around an optimizer ----


class _Forwarded:
    """An attribute of the wrapped optimizer, read and written there."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: Any, owner: type | None = None) -> Any:
        return self if wrapper is None else getattr(wrapper.optimizer, self._name)

    def __set__(self, wrapper: Any, value: Any) -> None:
        setattr(wrapper.optimizer, self._name, value)


@dataclass
class _Past:
    """What a step leaves for the next one."""

    steps: int = 0
    grad_sq: float = 0.0  # |g|^2
    rates: list[float] = field(default_factory=list)  # of each group
    points: dict[Tensor, Tensor] = field(default_factory=dict)  # where the parameters were before it
    grads: dict[Tensor, Tensor] = field(default_factory=dict)  # gala, consecutive
    stats: dict[str, float] = field(default_factory=dict)


class Watcher(Optimizer):
    """What the wrappers share: an optimizer that steps another one at a rate learnt from training.

    Groups, state and defaults are the wrapped optimizer's own, so torch's schedulers and ``GradScaler`` take the
    wrapper for it. During the inner step ``group["lr"]`` holds the rate, afterwards what it held before: a scheduler
    that writes it multiplies. A checkpoint is the wrapped optimizer's with one key more, and moves both ways. Hooks
    on a step of the wrapper see all of it, closure included; hooks on checkpoints are the wrapped optimizer's.

    A step waits for the device once, for its statistics, and keeps a copy of the parameters.
    """

    param_groups: Any = _Forwarded()
    state: Any = _Forwarded()
    defaults: Any = _Forwarded()
    _optimizer_state_dict_pre_hooks: Any = _Forwarded()
    _optimizer_state_dict_post_hooks: Any = _Forwarded()
    _optimizer_load_state_dict_pre_hooks: Any = _Forwarded()
    _optimizer_load_state_dict_post_hooks: Any = _Forwarded()

    optimizer: Optimizer
    closed_loop: ClosedLoop
    _rule: Rule | None
    _past: _Past

    def __init__(self, optimizer: Optimizer, closed_loop: ClosedLoop) -> None:
        name = type(self).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"lrkernels: {name} wraps a torch.optim.Optimizer, got {type(optimizer).__name__}")
        lbfgs = isinstance(optimizer, LBFGS)
        check(not lbfgs, f"{name} cannot wrap LBFGS, which evaluates its closure many times a step")
        self.__setstate__({"optimizer": optimizer, "closed_loop": closed_loop, "_rule": None, "_past": _Past()})

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("optimizer", "closed_loop", "_rule", "_past")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set up what torch's constructor does, for groups that are there."""
        self.__dict__.update(state)
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._patch_step_function()

    def __repr__(self) -> str:
        settings = ", ".join(f"{f.name}={getattr(self.closed_loop, f.name)!r}" for f in fields(self.closed_loop))
        return f"{type(self).__name__}({settings}) of {self.optimizer!r}"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the wrapped optimizer does it."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    @property
    def stats(self) -> dict[str, float]:
        """The last step's statistics: ``step`` (completed ones), ``lr`` (of the first group), ``grad_norm``, ..."""
        return dict(self._past.stats)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Measure, decide, and let the wrapped optimizer apply.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss (default: None).

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ValueError: if a gradient is sparse, or ``GALA`` lacks the closure of its ``"same_batch"``; nothing has been
                changed then.
        """
        loss, probe = self._evaluate(closure)
        work = [(i, p) for i, group in enumerate(self.param_groups) for p in group["params"] if p.grad is not None]
        sparse = any(p.grad.is_sparse for _, p in work)
        check(not sparse, f"{type(self).__name__} takes no sparse gradients; use sparse=False")
        if not work:
            return loss
        if self._rule is None:
            first = self.param_groups[0]
            self._rule = self._make_rule(float(first.get("initial_lr", first["lr"])))
        sums = _dots(self._pairs(work, probe))
        factor, stats = self._decide(sums)
        past = self._past
        past.steps += 1
        past.grad_sq = sums["gg"]
        past.points = {p: p.detach().clone() for _, p in work}
        past.grads = {p: p.grad.detach().clone() for _, p in work} if self._keeps_grads() else {}
        bases = [group["lr"] for group in self.param_groups]
        try:
            for group, lr in zip(self.param_groups, bases, strict=True):
                group["lr"] = self._rate(lr, factor)
            past.rates = [float(group["lr"]) for group in self.param_groups]
            past.stats = {"step": past.steps, "lr": past.rates[0], "grad_norm": math.sqrt(sums["gg"]), **stats}
            self.optimizer.step()
        finally:
            for group, lr in zip(self.param_groups, bases, strict=True):
                group["lr"] = lr
        return loss

    def _evaluate(self, closure: Callable[[], Any] | None) -> tuple[Any, dict[Tensor, Tensor]]:
        """Return the loss, and the gradients to compare with: those of the last step, if they are kept."""
        return None if closure is None else torch.enable_grad()(closure)(), self._past.grads

    def _direction(self, i: int, p: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the gradient, and the last move's d, both pointing uphill; None where nothing moved at a rate."""
        if p not in self._past.points or not self._past.rates[i]:
            return None
        g = p.grad
        assert g is not None
        d = (self._past.points[p].double() - p.double()) / self._past.rates[i]
        return (-g if self.param_groups[i].get("maximize") else g), d

    def _rate(self, lr: Any, factor: float) -> Any:
        return lr * factor

    def _keeps_grads(self) -> bool:
        return False

    @abstractmethod
    def _make_rule(self, lr_0: float) -> Rule: ...

    @abstractmethod
    def _pairs(self, work: Work, probe: dict[Tensor, Tensor]) -> Pairs:
        """Yield what MEASURE adds up, by the names of ``reference``; always ``gg``."""

    @abstractmethod
    def _decide(self, sums: dict[str, float]) -> tuple[float, dict[str, float]]:
        """Return the factor on every group's rate, and the statistics that are this method's own."""

    # -- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def _key(self) -> str:
        return f"lrkernels_{type(self).__name__.lower()}"

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's, and under one more key what decides the next rate."""
        past, flat = self._past, self._params()
        own = {
            "rule": self._rule and _position(self._rule),
            "steps": past.steps,
            "grad_sq": past.grad_sq,
            "rates": past.rates,
            "points": {i: past.points[p] for i, p in enumerate(flat) if p in past.points},
            "grads": {i: past.grads[p] for i, p in enumerate(flat) if p in past.grads},
        }
        return {**self.optimizer.state_dict(), self._key: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this wrapper, or of the wrapped optimizer, which leaves the learnt rate as it is."""
        state_dict = dict(state_dict)
        own = state_dict.pop(self._key, None)
        self.optimizer.load_state_dict(state_dict)
        flat, past = self._params(), self._past
        past.points, past.grads = {}, {}
        if own is None:
            return
        past.steps, past.grad_sq, past.rates = own["steps"], own["grad_sq"], list(own["rates"])
        past.points, past.grads = (
            {flat[i]: t.to(flat[i].device, copy=True) for i, t in own[name].items()} for name in ("points", "grads")
        )
        self._rule = self._make_rule(own["rule"]["lr_0"]) if own["rule"] else None
        if self._rule:
            _set_position(self._rule, own["rule"])


class Alignment(Watcher):
    """``schedules.alignment`` around any torch optimizer: the rate grows while gradients agree with the last move.

    The direction is what can be seen from outside, minus the last move over its rate: ``d = -(x[t] - x[t-1]) / lr``,
    with weight decay in it, and the rounding of ``x``. A move at rate 0 gives no signal. For SGD and AdamW use
    ``FusedSGD`` and ``FusedAdamW`` with ``schedule=schedules.alignment()``: there the direction is exact,
    and read in the same pass.

    Args:
        optimizer: the optimizer to wrap. Its step takes no closure.
        kappa: how fast the logarithm of the rate moves (default: 0.2). Without momentum it
            climbs slowly: a larger one gets there sooner, a smaller one is steadier once there.
        bias: added to every cosine (default: 0). Above 0 the rate settles higher.
        lag: 1, this step's cosine acts at the next one; 0, at once (default: 1). Here both cost the same.
        freeze_after: the factor stays after this many steps, for a decay to follow (default: None, never).
        min_lr: lower bound of each group's rate (default: 0).
        max_lr: upper bound of each group's rate (default: none).

    Raises:
        ValueError: if an argument is out of range, or ``optimizer`` is ``LBFGS``.
        TypeError: if ``optimizer`` is none of torch's kind.

    Every process must see the same gradients, as with ``DistributedDataParallel``. Source: this project.
    """

    closed_loop: AlignmentSchedule

    def __init__(
        self,
        optimizer: Optimizer,
        kappa: float = 0.2,
        bias: float = 0.0,
        lag: int = 1,
        freeze_after: int | None = None,
        min_lr: float = 0.0,
        max_lr: float = math.inf,
    ) -> None:
        super().__init__(optimizer, schedules.alignment(kappa, bias, lag, freeze_after, min_lr, max_lr))

    def _make_rule(self, lr_0: float) -> Rule:
        s = self.closed_loop
        return AlignmentRule(1.0, s.kappa, s.bias, s.lag, s.freeze_after)

    def _pairs(self, work: Work, probe: dict[Tensor, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        for i, p in work:
            assert p.grad is not None
            yield "gg", p.grad, p.grad
            if pair := self._direction(i, p):
                g, d = pair
                yield "gd", g, d
                yield "dd", d, d

    def _decide(self, sums: dict[str, float]) -> tuple[float, dict[str, float]]:
        assert isinstance(self._rule, AlignmentRule)
        known = "dd" in sums and math.isfinite(sums["gg"])
        c = cosine(sums["gd"], sums["gg"], sums["dd"])
        return self._rule.update(c if known else math.nan), {"direction_cosine": c}

    def _rate(self, lr: Any, factor: float) -> Any:
        low, high = self.closed_loop.min_lr, self.closed_loop.max_lr
        return (lr * factor).clamp(low, high) if isinstance(lr, Tensor) else min(max(lr * factor, low), high)


class GALA(Watcher):
    """``schedules.gala`` around any torch optimizer: the rate that would have been best so far, in hindsight.

    With SGD, momentum or not, it is the paper's: ``a = <g', g>``, ``b = L |g|^2``. Any other optimizer is served as
    ``FusedAdamW`` is, along its own direction, seen from outside as ``d = -(x[s+1] - x[s]) / lr``: ``a = <g', d>``,
    ``b = L |d|^2``. Give it a ``min_lr`` above 0, since at rate 0 there is no move to learn from.

    Args:
        optimizer: the optimizer to wrap; its step takes no closure. With momentum clip the gradient norm to 1, in its
            ``register_step_pre_hook``, which comes after the measurement.
        delta: weight of the first rate (default: 1e-12, in effect none after the first step).
        min_lr: lower bound of the first group's rate (default: 0).
        max_lr: upper bound of the first group's rate (default: none).
        mode: ``"same_batch"`` (default), the paper's: ``step`` takes a closure and evaluates it twice, at the previous
            point without leaving a trace in module buffers or random numbers. ``"consecutive"``: the gradients that
            training computes anyway, for full or very large batches only: with noise the rate collapses; ``Alignment``
            is for that.

    Raises:
        ValueError: if an argument is out of range, or ``optimizer`` is ``LBFGS``.
        TypeError: if ``optimizer`` is none of torch's kind.

    Every process must see the same gradients, as with ``DistributedDataParallel``. With ``GradScaler``, which takes no
    closure, only ``"consecutive"`` works.

    Source: Jiang, Kavis, Mokhtari, 2025, arXiv 2506.08419; ``delta``, momentum and other optimizers than SGD are a
    reconstruction.
    """

    closed_loop: GalaSchedule

    def __init__(
        self,
        optimizer: Optimizer,
        delta: float = 1e-12,
        min_lr: float = 0.0,
        max_lr: float = math.inf,
        mode: str = "same_batch",
    ) -> None:
        super().__init__(optimizer, schedules.gala(delta, min_lr, max_lr, mode))

    def _make_rule(self, lr_0: float) -> Rule:
        s = self.closed_loop
        return Gala(lr_0, s.delta, s.min_lr, s.max_lr)

    def _keeps_grads(self) -> bool:
        return self.closed_loop.mode == "consecutive"

    @property
    def _along_gradient(self) -> bool:
        return isinstance(self.optimizer, SGD | FusedSGD)

    def _evaluate(self, closure: Callable[[], Any] | None) -> tuple[Any, dict[Tensor, Tensor]]:
        """Run the closure; with the same batch first at the previous point, so that this point's gradients stay."""
        if self._keeps_grads():
            return super()._evaluate(closure)
        if closure is None:
            raise ValueError("lrkernels: GALA(mode='same_batch') needs step(closure)")
        closure, points = torch.enable_grad()(closure), self._past.points
        probe = gradients_at(points, closure, self._params()) if points else {}
        return closure(), probe

    def _pairs(self, work: Work, probe: dict[Tensor, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        for i, p in work:
            assert p.grad is not None
            yield "gg", p.grad, p.grad
            if p in self._past.points:
                move = p.double() - self._past.points[p].double()
                yield "move_sq", move, move
            if p in probe:
                change = p.grad.double() - probe[p].double()
                yield "gh", p.grad, probe[p]
                yield "change_sq", change, change
            if not self._along_gradient and (pair := self._direction(i, p)):
                g, d = pair
                yield "gd", g, d
                yield "dd", d, d

    def _decide(self, sums: dict[str, float]) -> tuple[float, dict[str, float]]:
        assert isinstance(self._rule, Gala)
        move = math.sqrt(sums["move_sq"])
        curvature = math.sqrt(sums["change_sq"]) / move if move > 0.0 else None
        a, length_sq = (sums["gh"], self._past.grad_sq) if self._along_gradient else (sums["gd"], sums["dd"])
        if math.isfinite(sums["gg"]):
            self._rule.update(a, length_sq, curvature)
        lr, lr_0 = self._rule.lr, self._rule.lr_0
        return lr / lr_0 if lr_0 else 1.0, {"alignment": sums["gh"], "curvature": curvature or 0.0}
