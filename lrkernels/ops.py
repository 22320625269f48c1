"""The operators: measure, decide, apply, and step, which is all three in one call.

Their schemas are here, once. The eager implementation below is the reference and the fallback on every device; the C++
kernels (CPU, CUDA) and Triton do the same with the same arguments:

========================  =============================================================================================
``params, grads``         one entry per parameter; a missing gradient leaves its parameter alone
``state0, 1, 2``          momentum buffers (sgd), or the first, second and maximal second moments (adamw); or empty
``master``                float32 copies that the update works on, None where there is none; or empty
``prev_read``             the previous gradients, or empty
``prev_write``            where to keep this gradient, and where the previous one is; or empty
``groups``                int32, on the CPU: the group of each parameter
``counts``                float32 ``[params, 2]``: updates so far, and whether there is a previous gradient
``control``               float64: what a step leaves for the next, its statistics and sums (``layout.Control``)
``settings, hyper``       float64, on the CPU: what the decision is told; one row of hyper-parameters per group
``lr``                    float64 ``[groups]``: the base rates
``table, decay``          float64: the open-loop multipliers of each step; volsched's own decay
``history``               float64 ``[history_size, stats]``: a ring, one row per step
``found_inf, grad_scale`` float32, one element: a gradient scaler's verdict and its scale; or None
``rule, measure``         ``layout.Rule``, ``layout.Measure``
``two_pass``              the order of the verbs, of which the last ends the step, be they in one call or in several:
                          measure, decide, apply; otherwise measure while applying, then decide for the next step
========================  =============================================================================================
"""

from __future__ import annotations

import operator
import platform
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import rules
from .checks import check
from .layout import SUMS_AT, Control, Count, Hyper, Measure, Rule, Setting, Sum, Verb

try:
    _C: Any = import_module("._C", __package__)  # "from . import" would call one that was not built a circular import
    _C.connect(torch.Tensor.__dlpack_c_exchange_api__)
    _C.locate([torch.zeros(1, device="cpu"), torch.nn.Parameter(torch.zeros(1, device="cpu"))])
    _import_error = ""
except (ImportError, AttributeError, ValueError) as error:
    _C = None
    _import_error = f"{type(error).__name__}: {error}"

__all__ = [
    "EAGER",
    "LISTS",
    "NATIVE",
    "after_run",
    "backend_for",
    "check_backend",
    "check_backend_name",
    "gradients",
    "holds",
    "info",
    "is_eager",
    "listed",
    "run_copies",
    "run_eager",
    "run_native",
    "same_layout",
    "seen",
    "versions",
]

EAGER, NATIVE, TRITON = "eager", "native", "triton"
OLDEST_TRITON = (3, 6)
LISTS = 8  # the arguments that are lists of tensors come first
READ_ONLY = (1, 6)  # of them: grads and prev_read
CONTROL = LISTS + 2  # where the control tensor is among the arguments

_READ = (
    "Tensor[] params, Tensor?[] grads, Tensor[] state0, Tensor[] state1, Tensor[] state2, Tensor[] master, "
    "Tensor?[] prev_read"
)
_WRITTEN = (
    "Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] state0, Tensor(c!)[] state1, Tensor(d!)[] state2, "
    "Tensor(i!)[] master, Tensor?[] prev_read"
)
_REST = (
    "Tensor groups, Tensor(f!) counts, Tensor(g!) control, Tensor settings, Tensor lr, Tensor hyper, Tensor table, "
    "Tensor decay, Tensor(h!) history, Tensor? found_inf, Tensor? grad_scale, *, int rule, int measure, bool two_pass"
)
SCHEMAS = {
    Verb.MEASURE: f"measure_({_READ}, Tensor[] prev_write, {_REST}) -> ()",
    Verb.DECIDE: f"decide_({_READ}, Tensor[] prev_write, {_REST}) -> ()",
    Verb.APPLY: f"apply_({_WRITTEN}, Tensor(e!)[] prev_write, {_REST}) -> ()",
    Verb.STEP: f"step_({_WRITTEN}, Tensor(e!)[] prev_write, {_REST}) -> ()",
}

# ----------------------------------------------------------------------------------------------------------------------
# Eager


