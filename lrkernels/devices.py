"""Parameters on several devices in one optimizer: a call of the kernels on each, and the sums over all gradients.

As with several processes (distributed.py), each device measures what it has, and the sums are added up. In one pass
the first device decides for all; in two passes each of them decides alike. What goes from device to device is queued
on their current streams, and the host waits for none of it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .layout import SUMS_AT, Control, Measure, Sum, Verb

__all__ = ["DevicesRunner", "device_of", "places_of", "runner_for"]


def device_of(param: Tensor) -> torch.device:
    """Return where a parameter is: a function of its own so that tests can have several devices on one CPU."""
    return param.device


def places_of(params: list[Tensor]) -> tuple[list[torch.device], list[int]]:
    """Return the parameters' devices, each once and in their order, and which of them each parameter is on."""
    places = [device_of(p) for p in params]
    devices = list(dict.fromkeys(places))
    return devices, [devices.index(device) for device in places]


def runner_for(devices: list[torch.device], backend: str | None) -> Callable[..., None]:
    """Return what runs a step over parameters on these devices."""
    return ops.backend_for(devices[0], backend) if len(devices) == 1 else DevicesRunner(devices, backend)


class DevicesRunner:
    """Runs a step over several devices by a runner for each; takes what one of these takes, but ``counts`` of each.

    A runner gets every row, but only its own device's gradients. Each device has a copy of the small tensors, in which
    a step leaves the same on all of them; the first device's are those that the host reads and writes.
    """

    def __init__(self, devices: list[torch.device], backend: str | None) -> None:
        self.devices = devices
        self.runners = [ops.backend_for(device, backend) for device in devices]
        self._copies = [_Copies(devices) for _ in range(4)]
        self._rings: list[Tensor] = []  # the others' histories, which nobody reads
        self._params: list[Tensor] = []
        self._at: list[int] = []  # which device each of them is on

    def __call__(
        self, verbs: int, rule: int, measure: int, two_pass: bool, params: list[Tensor], grads: list[Any], *rest: Any
    ) -> None:
        """Run a whole step, or raise and change nothing."""
        assert verbs == Verb.STEP
        *columns, groups, counts, control, settings, lr, hyper, table, decay, history, found_inf, grad_scale = rest
        if params is not self._params:
            self._params, (_, self._at) = params, places_of(params)
        if not self._rings:
            self._rings = [torch.empty_like(history[:1], device=device) for device in self.devices[1:]]
        small = [copies.of(tensor) for copies, tensor in zip(self._copies, (control, lr, table, decay), strict=True)]
        calls = []
        for k, (mine, of_lr, of_table, of_decay) in enumerate(zip(*small, strict=True)):
            here = [grad if at == k else None for grad, at in zip(grads, self._at, strict=True)]
            ring = self._rings[k - 1] if k else history
            verdict = [x if x is None else x.to(self.devices[k], non_blocking=True) for x in (found_inf, grad_scale)]
            arguments = (groups, counts[k], mine, settings, of_lr, hyper, of_table, of_decay, ring, *verdict)
            calls.append((self.runners[k], (rule, measure, two_pass, params, here, *columns, *arguments)))

        def run(verbs: Verb, on: slice = slice(None)) -> None:
            for runner, arguments in calls[on]:
                runner(verbs, *arguments)

        run(Verb(0), on=slice(1, None))  # nothing but the checks: none may fail after the first device has gone on
        if not measure:
            return run(Verb.STEP)
        controls: list[Tensor] = small[0]
        sums = [each[SUMS_AT : SUMS_AT + len(Sum)] for each in controls]
        if not two_pass:
            run(Verb.MEASURE | Verb.APPLY)
            _add_up(sums)
            run(Verb.DECIDE, on=slice(1))
            return self._copies[0].renew()
        run(Verb.MEASURE)
        _add_up(sums)
        run(Verb.DECIDE | Verb.APPLY)
        if measure & Measure.MOVE:
            moves = [each[SUMS_AT + Sum.MOVE_SQ] for each in controls]
            _add_up(moves)
            for each, move in zip(controls, moves, strict=True):
                last = each[Control.LAST_MOVE_SQ]
                last.copy_(torch.where(each[Control.SKIP] != 0, last, move))
        self._copies[0].are_equal()
        return None


class _Copies:
    """A tensor on the first device, and copies of it on the others, renewed when the host has written to it."""

    def __init__(self, devices: list[torch.device]) -> None:
        self._devices = devices
        self._tensors: list[Tensor] = []
        self._version = -1

    def of(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensor and its copies as they should be now."""
        if not self._tensors or self._tensors[0] is not tensor:
            self._tensors = [tensor, *(torch.empty_like(tensor, device=device) for device in self._devices[1:])]
            self._version = -1
        if self._version != tensor._version:  # the kernels do not count
            self.renew()
        return self._tensors

    def renew(self) -> None:
        """Copy the first to the others."""
        for copy in self._tensors[1:]:
            copy.copy_(self._tensors[0], non_blocking=True)
        self.are_equal()

    def are_equal(self) -> None:
        """Take note that what has been written was written to all of them."""
        self._version = self._tensors[0]._version


def _add_up(parts: list[Tensor]) -> None:
    """Put the sum into each of them; the same bits, so that all devices decide alike."""
    total = functools.reduce(operator.add, [part.to(parts[0].device, non_blocking=True) for part in parts])
    for part in parts:
        part.copy_(total, non_blocking=True)
