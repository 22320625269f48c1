"""The host's part of a step on Triton: check the tensors, keep a table of them on the device, launch."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from .checks import check
from .layout import HYPERS, RING_AT, STATS, Count, Hyper, Rule, Setting, Sum, Verb
from .ops import LISTS, READ_ONLY, listed, run_copies, same_layout, seen
from .triton_kernels import step_kernel
from .triton_layout import CHUNK, LAYOUT, Counter, Dtype, Field

__all__ = ["TritonRunner", "why_not"]

WARPS = 4  # of a program
NAMES = ("params", "grads", "state0", "state1", "state2", "master", "prev_read", "prev_write")
DTYPES = {
    torch.float32: Dtype.FLOAT32,
    torch.float64: Dtype.FLOAT64,
    torch.bfloat16: Dtype.BFLOAT16,
    torch.float16: Dtype.FLOAT16,
}
INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1


def why_not(device: torch.device) -> str:
    """Return why Triton does not serve ``device``, or an empty string."""
    if device.type == "cpu" and not INTERPRETED:
        return "it runs on a GPU, and on the CPU only with TRITON_INTERPRET=1, for tests"
    return "" if device.type in ("cpu", "cuda", "xpu") else f"it knows no {device.type}"


compile_seconds: float | None = None  # what the first call of a kernel took in this process, to be shown


def version() -> str:
    """Return Triton's version, and whether it interprets."""
    return f"Triton {triton.__version__}" + (", interpreted" if INTERPRETED else "")