def run_eager(
    verbs: int,
    rule: int,
    measure: int,
    two_pass: bool,
    params: list[Tensor],
    grads: list[Tensor | None],
    state0: list[Tensor],
    state1: list[Tensor],
    state2: list[Tensor],
    master: list[Tensor | None],
    prev_read: list[Tensor | None],
    prev_write: list[Tensor],
    groups: Tensor,
    counts: Tensor,
    control: Tensor,
    settings: Tensor,
    lr: Tensor,
    hyper: Tensor,
    table: Tensor,
    decay: Tensor,
    history: Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
) -> None:
    """Run the verbs with torch's own operations; on any device, without waiting for it."""
    scalars = settings.tolist()
    rows = hyper.tolist()
    states = [state for state in (state0, state1, state2) if state]
    sums = control[SUMS_AT : SUMS_AT + len(Sum)]
    taken: list[_Row] = []
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is not None:
            kept = prev_write[index] if prev_write else None
            given = prev_read[index] if prev_read else None
            prev = kept if given is None else given
            group = int(groups[index])
            moments = [state[index] for state in states if state[index] is not None]
            wide = master[index] if master else None
            key = rules.random_key(control[Control.STEP], index) if scalars[Setting.STOCHASTIC_ROUNDING] else None
            row = _Row(param, grad, moments, wide, prev, kept, counts[index], rows[group], lr[group], key)
            taken.append(row)

    if verbs & Verb.MEASURE:
        rules.begin(control, found_inf)
        skip = control[Control.SKIP] != 0
        if measure:
            measured = sum((row.measure(rule, measure, grad_scale) for row in taken), torch.zeros_like(sums))
            sums.copy_(torch.where(skip, torch.full_like(sums, torch.nan), measured))
    multiplier = rules.at(table, control[Control.STEP])
    if verbs & Verb.DECIDE and measure and two_pass:
        rules.decide(control, scalars, rows[0], rule, True)
    if verbs & Verb.APPLY:
        skip = control[Control.SKIP] != 0
        moved = torch.zeros_like(sums[0])
        for row in taken:
            rate = rules.rate(row.lr, multiplier, control, scalars)
            moved = moved + row.apply(rule, rate, control, grad_scale, skip, bool(measure & Measure.MOVE))
        sums[Sum.MOVE_SQ] = moved
    if verbs & Verb.DECIDE and measure and not two_pass:
        rules.decide(control, scalars, rows[0], rule, False)
    if verbs & (Verb.APPLY if two_pass else Verb.DECIDE):
        rules.finish(control, scalars, decay, history, lr[0], multiplier)


