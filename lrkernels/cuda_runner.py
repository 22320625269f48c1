"""CUDA: what one optimizer's steps need on the device besides its tensors, and the call of the C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops

__all__ = ["CudaRunner"]

_orphans: list[tuple[Tensor, torch.cuda.Event]] = []  # of runners that ended while a graph was captured


class CudaRunner:
    """Runs the verbs by one launch of the C++ kernels on the current stream, with memory of its own for it.

    The kernels leave their counters at zero, so steps of one runner must follow one another, on one stream or on
    streams that wait for each other, as any use of the parameters has to. Steps of different runners may overlap.

    A few hundred rows go along as an argument of the launch. More are copied from pinned memory, which must stay as it
    is until the copy is made; for a captured step that is as long as its graph may be replayed, so the runner keeps it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Tensor | None = None
        self._list: Tensor | None = None
        self._pinned: list[tuple[Tensor, torch.cuda.Event]] = []  # with the last use of each
        self._spare: Tensor | None = None  # never used so far: what a capture takes, since it cannot make one
        self._captured: list[Tensor] = []  # what replays may use

    def __del__(self) -> None:
        """Wait for the copies that are under way: the memory they read may be anyone's after this."""
        if self._pinned and torch.cuda.is_current_stream_capturing():  # by which an event may not be asked anything
            _orphans.extend(self._pinned)
            return
        for _, event in self._pinned:
            event.synchronize()

    def __call__(self, *arguments: Any) -> None:
        """Run the verbs; a tensor whose layout differs from its parameter's goes through a copy."""
        if torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):  # torch's own switch wakes no device that nobody uses
                return self(*arguments)
        capturing = torch.cuda.is_current_stream_capturing()
        pinned = self._free_pinned(capturing)
        try:
            uneven, rows = ops._C.run(*arguments, self._workspace(pinned))
        except BufferError as short:
            if capturing:
                raise RuntimeError(
                    "lrkernels: this step needs memory that cannot be had while a graph is captured; take one step "
                    "with the same gradients before the capture"
                ) from None
            self._grow(*short.args)
            pinned = self._free_pinned(capturing)
            uneven, rows = ops._C.run(*arguments, self._workspace(pinned))
        if pinned is not None and not capturing:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._pinned.append((pinned, event))
        elif pinned is not None and not uneven:  # where nothing was launched, the next call takes it
            self._captured.append(pinned)
            self._spare = None
        return ops.after_run(self, uneven, rows, *arguments)

    def _workspace(self, pinned: Tensor | None) -> tuple[int, int, int, int, int] | None:
        if self._memory is None:
            return None
        memory = (self._memory.data_ptr(), self._memory.numel())
        if self._list is None or pinned is None:
            return (*memory, 0, 0, 0)
        return (*memory, self._list.data_ptr(), pinned.data_ptr(), pinned.numel())

    def _grow(self, memory: int, rows: int) -> None:
        self._captured += [old for old in (self._memory, self._list) if old is not None]
        if self._memory is None or self._memory.numel() < memory:
            self._memory = torch.zeros(memory, dtype=torch.uint8, device=self._device)
        if rows and (self._list is None or self._list.numel() < rows):
            self._list = torch.empty(rows, dtype=torch.uint8, device=self._device)
            self._captured += [pinned for pinned, _ in self._pinned]  # a copy from one may be under way
            self._pinned, self._spare = [], None

    def _free_pinned(self, capturing: bool) -> Tensor | None:
        """Return pinned memory that no copy reads any more; nothing waits for one."""
        if self._list is None:
            return None
        if capturing:
            if self._spare is None:
                raise RuntimeError(
                    "lrkernels: an optimizer of this many parameters takes one step outside before each capture"
                )
            return self._spare
        if self._spare is None:
            self._spare = self._new_pinned(self._list.numel())
        for i, (pinned, event) in enumerate(self._pinned):
            if event.query():
                del self._pinned[i]
                return pinned
        return self._new_pinned(self._list.numel())

    @staticmethod
    def _new_pinned(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
