"""The two optimizers in slow, plain form: measure the gradients, decide the rate, apply the update.

Element-wise math is done in float32 (float64 tensors: in float64) and rounded once, on store, in the very operations
of torch's own loops: ``add(alpha=)``, ``lerp``, ``addcmul``, ``addcdiv``, which fuse their multiply-adds. Scalars are
float64 on the host and are cast where they meet a tensor. The fused optimizers are tested against this file bit for
bit.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .. import rules
from ..closed_loop import AlignmentSchedule, ClosedLoop, GalaSchedule, VolSchedule
from ..closures import gradients_at
from ..schedules import split
from .alignment import Alignment, cosine
from .gala import Gala
from .volsched import VolSched

__all__ = ["ReferenceAdamW", "ReferenceSGD", "clip_factor"]

Rule: TypeAlias = Alignment | Gala | VolSched
Group: TypeAlias = dict[str, Any]

TRACKABLE = {"grad_norm", "grad_norm_l1", "direction", "alignment"}


def clip_factor(norm: float, max_norm: float) -> float:
    """``min(1, max_norm / (norm + 1e-6))``, that of ``torch.nn.utils.clip_grad_norm_``; nan gives nan."""
    factor = max_norm / (norm + 1e-6)
    return 1.0 if factor > 1.0 else factor


def wide(x: Tensor) -> Tensor:
    """What the math is done in: float32, or float64 where it is stored so."""
    return x if x.dtype == torch.float64 else x.float()


def scalar(value: float, like: Tensor) -> Tensor:
    """A divisor on the tensor's device: torch multiplies by the reciprocal of one that stays on the host."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


def root(x: Tensor) -> Tensor:
    """The square root, correctly rounded: torch's own on the CPU (MKL's) is off by one bit for one x in five or six."""
    return x.double().sqrt().to(x.dtype)


def dot(a: Tensor, b: Tensor) -> float:
    """``<a, b>`` in float64."""
    return float((a.double() * b.double()).sum())


def _state_names(rule: Rule) -> set[str]:
    return {"lr_0"} | {f.name for f in fields(rule) if not f.init}


@dataclass
class Sums:
    """What MEASURE takes from the gradients: sums over every element of every parameter that has one.

    g: this gradient, unscaled, before clipping and weight decay. d: the previous update direction. h: what g
    is compared with, the previous gradient or (gala, same batch) this batch's gradient at the previous point.
    """

    gg: float = 0.0
    g_l1: float = 0.0
    gd: float = 0.0
    dd: float = 0.0
    gh: float = 0.0
    hh: float = 0.0
    change_sq: float = 0.0  # |g - h|^2


class Decision(NamedTuple):
    """What DECIDE hands to APPLY: the rate of every group, and the clip factor (None: no clip)."""

    factor: float  # of the closed loop
    bounds: tuple[float, float]  # of a group's rate under it
    multiplier: float  # of the open loop
    clip: float | None

    def lr(self, group: Group) -> float:
        """The rate of a group."""
        low, high = self.bounds
        return min(max(float(group["lr"]) * self.factor, low), high) * self.multiplier