class _Row:
    """One parameter's tensors, and what the three verbs do with them."""

    def __init__(
        self,
        param: Tensor,
        grad: Tensor,
        states: list[Tensor],
        master: Tensor | None,
        prev: Tensor | None,
        kept: Tensor | None,
        count: Tensor,
        hyper: list[float],
        lr: Tensor,
        key: Tensor | None,
    ) -> None:
        self.param, self.grad, self.states, self.prev, self.kept = param, grad, states, prev, kept
        self.count, self.hyper, self.lr = count, hyper, lr
        self.master = param if master is None else master  # what the update works on
        self.key = key  # for rounding at random
        self.dtype = torch.float64 if param.dtype == torch.float64 else torch.float32

    def unscaled(self, grad_scale: Tensor | None) -> Tensor:
        """Return the gradient in the arithmetic's dtype, without the loss scale."""
        grad = self.grad.to(self.dtype)
        return grad if grad_scale is None else grad * (1.0 / grad_scale.double()).to(self.dtype)

    def previous(self) -> Tensor | None:
        """Return the previous gradient, zero where there is none yet."""
        if self.prev is None:
            return None
        prev = self.prev.to(self.dtype)
        return torch.where(self.count[Count.HAS_PREV] != 0, prev, torch.zeros_like(prev))

    def measure(self, rule: int, what: int, grad_scale: Tensor | None) -> Tensor:
        """Return the sums over this gradient, in the order of ``layout.Sum``."""
        grad = self.unscaled(grad_scale)
        prev = self.previous()
        has_prev = self.count[Count.HAS_PREV] != 0
        sign = -1.0 if self.hyper[Hyper.MAXIMIZE] else 1.0
        direction = None
        if what & Measure.DIRECTION and rule == Rule.ADAMW:
            exp_avg, second = (self.states[k].to(self.dtype) for k in (0, 2 if self.hyper[Hyper.AMSGRAD] else 1))
            direction = rules.adamw_direction(exp_avg, second, self.hyper, self.count[Count.UPDATES])
        elif what & Measure.DIRECTION and self.hyper[Hyper.MOMENTUM]:
            direction = self.states[0].to(self.dtype)
        elif what & Measure.DIRECTION:
            direction, sign = prev, 1.0  # both gradients point the same way

        def dot(a: Tensor, b: Tensor) -> Tensor:
            return torch.sum(a.double() * b.double())

        zero = torch.zeros_like(self.lr)
        sums = [dot(grad, grad), grad.abs().sum(dtype=torch.float64)]
        sums += [zero, zero] if direction is None else [sign * dot(grad, direction), dot(direction, direction)]
        if prev is None:
            sums += [zero, zero, zero]
        else:
            difference = grad.double() - prev.double()
            sums += [dot(grad, prev), dot(prev, prev), torch.where(has_prev, dot(difference, difference), zero)]
        return torch.stack([*sums, zero])

    def rounded(self, result: Tensor) -> Tensor:
        """Return the new parameter in its own dtype."""
        at_random = {torch.bfloat16: rules.to_bfloat16_at_random, torch.float16: rules.to_float16_at_random}
        if self.key is None or self.param.dtype not in at_random:
            return result.to(self.param.dtype)
        strides = torch.empty_like(self.param).stride()  # dense, in the order of the parameter's strides
        element = torch.arange(result.numel(), device=result.device).as_strided(result.shape, strides)
        return at_random[self.param.dtype](result, rules.random_bits(self.key, element))

    def apply(
        self, rule: int, rate: Tensor, control: Tensor, grad_scale: Tensor | None, skip: Tensor, move: bool
    ) -> Tensor:
        """Update the parameter and its state unless the step is skipped; return the squared length of the move."""
        unscaled = self.unscaled(grad_scale)
        sign = -1.0 if self.hyper[Hyper.MAXIMIZE] else 1.0
        grad = unscaled * (sign * control[Control.CLIP]).to(self.dtype)
        param = self.master.to(self.dtype)
        states: list[Tensor | None] = [state.to(self.dtype) for state in self.states]
        updates = self.count[Count.UPDATES]
        if rule == Rule.SGD:
            buffer = states[0] if states and self.hyper[Hyper.MOMENTUM] else None
            new, buffer = rules.sgd_step(param, grad, buffer, self.hyper, rate, control[Control.LENGTH], updates)
            results = [new, buffer]
        else:
            maximal = states[2] if self.hyper[Hyper.AMSGRAD] else None
            moments = (states[0], states[1], maximal)
            results = list(
                rules.adamw_step(param, grad, *moments, self.hyper, rate, control[Control.LENGTH], updates)  # type: ignore[arg-type]
            )
        before = self.master.to(self.dtype, copy=True) if move else None
        targets = [self.master, *self.states] + ([self.kept] if self.kept is not None else [])
        results = results[: len(self.states) + 1] + ([unscaled] if self.kept is not None else [])
        for target, result in zip(targets, results, strict=True):
            if result is not None:
                rounded = self.rounded(result) if target is self.param else result.to(target.dtype)
                target.copy_(torch.where(skip, target, rounded))
        if self.master is not self.param:
            self.param.copy_(torch.where(skip, self.param, self.master.to(self.param.dtype)))
        self.count[Count.UPDATES] += (~skip).float()
        self.count[Count.HAS_PREV] = torch.where(skip, self.count[Count.HAS_PREV], torch.ones_like(updates))
        if before is None:
            return torch.zeros_like(self.lr)
        return (self.master.to(self.dtype).double() - before.double()).square().sum()


# ----------------------------------------------------------------------------------------------------------------------
# Native


def run_native(*arguments: Any) -> None:
    """Run the verbs in the C++ kernels; a tensor whose layout differs from its parameter's goes through a copy."""
    after_run(run_native, *_C.run(*arguments), *arguments)


def after_run(runner: Callable[..., None], uneven: list[int], rows: int, *arguments: Any) -> None:
    """Do what a call of the kernels leaves to Python: the rows that need copies, and the versions of the others."""
    verbs, _, _, _, params, grads, *_ = arguments
    if uneven:
        run_copies(runner, uneven, *arguments)
    elif rows and verbs & Verb.APPLY:  # a backward pass that still needs the old values must find out
        moved = params if rows == len(params) else [p for p, g in zip(params, grads, strict=True) if g is not None]
        torch.autograd.graph.increment_version(moved)


def gradients(params: list[Tensor]) -> list[Tensor | None]:
    """Return each parameter's gradient."""
    return [p.grad for p in params] if _C is None else _C.gradients(params)


def versions(tensors: list[Tensor | None]) -> list[int | None]:
    """Return each tensor's version, a count that rises when it is changed in place; None for None."""
    return [None if t is None else t._version for t in tensors] if _C is None else _C.versions(tensors)


