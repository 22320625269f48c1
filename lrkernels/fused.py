"""What the fused optimizers share: torch's groups, states and checkpoints, and a step measured, decided and applied."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import ops, schedules
from .checkpoints import CONTROL_KEY, MASTER, check_checkpoint, check_control, restore, states_to_save
from .checks import check, check_number, is_real, on_host
from .closed_loop import ClosedLoop, GalaSchedule
from .closures import gradients_at
from .control import Controller, Stats
from .devices import places_of, runner_for
from .distributed import local, version
from .layout import HYPERS, Control, Count, Measure, Rule, Verb
from .options import DTYPES, Options
from .plan import Kept, Plan

__all__ = ["FusedOptimizer"]

HALVES = (torch.bfloat16, torch.float16)
# What a copy of the optimizer takes along, besides what torch's does.
_PICKLED = ("_options", "_controller", "_counts", "_kept", "_measure", "_two_pass", "_same_batch", "_rehearsed")
_IGNORED = {"foreach", "fused", "capturable"}  # torch's, which may be None
_FLAGS = {
    "maximize",
    "nesterov",
    "decoupled_weight_decay",
    "zero_init_momentum",
    "amsgrad",
    "differentiable",
} | _IGNORED
POST_SAVE = "_optimizer_state_dict_post_hooks"  # where torch keeps what is registered
PRE_LOAD, POST_LOAD = "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"
WARM_UP = "take a step outside of the capture first, with the same gradients and settings"


def _check_shape(p: Tensor, key: str, value: Tensor) -> None:
    """Refuse a state that was made for the parameter when it had another shape."""
    check(
        value.shape == p.shape,
        f"a parameter has the shape {tuple(p.shape)} now, and its {key} {tuple(value.shape)}; forget its state by "
        "optimizer.state.pop(parameter)",
    )


class FusedOptimizer(Optimizer):
    """What the fused optimizers share: schedules, clipping, statistics, checkpoints, and the one call of a step.

    Args:
        schedule: an open-loop schedule ``step -> multiplier``, a closed-loop one, or their product (default: None). A
            group's rate is ``group["lr"]`` times what it says; ``group["lr"]`` itself stays as it is.
        max_grad_norm: clip the global norm, as ``torch.nn.utils.clip_grad_norm_``; gradients are not written
            (default: None).
        track: statistics to take although nothing needs them: ``"grad_norm"``, ``"grad_norm_l1"``, ``"direction"``,
            ``"alignment"`` (default: ()).
        prev_grad: how the previous gradient is kept when it is needed: ``"store"``, ``"bfloat16"`` (half the size), or
            ``"swap"`` (the tensor itself, which must not be changed in place then) (default: "store").
        process_group: add the sums up over these processes, which hold different parameters; ``DTensor`` s need none,
            their mesh says it (default: None).
        backend: ``"native"``, ``"triton"``, ``"eager"``, or None for the best there is (default: None).
        history_size: steps that ``history()`` goes back; None keeps all (default: 1024).
        state_dtype: the dtype of momentum and moments; None is the parameter's own (default: None).
        master_weights: keep a float32 copy of each bfloat16 or float16 parameter in its state as ``master_param``; the
            update works on it, and the parameter gets it rounded. Write to both, or to neither (default: False).
        stochastic_rounding: round bfloat16 and float16 parameters up or down at random, so that small updates are not
            lost; the bits depend on step, parameter and element alone (default: False).
        skip_nonfinite: a step with a gradient that is not finite changes nothing and counts as skipped; it costs a
            pass over the gradients ahead of the update (default: False).

    Raises:
        ValueError: an argument is out of range; a parameter is complex, or of a dtype that no kernel computes.
        TypeError: ``schedule`` is not one, but a function of ``schedules`` that was not called, say.
        RuntimeError: the backend asked for is not available for the parameters' device; the first step says so where
            ``"triton"`` is asked for and they are on the CPU, from where they may move.
    """

    _rule: ClassVar[Rule]
    _states: ClassVar[tuple[str | None, str | None, str | None]]  # the rule's states, in the kernels' order
    _required: ClassVar[tuple[str, ...]] = ()  # of them, what a checkpoint must have
    _hyper_names: ClassVar[tuple[str, ...]]  # what a group must have besides lr

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        schedule: Any,
        **options: Any,
    ) -> None:
        open_loop, closed_loop = schedules.split(schedule)
        self._options = Options(**options)
        self._measure = self._options.measures(self._rule, closed_loop)
        self._two_pass = self._options.two_pass(closed_loop)
        self._same_batch = isinstance(closed_loop, GalaSchedule) and closed_loop.mode == "same_batch"
        self._controller = Controller(open_loop, closed_loop, self._options.settings(), self._options.history_size)
        self._plan: Plan | None = None
        self._run: Callable[..., None] | None = None
        self._devices: list[torch.device] = []  # that it serves
        self._eager = False  # whether it is torch's own operations
        self._seen: Any = None
        self._keys: Any = None
        self._lr: Tensor | None = None  # each group's rate, on the device
        self._rates: list[float] = []
        self._all_counts: Any = None  # the plan's
        self._captured = False  # whether a step was captured in a graph, which has the addresses of that time
        self._outlived: list[Any] = []  # what is at them and would be gone
        self._counts: dict[Tensor, Tensor] = {}  # each parameter's row of the plan's counts
        self._kept = Kept([], [], [])
        self._told: set[Tensor] = set()  # whose kept gradient was said to be lost
        self._rehearsed = False  # states without an update, for a checkpoint to be loaded into
        super().__init__(params, defaults)
        devices, _ = places_of([p for group in self.param_groups for p in group["params"]])
        for device in devices:
            to_move = device.type == "meta" or (device.type == "cpu" and self._options.backend == ops.TRITON)
            if not to_move:  # else the first step asks, where they are then
                ops.check_backend(device, self._options.backend)
        self.param_groups[0][CONTROL_KEY] = self._controller.control

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``torch.amp.GradScaler`` hands us found_inf and grad_scale, and calls ``step`` all the same.

        accelerate puts a ``step`` of its own in place, and takes each call of it for a step that was made. Under it
        the scaler unscales, waits and skips as with any optimizer, so ``step_was_skipped`` is right.
        """
        return not (getattr(self.step, "__module__", None) or "").startswith("accelerate.")

    # -- groups -------------------------------------------------------------------------------------------------------

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse hyper-parameters that the rule is not defined for."""
        lr = group["lr"]
        if isinstance(lr, Tensor):
            check(lr.numel() == 1, f"lr must be a float or a tensor of one element, got shape {tuple(lr.shape)}")
            check(is_real(lr), f"lr must be a real number, got {lr.dtype}, {lr.layout}, on {lr.device}")
            if lr.device.type == "cpu":  # to look at another, be it for a message, would wait for its device
                check(0.0 <= float(lr) < math.inf, f"lr must be finite and >= 0, got {lr}")
        else:
            check_number("lr", group["lr"], 0.0)
        check_number("weight_decay", group["weight_decay"], 0.0)
        for name in _FLAGS & group.keys():
            unset = group[name] is None and name in _IGNORED
            flag = unset or isinstance(group[name], int | np.bool_)
            check(flag, f"{name} must be True or False, got {group[name]!r}")
        check(not group["differentiable"], "differentiable=True is not supported; use torch.optim for it")

    def _check_together(self, groups: list[dict[str, Any]]) -> None:
        """Refuse groups that do not go together."""

    def _hyper(self, group: dict[str, Any]) -> list[float]:
        """Return the group's row of hyper-parameters, in the order of ``layout.Hyper``."""
        raise NotImplementedError

    def _state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the rule's states in this group."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; refuses parameters that no kernel computes."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            for p in group["params"]:
                known = p.layout == torch.strided and not is_lazy(p)
                overlapping = known and any(
                    stride == 0 and size > 1 for size, stride in zip(p.shape, p.stride(), strict=True)
                )
                check(not overlapping, "a parameter has several elements in one place; make it dense by .clone()")
                check(not p.is_complex(), f"{type(self).__name__} takes no complex parameters; use torch.view_as_real")
                check(p.dtype in DTYPES, f"{type(self).__name__} takes parameters of {DTYPES}, got {p.dtype}")
            self._check_together(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise
        self._plan = None

    def _refresh_hyper(self, plan: Plan) -> None:
        """Bring the device's rates and the host's rows up to date with ``param_groups``."""
        rates = [group["lr"] for group in self.param_groups]
        seen = [
            [id(group["lr"]) if isinstance(group["lr"], Tensor) else group["lr"], group["differentiable"]]
            + [tuple(value) if isinstance(value := group[name], list) else value for name in self._hyper_names]
            for group in self.param_groups
        ]
        if self._seen != seen:
            if self._is_capturing():
                raise RuntimeError(f"lrkernels: param_groups have changed since the last step; {WARM_UP}")
            for group in self.param_groups:
                self._check_group(group)
            self._check_together(self.param_groups)
            rows = [self._hyper(group) for group in self.param_groups]
            self._hyper_rows = on_host(rows, torch.float64).reshape(len(rows), HYPERS)
            self._set_rates([0.0 if isinstance(rate, Tensor) else float(rate) for rate in rates])
            keys = [self._state_keys(group) for group in self.param_groups]
            if keys != self._keys:  # momentum or amsgrad was switched on
                self._keys = keys
                for i in set(range(len(plan.params))) - set(plan.idle):
                    self._fill_state(plan, i)
            first = self.param_groups[0]
            self._controller.start_at(first.get("initial_lr", first["lr"]))
            self._seen = seen
        for i, rate in enumerate(rates):
            if isinstance(rate, Tensor):
                assert self._lr is not None
                self._lr[i].copy_(rate.detach().reshape(()), non_blocking=True)

    def _set_rates(self, rates: list[float]) -> None:
        """Write the rates where the kernels read them: in place, since a captured step reads them there too."""
        device, old = self._controller.device, self._rates
        if self._lr is None or self._lr.device != device or len(old) != len(rates):
            self._outlive(self._lr)
            with torch.inference_mode(False):
                self._lr = on_host(rates, torch.float64).to(device, non_blocking=True)
        else:
            for i, (rate, before) in enumerate(zip(rates, old, strict=True)):
                if rate != before:
                    self._lr[i].fill_(rate)
        self._rates = rates

    def _outlive(self, replaced: Any) -> None:
        """Keep a tensor that the steps to come do not need, if a captured one still does."""
        if self._captured and replaced is not None:
            self._outlived.append(replaced)

    # -- state --------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # steps outside of it write to these tensors
    def _make_plan(self) -> Plan:
        """Collect the parameters anew: at the first step, and when groups, states or the device have changed."""
        self._adopt_control()
        plan = Plan(self)
        if self._run is None or plan.devices != self._devices:
            self._run, self._devices = runner_for(plan.devices, self._options.backend), plan.devices
            self._eager = ops.is_eager(self._run)
            self._controller.to(plan.device)
            self._seen = None
        self.param_groups[0][CONTROL_KEY] = self._controller.control
        for gone in self._counts.keys() - set(plan.params):
            del self._counts[gone]
        kept = {p: (grad, then) for p, grad, then in zip(*self._kept, strict=True) if p in plan.state}
        found = [kept.get(p, (None, None)) for p in plan.params]
        self._kept = Kept(plan.params, [grad for grad, _ in found], [then for _, then in found])
        for i, p in enumerate(plan.params):
            if p in plan.state:
                self._fill_state(plan, i)
        old = self._all_counts
        if self._captured and isinstance(old, Tensor) and not plan.several and old.shape == plan.counts.shape:
            plan.counts = old.copy_(plan.counts)
            for p, state, counts in zip(plan.params, plan.states, plan.counts, strict=True):
                if p in self._counts:
                    self._counts[p] = counts
                    self._show_updates(state, counts[Count.UPDATES])
        else:
            self._outlive(old)
        self._all_counts = plan.counts
        plan.entries = list(self.state.values())
        self._plan = plan
        return plan

    def _adopt_control(self) -> None:
        """Continue from a control tensor put into the first group, as by ZeroRedundancyOptimizer."""
        control = self.param_groups[0].get(CONTROL_KEY, self._controller.control)
        if control is not self._controller.control:
            check_control(control, self._controller)
            self._begin_from(control)

    def _begin_from(self, control: Tensor | None) -> None:
        """Continue from a checkpoint's control tensor, and from the states that came with it."""
        self._counts.clear()
        self._kept = Kept([], [], [])
        self._controller.load(control)
        self.param_groups[0][CONTROL_KEY] = self._controller.control
        self._rehearsed = False
        self._plan = None

    @torch.inference_mode(False)
    def _fill_state(self, plan: Plan, i: int) -> None:
        """Give parameter ``i`` every state it lacks: zeros, in the parameter's own layout."""
        p, group = plan.params[i], self.param_groups[plan.group_of[i]]
        state, counts = self.state[p], plan.counts_of(i)
        if p in self._counts and (state or self._kept.grads[i] is not None):
            counts.copy_(self._counts[p])
        elif state:  # from a checkpoint
            counts[Count.UPDATES].fill_(self._updates_in(state))
            has_prev = state.get("prev_param" if self._same_batch else "prev_grad") is not None
            counts[Count.HAS_PREV].fill_(float(has_prev))
        for key in self._state_keys(group):
            if state.get(key) is None:
                state[key] = torch.zeros_like(p, dtype=self._options.state_dtype, memory_format=torch.preserve_format)
                if key != "max_exp_avg_sq":  # the rule starts anew
                    counts[Count.UPDATES].zero_()
        if self._options.master_weights and p.dtype in HALVES and state.get(MASTER) is None:
            state[MASTER] = p.detach().float()
        if not self._same_batch:
            state.pop("prev_param", None)
        if not self._keeps_prev():  # one that was kept so far would be an older step's when it is needed again
            state.pop("prev_grad", None)
            self._kept.grads[i] = self._kept.versions[i] = None
            if not self._same_batch:
                counts[Count.HAS_PREV].zero_()
        elif self._options.prev_grad == "swap":
            if isinstance(prev := state.get("prev_grad"), Tensor):
                self._kept.grads[i], self._kept.versions[i] = prev, version(prev)
            state["prev_grad"] = None  # by the name, torch's tools find one in a flattened checkpoint
        else:
            prev = state.get("prev_grad")
            half = self._options.prev_grad == "bfloat16"
            if prev is None:
                dtype = torch.bfloat16 if half else (p if p.grad is None else p.grad).dtype
                state["prev_grad"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
                counts[Count.HAS_PREV].zero_()
            elif half or prev.dtype == torch.bfloat16:  # a checkpoint may have kept it in the other way
                state["prev_grad"] = prev.to(torch.bfloat16 if half else p.dtype)
        self._counts[p] = counts
        self._show_updates(state, counts[Count.UPDATES])
        plan.states[i] = state

    def _updates_in(self, state: dict[str, Any]) -> float:
        """Return how many updates a checkpoint's state stands for."""
        raise NotImplementedError

    def _show_updates(self, state: dict[str, Any], updates: Tensor) -> None:
        """Put the device's count of updates into the state, where torch has it there."""

    def _keeps_prev(self) -> bool:
        """Whether the previous gradient is needed; it is the direction too where there is no momentum buffer."""
        if self._same_batch:
            return False
        plain = self._rule == Rule.SGD and any(group["momentum"] == 0 for group in self.param_groups)
        return bool(self._measure & Measure.PREVIOUS) or (bool(self._measure & Measure.DIRECTION) and plain)

    def _lacks_state(self, plan: Plan) -> bool:
        """Whether a state that the rule needs was removed from ``optimizer.state``."""
        keys = [self._state_keys(group) for group in self.param_groups]
        awake = set(range(len(plan.params))) - set(plan.idle)
        return any(plan.states[i].get(key) is None for i in awake for key in keys[plan.group_of[i]])

    def _awaken(self, plan: Plan, grads: list[Tensor | None]) -> None:
        """Give parameters whose first gradient has arrived their state."""
        arrived = [i for i in plan.idle if grads[i] is not None]
        if arrived:
            self._refuse(plan, grads)
            for i in arrived:
                self._fill_state(plan, i)
            plan.idle = [i for i in plan.idle if grads[i] is None]
            plan.entries = list(self.state.values())

    def _refuse(self, plan: Plan, grads: list[Tensor | None]) -> None:
        """Raise for a gradient or a state that no kernel takes, before anything is changed."""
        name = type(self).__name__
        ours = {*self._states, MASTER, "prev_grad", "prev_param"}
        for p, grad, state, kept in zip(plan.params, grads, plan.states, self._kept.grads, strict=True):
            if grad is None:
                continue
            shape = tuple(p.shape)
            for key, value in (state if kept is None else {**state, "prev_grad": kept}).items():
                if isinstance(value, Tensor) and key in ours:
                    _check_shape(p, key, value)
            check(
                grad.layout == torch.strided,
                f"{name} takes no sparse gradients, and got one of shape {shape}; use sparse=False, or torch.optim",
            )
            check(
                grad.dtype in (p.dtype, torch.float32),
                f"{name} takes gradients of the parameter's dtype or float32; got {grad.dtype} for {p.dtype} {shape}",
            )
            check(grad.device == p.device, f"{name} got a gradient on {grad.device} for a parameter on {p.device}")

    # -- the step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step, of which neither hooks nor profiler know."""
        if is_in_torch_dispatch_mode():
            on_host([], torch.float64)  # refuses a FakeTensorMode; the step may make no tensor of its own
        loss, probe = None, None
        if closure is not None:
            closure = torch.enable_grad()(closure)
            probe = self._gradients_at_last_point(closure) if self._same_batch else None
            loss = closure()
        plan = self._plan
        if self._is_capturing():
            self._check_capture(plan)
        if plan is None or not plan.is_current(self):
            plan = self._make_plan()
        grads: list[Tensor | None] = ops.gradients(plan.params)
        if plan.spread is not None:
            grads = plan.spread.aligned(plan.params, grads)
        if self._controller.is_new and closure is None and self._rehearses(plan, grads):
            return loss
        self._rehearsed = False
        check(closure is not None or not self._same_batch, "gala(mode='same_batch') needs step(closure)")
        self._refresh_hyper(plan)
        if self._options.process_group is None and all(grad is None for grad in grads):
            return loss  # nothing to do, and no step of the schedule
        if plan.idle:
            self._awaken(plan, grads)
        if self._eager:  # the others find out themselves, and say so at once
            self._refuse(plan, grads)
            plan = self._make_plan() if self._lacks_state(plan) else plan
        try:
            self._launch(plan, grads, probe)
        except ValueError:
            self._refuse(plan, grads)
            if not self._lacks_state(plan):
                raise
            self._launch(self._make_plan(), grads, probe)
        return loss

    _observed_step = Optimizer.profile_hook_step(_step)

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Measure, decide and apply, in one call.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss (default: None).
                ``gala(mode="same_batch")`` needs one and calls it twice, first at the previous point, with the same
                random numbers and without moving any module's buffers.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ValueError: a gradient or a hyper-parameter cannot be used; nothing has been changed then.
            RuntimeError: a gradient kept by ``prev_grad="swap"`` was changed in place, or the step cannot be captured
                in a graph; likewise.
        """
        wrapped = getattr(type(self).step, "hooked", None) is True  # by torch, as where a subclass has its own
        if wrapped or not self._is_observed():
            return self._step(closure)
        return self._observed_step() if closure is None else self._observed_step(closure)

    step.hooked = "by itself"  # type: ignore[attr-defined]  # or torch would wrap it in hooks and profiler

    def _is_observed(self) -> bool:
        """Whether there are hooks on the step, or a profiler is at work; else it is a sixth faster on a small model."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd.profiler._is_profiler_enabled
        )

    def _is_capturing(self) -> bool:
        first = self.param_groups[0]["params"]
        return bool(first) and first[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _check_capture(self, plan: Plan | None) -> None:
        """Refuse to be captured in a graph where replaying it would not do what the steps would have done."""
        if why := self._controller.why_not_captured() or self._why_not_captured(plan):
            raise RuntimeError(f"lrkernels: this step cannot be captured in a graph: {why}; {WARM_UP}")
        self._captured = True

    def _why_not_captured(self, plan: Plan | None) -> str:
        """Return what in the parameters or settings stands against a capture, or an empty string."""
        if plan is None or not plan.is_current(self):
            return "its parameters or states have changed since the last one"
        idle = set(plan.idle)
        missing = [p for i, p in enumerate(plan.params) if p.grad is None and i not in idle]
        if missing:
            return f"{len(missing)} parameters have no gradient, one of them of shape {tuple(missing[0].shape)}"
        late = [plan.params[i] for i in plan.idle if plan.params[i].grad is not None]
        if late:
            return f"{len(late)} parameters have their first gradient, one of them of shape {tuple(late[0].shape)}"
        if self._options.prev_grad == "swap" and self._keeps_prev():
            return "prev_grad='swap' keeps a tensor that the graph writes again; use prev_grad='store'"
        if self._same_batch:
            return "gala(mode='same_batch') has the host evaluate the closure twice; use mode='consecutive'"
        if plan.several:
            return "its parameters are on several devices, and a graph has one; make one optimizer for each"
        rates = [group["lr"] for group in self.param_groups]
        if any(isinstance(rate, Tensor) and rate.device.type == "cpu" for rate in rates):
            return "a rate is a tensor on the CPU; make it a float, or a tensor on the device"
        return ""

    def _rehearses(self, plan: Plan, grads: list[Tensor | None]) -> bool:
        """Make the states and no step of it, if all rates and gradients are 0 and nothing has been updated.

        So ``torch.distributed.checkpoint.state_dict`` has an optimizer make the tensors that it loads into.
        """
        for group in self.param_groups:
            self._check_group(group)
        rates = [group["lr"] for group in self.param_groups]
        if any((isinstance(rate, Tensor) and rate.device.type != "cpu") or rate != 0 for rate in rates):
            return False  # a rate on the device is not waited for; nor would that function have put it there
        self._refuse(plan, grads)
        zero = not self.state and not any(bool(local(grad).any()) for grad in grads if grad is not None)
        if plan.spread is not None:
            zero = plan.spread.agree(zero, plan.device)
        if zero:
            self._awaken(plan, grads)
            for p in plan.params if self._same_batch else ():
                self.state[p]["prev_param"] = p.clone()
            if self._options.prev_grad == "swap" and self._keeps_prev():
                self._keep_grads(plan, grads, False, None)
            self._rehearsed = True
        return zero

    def _gradients_at_last_point(self, closure: Callable[[], Any]) -> dict[Tensor, Tensor]:
        """Return this batch's gradients where the parameters were before the last update."""
        points = {p: state["prev_param"] for p, state in self.state.items() if "prev_param" in state}
        for p, point in points.items():
            _check_shape(p, "prev_param", point)
        params = [p for group in self.param_groups for p in group["params"]]
        return gradients_at(points, closure, params) if points else {}

    def _launch(self, plan: Plan, grads: list[Tensor | None], probe: Mapping[Tensor, Tensor] | None = None) -> None:
        controller, run = self._controller, self._run
        assert run is not None
        prev_read: Any = None
        prev_write: Any = None
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if isinstance(found_inf, int | float):  # torch.amp.GradScaler's sum over no gradients at all
            found_inf = torch.full((1,), float(found_inf), device=controller.device)
        if probe is not None:
            prev_read = [probe.get(p) for p in plan.params]
            if plan.spread is not None:
                prev_read = plan.spread.aligned(plan.params, prev_read)
            before = [(p, p.clone()) for p, grad in zip(plan.params, grads, strict=True) if grad is not None]
        elif self._keeps_prev():
            if self._options.prev_grad == "swap":
                prev_read = self._kept_grads(plan)
            else:
                prev_write = (plan.states, "prev_grad")
        spread = plan.spread
        params, states, here = plan.params, plan.states, grads
        if spread is not None:
            params, states, here = spread.parts(params), spread.states(states), spread.parts(grads)
            prev_read = prev_read and spread.parts(prev_read)
            prev_write = prev_write and (states, "prev_grad")
        controller.before_step()

        def call(
            verbs: int,
            grads: list[Tensor | None],
            control: Tensor = controller.control,
            history: Tensor = controller.history,
            two_pass: bool = self._two_pass,
        ) -> None:
            run(
                verbs,
                self._rule,
                self._measure,
                two_pass,
                params,
                grads,
                *((states, key) if key else None for key in self._states),
                (states, MASTER) if self._options.master_weights else None,
                prev_read,
                prev_write,
                plan.groups,
                plan.counts,
                control,
                controller.settings,
                self._lr,
                self._hyper_rows,
                controller.table,
                controller.decay,
                history,
                found_inf,
                grad_scale,
            )

        if not self._eager and is_in_torch_dispatch_mode():
            self._announce(plan, grads)
        if spread is None:
            call(Verb.STEP, here)
        else:
            spread.step(call, here, controller, self._measure, self._two_pass, found_inf is not None)
            spread.raise_versions(plan.params, grads)
        controller.after_step()
        may_skip = found_inf is not None or self._options.skip_nonfinite
        if probe is not None:
            skipped = controller.control[Control.SKIP] != 0
            for p, point in before:
                old = self.state[p].get("prev_param") if may_skip else None
                self.state[p]["prev_param"] = point if old is None else torch.where(skipped.to(p.device), old, point)
        elif prev_read is not None:
            self._keep_grads(plan, grads, may_skip, grad_scale)

    @staticmethod
    def _announce(plan: Plan, grads: list[Tensor | None]) -> None:
        """Write each parameter's own values to it, so that a dispatch mode knows: it does not see the kernels write.

        So ``torch.autograd.graph.allow_mutation_on_saved_tensors`` saves the old values for a backward pass.
        """
        for p, grad in zip(plan.params, grads, strict=True):
            if grad is not None:
                p.copy_(p)

    def _keep_grads(self, plan: Plan, grads: list[Tensor | None], may_skip: bool, grad_scale: Tensor | None) -> None:
        """Keep the gradients for the next step; copies of them where they are scaled, or the step may be skipped."""
        if grad_scale is not None or may_skip:
            skipped = self._controller.control[Control.SKIP] != 0
            for i, (old, grad) in enumerate(zip(self._kept.grads, grads, strict=True)):
                if grad is not None and grad_scale is not None:
                    grad = grad * (1.0 / grad_scale.double()).to(grad.device, grad.dtype, non_blocking=True)
                if grad is not None and may_skip:
                    old = torch.zeros_like(grad) if old is None else old
                    grad = torch.where(skipped.to(grad.device, non_blocking=True), old, grad)
                grads[i] = grad
        try:
            versions = self._versions(plan, grads)
        except RuntimeError:  # torch does not count the changes of a tensor that was made in inference mode
            with torch.inference_mode(False):
                grads = [grad.clone() if grad is not None and grad.is_inference() else grad for grad in grads]
            versions = self._versions(plan, grads)
        if None in versions:  # where there is no gradient now, the last one stays
            grads = [old if grad is None else grad for old, grad in zip(self._kept.grads, grads, strict=True)]
            versions = self._versions(plan, grads)
        self._kept = Kept(plan.params, grads, versions)

    def _versions(self, plan: Plan, tensors: list[Tensor | None]) -> list[int | None]:
        """Return what rises in each when it is changed in place, be it in this process's part alone."""
        if plan.spread is None:
            return ops.versions(tensors)
        return [None if tensor is None else version(tensor) for tensor in tensors]

    def _kept_grads(self, plan: Plan) -> list[Tensor | None]:
        """Return the gradients kept by ``prev_grad="swap"``, unless one was changed in place since."""
        params, grads, versions = self._kept
        new = []
        if versions != (now := self._versions(plan, grads)):
            for i, p in enumerate(params):
                if now[i] != versions[i] and p in self._told:  # said once: it goes on without it
                    grads[i] = versions[i] = None
                elif now[i] != versions[i]:
                    new.append(p)
        self._told = set(new)
        if new:
            raise RuntimeError(
                "lrkernels: prev_grad='swap' keeps each gradient until the next step, and the one of shape "
                f"{tuple(new[0].shape)} was changed in place since, so it is lost; call "
                "zero_grad(set_to_none=True), which lets go of it, or use prev_grad='store' (as with "
                "DistributedDataParallel's gradient_as_bucket_view=True, whose gradients stay its own)"
            )
        return grads

    # -- what a user sees ---------------------------------------------------------------------------------------------

    def observe(self, value: float | Tensor) -> None:
        """Give ``volsched`` its signal for the coming step, such as the batch's accuracy; nothing waits.

        Other schedules leave it aside.

        Args:
            value: a float, or a tensor of one element on any device. One that is not finite is left out.
        """
        if self._plan is None or not self._plan.is_current(self):
            self._make_plan()
        self._controller.observe(value)

    @property
    def stats(self) -> Stats:
        """The last step's statistics: a mapping of 0-dim float64 tensors on the device, of what is measured.

        ``step`` (completed updates), ``lr`` (of the first group), ``grad_norm`` and ``grad_norm_l1`` (before clipping),
        ``direction_cosine`` (of this gradient with the previous update's direction), ``alignment`` (dot product with
        the previous gradient) and ``cosine`` (the same over both norms), ``curvature`` (the change of the gradient over
        the length of the previous move), ``clip`` (the factor on the gradient), ``skipped`` (steps so far that
        were skipped, by a gradient scaler or ``skip_nonfinite``).
        """
        return self._controller.stats(self._measure, self._options.clipping)

    @property
    def open_loop(self) -> Callable[[int], float] | None:
        """The open-loop part of ``schedule``, or None."""
        return self._controller.open_loop

    @property
    def closed_loop(self) -> ClosedLoop | None:
        """The closed-loop part of ``schedule``, or None."""
        return self._controller.closed_loop

    def history(self) -> dict[str, NDArray[np.float64]]:
        """Return ``stats`` over the last ``history_size`` steps, oldest first, as arrays; one copy to the host."""
        return self._controller.read_history(self._measure, self._options.clipping)

    def __repr__(self) -> str:
        """As in torch, without the control tensor."""
        control = self.param_groups[0].pop(CONTROL_KEY, None)
        try:
            return super().__repr__()
        finally:
            if control is not None:
                self.param_groups[0][CONTROL_KEY] = control

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return torch's own form; one more key of the first group holds what decides the next rate."""
        self._adopt_control()
        with self._hooks_aside(POST_SAVE):
            packed = super().state_dict()
        for group in packed["param_groups"]:
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].clone()
        packed["param_groups"][0][CONTROL_KEY] = self._controller.control.clone()
        return self._hooked(POST_SAVE, {**packed, "state": states_to_save(self)})

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of torch's, into the tensors that are there.

        Raises:
            ValueError: the checkpoint is not one of this model's; nothing has been changed then.
        """
        if isinstance(state_dict, dict):
            state_dict = self._hooked(PRE_LOAD, state_dict.copy())
        flat = [p for group in self.param_groups for p in group["params"]]
        saved = check_checkpoint(self, state_dict, flat)
        control = state_dict["param_groups"][0].get(CONTROL_KEY)
        old_groups = list(self.param_groups)
        old_state = {p: dict(self.state[p]) for p in flat if p in self.state}
        with self._hooks_aside(PRE_LOAD, POST_LOAD):
            super().load_state_dict(state_dict)
        for group, old in zip(self.param_groups, old_groups, strict=True):
            for key, value in old.items():
                group.setdefault(key, value)
            if isinstance(old["lr"], Tensor):  # the same tensor goes on, for whoever holds it
                group["lr"] = old["lr"].copy_(torch.as_tensor(group["lr"], device=old["lr"].device))
        restore(self, flat, saved, old_state)
        self._begin_from(control)
        for hook in getattr(self, POST_LOAD).values():
            hook(self)
        if self._captured:  # a replay reads what is there now, and asks nobody
            self._refresh_hyper(self._make_plan())

    @contextlib.contextmanager
    def _hooks_aside(self, *names: str) -> Iterator[None]:
        """Disable these hooks while torch's own method runs: they must see the whole checkpoint."""
        hooks = {name: getattr(self, name) for name in names}
        self.__dict__.update({name: OrderedDict() for name in names})
        try:
            yield
        finally:
            self.__dict__.update(hooks)

    def _hooked(self, name: str, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return what the hooks make of it."""
        for hook in getattr(self, name).values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what the next step makes anew."""
        own = {key: self.__dict__[key] for key in _PICKLED}
        own["_kept"] = self._kept._replace(grads=[x if x is None else x.detach() for x in self._kept.grads])
        return {**super().__getstate__(), **own, "_counts": {p: row.clone() for p, row in self._counts.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; the next step makes a new plan."""
        super().__setstate__(state)
        if "_kept" in state:  # a copy, not a checkpoint being loaded; copies of tensors count their versions from 0
            params, grads, _ = self._kept
            self._kept = Kept(params, grads, [None if grad is None else version(grad) for grad in grads])
            self._run = self._lr = self._all_counts = None
            self._rates, self._captured, self._outlived = [], False, []
        self._plan = self._seen = self._keys = None
        self._told = set()