class Reference(torch.optim.Optimizer):
    """What both optimizers share. A subclass adds ``_direction``, ``_gala_terms`` and ``_update``."""

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf and calls step()
    _gala_needs_direction = False

    def _watch(
        self,
        *,
        schedule: Callable[[int], float] | ClosedLoop | None = None,
        max_grad_norm: float | None = None,
        track: str | Iterable[str] = (),
        prev_grad: str = "store",
        process_group: Any = None,
        backend: str | None = None,
        history_size: int | None = 1024,
        differentiable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        """Set up what goes beyond torch's optimizer; what only concerns speed is accepted and ignored."""
        if differentiable:
            raise ValueError("lrkernels: differentiable=True is not supported")
        self._measures = {track} if isinstance(track, str) else set(track)
        if unknown := self._measures - TRACKABLE:
            raise ValueError(f"lrkernels: track takes {sorted(TRACKABLE)}, got {sorted(unknown)}")
        if prev_grad not in ("store", "swap", "bfloat16"):
            raise ValueError(f"lrkernels: prev_grad must be 'store', 'swap' or 'bfloat16', got {prev_grad!r}")
        if any(p.is_complex() for group in self.param_groups for p in group["params"]):
            raise ValueError("lrkernels: complex parameters are not supported")
        self._state_dtype, self._master_weights = state_dtype, master_weights
        self._stochastic_rounding, self._skip_nonfinite = stochastic_rounding, skip_nonfinite
        self.open_loop, self.closed_loop = split(schedule)
        self._max_grad_norm = max_grad_norm
        self._prev_grad = torch.bfloat16 if prev_grad == "bfloat16" else None  # None: as p
        self._same_batch = False
        if isinstance(self.closed_loop, AlignmentSchedule):
            self._measures.add("direction")
        if isinstance(self.closed_loop, GalaSchedule):
            self._same_batch = self.closed_loop.mode == "same_batch"
            self._measures |= {"alignment", "direction"} if self._gala_needs_direction else {"alignment"}
        self._consecutive = "alignment" in self._measures and not self._same_batch
        if max_grad_norm is not None or self._measures & {"direction", "alignment"}:
            self._measures.add("grad_norm")
        self._completed = 0
        self._skipped = 0
        self._move = 0.0  # |x_t - x_{t-1}|, over all parameters
        self._last_gg = 0.0  # |g_{t-1}|^2
        self._rule: Rule | None = None  # made at the first step, which knows lr_0
        self._signal: float | Tensor | None = None
        self._probe: dict[Tensor, Tensor] = {}  # this batch's gradient at the previous point
        self._row: dict[str, float] = {}
        self._rows: deque[dict[str, float]] = deque(maxlen=history_size)

    # Public methods beyond torch's

    def observe(self, value: float | Tensor) -> None:
        """Give the signal that ``volsched`` watches; call it before ``step``. A skipped step drops it."""
        self._signal = value

    @property
    def stats(self) -> dict[str, float]:
        """The last step's statistics, only what is measured; ``step`` and ``skipped`` count updates so far.

        ``lr`` is the first group's rate. ``alignment``, ``cosine`` and ``curvature`` are 0 where there is no
        pair yet.
        """
        return {**self._row, "step": self._completed, "skipped": self._skipped}

    def history(self) -> dict[str, np.ndarray]:
        """``stats`` of the last ``history_size`` completed steps, oldest first."""
        return {name: np.array([row[name] for row in self._rows], dtype=np.float64) for name in self._row}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update: measure, decide, apply. With ``found_inf`` set (AMP) nothing at all changes."""
        loss = self._evaluate(closure)
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and float(found_inf) != 0.0:
            self._skipped += 1
            self._signal = None
            return loss
        work = list(self._gradients())
        if not work:
            return loss
        sums = self._measure(work)
        if self._skip_nonfinite and not math.isfinite(sums.gg):
            self._skipped += 1
            self._signal = None
            return loss
        self._apply(work, self._decide(sums))
        return loss

    # The three verbs

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """Run the closure; for gala first at the previous point, so that this point's gradients stay."""
        if closure is None:
            if self._same_batch:
                raise ValueError("lrkernels: gala(mode='same_batch') needs step(closure)")
            return None
        closure = torch.enable_grad()(closure)
        if self._same_batch:
            params = [p for group in self.param_groups for p in group["params"]]
            points = {p: self.state[p]["prev_param"] for p in params if "prev_param" in self._of(p)}
            self._probe = gradients_at(points, closure, params) if points else {}
        return closure()

    def _measure(self, work: list[tuple[Group, Tensor, Tensor]]) -> Sums:
        """MEASURE: float64 sums over all groups."""
        sums = Sums()
        for group, p, g in work:
            sums.gg += dot(g, g)
            if "grad_norm_l1" in self._measures:
                sums.g_l1 += float(g.double().abs().sum())
            if "direction" in self._measures and (d := self._direction(p, group)) is not None:
                sums.gd += dot(-g if group["maximize"] else g, d)
                sums.dd += dot(d, d)
            h = self._probe.get(p) if self._same_batch else self._of(p).get("prev_grad")
            if "alignment" in self._measures and h is not None:
                change = g.double() - h.double()
                sums.gh += dot(g, h)
                sums.hh += dot(h, h)
                sums.change_sq += dot(change, change)
        return sums

    def _decide(self, sums: Sums) -> Decision:
        """DECIDE: this step's rate and clip factor; the closed loop's state and the history move on."""
        norm = math.sqrt(sums.gg)
        c = cosine(sums.gd, sums.gg, sums.dd)
        curvature = math.sqrt(sums.change_sq) / self._move if self._move > 0.0 else None
        multiplier = self.open_loop(self._completed) if self.open_loop else 1.0
        factor = self._factor(sums, c, curvature)
        clip = None if self._max_grad_norm is None else clip_factor(norm, self._max_grad_norm)
        s = self.closed_loop
        bounds = (s.min_lr, s.max_lr) if isinstance(s, AlignmentSchedule) else (0.0, math.inf)
        decision = Decision(factor, bounds, multiplier, clip)

        lr = decision.lr(self.param_groups[0])
        self._row = {"step": self._completed + 1, "lr": lr, "skipped": self._skipped}
        if "grad_norm" in self._measures:
            self._row["grad_norm"] = norm
        if "grad_norm_l1" in self._measures:
            self._row["grad_norm_l1"] = sums.g_l1
        if "direction" in self._measures:
            self._row["direction_cosine"] = c
        if "alignment" in self._measures:
            self._row["alignment"] = sums.gh
            self._row["cosine"] = cosine(sums.gh, sums.gg, sums.hh)
            self._row["curvature"] = curvature or 0.0
        if clip is not None:
            self._row["clip"] = clip
        self._rows.append(self._row)
        self._last_gg = sums.gg
        return decision

    def _factor(self, sums: Sums, c: float, curvature: float | None) -> float:
        """``lr_t / lr_0`` of the closed loop; ``lr_0`` is the first group's base rate at the first step.

        Groups share it. ``alignment`` bounds the rate of each group, ``gala`` and ``volsched`` that of the first.
        """
        signal, self._signal = self._signal, None  # of this step only, whoever watches it
        if self._rule is None:
            first = self.param_groups[0]
            self._rule = self._make_rule(float(first.get("initial_lr", first["lr"])))  # as torch's schedulers
        rule = self._rule
        if rule is None:
            return 1.0
        if isinstance(rule, Alignment):
            lr = rule.update(c if math.isfinite(sums.gg) else math.nan)
        elif isinstance(rule, VolSched):
            lr = rule.update(None if signal is None else float(signal))
        elif math.isfinite(sums.gg):
            lr = rule.update(*self._gala_terms(sums), curvature)
        else:
            lr = rule.lr
        return lr / rule.lr_0 if rule.lr_0 else 1.0

    def _apply(self, work: list[tuple[Group, Tensor, Tensor]], decision: Decision) -> None:
        """APPLY: the update of every parameter; and what the next step compares with is kept."""
        move_sq = 0.0
        keep = self._consecutive or any(self._direction_is_gradient(group) for group in self.param_groups)
        if not keep:  # what was kept would be an older step's when it is needed again
            for state in self.state.values():
                state.pop("prev_grad", None)
        for group, p, g in work:
            point, before = p.detach().clone(), self._load(p).clone()
            u = -g if group["maximize"] else g
            u = u if decision.clip is None else u * decision.clip
            self._update(p, u, group, decision.lr(group))
            change = self._load(p).double() - before.double()
            move_sq += dot(change, change)
            if self._same_batch:
                self.state[p]["prev_param"] = point
            if keep:
                self.state[p]["prev_grad"] = g.to(self._prev_grad or p.dtype, copy=True)
        self._move = math.sqrt(move_sq)
        self._completed += 1

    # What each optimizer adds

    @abstractmethod
    def _direction(self, p: Tensor, group: Group) -> Tensor | None:
        """``d_{t-1}``, what the rate multiplied in the last update; None before the first."""

    def _direction_is_gradient(self, group: Group) -> bool:
        """Whether ``d_{t-1}`` is the previous gradient, which must then be kept."""
        return False

    @abstractmethod
    def _gala_terms(self, sums: Sums) -> tuple[float, float]:
        """``a_s`` and the squared length in ``b_s``."""

    @abstractmethod
    def _update(self, p: Tensor, g: Tensor, group: Group, lr: float) -> None:
        """Update one parameter and its state."""

    # Low precision

    def _load(self, p: Tensor) -> Tensor:
        """What the update works on: the float32 master, or the parameter in the precision of the math."""
        if self._master_weights and p.dtype in (torch.bfloat16, torch.float16):
            return self.state[p].setdefault("master_param", p.detach().float())
        return wide(p)

    def _store(self, p: Tensor, x: Tensor) -> None:
        """Write the new value, rounded to nearest or at random; a master keeps all of it."""
        at_random = {torch.bfloat16: rules.to_bfloat16_at_random, torch.float16: rules.to_float16_at_random}
        if "master_param" in self.state[p]:
            self.state[p]["master_param"].copy_(x)
        if self._stochastic_rounding and p.dtype in at_random:
            row = [id(q) for group in self.param_groups for q in group["params"]].index(id(p))
            key = rules.random_key(torch.tensor(float(self._completed)), row)
            element = torch.arange(p.numel()).as_strided(p.shape, torch.empty_like(p).stride())
            x = at_random[p.dtype](x, rules.random_bits(key, element))
        p.copy_(x)

    def _zeros(self, p: Tensor) -> Tensor:
        """A new buffer of momentum or moments."""
        return torch.zeros_like(p, dtype=self._state_dtype or p.dtype)

    # Small helpers

    def _of(self, p: Tensor) -> dict[str, Any]:
        return self.state.get(p, {})  # self.state[p] would make an entry

    def _gradients(self) -> Iterator[tuple[Group, Tensor, Tensor]]:
        """Every group, parameter and gradient, the latter unscaled (AMP) and in the precision of the math."""
        scale = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise ValueError(f"lrkernels: {type(self).__name__} takes no sparse gradients; use sparse=False")
                g = wide(p.grad)
                yield group, p, g if scale is None else g * (1.0 / float(scale))

    def _make_rule(self, lr_0: float) -> Rule | None:
        s = self.closed_loop
        if isinstance(s, AlignmentSchedule):
            return Alignment(1.0, s.kappa, s.bias, s.lag, s.freeze_after)
        if isinstance(s, GalaSchedule):
            return Gala(lr_0, s.delta, s.min_lr, s.max_lr)
        if isinstance(s, VolSchedule):
            return VolSched.from_settings(lr_0, s)
        return None

    # Checkpoints: torch's own, and one entry beside it that torch's optimizers ignore

    def state_dict(self) -> dict[str, Any]:
        """Return torch's, with the schedules' position and state under ``"lrkernels"``."""
        rule = self._rule
        own: dict[str, Any] = {
            "step": self._completed,
            "skipped": self._skipped,
            "move": self._move,
            "last_gg": self._last_gg,
        }
        if isinstance(rule, VolSched) and self._signal is not None:
            own["signal"] = float(self._signal)
        if rule is not None:
            own["rule"] = {name: getattr(rule, name) for name in _state_names(rule)}
        return {**super().state_dict(), "lrkernels": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, or of torch's, which leaves the schedules where they are."""
        super().load_state_dict(state_dict)
        if (own := state_dict.get("lrkernels")) is None:
            return
        self._completed, self._skipped = own["step"], own["skipped"]
        self._move, self._last_gg, self._signal = own["move"], own["last_gg"], own.get("signal")
        learnt = own.get("rule", {})
        rule = self._make_rule(learnt.get("lr_0", 0.0))
        self._rule = rule if rule and learnt.keys() == _state_names(rule) else None
        for name in learnt if self._rule else ():
            setattr(self._rule, name, learnt[name])


class ReferenceSGD(Reference, torch.optim.SGD):
    """``torch.optim.SGD`` with schedules that watch training: ``FusedSGD`` in its plainest form.

    ``g = clip * g + weight_decay * x``, ``m = momentum * m + (1 - dampening) * g``, ``d = g + momentum * m``
    with Nesterov, else ``m``; ``x = x - lr * d``, or with ``normalize`` ``x = x - lr * d / |d|``. m starts as the
    first g, as in torch, or with ``zero_init_momentum`` at 0. ``decoupled_weight_decay`` replaces the first term by
    ``x = x * (1 - lr * weight_decay)`` before the update.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        zero_init_momentum: bool = False,
        normalize: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        self.defaults["decoupled_weight_decay"] = decoupled_weight_decay
        self.defaults["zero_init_momentum"] = zero_init_momentum
        self._fill_groups()
        self._normalize, self._length = normalize, 1.0  # |m|, over all parameters
        self._watch(**common)
        if normalize:
            self._measures |= {"direction", "grad_norm"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fill_groups()

    def _fill_groups(self) -> None:
        for group in self.param_groups:  # a checkpoint of torch's SGD does not have these
            for name in ("decoupled_weight_decay", "zero_init_momentum"):
                group.setdefault(name, self.defaults[name])

    def _direction(self, p: Tensor, group: Group) -> Tensor | None:
        if group["momentum"] != 0:
            return self._of(p).get("momentum_buffer")
        h = self._of(p).get("prev_grad")
        return -h if h is not None and group["maximize"] else h

    def _direction_is_gradient(self, group: Group) -> bool:
        return "direction" in self._measures and group["momentum"] == 0

    def _gala_terms(self, sums: Sums) -> tuple[float, float]:
        if self._normalize:  # d / |d| is what the rate multiplied
            return (sums.gd / math.sqrt(sums.dd), 1.0) if sums.dd > 0 else (0.0, 0.0)
        return sums.gh, self._last_gg

    def _apply(self, work: list[tuple[Group, Tensor, Tensor]], decision: Decision) -> None:
        if self._normalize:
            square = 0.0
            for group, p, g in work:
                d = self._next_buffer(p, -g if group["maximize"] else g, group)
                square += dot(d, d)
            self._length = math.sqrt(square) or 1.0
        super()._apply(work, decision)

    def _next_buffer(self, p: Tensor, g: Tensor, group: Group) -> Tensor:
        """M after this step; g without momentum."""
        if group["momentum"] == 0:
            return g
        m = self._of(p).get("momentum_buffer")
        if m is None and not group["zero_init_momentum"]:
            return g
        m = torch.zeros_like(g) if m is None else wide(m)
        return (m * group["momentum"]).add(g, alpha=1 - group["dampening"])

    def _update(self, p: Tensor, g: Tensor, group: Group, lr: float) -> None:
        x = self._load(p)
        momentum, weight_decay = group["momentum"], group["weight_decay"]
        if weight_decay != 0 and not group["decoupled_weight_decay"]:
            g = g.add(x, alpha=weight_decay)
        d = g
        if momentum != 0:
            state, m = self.state[p], self._next_buffer(p, g, group)
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = self._zeros(p)
            state["momentum_buffer"].copy_(m)
            d = g.add(m, alpha=momentum) if group["nesterov"] else m
        if weight_decay != 0 and group["decoupled_weight_decay"]:
            x = x * (1 - lr * weight_decay)
        self._store(p, x.add(d, alpha=-(lr / self._length)))


class ReferenceAdamW(Reference, torch.optim.AdamW):
    """``torch.optim.AdamW`` with schedules that watch training: ``FusedAdamW`` in its plainest form.

    ``x = x * (1 - lr * weight_decay)``, ``m = beta1 * m + (1 - beta1) * g``, ``v = beta2 * v + (1 - beta2) *
    g * g``, ``d = m_hat / (sqrt(v_hat) + eps)`` with ``m_hat = m / (1 - beta1^t)``, ``v_hat = v / (1 -
    beta2^t)`` (amsgrad: of the largest v so far), ``x = x - lr * d``. Source: Loshchilov, Hutter 2019, arXiv
    1711.05101.
    """

    _gala_needs_direction = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)
        self._watch(**common)

    def _direction(self, p: Tensor, group: Group) -> Tensor | None:
        state = self._of(p)
        if not state or float(state["step"]) == 0.0:
            return None
        (beta1, beta2), t = group["betas"], float(state["step"])
        m, v = wide(state["exp_avg"]), wide(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
        denom = root(v) * scalar(1 / math.sqrt(1 - beta2**t), v) + group["eps"]
        return (m * scalar(1 / (1 - beta1**t), m)) / denom

    def _gala_terms(self, sums: Sums) -> tuple[float, float]:
        return sums.gd, sums.dd

    def _update(self, p: Tensor, g: Tensor, group: Group, lr: float) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = self._zeros(p)
            state["exp_avg_sq"] = self._zeros(p)
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = self._zeros(p)
        state["step"] += 1
        t = float(state["step"])
        x = self._load(p)
        if group["weight_decay"] != 0:
            x = x * (1 - lr * group["weight_decay"])
        m = wide(state["exp_avg"]).lerp(g, 1 - beta1)
        v = (wide(state["exp_avg_sq"]) * beta2).addcmul(g, g, value=1 - beta2)
        state["exp_avg"].copy_(m)
        state["exp_avg_sq"].copy_(v)
        if group["amsgrad"]:
            v = torch.maximum(wide(state["max_exp_avg_sq"]), v)
            state["max_exp_avg_sq"].copy_(v)
        denom = root(v) * scalar(1 / math.sqrt(1 - beta2**t), v) + group["eps"]
        self._store(p, x.addcdiv(m, denom, value=-lr / (1 - beta1**t)))
