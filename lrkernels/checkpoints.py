"""What a checkpoint holds, what it must be before anything of it is loaded, and how its states come back in place."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import check, is_real
from .distributed import same_spread
from .layout import ClosedLoopKind, Control, Count, Setting

if TYPE_CHECKING:
    from .control import Controller
    from .fused import FusedOptimizer

__all__ = ["CONTROL_KEY", "MASTER", "check_checkpoint", "check_control", "restore", "states_to_save"]

MASTER = "master_param"  # the float32 parameter behind one of 16 bits, in its state
CONTROL_KEY = "lrkernels_control"  # the control tensor, in the first group
_LATER = {"decoupled_weight_decay", "zero_init_momentum", "maximize"}  # torch's checkpoints lack these, or did


def check_checkpoint(
    optimizer: FusedOptimizer, state_dict: dict[str, Any], flat: list[Tensor]
) -> dict[int, dict[str, Any]]:
    """Return a checkpoint's states by position of their parameter in ``flat``, or raise."""
    name = type(optimizer).__name__
    state: Any = state_dict.get("state") if isinstance(state_dict, dict) else None
    groups: Any = state_dict.get("param_groups") if isinstance(state_dict, dict) else None
    check(
        isinstance(state, dict) and isinstance(groups, list) and all(isinstance(g, dict) for g in groups),
        "not an optimizer's checkpoint: it has no 'state' and 'param_groups'",
    )
    lists = [group.get("params") for group in groups]
    sizes = [len(params) if isinstance(params, list | tuple) else None for params in lists]
    own = [len(group["params"]) for group in optimizer.param_groups]
    check(sizes == own, f"the checkpoint has groups of {sizes} parameters, this optimizer {own}")
    merged = [{**group, **saved_group} for saved_group, group in zip(groups, optimizer.param_groups, strict=True)]
    for saved_group, group in zip(groups, merged, strict=True):
        lacking = [key for key in ("lr", *optimizer._hyper_names) if key not in {*_LATER, *saved_group}]
        check(not lacking, f"the checkpoint's groups lack {lacking}: it is not one of {name}")
        optimizer._check_group(group)
    optimizer._check_together(merged)
    ids = [key for group in groups for key in group["params"]]
    check(
        all(isinstance(key, int | str) for key in ids) and len(set(ids)) == len(ids),
        "the checkpoint's groups do not number or name their parameters",
    )
    saved = {i: state[key] for i, key in enumerate(ids) if key in state}
    known = {key for key in optimizer._states if key} | {"step", "prev_grad", "prev_param", MASTER}
    for i, entry in saved.items():
        check(isinstance(entry, dict), f"the checkpoint's state of parameter {i} is {type(entry).__name__}")
        foreign = [key for key in entry if key not in known]
        check(not foreign, f"the checkpoint has {foreign}, which {name} has not: it is another optimizer's")
        check(
            optimizer._options.master_weights or entry.get(MASTER) is None,
            "the checkpoint has float32 masters of its parameters; give the optimizer master_weights=True",
        )
        absent = [key for key in optimizer._required if entry and entry.get(key) is None]
        check(not absent, f"the checkpoint's state of parameter {i} lacks {absent}")
        for key, value in entry.items():
            if value is None:
                continue
            if key == "step":
                count = value.numel() == 1 and is_real(value) if isinstance(value, Tensor) else True
                count = count and isinstance(value, numbers.Real | Tensor)
                check(
                    count and 0.0 <= float(value) < math.inf,
                    f"the checkpoint's step of parameter {i} is {value!r}, not a count",
                )
                continue
            check(
                not isinstance(value, Tensor) or (value.is_floating_point() and is_real(value)),
                f"the checkpoint's {key} of parameter {i} is not a dense tensor of a floating-point dtype",
            )
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            check(
                shape == tuple(flat[i].shape),
                f"the checkpoint's {key} of parameter {i} is {shape}, the parameter {tuple(flat[i].shape)}",
            )
            check(
                same_spread(value, flat[i]),
                f"the checkpoint's {key} of parameter {i} and the parameter itself are not spread alike over the "
                "processes; load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict",
            )
    check_control(groups[0].get(CONTROL_KEY), optimizer._controller)
    return saved


