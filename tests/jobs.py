"""One call of the operators as a dataclass, and how two of them are compared."""

import copy
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from lrkernels import layout, ops, rules
from lrkernels.layout import (
    RING_AT,
    STATS,
    STATS_AT,
    SUMS_AT,
    ClosedLoopKind,
    Control,
    Count,
    Hyper,
    Measure,
    Rule,
    Setting,
    Sum,
    Verb,
)

CPU = torch.device("cpu")
ALL = Measure.NORMS | Measure.DIRECTION | Measure.PREVIOUS | Measure.MOVE
VERBS = {Verb.MEASURE: "measure_", Verb.DECIDE: "decide_", Verb.APPLY: "apply_", Verb.STEP: "step_"}

# Around the lanes and registers of every instruction set, the tile (1024) and the chunk (65536)
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 65535, 65536, 65537]

orders = pytest.mark.parametrize("two_pass", [False, True], ids=["one-pass", "two-passes"])


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


def new_control(ring=1):
    control = torch.zeros(RING_AT + ring, dtype=torch.float64)
    control[[Control.FACTOR, Control.NEXT_FACTOR, Control.CLIP, Control.LENGTH]] = 1.0
    control[Control.SIGNAL] = math.nan
    control[Control.FIRST_LR] = 0.1
    return control


def new_settings(**values):
    settings = torch.zeros(len(Setting), dtype=torch.float64)
    settings[[Setting.MAX_GRAD_NORM, Setting.MAX_LR, Setting.FREEZE_AFTER]] = math.inf
    for name, value in values.items():
        settings[Setting[name]] = value
    return settings


def hyper_row(**values):
    row = torch.zeros(1, layout.HYPERS, dtype=torch.float64)
    for name, value in values.items():
        row[0, Hyper[name]] = value
    return row


@dataclass
class Job:
    """An operator's arguments, in its order, and then its flags."""

    params: list[Tensor]
    grads: list[Tensor | None]
    state0: list[Tensor] = field(default_factory=list)
    state1: list[Tensor] = field(default_factory=list)
    state2: list[Tensor] = field(default_factory=list)
    master: list[Tensor] = field(default_factory=list)
    prev_read: list[Tensor | None] = field(default_factory=list)
    prev_write: list[Tensor] = field(default_factory=list)
    groups: Tensor | None = None
    counts: Tensor | None = None
    control: Tensor = field(default_factory=new_control)
    settings: Tensor = field(default_factory=new_settings)
    lr: Tensor = field(default_factory=lambda: f64([0.1]))
    hyper: Tensor = field(default_factory=hyper_row)
    table: Tensor = field(default_factory=lambda: f64([1.0]))
    decay: Tensor = field(default_factory=lambda: f64([1.0]))
    history: Tensor = field(default_factory=lambda: torch.zeros(4, len(STATS), dtype=torch.float64))
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None
    rule: int = Rule.SGD
    measure: int = Measure.NORMS
    two_pass: bool = False

    def __post_init__(self):
        if self.groups is None:
            self.groups = torch.zeros(len(self.params), dtype=torch.int32)
        if self.counts is None:
            self.counts = torch.zeros(len(self.params), len(Count))

    @property
    def arguments(self):
        return tuple(vars(self).values())[:-3]

    @property
    def flags(self):
        return {"rule": int(self.rule), "measure": int(self.measure), "two_pass": bool(self.two_pass)}

    def run(self, backend, verb=Verb.STEP):
        """Native through the dispatcher, as torch.ops has it; eager by its name."""
        if backend == "native":
            getattr(torch.ops.lrkernels, VERBS[verb])(*self.arguments, **self.flags)
        else:
            ops.backend_for(CPU, "eager")(verb, *self.flags.values(), *self.kernel_arguments)
        return self

    @property
    def kernel_arguments(self):
        return tuple((x or None) if isinstance(x, list) else x for x in self.arguments)

    def copy(self):
        return copy.deepcopy(self)

    @property
    def tensors(self):
        """Every tensor by a readable name."""
        found = {}
        for name, value in vars(self).items():
            for i, x in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(x, Tensor):
                    found[f"{name}[{i}]" if isinstance(value, list) else name] = x
        return found

    @property
    def sums(self):
        return {slot: self.control[SUMS_AT + slot].item() for slot in Sum}

    def stat(self, name):
        return self.control[STATS_AT + STATS.index(name)].item()


def as_bits(x):
    """The tensor's bits, with one NaN for all of them."""
    if not x.is_floating_point():
        return x.contiguous()
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    return torch.where(x.isnan(), torch.full_like(x, math.nan), x).contiguous().view(integers)


def assert_same_job(a, b, names=None):
    for name, x in a.tensors.items():
        if names is None or name.split("[")[0] in names:
            assert torch.equal(as_bits(x), as_bits(b.tensors[name])), name


