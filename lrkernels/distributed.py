"""Parameters spread over processes: the memory that the kernels get of them, and the sums over the whole model.

Torch does the distributing. Here a ``DTensor`` becomes this process's part of it, and the packed sums are added up.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check, warn
from .control import Controller
from .layout import STATS, Control, Measure, Sum, Verb

__all__ = ["Spread", "is_spread", "local", "same_spread", "spread_of", "version", "where_added_up"]

T = TypeVar("T", bound=Tensor | None)


def is_spread(tensor: Any) -> bool:
    """Whether it is a ``DTensor``, without importing their module, which takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """Return this process's part of a ``DTensor``, once it has arrived; anything else as it is."""
    part = getattr(tensor, "_local_tensor", tensor)  # to_local() makes a view of a parameter, at 4 us each
    return part if type(part) is Tensor or not hasattr(part, "wait") else part.wait()


def version(tensor: Tensor) -> int:
    """Return a count that rises when the tensor is changed in place, be it as a whole or in this process's part."""
    return tensor._version if not is_spread(tensor) else tensor._version + local(tensor)._version


def same_spread(a: Any, b: Any) -> bool:
    """Whether two tensors of one shape have the same elements in this process."""
    if not (is_spread(a) and is_spread(b)):
        return is_spread(a) == is_spread(b)
    return a.device_mesh == b.device_mesh and a.placements == b.placements


def where_added_up(process_group: Any) -> torch.device:
    """Return the device on which a process without parameters takes part in the group's sums.

    It is the device that the group has a backend of its own for, as NCCL for CUDA; the CPU where one backend serves
    both, as gloo does, or where there is no other device.
    """
    if process_group is not None:
        backends = dict(pair.split(":") for pair in dist.get_backend_config(process_group).split(","))
        for kind, backend in backends.items():
            if backend != backends.get("cpu") and torch.get_device_module(kind).is_available():
                return torch.device(kind, torch.get_device_module(kind).current_device())
    return torch.device("cpu")


def spread_of(params: list[Tensor], process_group: Any, measure: int) -> Spread | None:
    """Return how the parameters are spread, or None where this process has all of them."""
    if process_group is None and measure and any(getattr(p, "_fsdp_flattened", False) for p in params):
        warn(
            "FullyShardedDataParallel's parameters are measured in this process alone; where it shards them, give "
            "process_group=, the processes that it shards over, so that norm and rate are the whole model's"
        )
    return Spread(params, process_group) if process_group is not None or any(map(is_spread, params)) else None


