"""What a checkpoint has beyond torch's, and what it must be before anything of it is loaded."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .checks import check, is_real
from .distributed import same_spread
from .layout import ClosedLoopKind, Control, Setting

if TYPE_CHECKING:
    from .control import Controller
    from .fused import FusedOptimizer

__all__ = ["CONTROL_KEY", "MASTER", "check_checkpoint", "check_control"]

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