def check_control(control: Any, controller: Controller) -> None:
    """Raise unless a checkpoint's control tensor may take the place of the controller's."""
    if control is None:
        return
    check(
        isinstance(control, Tensor) and control.shape == controller.control.shape,
        "the checkpoint's schedule state has another size; give the optimizer the schedule it was saved with",
    )
    check(is_real(control), f"the checkpoint's schedule state is garbled: a tensor of {control.dtype}")
    values = control.tolist()
    for slot in (Control.STEP, Control.SKIPPED, Control.SIGNALS, Control.FACTOR, Control.NEXT_FACTOR):
        whole = "FACTOR" in slot.name or values[slot] % 1 == 0
        check(
            0.0 <= values[slot] < math.inf and whole,
            f"the checkpoint's schedule state is garbled: {slot.name} is {values[slot]}",
        )
    loop, log_factor = int(controller.settings[Setting.CLOSED_LOOP]), values[Control.LOG_FACTOR]
    foreign = log_factor != 0 and loop != ClosedLoopKind.ALIGNMENT
    foreign |= (values[Control.NUMERATOR] != 0 or values[Control.DENOMINATOR] != 0) and loop != ClosedLoopKind.GALA
    foreign |= values[Control.NEXT_FACTOR] != 1 and loop == ClosedLoopKind.OPEN
    check(
        not foreign,
        "the checkpoint's schedule state is that of another closed loop; give the optimizer the schedule it was saved "
        "with, or drop the key 'lrkernels_control' from the checkpoint's first group to begin the schedule anew",
    )


def states_to_save(optimizer: FusedOptimizer) -> dict[int, dict[str, Any]]:
    """Return the states by position of their parameter, without those that no update has filled yet."""
    flat = [p for group in optimizer.param_groups for p in group["params"]]
    saved: dict[int, dict[str, Any]] = {}
    known: dict[Tensor, list[float]] = {}
    kept = dict(zip(optimizer._kept.params, optimizer._kept.grads, strict=True))
    for device in {row.device for row in optimizer._counts.values()}:
        rows = {p: row for p, row in optimizer._counts.items() if row.device == device}
        known |= zip(rows, torch.stack(list(rows.values())).tolist(), strict=True)
    for i, p in enumerate(flat):
        counts = known.get(p, [1.0, 1.0])  # loaded, and no step since
        started = counts[Count.UPDATES] != 0 or optimizer._rehearsed
        if p not in optimizer.state or not (started or optimizer._required == ()):
            continue
        state = optimizer.state[p]
        left_out = ("prev_grad",) if started else ("prev_grad", *optimizer._states)
        entry = {key: value for key, value in state.items() if key not in left_out}
        if "step" in entry:
            entry["step"] = entry["step"].clone()
        has_prev = counts[Count.HAS_PREV] != 0 or optimizer._rehearsed
        prev = state.get("prev_grad") if kept.get(p) is None else kept[p]
        if has_prev and prev is not None:
            entry["prev_grad"] = prev.detach()  # create_graph=True leaves a graph on it
        if entry:
            saved[i] = entry
    return saved


def restore(
    optimizer: FusedOptimizer,
    flat: list[Tensor],
    saved: dict[int, dict[str, Any]],
    old_state: dict[Tensor, dict[str, Any]],
) -> None:
    """Put the states that torch has loaded into the tensors of ``old_state``, in their own dtypes."""
    for i, p in enumerate(flat):
        for key, value in saved.get(i, {}).items():  # torch has rounded them to the parameter's dtype
            if isinstance(value, Tensor) and key != "step":
                moment = key in optimizer._states
                dtype = (optimizer._options.state_dtype or p.dtype) if moment else value.dtype
                optimizer.state[p][key] = value.to(p.device, dtype)
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and key != "step":
                old = old_state.get(p, {}).get(key)
                if isinstance(old, Tensor) and old.dtype == value.dtype:
                    optimizer.state[p][key] = old.copy_(value)
                else:
                    with torch.inference_mode(False):  # or no step outside of it could write to the state
                        fresh = torch.empty_like(p, dtype=value.dtype)
                    optimizer.state[p][key] = fresh.copy_(value)