class Spread:
    """How one optimizer's parameters are spread over processes.

    The sums run over the processes of the largest mesh, and then over ``process_group``. An element that several
    processes of the mesh hold counts in one of them: where the coordinate of each replicated dimension is 0, on the
    mesh that has the first process. A plain tensor beside ``DTensor`` s is on all of the mesh's processes.
    """

    def __init__(self, params: list[Any], process_group: Any) -> None:
        self.at = [i for i, p in enumerate(params) if is_spread(p)]
        self.groups: list[Any] = []  # one all-reduce over each
        self.by_group = process_group is not None
        self.apart = ""  # why there can be none
        self.measured_here = [True] * len(params)
        ranks: set[int] = set()
        if self.at:
            meshes = {params[i].device_mesh: None for i in self.at}
            members = {mesh: set(mesh.mesh.flatten().tolist()) for mesh in meshes}
            ranks = self._sum_over(members)
            self.measured_here = [self._measures_here(p, min(ranks), members) for p in params]
        if process_group is not None:
            check(
                process_group is not dist.GroupMember.NON_GROUP_MEMBER,
                "this process is not in process_group, so torch would leave it out of the sums; give it the group that "
                "holds its part of the model",
            )
            both = sorted(ranks.intersection(dist.get_process_group_ranks(process_group)))
            check(
                len(both) < 2,
                f"process_group holds the ranks {both}, over which the DTensor parameters are summed already; leave it "
                "out, or give the group that holds the other parts of the model",
            )
            self.groups.append(process_group)

    def _sum_over(self, members: dict[Any, set[int]]) -> set[int]:
        """Find the groups that reach all of the largest mesh, and return its ranks."""
        mesh = max(members, key=lambda mesh: mesh.size())
        ranks = members[mesh]
        apart = [sorted(others) for others in members.values() if not others <= ranks]
        if apart or any(each.get_coordinate() is None for each in members):
            self.apart = (
                f"lrkernels: the parameters are DTensors on meshes of the ranks {sorted(ranks)} and "
                f"{apart or 'without this process'}, and no mesh holds all of them, so nothing can be measured over "
                "the whole model, nor a gradient scaler's verdict shared; put them on parts of one mesh, or make an "
                "optimizer for each"
            )
        elif mesh.size() > 1 and mesh.ndim == 1:
            self.groups = [mesh.get_group()]
        elif mesh.size() > 1:  # torch has no group for all of a mesh's processes, but for all there are
            whole = mesh.size() == dist.get_world_size()
            self.groups = [dist.group.WORLD] if whole else list(mesh.get_all_groups())
        return ranks

    def _measures_here(self, p: Any, first: int, members: dict[Any, set[int]]) -> bool:
        """Whether this process is the one that counts the parameter's elements."""
        if not is_spread(p):
            return dist.get_rank() == first
        mesh = p.device_mesh
        if self.apart or first not in members[mesh]:
            return False
        coordinates = zip(mesh.get_coordinate(), p.placements, strict=True)
        return all(at == 0 for at, placement in coordinates if placement.is_replicate())

    # -- what the kernels get -----------------------------------------------------------------------------------------

    def parts(self, tensors: Sequence[T]) -> list[T]:
        """Return the parameters' tensors as this process has them."""
        parts = list(tensors)
        for i in self.at:
            parts[i] = local(parts[i])
        return parts

    def states(self, states: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the parameters' states as this process has them."""
        parts = list(states)
        for i in self.at:
            parts[i] = {key: local(value) for key, value in parts[i].items()}
        return parts

    def aligned(self, params: list[Any], grads: Sequence[Any]) -> list[Any]:
        """Return the gradients spread as their parameters are; a gradient that is still partial is reduced first."""
        aligned = list(grads)
        for i in self.at:
            p, grad = params[i], aligned[i]
            if grad is None:
                continue
            if not is_spread(grad) or grad.device_mesh != p.device_mesh:
                raise ValueError(
                    f"lrkernels: the gradient of parameter {i}, of shape {tuple(p.shape)}, is "
                    f"{f'on {grad.device_mesh}' if is_spread(grad) else 'a plain tensor'}, the parameter a DTensor on "
                    f"{p.device_mesh}; make it one on the same mesh (torch.distributed.tensor.distribute_tensor)"
                )
            if grad.placements != p.placements:
                aligned[i] = grad.redistribute(placements=p.placements)
        return aligned

    # -- the step -----------------------------------------------------------------------------------------------------

    def step(
        self,
        call: Callable[..., None],
        grads: list[Tensor | None],
        controller: Controller,
        measure: int,
        two_pass: bool,
        verdict: bool,
    ) -> None:
        """Measure, add up over the processes, decide and apply, in either order.

        Args:
            call: runs verbs on gradients; with another control tensor and history, or in the other order, if told so.
            grads: the gradients as this process has them.
            controller: its control tensor takes the sums.
            measure: what is measured.
            two_pass: whether this step's update needs this step's sums.
            verdict: whether a gradient scaler has one, which may differ between the processes.

        A verdict comes before the update too. With ``process_group`` the sums always do, since a process without
        parameters takes part: it has no scaler, so it cannot know whether the others wait for a verdict.
        """
        if not (measure or verdict):
            return call(Verb.STEP, grads)
        if self.apart:
            raise RuntimeError(self.apart)
        if not self.groups:
            return call(Verb.STEP, grads)
        if verdict or self.by_group:
            two_pass, call = True, functools.partial(call, two_pass=True)
        mine = [grad if counts and measure else None for grad, counts in zip(grads, self.measured_here, strict=True)]
        theirs = [None if counts else grad for grad, counts in zip(grads, self.measured_here, strict=True)]
        shared = any(grad is not None for grad in theirs)
        control, sums = controller.control, controller.sums

        def add_up() -> None:  # whether to skip along with the sums
            packed = torch.cat([sums, control[Control.SKIP : Control.SKIP + 1]])
            self._add_up(packed)
            sums.copy_(packed[: len(Sum)])
            control[Control.SKIP] = (packed[-1] != 0).double()

        def apply_theirs() -> None:  # their moves are added up elsewhere, and the step is counted with mine
            if shared:
                call(Verb.APPLY, theirs, control.clone(), controller.history.new_empty(1, len(STATS)))

        if shared:
            call(Verb(0), theirs)  # nothing but the checks: no process may fail after the others have gone on
        if not two_pass:
            call(Verb.MEASURE | Verb.APPLY, mine)
            apply_theirs()
            add_up()
            return call(Verb.DECIDE, mine)
        call(Verb.MEASURE, mine)
        add_up()
        if shared and measure & Measure.MOVE:
            call(Verb.DECIDE, mine)
            apply_theirs()
            call(Verb.APPLY, mine)
        else:
            call(Verb.DECIDE | Verb.APPLY, grads)
        if measure & Measure.MOVE:
            move, last_move = sums[Sum.MOVE_SQ], control[Control.LAST_MOVE_SQ]
            self._add_up(move)
            last_move.copy_(torch.where(control[Control.SKIP] != 0, last_move, move))  # a skipped step has left it
        return None

    def raise_versions(self, params: list[Tensor], grads: list[Tensor | None]) -> None:
        """Let a backward pass that still needs the old values find out, for the ``DTensor`` s around the parts."""
        torch.autograd.graph.increment_version([params[i] for i in self.at if grads[i] is not None])

    def _add_up(self, values: Tensor) -> None:
        for group in self.groups:
            dist.all_reduce(values, group=group)

    def agree(self, condition: bool, device: torch.device) -> bool:
        """Whether it holds in all the processes."""
        votes = torch.tensor(float(not condition), dtype=torch.float64, device=device)
        self._add_up(votes)
        return float(votes) == 0.0