def _is_dense(x: Tensor) -> bool:
    """Whether every address between the first and the last element holds exactly one element."""
    if x.is_contiguous() or x.numel() == 0:
        return True
    stride = 1
    for step, size in sorted((step, size) for step, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if step != stride:
            return False
        stride *= size
    return True


def _small(name: str, x: Any, dtype: torch.dtype, device: torch.device, rows: int, *shape: int) -> None:
    """Check one of the small tensors: ``rows`` or more of them, each of ``shape``."""
    what = f"{name} must be a contiguous {dtype} tensor on {device} with {rows} rows of {shape or 1}"
    check(isinstance(x, Tensor) and x.dtype == dtype and x.device == device and x.is_contiguous(), what)
    found = x.shape[0] if x.dim() else 1
    check(found >= rows and x.numel() == found * int(np.prod(shape, dtype=int)), what)


class _Table:
    """A step's tensors as rows of int64 for the kernel, and the constants that it is compiled for."""

    def __init__(self, rule: int, columns: list[Any], groups: Tensor, settings: Tensor, hyper: Tensor) -> None:
        states = columns[2:5]
        rows: list[list[int]] = []
        chunk_rows: list[int] = []
        for i, (param, grad) in enumerate(zip(columns[0] or [], columns[1] or [], strict=True)):
            if grad is None:
                continue
            row = dict.fromkeys(Field, 0)
            master, read, write = (column[i] if column else None for column in columns[5:])
            prev = write if read is None else read
            updated = param if master is None else master
            kinds = {"PARAM": param, "UPDATED": updated, "GRAD": grad, "PREV_READ": prev, "PREV_WRITE": write}
            kinds |= {f"STATE{k}": column[i] for k, column in enumerate(states) if column}
            for name, x in kinds.items():
                row[Field[name]] = 0 if x is None else x.data_ptr()
            moments = [column[i] for column in states if column and column[i] is not None]
            for name, x in [("PARAM", param), ("UPDATED", updated), ("GRAD", grad), ("STATE", moments), ("PREV", prev)]:
                x = (x[0] if x else None) if isinstance(x, list) else x
                row[Field[name + "_DTYPE"]] = -1 if x is None else DTYPES[x.dtype]
            row[Field.NUMEL], row[Field.GROUP], row[Field.INDEX] = param.numel(), int(groups[i]), i
            row[Field.FIRST_CHUNK] = len(chunk_rows)
            chunk_rows += [len(rows)] * -(-param.numel() // CHUNK)
            rows.append(list(row.values()))
        table = np.array(rows, dtype=np.int64).reshape(-1, len(Field))
        bits = [x.numpy().reshape(-1).view(np.int64) for x in (settings, hyper)]
        self.host = np.concatenate([*bits, table.reshape(-1), np.array(chunk_rows, dtype=np.int64)])
        at = bits[0].size + bits[1].size
        self.rows = self.host[at : at + table.size].reshape(table.shape)  # a view of it
        self.chunks = len(chunk_rows)
        self.index = self.rows[:, Field.INDEX].tolist()
        self._align()

        def code(field: Field) -> int:
            codes = {int(x) for x in self.rows[:, field]} - {-1}
            return int(Dtype.MIXED) if len(codes) > 1 else codes.pop() if codes else int(Dtype.FLOAT32)

        wide = self.rows[:, Field.PARAM_DTYPE] == Dtype.FLOAT64
        mixed = bool(wide.any() and not wide.all())
        self.constants = {
            "STATES": 1 + max((k for k, column in enumerate(states) if column and any_of(column)), default=-1),
            "KEPT": any_of(columns[6]) or any_of(columns[7]),
            "MASTERS": any_of(columns[5]),
            "AT_RANDOM": bool(settings[Setting.STOCHASTIC_ROUNDING]),
            "WIDE": int(Dtype.MIXED) if mixed else int(wide.any()),
            "PARAM": code(Field.PARAM_DTYPE),
            "UPDATED": code(Field.UPDATED_DTYPE),
            "GRAD": code(Field.GRAD_DTYPE),
            "STATE": code(Field.STATE_DTYPE),
            "PREV": code(Field.PREV_DTYPE),
        }
        if rule == Rule.SGD:
            self.constants["STATES"] = min(1, self.constants["STATES"])
        self.resident = 65536 // (32 * WARPS * registers(self.constants))

    def _align(self) -> None:
        addresses = self.rows[:, Field.PARAM : Field.PREV_WRITE + 1]
        self.rows[:, Field.ALIGNED] = (addresses % 16 == 0).all(axis=1)

    def move(self, grads: bytes, prev_read: bytes) -> None:
        """Take new addresses of the gradients, and of the kept ones if the caller keeps them."""
        self.rows[:, Field.GRAD] = np.frombuffer(grads, np.int64)[self.index]
        if prev_read:
            read = np.frombuffer(prev_read, np.int64)[self.index]
            self.rows[:, Field.PREV_READ] = np.where(read == 0, self.rows[:, Field.PREV_WRITE], read)
        self._align()


def registers(constants: Mapping[str, int]) -> int:
    """Return the most registers of a thread, for nothing to spill: three programs on a multiprocessor, or else two."""
    kinds = {constants[name] for name in ("PARAM", "UPDATED", "GRAD", "STATE", "PREV")}
    return 168 if kinds == {Dtype.FLOAT32} else 255


def any_of(column: Any) -> bool:
    """Whether a column has a tensor."""
    return bool(column) and any(x is not None for x in column)


class TritonRunner:
    """Runs the verbs on one optimizer's device: one launch, and no wait for the device.

    It takes the arguments of ``ops.run_native``. The table of rows stays on the device, and is uploaded anew when a
    tensor has moved. The workspace is its own, so two optimizers may step at once.
    """

    def __init__(self, device: torch.device, programs: int | None = None, most: int | None = None) -> None:
        self.device = device
        self.nvidia = device.type == "cuda" and torch.version.hip is None
        self.programs, self.most = programs, most  # for tests: how many, and how many chunks one of them takes
        self._counters = torch.zeros(len(Counter) * 32, dtype=torch.int32, device=device)
        self._table: _Table | None = None
        self._fixed: Any = None
        self._moving: Any = None
        self._memory = self._partials = torch.empty(0)
        self._spare = torch.empty(0, dtype=torch.int64)
        self._captured: list[tuple[Tensor, ...]] = []

    def __call__(self, verbs: int, rule: int, measure: int, two_pass: bool, *arguments: Any) -> None:
        """Run the verbs, or raise and change nothing."""
        global compile_seconds

        for name, column in zip(NAMES, arguments, strict=False):
            pair = isinstance(column, tuple) and len(column) == 2 and isinstance(column[0], list)
            what = f"{name} must be a list of tensors, or a pair (dictionaries, key)"
            check(column is None or isinstance(column, list) or pair, what)
        columns = [listed(column) for column in arguments[:LISTS]]
        groups, counts, control, settings, lr, hyper, table, decay, history, found_inf, grad_scale = arguments[LISTS:]
        for name, x in [("found_inf", found_inf), ("grad_scale", grad_scale)]:
            if x is not None:
                _small(name, x, torch.float32, self.device, 1)
        fixed, moving = _seen(rule, columns, arguments[LISTS:-2])
        if fixed is None or fixed != self._fixed:
            uneven = self._check(rule, columns, *arguments[LISTS:-2])
            if uneven:
                return run_copies(self, uneven, verbs, rule, measure, two_pass, *arguments)
            self._table, self._fixed = _Table(rule, columns, groups, settings, hyper), fixed
            self._upload(moving)
        elif moving != self._moving:
            assert self._table is not None
            self._table.move(*moving)
            self._upload(moving)
        assert self._table is not None
        measures, applies = bool(verbs & Verb.MEASURE), bool(verbs & Verb.APPLY)
        passes = measures + applies if two_pass else int(measures or applies)
        tickets = self._table.chunks * passes
        programs = self.programs or min(max(tickets, 1), _multiprocessors(self.device) * self._table.resident)
        if not verbs:  # that was the check
            return None
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.append((self._memory, self._partials))  # replays read the table as it is now
        start = time.perf_counter()
        with _current(self.device):
            step_kernel[(programs,)](
                control,
                counts,
                lr,
                table,
                decay,
                history,
                found_inf,
                grad_scale,
                self._memory,
                self._counters,
                self._partials,
                table.numel(),
                decay.numel(),
                history.shape[0],
                len(self._table.rows),
                lr.numel(),
                self._table.chunks,
                self.most or 2**31 - 1,
                RULE=int(rule),
                MEASURE=int(measure),
                VERBS=int(verbs),
                TWO_PASS=bool(two_pass),
                **self._table.constants,
                LAYOUT=LAYOUT,
                num_warps=WARPS,
                enable_fp_fusion=False,  # fused where the rules say fma, and nowhere else
                **({"maxnreg": registers(self._table.constants)} if self.nvidia else {}),
            )
        if compile_seconds is None:
            compile_seconds = time.perf_counter() - start
        if verbs & Verb.APPLY and self._table.index:  # a backward pass that still needs the old values must find out
            torch.autograd.graph.increment_version([columns[0][i] for i in self._table.index])  # type: ignore[index]
        return None

    def _upload(self, moving: Any) -> None:
        """Copy the table to the device, past the host; nothing waits."""
        assert self._table is not None
        host = torch.from_numpy(self._table.host)
        self._moving = moving
        if self.device.type != "cuda":
            self._memory = host.to(self.device, copy=True)
        else:
            capturing = torch.cuda.is_current_stream_capturing()
            enough = capturing and self._spare.numel() >= host.numel()
            staging = self._spare[: host.numel()] if enough else torch.empty_like(host, pin_memory=True)
            staging.copy_(host)
            self._memory = staging.to(self.device, non_blocking=True)
            self._partials = torch.empty(len(Sum) * self._table.chunks, dtype=torch.float64, device=self.device)
            if capturing:  # each replay copies and runs again; until then the device's table is empty
                self._captured.append((staging,))
                self._fixed, self._spare = None, torch.empty(0, dtype=torch.int64)
            elif self._spare.numel() < host.numel():  # no memory can be pinned while capturing
                self._spare = torch.empty_like(host, pin_memory=True)
        if self._partials.numel() < len(Sum) * self._table.chunks or self._partials.device != self.device:
            self._partials = torch.empty(len(Sum) * self._table.chunks, dtype=torch.float64, device=self.device)

    def _check(
        self,
        rule: int,
        columns: list[Any],
        groups: Any,
        counts: Any,
        control: Any,
        settings: Any,
        lr: Any,
        hyper: Any,
        table: Any,
        decay: Any,
        history: Any,
    ) -> list[int]:
        """Raise for what the kernel cannot take; return the indices of the rows that need copies of one layout."""
        cpu, f64 = torch.device("cpu"), torch.float64
        size = len(columns[0] or [])
        for name, column in zip(NAMES, columns, strict=True):
            check(column is None or len(column) == size, f"{name} must have one entry for each of params")
        check(columns[1] is not None or size == 0, "grads must have one entry for each of params")
        _small("lr", lr, f64, self.device, 1)
        _small("hyper", hyper, f64, cpu, lr.numel(), HYPERS)
        _small("groups", groups, torch.int32, cpu, size)
        _small("counts", counts, torch.float32, self.device, size, len(Count))
        _small("settings", settings, f64, cpu, len(Setting))
        _small("control", control, f64, self.device, RING_AT + int(settings[Setting.CAPACITY]))
        _small("table", table, f64, self.device, 1)
        _small("decay", decay, f64, self.device, 1)
        _small("history", history, f64, self.device, 1, len(STATS))
        known = groups.numel() == 0 or (int(groups.min()) >= 0 and int(groups.max()) < lr.numel())
        check(known, "groups names a group that hyper has no row for")
        return [
            i for i in range(size) if columns[1][i] is not None and not self._is_even(rule, columns, i, groups, hyper)
        ]

    def _is_even(self, rule: int, columns: list[Any], i: int, groups: Tensor, hyper: Tensor) -> bool:
        """Check a row's tensors; return whether they share one dense layout."""
        row: list[Any] = [column[i] if column else None for column in columns]
        param, grad, *states, master, _, _ = row
        for name, x in zip(NAMES, row, strict=True):
            what = f"{name}[{i}] is not a dense tensor of float32, float64, bfloat16 or float16 on {self.device}"
            check(isinstance(x, Tensor) or (x is None and name != "params"), what)
            dense = x is None or (x.dtype in DTYPES and x.layout == torch.strided and x.device == self.device)
            check(dense, what)
        check(grad.dtype in (param.dtype, torch.float32), f"grads[{i}] is neither of its parameter's dtype nor float32")
        told = hyper[int(groups[i])].tolist()
        for k, state in enumerate(states):
            needed = k == 0 and told[Hyper.MOMENTUM] != 0
            if rule == Rule.ADAMW:
                needed = k < 2 or told[Hyper.AMSGRAD] != 0
            check(state is not None or not needed, f"the rule needs {NAMES[2 + k]}[{i}], which is missing")
        kinds = {state.dtype for state in states if state is not None}
        check(len(kinds) < 2, f"the states of parameter {i} are of several dtypes")
        kinds = {x.dtype for x in row[6:] if x is not None}
        check(len(kinds) < 2, f"prev_read[{i}] and prev_write[{i}] are of different dtypes")
        check(master is None or master.dtype == torch.float32, f"master[{i}] is not float32")
        return _is_dense(param) and all(x is None or (same_layout(x, param) and not x.is_neg()) for x in row)


def _seen(rule: int, columns: list[Any], small: Sequence[Any]) -> tuple[Any, Any]:
    """Return what the table was made of: what stays as a rule, and the addresses that come and go with each step."""
    groups, _, _, settings, _, hyper = small[:6]
    try:
        layouts, addresses = zip(*(seen(column or []) for column in [*columns, list(small)]), strict=True)
        values = [x.numpy().tobytes() for x in (groups, settings, hyper)]
        signs = [x is not None and x.is_neg() for k in READ_ONLY for x in columns[k] or ()]  # that are not in memory
    except (AttributeError, RuntimeError, TypeError):  # no tensors of this kind: the check says what is wrong
        return None, None
    stays = [address for k, address in enumerate(addresses) if k not in READ_ONLY]
    return (int(rule), layouts, stays, signs, values), [addresses[k] for k in READ_ONLY]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0) or getattr(properties, "gpu_subslice_count", 0) or 64)


def _current(device: torch.device) -> Any:
    """Make ``device`` the current one, for a launch."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