def seen(tensors: list[Tensor | None]) -> tuple[Any, bytes] | None:
    """Return what each tensor is (dtype, device, sizes, strides), and where, as int64; None where one has no memory.

    Two calls with equal answers have had the same memory in the same layouts.
    """
    if _C is not None:
        return _C.seen(tensors)
    try:
        layouts = [None if x is None else (x.dtype, x.device, x.shape, x.stride()) for x in tensors]
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
    except (AttributeError, RuntimeError):
        return None
    return layouts, np.array(addresses, dtype=np.int64).tobytes()


def holds(container: list[Any] | dict[Any, Any], values: list[Any]) -> bool:
    """Whether these very objects are the list's items, or the dictionary's values, in this order."""
    if _C is not None:
        return bool(_C.holds(container, values))
    found = container.values() if isinstance(container, dict) else container
    return len(found) == len(values) and all(map(operator.is_, found, values))


def run_copies(runner: Callable[..., None], uneven: list[int], verbs: int, *arguments: Any) -> None:
    """Call the runner with copies of what has another layout than its parameter, in the ``uneven`` rows."""
    flags, lists, others = arguments[:3], arguments[3 : 3 + LISTS], arguments[3 + LISTS :]
    columns: list[Any] = [*map(listed, lists)]
    copied: list[tuple[Tensor, Tensor]] = []
    for i in uneven:
        param = torch.empty_like(lists[0][i])  # dense, in the order of the parameter's strides
        for k, column in enumerate(columns):
            if column is None or column[i] is None or (same_layout(column[i], param) and not column[i].is_neg()):
                continue
            original, shape = column[i], tuple(column[i].shape)
            good = column is columns[1] or original.shape == param.shape  # torch spreads gradients too
            check(good, f"entry {i} of list {k} has shape {shape}, its parameter {tuple(param.shape)}")
            column[i] = torch.empty_strided(param.shape, param.stride(), dtype=original.dtype, device=param.device)
            column[i].copy_(original)
            if k not in READ_ONLY and verbs & Verb.APPLY:
                copied.append((original, column[i]))
    runner(verbs, *flags, *columns, *others)  # of one layout now
    for original, copy in copied:
        original.copy_(copy)


