"""What a step hands to the kernels besides the gradients: parameters, states and counts, flat and in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .checkpoints import CONTROL_KEY
from .checks import check, on_host
from .devices import places_of
from .distributed import spread_of, where_added_up
from .layout import Count

if TYPE_CHECKING:
    from .fused import FusedOptimizer

__all__ = ["Kept", "Plan"]


class Kept(NamedTuple):
    """What ``prev_grad="swap"`` keeps: a gradient for each of the plan's parameters, and its version then; or None."""

    params: list[Tensor]
    grads: list[Tensor | None]
    versions: list[int | None]


class Plan:
    """All parameters with their states. It serves until groups, states or the device change."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        flat = [(p, i) for i, group in enumerate(optimizer.param_groups) for p in group["params"]]
        self.lists = [list(group["params"]) for group in optimizer.param_groups]
        self.params = [p for p, _ in flat]
        self.group_of = [i for _, i in flat]
        self.groups = on_host(self.group_of, torch.int32)
        self.devices, self._at = places_of(self.params)
        self.devices = self.devices or [where_added_up(optimizer._options.process_group)]
        self.device = self.devices[0]  # of the small tensors
        self.spread = spread_of(self.params, optimizer._options.process_group, optimizer._measure)
        self._check_devices()
        counts = [torch.zeros(len(flat), len(Count), dtype=torch.float32, device=device) for device in self.devices]
        self.several = len(counts) > 1
        self.counts: Any = counts if self.several else counts[0]
        self.state = optimizer.state
        self.states: list[dict[str, Any]] = [{} for _ in self.params]
        self.idle = [i for i, p in enumerate(self.params) if p not in self.state]  # no gradient so far
        self.entries = list(self.state.values())

    def _check_devices(self) -> None:
        names = ", ".join(map(str, self.devices))
        check(
            len({device.type for device in self.devices}) == 1,
            f"parameters on several devices of different kinds ({names}): make one optimizer for each",
        )
        check(
            len(self.devices) == 1 or self.spread is None,
            f"parameters on several devices ({names}) and spread over processes: make one optimizer for each device",
        )

    def counts_of(self, i: int) -> Tensor:
        """Return the row of parameter ``i``, on its device."""
        return self.counts[self._at[i]][i] if self.several else self.counts[i]

    def is_current(self, optimizer: FusedOptimizer) -> bool:
        """Whether nobody has exchanged the parameters, the states or the control tensor, or moved the parameters."""
        lists = [group["params"] for group in optimizer.param_groups]
        return (
            len(lists) == len(self.lists)
            and all(map(ops.holds, lists, self.lists))
            and optimizer.param_groups[0].get(CONTROL_KEY) is optimizer._controller.control
            and self.state is optimizer.state
            and ops.holds(self.state, self.entries)
            and (not self.params or self.params[0].device == self.device)
        )