def assert_same_decisions(a, b, rel=1e-12, slack=0.0, sums=True):
    """The control tensors, slot by slot: what two ways of adding up in float64 may differ by."""
    slots = {slot.name: slot for slot in Control} | {name: STATS_AT + i for i, name in enumerate(STATS)}
    if sums:
        slots |= {f"sum of {slot.name.lower()}": SUMS_AT + slot for slot in Sum}
    there, here = ({name: x.control[slot].item() for name, slot in slots.items()} for x in (a, b))
    assert here == pytest.approx(there, rel=rel, abs=slack, nan_ok=True)
    assert torch.equal(a.control[RING_AT:], b.control[RING_AT:])


TRAINED = ("params", "state0", "state1", "state2", "prev_write", "counts")


def randn(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(shapes, rule=Rule.SGD, dtype=torch.float32, grad_dtype=None, state_dtype=None, prev=None, **more):
    """A job with random parameters, gradients and states; ``prev`` is the dtype of the previous gradient's keep."""
    hyper = more.setdefault("hyper", hyper_row())
    states = 1 if rule == Rule.SGD and hyper[0, Hyper.MOMENTUM] else 0
    if rule == Rule.ADAMW:
        states = 3 if hyper[0, Hyper.AMSGRAD] else 2

    def one_each(seed, as_dtype):
        return [randn(shape, seed + i, as_dtype) for i, shape in enumerate(shapes)]

    lists = {f"state{k}": [x.abs() if k else x for x in one_each(100 * k, state_dtype or dtype)] for k in range(states)}
    if prev is not None:
        lists["prev_write"] = one_each(800, prev)
    job = Job(one_each(400, dtype), one_each(600, grad_dtype or dtype), **lists, rule=rule, **more)
    job.counts[:] = f64([3.0, float(prev is not None)])
    return job


def on_a_gpu(job, verb=Verb.STEP):
    """Run the operator as it is registered for CUDA, with the CPU's tensors."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    getattr(torch.ops.lrkernels, VERBS[verb]).default.redispatch(cuda, *job.arguments, **job.flags)
    return job


# ----------------------------------------------------------------------------------------------------------------------
# What they run over

CASES = {
    "sgd": (Rule.SGD, {}),
    "sgd-maximize": (Rule.SGD, {"MAXIMIZE": 1.0, "WEIGHT_DECAY": 0.1}),
    "sgd-momentum": (Rule.SGD, {"MOMENTUM": 0.9, "WEIGHT_DECAY": 0.1, "DAMPENING": 0.2}),
    "sgd-nesterov": (Rule.SGD, {"MOMENTUM": 0.9, "NESTEROV": 1.0, "WEIGHT_DECAY": 0.1, "MAXIMIZE": 1.0}),
    "sgd-decoupled": (Rule.SGD, {"MOMENTUM": 0.9, "DECOUPLED": 1.0, "WEIGHT_DECAY": 0.1, "ZERO_INIT": 1.0}),
    "adamw": (Rule.ADAMW, {"BETA1": 0.9, "BETA2": 0.999, "EPS": 1e-8, "WEIGHT_DECAY": 0.01}),
    "adamw-amsgrad": (Rule.ADAMW, {"BETA1": 0.9, "BETA2": 0.99, "EPS": 1e-8, "AMSGRAD": 1.0, "MAXIMIZE": 1.0}),
    "adamw-small-beta": (Rule.ADAMW, {"BETA1": 0.3, "BETA2": 0.5, "EPS": 1e-3}),
    "adamw-no-eps": (Rule.ADAMW, {"BETA1": 0.9, "BETA2": 0.999, "EPS": 0.0}),
}
cases = pytest.mark.parametrize("rule, row", CASES.values(), ids=CASES)

DTYPES = {
    # parameter, gradient, states, previous gradient
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16, torch.float16, torch.float16),
    "bf16-fp32-grad": (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32),
    "fp16-fp32-grad": (torch.float16, torch.float32, torch.float16, torch.bfloat16),
    "bf16-fp32-state": (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
    "fp32-bf16-prev": (torch.float32, torch.float32, torch.float32, torch.bfloat16),
}

CLOSED_LOOPS = {
    "open": {},
    "skip-nonfinite": {"SKIP_NONFINITE": 1.0, "MAX_GRAD_NORM": 1.0},
    "alignment": {"CLOSED_LOOP": ClosedLoopKind.ALIGNMENT, "KAPPA": 0.5, "BIAS": 0.1, "LAG": 1.0},
    "alignment-bounded": {
        **{"CLOSED_LOOP": ClosedLoopKind.ALIGNMENT, "KAPPA": 0.5, "BIAS": 0.1, "LAG": 1.0},
        **{"MIN_LR": 0.102, "MAX_LR": 0.12},  # the first steps are under, the last ones over
    },
    "alignment-at-once": {"CLOSED_LOOP": ClosedLoopKind.ALIGNMENT, "KAPPA": 0.5, "FREEZE_AFTER": 4.0},
    "gala": {"CLOSED_LOOP": ClosedLoopKind.GALA, "DELTA": 0.5, "MAX_LR": 0.3},
    "volsched": {"CLOSED_LOOP": ClosedLoopKind.VOL_SCHED, "WINDOW": 2.0, "SENSITIVITY": 0.5, "CAPACITY": 5.0},
    "volsched-warmup": {
        **{"CLOSED_LOOP": ClosedLoopKind.VOL_SCHED, "WINDOW": 2.0, "SENSITIVITY": 0.5, "CAPACITY": 5.0},
        **{"WARMUP_STEPS": 3.0, "WARMUP_START": 0.1, "MIN_LR": 0.02},
    },
}


def layouts():
    """Parameters with another layout than their gradient, and ones with gaps."""
    base = randn((6, 10), 0)
    yield "transposed", base.t(), randn((10, 6), 1)
    yield "grad-transposed", base, randn((10, 6), 1).t()
    yield "both-transposed", base.t(), randn((6, 10), 1).t()
    yield "channels-last", randn((2, 3, 4, 5), 2).to(memory_format=torch.channels_last), randn((2, 3, 4, 5), 3)
    yield "gaps", base[:, ::2], randn((6, 5), 4)
    yield "gaps-in-grad", randn((6, 5), 4), base[:, ::2]
    yield "expanded-grad", randn((6, 5), 4), randn((6, 1), 5).expand(6, 5)
    yield "size-one", randn((1, 5, 1), 5), randn((5, 1, 1), 6).as_strided((1, 5, 1), (77, 1, 99))
    yield "scalar", randn((), 7), randn((), 8)
    yield "empty", torch.zeros(0, 3), torch.zeros(0, 3)


LAYOUTS = {name: (param, grad) for name, param, grad in layouts()}


def refused():
    """Jobs with one thing wrong, on two parameters, the second at fault where a parameter is."""
    job = make([(5,), (7,)], Rule.ADAMW, prev=torch.float32, hyper=hyper_row(BETA1=0.9, BETA2=0.9), measure=ALL)
    job.found_inf = job.grad_scale = torch.ones(1)
    doubles = ("control", "settings", "lr", "hyper", "table", "decay", "history")
    for name in doubles:
        yield f"{name}-float32", {name: getattr(job, name).float()}
    for name in ("counts", "found_inf", "grad_scale"):
        yield f"{name}-float64", {name: getattr(job, name).double()}
    yield "integer-param", {"params": [job.params[0], job.params[1].int()]}
    yield "integer-grad", {"grads": [job.grads[0], job.grads[1].long()]}
    yield "complex-grad", {"grads": [job.grads[0], job.grads[1].to(torch.complex64)]}
    yield "integer-state", {"state1": [job.state1[0], job.state1[1].int()]}
    yield "integer-prev", {"prev_write": [job.prev_write[0], job.prev_write[1].int()]}
    yield "params-tuple", {"params": tuple(job.params)}
    yield "grads-tuple", {"grads": tuple(job.grads)}
    yield "grads-tensor", {"grads": job.grads[0]}
    yield "meta-param", {"params": [job.params[0], job.params[1].to("meta")]}
    yield "meta-grad", {"grads": [job.grads[0], job.grads[1].to("meta")]}
    yield "meta-control", {"control": job.control.to("meta")}
    yield "no-tensor", {"grads": [job.grads[0], 3.0]}
    yield "mixed-states", {"state1": [x.bfloat16() for x in job.state1]}
    # What would be read or written past its end
    yield "groups-int64", {"groups": job.groups.long()}
    yield "groups-short", {"groups": job.groups[:1]}
    yield "group-without-a-row", {"groups": torch.tensor([0, 1], dtype=torch.int32)}
    yield "negative-group", {"groups": torch.tensor([0, -1], dtype=torch.int32)}
    yield "grads-short", {"grads": job.grads[:1]}
    yield "states-short", {"state0": job.state0[:1]}
    yield "counts-short", {"counts": job.counts[:1]}
    yield "counts-transposed", {"counts": job.counts.t().contiguous().t()}
    yield "control-short", {"control": job.control[:RING_AT].clone()[: STATS_AT + 1]}
    yield "control-strided", {"control": torch.zeros(2 * len(job.control), dtype=torch.float64)[::2]}
    yield "settings-short", {"settings": job.settings[:3].clone()}
    yield "hyper-narrow", {"hyper": job.hyper[:, :4].clone()}
    yield "lr-empty", {"lr": job.lr[:0]}
    yield "table-empty", {"table": job.table[:0]}
    yield "decay-empty", {"decay": job.decay[:0]}
    yield "history-empty", {"history": job.history[:0]}
    yield "history-narrow", {"history": job.history[:, :4].clone()}
    yield "adamw-without-states", {"state0": None, "state1": None}
    yield "states-none", {"state0": [job.state0[0], None]}
    for name in (*doubles, "counts", "groups"):
        yield f"no-{name}", {name: None}


# ----------------------------------------------------------------------------------------------------------------------
# The verbs alone are a step

IN_PARTS = {  # whether in two passes; a step's calls
    "one-pass": (False, (Verb.MEASURE | Verb.APPLY, Verb.DECIDE)),
    "one-pass-apart": (False, (Verb.MEASURE, Verb.APPLY | Verb.DECIDE)),
    "one-pass-each": (False, (Verb.MEASURE, Verb.APPLY, Verb.DECIDE)),
    "two-passes": (True, (Verb.MEASURE, Verb.DECIDE | Verb.APPLY)),
    "two-passes-apart": (True, (Verb.MEASURE | Verb.DECIDE, Verb.APPLY)),
    "two-passes-each": (True, (Verb.MEASURE, Verb.DECIDE, Verb.APPLY)),
}
in_parts = pytest.mark.parametrize("two_pass, calls", IN_PARTS.values(), ids=IN_PARTS)


def to_be_parted(rule, row, two_pass, shapes=((33,), (1025,), (4, 5))):
    """What changes with each decision: the clip, or the rate of the next step."""
    loop = {"MAX_GRAD_NORM": 1.0} if two_pass else CLOSED_LOOPS["alignment"]
    settings = {"settings": new_settings(SKIP_NONFINITE=1.0, **loop), "measure": ALL, "two_pass": two_pass}
    job = make(shapes, rule, prev=torch.float32, hyper=hyper_row(**row), **settings)
    job.grads[2], job.found_inf = None, torch.zeros(1)
    return job


def assert_parts_are_a_step(job, calls, run):
    """Four steps, the second of them skipped; ``run`` takes a job and the verbs of a call."""
    whole, parts = job.copy(), job.copy()
    for step in range(4):
        for each, verbs in ((whole, [Verb.STEP]), (parts, calls)):
            each.found_inf.fill_(float(step == 1))
            for verb in verbs:
                run(each, verb)
    assert_same_job(whole, parts)
    assert whole.control[Control.STEP] == 3 and whole.control[Control.SKIPPED] == 1
    assert (0 < whole.control[Control.CLIP] < 1) == whole.two_pass
    assert (whole.control[Control.FACTOR] != 1) != whole.two_pass


# ----------------------------------------------------------------------------------------------------------------------
# What MEASURE adds up


def exact_sums(job, before):
    """What MEASURE should add up: exact products of the given numbers, added in extended precision."""
    row, truth = before.hyper[0].tolist(), dict.fromkeys(Sum, 0.0)
    for i in range(len(job.params)):
        g, prev = before.grads[i], before.prev_write[i]
        sign = -1.0 if row[Hyper.MAXIMIZE] else 1.0
        if job.rule == Rule.ADAMW:
            moments = [state[i] for state in (before.state0, before.state1, before.state2) if state]
            direction = rules.adamw_direction(moments[0], moments[-1], row, before.counts[i, Count.UPDATES])
        else:
            direction, sign = (before.state0[i], sign) if before.state0 else (prev, 1.0)
        numbers = (g, direction, prev, g.double() - prev.double(), job.params[i].double() - before.params[i].double())
        g, direction, prev, difference, move = (x.numpy().astype(np.longdouble) for x in numbers)
        for slot, value in {
            Sum.GRAD_SQ: g @ g,
            Sum.GRAD_ABS: abs(g).sum(),
            Sum.DOT_DIRECTION: sign * (g @ direction),
            Sum.DIRECTION_SQ: direction @ direction,
            Sum.DOT_PREV: g @ prev,
            Sum.PREV_SQ: prev @ prev,
            Sum.DIFF_SQ: difference @ difference,
            Sum.MOVE_SQ: move @ move,
        }.items():
            truth[slot] += float(value)
    return truth


def assert_sums_are(truth, job, backend):
    scale = {  # a dot product is as large as what it adds up
        Sum.DOT_DIRECTION: math.sqrt(truth[Sum.GRAD_SQ] * truth[Sum.DIRECTION_SQ]),
        Sum.DOT_PREV: math.sqrt(truth[Sum.GRAD_SQ] * truth[Sum.PREV_SQ]),
    }
    for slot in Sum:
        rel = 2.0**-23 if slot == Sum.MOVE_SQ else 1e-12  # a difference of parameters may be rounded to their dtype
        close = pytest.approx(truth[slot], rel=0, abs=rel * scale.get(slot, truth[slot]))
        assert job.sums[slot] == close, (slot.name, backend)