def listed(column: Any) -> list[Any] | None:
    """Return a column's tensors: those of a list, or of a pair (list of dictionaries, key)."""
    if isinstance(column, tuple):
        return [state.get(column[1]) for state in column[0]]
    return list(column) if column else None


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether equal indices mean equal places: equal sizes, and equal strides where a stride means something."""
    return a.shape == b.shape and all(
        size == 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


# ----------------------------------------------------------------------------------------------------------------------
# Registration

_library = torch.library.Library("lrkernels", "DEF")


def _as_operator(verbs: Verb, runner: Callable[..., None]) -> Callable[..., None]:
    def call(*tensors: Any, rule: int, measure: int, two_pass: bool) -> None:
        # An empty list is None to the kernels; a caller's tuple is a list.
        runner(
            verbs, rule, measure, two_pass, *(list(x) or None if isinstance(x, list | tuple) else x for x in tensors)
        )

    return call


def _eager_lists(verbs: int, rule: int, measure: int, two_pass: bool, *tensors: Any) -> None:
    lists: list[Any] = [listed(x) or [] for x in tensors[:LISTS]]
    run_eager(verbs, rule, measure, two_pass, *lists, *tensors[LISTS:])


def is_eager(runner: Any) -> bool:
    """Whether a runner, or one of those that it is made of, is the eager implementation."""
    return runner is _eager_lists or any(map(is_eager, getattr(runner, "runners", ())))


_runners: dict[tuple[torch.device, int], Callable[..., None]] = {}


def _run_on_gpu(verbs: int, rule: int, measure: int, two_pass: bool, *tensors: Any) -> None:
    """Run an operator that no optimizer owns by the best there is, with memory for its device and stream."""
    device = tensors[CONTROL].device
    key = (device, getattr(torch.get_device_module(device).current_stream(device), "stream_id", 0))
    if key not in _runners:
        _runners[key] = backend_for(device, None)
    _runners[key](verbs, rule, measure, two_pass, *tensors)


for _verbs, _schema in SCHEMAS.items():
    _name = _schema.split("(", 1)[0]
    _library.define(_schema)
    _library.impl(_name, _as_operator(_verbs, _eager_lists), "CompositeExplicitAutograd")
    if _C is not None:
        _library.impl(_name, _as_operator(_verbs, run_native), "CPU")
    for _key in ("CUDA", "XPU"):
        _library.impl(_name, _as_operator(_verbs, _run_on_gpu), _key)
    torch.library.register_fake(f"lrkernels::{_name}", lambda *args, **kwargs: None, lib=_library)


def check_backend_name(wanted: str | None) -> None:
    """Raise for an unknown backend."""
    known = wanted in (None, EAGER, NATIVE, TRITON)
    check(known, f"backend must be None, 'native', 'triton' or 'eager', got {wanted!r}")


def why_not_native(device: torch.device) -> str:
    """Return why the binary does not serve ``device``, or an empty string."""
    if _C is None:
        return _import_error
    if device.type == "cpu":
        return ""
    codes = (_C.cuda_architectures() or "").split()
    if device.type != "cuda" or not codes or torch.version.hip is not None:
        return f"this build has no kernels for {'hip' if torch.version.hip else device.type}"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        for code in codes:  # machine code runs on its own generation, sm_80 on 8.6 too; PTX on any later one
            kind, number = code.split("_")
            least = int(number.rstrip("af"))
            if least <= 10 * major + minor and (kind == "compute" or least // 10 == major):
                return ""
        return f"this build has kernels for {', '.join(codes)}, and the device is of compute capability {major}.{minor}"
    return ""


def why_no_triton(device: torch.device) -> str:
    """Return why Triton does not serve ``device``, or an empty string; importing it takes a while."""
    try:
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
            return f"Triton {triton.__version__} is too old"
        from . import triton_runner
    except Exception as error:  # missing, or broken
        return f"{type(error).__name__}: {error}"
    return triton_runner.why_not(device)


def check_backend(device: torch.device, wanted: str | None) -> None:
    """Raise for a backend that is asked for by name and does not serve ``device``."""
    check_backend_name(wanted)
    if wanted == NATIVE and (reason := why_not_native(device)):
        raise RuntimeError(
            f"lrkernels: backend='native' is not available for {device}: {reason}. "
            "Build it with `pip install -e . --no-build-isolation`, or use backend='eager'."
        )
    if wanted == TRITON and (reason := why_no_triton(device)):
        raise RuntimeError(
            f"lrkernels: backend='triton' is not available for {device}: {reason}. "
            "Install it with `pip install 'triton>=3.6'`, or use backend=None or 'eager'."
        )


def backend_for(device: torch.device, wanted: str | None) -> Callable[..., None]:
    """Return the runner that serves ``device``; ``wanted`` asks for one by name and raises when it is not available."""
    check_backend(device, wanted)
    if wanted in (None, NATIVE) and not why_not_native(device):
        if device.type == "cpu":
            return run_native
        from .cuda_runner import CudaRunner

        return CudaRunner(device)
    on_gpu = device.type in ("cuda", "xpu")
    if wanted == TRITON or (wanted is None and on_gpu and not why_no_triton(device)):
        from .triton_runner import TritonRunner

        return TritonRunner(device)
    return _eager_lists


def info() -> str:
    """Return what serves which device and why, with the versions, as a text to print."""
    from . import __version__

    if _C is None:
        native = f"not available ({_import_error})"
    else:
        native = f"C++ kernels, {_C.instruction_set()}, {torch.get_num_threads()} threads"
    architectures = None if _C is None else _C.cuda_architectures()
    if architectures:
        cuda = f"native: C++ kernels for {architectures}"
        cuda += "" if torch.cuda.is_available() else "; no CUDA device is visible"
    else:
        cuda = "no C++ kernels in this build; see gpu"
    lines = [
        f"lrkernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        platform.platform(),
        f"cpu     {'native' if _C is not None else 'eager'}: {native}",
        f"cuda    {cuda}",
        f"gpu     {_triton_line()}",
        "other   eager: torch's own operations",
    ]
    return "\n".join(lines)


def _triton_line() -> str:
    devices = [torch.device(kind) for kind in ("cuda", "xpu") if torch.get_device_module(kind).is_available()]
    reason = why_no_triton(devices[0] if devices else torch.device("cuda"))
    if reason:
        return f"eager: Triton is not available ({reason})"
    from . import triton_runner

    compiled = triton_runner.compile_seconds
    took = f"the first call compiled for {compiled:.1f} s" if compiled is not None else "nothing compiled so far"
    return f"triton: {triton_runner.version()}, {took}" + ("" if devices else "; no GPU is visible")
