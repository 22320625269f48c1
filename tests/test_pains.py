"""One test for each thing that hurts users of other fused optimizers, named after what hurts."""

import copy
import gc
import math
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch
from cases import CLOSED_LOOPS, LR, OPTIMIZERS, SGD_OPTIONS, channels_last, sliced_columns, transposed
from conftest import (
    BACKENDS,
    TORCH,
    Reads,
    TorchLoop,
    assert_close,
    assert_same_bits,
    bits,
    everything,
    fused,
    gradients,
    parameters,
    random_tensors,
    set_grads,
    states,
    train,
)
from torch.optim import lr_scheduler

import lrkernels
from lrkernels import FusedAdamW, FusedSGD, ops, schedules

SHAPES = [(7,), (33, 5), (1025,)]
SKIP_AT = [[0], [2], [0, 1, 4]]
native_only = pytest.mark.skipif(ops.NATIVE not in BACKENDS, reason="the binary is not there")


# ---- Silent wrongness ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.5], ids=["plain", "momentum"])
def test_bfloat16_parameters_move_in_every_simd_block(momentum, dtype, backend):
    """Torch's fused CPU SGD left whole SIMD blocks of 16-bit parameters where they were."""
    params = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size in [*range(140), 255, 256, 257]]
    grads = [torch.ones_like(p) for p in params]
    train(FusedSGD(params, 0.5, momentum=momentum, backend=backend), params, [grads] * 3)
    moved = -1.5 if not momentum else -0.5 * (1 + 1.5 + 1.75)  # every number on the way has few bits
    for p in params:
        assert p.eq(moved).all(), f"{len(p)} elements: {p.eq(0).sum()} of them did not move"


class Scaled:
    """A run under torch.amp.GradScaler; at the given steps an attempt overflows first."""

    def __init__(self, make, overflow_at=(), unscale=False, steps=6, clip=None):
        self.params = parameters(SHAPES)
        self.optimizer = make(self.params)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        self.scaler.scale(torch.zeros(()))  # makes the scale
        self.skips = []
        for step, grads in enumerate(gradients(SHAPES, steps)):
            for _ in range(overflow_at.count(step)):
                before = everything(self.optimizer, self.params)[:2]
                bad = [g.clone() for g in grads]
                bad[-1].view(-1)[-1] = math.inf
                self.attempt(bad, unscale)
                after = everything(self.optimizer, self.params)[:2]
                self.skips.append((step, after[0] == before[0]))
            self.attempt(grads, unscale)

    def attempt(self, grads, unscale):
        scale = self.scaler.get_scale()
        set_grads(self.params, [grad * scale for grad in grads])
        if unscale:
            self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def result(self):
        history = self.optimizer.history()
        kept = [state.get("prev_grad") for state in self.optimizer.state_dict()["state"].values()]
        rows = {key: value.tolist() for key, value in history.items() if key != "skipped"}
        return [self.params, states(self.optimizer, self.params), kept], rows


SCALED = {
    "plain": {},
    "clip": {"max_grad_norm": 0.5},
    "schedule": {"schedule": schedules.linear(8, warmup_steps=2)},
    "alignment": {"schedule": schedules.alignment(), "track": "alignment"},
    "gala": {"schedule": CLOSED_LOOPS["gala"]},
    "swap": {"track": "alignment", "prev_grad": "swap"},
}


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("overflow_at", SKIP_AT, ids=str)
@pytest.mark.parametrize("more", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_an_overflow_poisons_nothing_and_consumes_nothing(kind, options, more, overflow_at, unscale, backend):
    """An overflow on the first step poisoned momentum; it went unseen after unscale_; schedules advanced."""
    run = Scaled(lambda params: fused(kind, params, options, backend=backend, **more), overflow_at, unscale)
    assert run.skips == [(step, True) for step in sorted(overflow_at)]
    assert run.optimizer.stats["skipped"] == len(overflow_at)
    assert run.optimizer.stats["step"] == 6
    params = parameters(SHAPES)  # without a scaler
    optimizer = fused(kind, params, options, backend=backend, **more)
    for grads in gradients(SHAPES, 6):
        train(optimizer, params, [grads])
        optimizer.zero_grad()
    kept = [state.get("prev_grad") for state in optimizer.state_dict()["state"].values()]
    left, rows = run.result()
    assert_same_bits(left, [params, states(optimizer, params), kept])
    assert rows == {key: value.tolist() for key, value in optimizer.history().items() if key != "skipped"}


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_a_parameter_whose_first_gradient_comes_late(kind, options, backend):
    """Torch's fused SGD crashed on it; apex's let the last parameter decide for all whether this is the start."""
    present = [range(8), range(3, 8), range(5, 8)]
    grads = [
        [g if step in steps else None for g, steps in zip(row, present, strict=True)]
        for step, row in enumerate(gradients(SHAPES, 8))
    ]
    params, twins = parameters(SHAPES), parameters(SHAPES)
    optimizer = train(fused(kind, params, options, backend=backend), params, grads)
    loop = train(TorchLoop(kind, twins, options), twins, grads)
    assert_same_bits(states(optimizer, params), [{k: v for k, v in s.items() if k != "step"} for s in loop.states()])
    assert_close(params, twins, rtol=1e-5, atol=2e-6)


STRIDES = [
    pytest.param((40, 30), torch.clone, transposed, id="4-transposed_gradient"),
    pytest.param((40, 30), transposed, torch.clone, id="4-transposed_parameter"),
    pytest.param((40, 30), sliced_columns, torch.clone, id="4-sliced_parameter"),
    pytest.param((4, 3, 5, 6), channels_last, torch.clone, id="12-channels_last_parameter"),
    pytest.param((4, 3, 5, 6), torch.clone, channels_last, id="12-channels_last_gradient"),
]


@pytest.mark.parametrize(("shape", "layout", "grad_layout"), STRIDES)
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_memory_layouts_do_not_mix_elements_up(kind, options, shape, layout, grad_layout, backend):
    """Kernels that walk storage paired the wrong elements, wrote into gaps, or rebound the parameter's data."""
    [p], [twin] = parameters([shape], layout=layout), parameters([shape])
    place, strides, storage = p.data_ptr(), p.stride(), torch.empty(0).set_(p.untyped_storage())
    gaps = int((storage == 7.0).sum())
    train(fused(kind, [p], options, backend=backend), [p], gradients([shape], 5, layout=grad_layout))
    train(TorchLoop(kind, [twin], options), [twin], gradients([shape], 5))
    assert (p.data_ptr(), p.stride()) == (place, strides)
    assert int((storage == 7.0).sum()) == gaps == storage.numel() - p.numel()
    assert_close(p, twin, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "sizes", [[0, 5], [5, 0], [5, 0, 0, 6], [0], [0, 0], []], ids=lambda sizes: "-".join(map(str, sizes)) or "none"
)
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_an_empty_tensor_does_not_stop_the_others(kind, options, sizes, backend):
    """A tensor without elements, in the last place, made other libraries skip the launch for all."""
    shapes = [(size,) for size in sizes]
    params, twins = parameters(shapes), parameters(shapes)
    groups = params or [{"params": []}]
    optimizer = fused(kind, groups, options, backend=backend, max_grad_norm=1e9)
    grads = gradients(shapes, 4)
    train(optimizer, params, grads)
    assert optimizer.stats["step"] == (4 if sizes else 0)  # a step without gradients counts for nothing
    if sizes:
        train(TorchLoop(kind, twins, options), twins, grads)
        assert_close(params, twins, rtol=1e-5, atol=2e-6)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads[-1]))
        assert optimizer.stats["grad_norm"].item() == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("foreach", [False, True], ids=["for-loop", "foreach"])
@pytest.mark.parametrize("name", ["momentum", "nesterov", "dampening", "momentum-weight_decay", "weight_decay"])
def test_hundreds_of_steps_do_not_drift_apart_from_torch_s(name, foreach, backend):
    """Apex's FusedSGD left torch's path after fifty steps; another's buffer was zeroed at each."""
    params, twins = parameters(SHAPES), parameters(SHAPES)
    options = {"lr": LR} | SGD_OPTIONS[name]
    optimizer = fused(FusedSGD, params, options, backend=backend)
    loop = torch.optim.SGD(twins, foreach=foreach, **options)
    for grads in gradients(SHAPES, 300 if backend == ops.NATIVE else 100):
        train(optimizer, params, [grads])
        train(loop, twins, [[g.clone() for g in grads]])
    assert_same_bits(params, twins)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_zero_grad_keeps_the_gradient_s_memory_when_asked_to(kind, options, backend):
    """TransformerEngine's zero_grad(set_to_none=False) let the buffers go all the same."""
    params = parameters(SHAPES)
    [grads] = gradients(SHAPES, 1)
    optimizer = train(fused(kind, params, options, backend=backend), params, [grads])
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is grad and not grad.any() for p, grad in zip(params, grads, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


# ---- Large tensors, dtypes ----


def free_bytes():
    if not os.path.exists("/proc/meminfo"):
        return 0
    with open("/proc/meminfo") as lines:
        rows = dict(line.split(":", 1) for line in lines)
    return int(rows["MemAvailable"].split()[0]) * 1024


@native_only
@pytest.mark.slow
@pytest.mark.skipif(free_bytes() < 12e9, reason="needs 12 GB")
def test_more_elements_than_a_32_bit_integer_counts():
    """Index arithmetic in 32 bits crashed, or trained nothing, beyond 2^31 elements, library by library."""
    size, boundary = 2**31 + 12345, 2**31
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        p = torch.nn.Parameter(torch.empty(size, dtype=torch.bfloat16))
        with torch.no_grad():
            p.fill_(1.0)
        p.grad = torch.empty_like(p).fill_(0.5)
        windows = [slice(0, 70_000), slice(boundary - 70_000, boundary + 7_000), slice(size - 5_000, size)]
        for window in windows:  # positions, so that an element that takes another's gradient shows
            p.grad[window] = torch.arange(window.stop - window.start, dtype=torch.float32).remainder(64).bfloat16()
        want = [1.0 - 0.25 * p.grad[window].float() for window in windows]
        optimizer = FusedSGD([p], 0.25, track="grad_norm")
        optimizer.step()
        for window, values in zip(windows, want, strict=True):
            assert_same_bits(p[window], values.bfloat16())
        moved = 1.0 - 0.25 * p.grad[::1021].float()  # no block elsewhere was left out, or moved twice
        assert_same_bits(p[::1021], moved.bfloat16())
        inside = sum(w.stop - w.start for w in windows)
        length = 0.5 * (size - inside) + sum(float(p.grad[w].double().sum()) for w in windows)
        assert optimizer.stats["grad_norm_l1"].item() == pytest.approx(length, rel=1e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_float32_gradients_of_16_bit_parameters_make_no_hidden_copies(kind, options, dtype, backend):
    """Mixed dtypes were refused, or answered with master weights that nobody asked for."""
    params, twins = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    optimizer = fused(kind, params, options, backend=backend)
    grads = gradients(SHAPES, 5)
    train(optimizer, params, grads)
    loop = train(TorchLoop(kind, twins, options), twins, grads)
    kept = [value for p in params for key, value in optimizer.state[p].items() if key != "step"]
    assert {value.dtype for value in kept} == {dtype}
    assert sum(value.numel() for value in kept) == sum(p.numel() for p in params) * (1 if kind is FusedSGD else 2)
    assert_same_bits(states(optimizer, params), [{k: v for k, v in s.items() if k != "step"} for s in loop.states()])


# ---- Launches, memory, waiting ----


@native_only
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_a_group_for_every_tensor_is_still_one_call(kind, monkeypatch):
    """One group per tensor (465 of them, 28 distinct settings) split the launch and cost a quarter of the step."""
    shapes = [(3 + i,) for i in range(60)]
    params, twins = parameters(shapes), parameters(shapes)
    settings = [{"lr": 0.1, "weight_decay": 0.0}, {"lr": 0.02, "weight_decay": 0.1}]
    split = kind([{"params": [p], **settings[i % 2]} for i, p in enumerate(params)], max_grad_norm=1.0)
    merged = kind([{"params": twins[i::2], **row} for i, row in enumerate(settings)], max_grad_norm=1.0)
    calls, real = [], ops._C
    counting = types.SimpleNamespace(**vars(real) | {"run": lambda *args: calls.append(args) or real.run(*args)})
    monkeypatch.setattr(ops, "_C", counting)
    train(split, params, gradients(shapes, 3))
    assert len(calls) == 3
    train(merged, twins, gradients(shapes, 3))
    assert len(split.param_groups) == 60
    assert_close(params, twins, rtol=1e-6, atol=1e-7)  # the norm is added up in another order


@native_only
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_a_step_needs_no_memory_beside_what_it_keeps(kind):
    """Foreach steps allocate temporaries of the size of all parameters, and 7B models run out of memory."""
    shapes = [(256, 256)] * 8 + [(1 << 17,)]
    params = parameters(shapes)
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1} if kind is FusedSGD else {"amsgrad": True}
    optimizer = kind(params, LR, schedule=schedules.alignment(), max_grad_norm=1.0, **options)
    train(optimizer, params, gradients(shapes, 1))

    def taken(step):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())

    assert taken(optimizer.step) < 10_000
    assert taken(lambda: params[0] + 1.0) >= params[0].nbytes  # the meter works


@native_only
@pytest.mark.parametrize("more", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_watching_training_waits_for_nothing(kind, more):
    """Logging norms cost an .item() for every tensor and step; here they are by-products, read when asked."""
    params = parameters(SHAPES)
    optimizer = kind(params, torch.tensor(LR), **({"track": ("grad_norm", "direction")} | more))
    for grads in gradients(SHAPES, 2):  # the first steps make states and tables
        train(optimizer, params, [grads])
        optimizer.zero_grad()
    kept = [optimizer.stats["grad_norm"]]
    with Reads() as reads:
        for grads in gradients(SHAPES, 5):
            set_grads(params, grads)
            optimizer.step()
            kept.append(optimizer.stats["grad_norm"])
            optimizer.zero_grad()
    assert reads.names == []
    assert optimizer.history()["grad_norm"].tolist()[1:] == [float(norm) for norm in kept]
    with Reads() as reads:
        float(kept[0])
    assert reads.names


def test_the_history_is_the_norm_that_a_user_would_compute(backend):
    """Norms for the log cost a pass of their own, and a wait for each tensor."""
    params = parameters(SHAPES)
    optimizer = FusedSGD(params, LR, track="grad_norm", history_size=5, backend=backend)
    grads = gradients(SHAPES, 9)
    train(optimizer, params, grads)
    want = [float(torch.nn.utils.get_total_norm([g.double() for g in row])) for row in grads]
    assert optimizer.history()["grad_norm"].tolist() == pytest.approx(want[-5:], rel=1e-6)


def test_the_norm_is_a_tensor_whatever_became_of_the_step(backend):
    """On the path of a skipped step the norm was None, or undefined, and the logger crashed."""
    params = parameters(SHAPES)
    optimizer = FusedSGD(params, LR, max_grad_norm=1.0, skip_nonfinite=True, backend=backend)
    good = gradients(SHAPES, 1)[0]
    bad = [torch.full_like(g, math.inf) for g in good]
    known = []
    for grads in (None, good, bad, [None] * len(good), good):
        if grads is not None:
            train(optimizer, params, [grads])
        norm = optimizer.stats["grad_norm"]
        assert isinstance(norm, torch.Tensor)
        assert norm.shape == ()
        known.append(bool(norm.isfinite()))
    assert known == [False, True, False, False, True]


def test_steps_with_fresh_tensors_leave_nothing_behind():
    """A table cached by the id of its tensors grew with each step, since every step brings other wrappers."""
    params = parameters(SHAPES)
    optimizer = FusedSGD(params, LR, momentum=0.9, track="alignment", prev_grad="swap", history_size=8)
    grads = gradients(SHAPES, 1)[0]

    def steps(n):
        for _ in range(n):
            set_grads(params, [g.clone() for g in grads])
            optimizer.step()
            optimizer.zero_grad()
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    assert steps(3) == steps(40)


# ---- The rate ----


@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_no_hyper_parameter_is_frozen_at_the_first_step(kind, backend):
    """Rate, decay and step were baked into captured steps, and training went on with the first ones."""
    rows = {
        FusedSGD: [{"lr": 0.2}, {"momentum": 0.5}, {"weight_decay": 0.3}, {"dampening": 0.2}, {"maximize": True}],
        FusedAdamW: [{"lr": 0.2}, {"betas": (0.5, 0.6)}, {"weight_decay": 0.3}, {"eps": 0.5}, {"maximize": True}],
    }
    options = {"momentum": 0.9} if kind is FusedSGD else {}
    params, twins = parameters(SHAPES), parameters(SHAPES)
    optimizer, loop = kind(params, LR, backend=backend, **options), TORCH[kind](twins, LR, foreach=False, **options)
    for row, grads in zip([{}, *rows[kind]], gradients(SHAPES, 6), strict=True):
        optimizer.param_groups[0].update(row)
        loop.param_groups[0].update(row)
        train(optimizer, params, [grads])
        train(loop, twins, [grads])
        assert_close(params, twins, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_a_changing_rate_does_not_compile_anew(as_tensor, backend):
    """Under torch.compile a float rate that changes compiled the step again each time."""
    params, twins = parameters(SHAPES), parameters(SHAPES)
    lr = torch.tensor(LR) if as_tensor else LR
    optimizer = FusedSGD(params, lr, momentum=0.9, schedule=schedules.linear(20), backend=backend)
    twin = FusedSGD(twins, LR, momentum=0.9, schedule=schedules.linear(20), backend=backend)
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()

    @torch.compile(backend=count)
    def forward_and_step(x):
        loss = sum((p * x).sum() for p in params)
        optimizer.step()
        return loss + 1.0

    made = []
    for step, grads in enumerate(gradients(SHAPES, 8)):
        set_grads(params, grads)
        set_grads(twins, grads)
        forward_and_step(torch.tensor(float(step)))
        twin.step()
        made.append(len(compilations))
    torch._dynamo.reset()
    assert made[-1] == made[2] > 0
    assert_same_bits(params, twins) if not as_tensor else assert_close(params, twins, rtol=1e-5, atol=1e-6)


def test_a_rate_in_a_tensor_stays_the_same_tensor(backend):
    """Loading put another tensor in its place, and state_dict handed out the live one."""
    params, lr = parameters(SHAPES), torch.tensor(LR)
    optimizer = FusedSGD(params, lr, backend=backend)
    saved = optimizer.state_dict()
    lr.fill_(0.5)
    assert float(saved["param_groups"][0]["lr"]) == pytest.approx(LR)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(LR)
    lr.fill_(0.25)  # whoever holds it still steers
    train(optimizer, params, gradients(SHAPES, 1))
    assert optimizer.stats["lr"] == 0.25


def test_the_user_can_tell_whether_the_step_happened(backend):
    """Behind a scaler nobody knew whether the step was skipped, and so whether to advance the schedule."""
    run = Scaled(lambda params: FusedSGD(params, LR, schedule=schedules.linear(6), backend=backend), [1, 1, 3])
    assert run.optimizer.history()["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run.optimizer.history()["skipped"].tolist() == [0, 2, 2, 3, 3, 3]
    assert run.optimizer.history()["lr"].tolist() == [LR * (1 - step / 6) for step in range(6)]


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_a_sequence_of_schedulers_reads_the_same_from_a_tensor(as_tensor, backend):
    """SequentialLR took a rate in a tensor for its own initial rate, and ran away."""
    params, twins = parameters(SHAPES), parameters(SHAPES)
    lr = torch.tensor(LR, dtype=torch.float64) if as_tensor else LR
    optimizer, loop = FusedSGD(params, lr, backend=backend), torch.optim.SGD(twins, LR, foreach=False)

    def sequence(optimizer):
        parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.8)]
        return lr_scheduler.SequentialLR(optimizer, parts, [4])

    mine, theirs = sequence(optimizer), sequence(loop)
    for grads in gradients(SHAPES, 12):
        train(optimizer, params, [grads], [mine])
        rate = loop.param_groups[0]["lr"]
        train(loop, twins, [grads], [theirs])
        assert float(optimizer.stats["lr"]) == pytest.approx(rate, rel=1e-12)
    assert_close(params, twins, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at", [0, 1, 5, 6, 7, 11])
def test_a_joined_schedule_resumes_anywhere_by_one_integer(at):
    """Resuming SequentialLR in mid-way gave other rates than going through."""
    schedule = schedules.join([schedules.linear(6, warmup_steps=2), schedules.cosine(10)], [6])
    params = parameters(SHAPES)
    first = train(FusedSGD(params, LR, schedule=schedule), params, gradients(SHAPES, at))
    second = FusedSGD(params, LR, schedule=schedule)
    second.load_state_dict(first.state_dict())
    train(second, params, gradients(SHAPES, 12 - at))
    rates = [*first.history()["lr"], *second.history()["lr"]]
    assert rates == [LR * schedule(step) for step in range(12)]


def test_accumulation_does_not_advance_the_schedule(backend):
    """Schedulers advanced once for each micro-batch or process; here a step is an update."""
    [p], [x] = parameters([(5,)]), random_tensors([(5,)], seed=4)
    optimizer = FusedSGD([p], LR, schedule=schedules.linear(10), backend=backend)
    for _ in range(6):
        for _ in range(4):
            (p * x).sum().div(4).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.history()["lr"].tolist() == [LR * (1 - step / 10) for step in range(6)]
    assert optimizer.stats["step"] == 6


@pytest.mark.parametrize("loop", ["alignment-lag1", "gala", "volsched"])
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_a_learnt_rate_goes_on_after_a_resume_in_groups_of_any_rates(kind, options, loop, backend):
    """Others refuse groups of different rates, or keep what was learnt in one, and resume at the first rate."""

    def make():
        params = parameters(SHAPES)
        groups = [{"params": [p], "lr": LR * factor} for p, factor in zip(params, (1.0, 0.1, 3.0), strict=True)]
        return params, kind(groups, **options, schedule=CLOSED_LOOPS[loop], backend=backend)

    def drive(params, optimizer, rows):
        for step, row in rows:
            optimizer.observe(0.2 + 0.1 * (step * step % 5))
            train(optimizer, params, [row])
        return optimizer

    rows = list(enumerate(gradients(SHAPES, 14)))
    params, optimizer = make()
    saved = copy.deepcopy(([p.detach() for p in params], drive(params, optimizer, rows[:9]).state_dict()))
    drive(params, optimizer, rows[9:])
    others, resumed = make()
    with torch.no_grad():
        for p, value in zip(others, saved[0], strict=True):
            p.copy_(value)
    resumed.load_state_dict(saved[1])
    drive(others, resumed, rows[9:])
    assert_same_bits(others, params)
    assert resumed.history()["lr"].tolist() == optimizer.history()["lr"][9:].tolist()
    assert resumed.history()["lr"][0] != LR  # something was learnt


# ---- Refused aloud, with nothing changed ----


def _sparse(optimizer, params):
    params[-1].grad = torch.eye(4).to_sparse()


def _another_dtype(optimizer, params):
    params[-1].grad_dtype = None
    params[-1].grad = torch.ones(4, 4, dtype=torch.float64)


def _on_another_device(optimizer, params):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3, device="meta"))]})


def _set(**values):
    def change(optimizer, params):
        optimizer.param_groups[-1].update(values)

    return change


nan, inf = math.nan, math.inf
REFUSED_STEPS = {
    "sparse": (None, _sparse, r"takes no sparse gradients, and got one of shape \(4, 4\); use sparse=False"),
    "float64_gradient": (None, _another_dtype, "takes gradients of the parameter's dtype or float32; got torch.float"),
    "devices": (None, _on_another_device, "parameters on several devices .*meta.*: make one optimizer for each"),
    "differentiable": (None, _set(differentiable=True), "differentiable=True is not supported; use torch.optim"),
    "lr_nan": (None, _set(lr=nan), "lr must be finite and >= 0, got nan"),
    "lr_inf": (None, _set(lr=inf), "lr must be finite and >= 0, got inf"),
    "lr_negative": (None, _set(lr=-0.1), "lr must be finite and >= 0, got -0.1"),
    "lr_none": (None, _set(lr=None), "lr must be finite and >= 0, got None"),
    "lr_tensor_nan": (None, _set(lr=torch.tensor(nan)), "lr must be finite and >= 0, got nan"),
    "lr_tensor_of_two": (None, _set(lr=torch.ones(2)), r"lr must be a float or a tensor of one element, got .*\(2,\)"),
    "weight_decay_nan": (None, _set(weight_decay=nan), "weight_decay must be finite and >= 0, got nan"),
    "weight_decay_negative": (None, _set(weight_decay=-1.0), "weight_decay must be finite and >= 0, got -1"),
    "momentum_nan": (FusedSGD, _set(momentum=nan), "momentum must be finite and >= 0, got nan"),
    "momentum_negative": (FusedSGD, _set(momentum=-0.5), "momentum must be finite and >= 0, got -0.5"),
    "dampening_nan": (FusedSGD, _set(dampening=nan), "dampening must be finite, got nan"),
    "nesterov": (FusedSGD, _set(nesterov=True, momentum=0.0), "nesterov=True needs momentum > 0 and dampening = 0"),
    "beta1": (FusedAdamW, _set(betas=(1.0, 0.9)), r"betas\[0\] must be in \[0, 1\), got 1.0"),
    "beta2": (FusedAdamW, _set(betas=(0.9, nan)), r"betas\[1\] must be in \[0, 1\), got nan"),
    "eps": (FusedAdamW, _set(eps=-1e-8), "eps must be finite and >= 0, got -1e-08"),
}
REFUSED_STEPS = [
    pytest.param(kind, options.values[1], spoil, message, done, id=f"{kind.__name__}-{name}-{done}")
    for name, (only, spoil, message) in REFUSED_STEPS.items()
    for options in OPTIMIZERS
    for done in (0, 3)
    if (kind := options.values[0]) is only or only is None
]


@pytest.mark.parametrize(("kind", "options", "spoil", "message", "done"), REFUSED_STEPS)
def test_a_refused_step_changes_nothing(kind, options, spoil, message, done, backend):
    shapes = [(5,), (33,), (4, 4)]
    params, twins = parameters(shapes), parameters(shapes)
    more = {"schedule": schedules.linear(20), "track": ("direction", "alignment"), "backend": backend}
    optimizer, twin = fused(kind, params, options, **more), fused(kind, twins, options, **more)
    grads = gradients(shapes, done + 3)
    train(optimizer, params, grads[:done])
    train(twin, twins, grads[:done])
    before, groups = everything(optimizer, params), [dict(group) for group in optimizer.param_groups]
    set_grads(params, grads[done])
    spoil(optimizer, params)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^lrkernels: .*" + message):
            optimizer.step()
        assert bits(params) == bits(twins)
        now = everything(optimizer, params)
        assert now == before or done == 0, "states, counts or control have changed"
    del optimizer.param_groups[1:]  # mended, it goes on as if nothing had happened
    optimizer.param_groups[0].update(groups[0])
    train(optimizer, params, grads[done:])
    train(twin, twins, grads[done:])
    assert everything(optimizer, params) == everything(twin, twins)


@pytest.mark.parametrize("lr", [torch.tensor(nan), torch.tensor(-1.0), torch.ones(2)], ids=["nan", "negative", "two"])
def test_a_rate_s_tensor_that_replaces_another_is_checked(lr, backend):
    params = parameters(SHAPES)
    optimizer = train(FusedSGD(params, torch.tensor(LR), backend=backend), params, gradients(SHAPES, 2))
    before = everything(optimizer, params)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=r"^lrkernels: lr must be "):
        optimizer.step()
    assert everything(optimizer, params) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_float64_gradient_is_refused_even_where_the_first_arrives_late(dtype, backend):
    params = parameters([(5,), (6,)], dtype)
    optimizer = FusedSGD(params, LR, momentum=0.9, backend=backend)
    first, second = gradients([(5,), (6,)], 2, dtype)
    train(optimizer, params, [[first[0], None]])
    before = everything(optimizer, params)
    with pytest.raises(ValueError, match=r"^lrkernels: FusedSGD takes gradients of the parameter's dtype or float32"):
        train(optimizer, params, [[second[0], second[1].double()]])
    assert everything(optimizer, params) == before
    assert params[1] not in optimizer.state


@pytest.mark.parametrize("shape", [(6,), (4, 5), (1, 5)], ids=str)  # to the last two a state of (5,) could be spread
@pytest.mark.parametrize(
    ("kind", "options"),
    [*OPTIMIZERS, pytest.param(FusedSGD, {"lr": LR, "track": "alignment", "prev_grad": "swap"}, id="swap")],
)
def test_a_parameter_that_has_grown_needs_its_state_forgotten(kind, options, shape, backend):
    params = parameters([(3,), (5,)])
    optimizer = train(fused(kind, params, options, backend=backend), params, gradients([(3,), (5,)], 2))
    params[1].grad = None
    params[1].data = torch.ones(shape)
    before, grads = everything(optimizer, params), gradients([(3,), shape], 1)
    with pytest.raises(ValueError, match=r"^lrkernels: a parameter has the shape .* now, and its .* \(5,\); forget"):
        train(optimizer, params, grads)
    assert everything(optimizer, params) == before
    optimizer.state.pop(params[1])
    anew = [torch.nn.Parameter(torch.ones(shape))]
    train(fused(kind, anew, options, backend=backend), anew, [grads[0][1:]])
    assert_same_bits(train(optimizer, params, grads).param_groups[0]["params"][1:], anew)


@pytest.mark.parametrize("shape", [(6,), (4, 5), ()], ids=str)
def test_a_parameter_that_has_grown_has_no_last_point(shape, backend):
    [p], evaluated = parameters([(5,)]), []
    optimizer = FusedSGD([p], LR, schedule=schedules.gala(), backend=backend)

    def closure():
        p.grad = torch.ones_like(p)
        evaluated.append(p.shape)

    optimizer.step(closure)
    p.grad = None
    p.data = torch.ones(shape)
    evaluated.clear()
    with pytest.raises(ValueError, match=r"^lrkernels: a parameter has the shape .* prev_param \(5,\); forget"):
        optimizer.step(closure)
    assert not evaluated and torch.equal(p, torch.ones(shape))
    optimizer.state.pop(p)
    optimizer.step(closure)
    assert not torch.equal(p, torch.ones(shape))


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_what_a_user_puts_into_a_state_is_left_alone(kind, options, backend):
    [p], grads = parameters([(3,)]), gradients([(3,)], 3)
    optimizer = train(fused(kind, [p], options, backend=backend), [p], grads[:1])
    optimizer.state[p]["seen"] = torch.tensor(1.0)
    train(optimizer, [p], grads[1:])
    assert optimizer.state[p]["seen"] == 1.0


@native_only
@pytest.mark.parametrize("layout", ["mkldnn", "sparse"])
def test_a_state_of_another_layout_is_an_error(layout):
    if layout == "mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no mkldnn")
    params = parameters([(5,), (6,)])
    optimizer = FusedSGD(params, LR, momentum=0.9, backend="native")
    train(optimizer, params, gradients([(5,), (6,)], 1))
    buffer = optimizer.state[params[1]]["momentum_buffer"]
    optimizer.state[params[1]]["momentum_buffer"] = getattr(buffer, f"to_{layout}")()
    before = bits(params)
    with pytest.raises(ValueError, match=r"^lrkernels: state0\[1\] is not a dense CPU tensor"):
        train(optimizer, params, gradients([(5,), (6,)], 1))
    assert bits(params) == before


def _changed_in_place(params):
    params[1].grad.mul_(2.0)


def _zeroed(params):
    torch.optim.SGD(params).zero_grad(set_to_none=False)


@pytest.mark.parametrize("change", [_changed_in_place, _zeroed])
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_a_kept_gradient_that_was_changed_is_an_error(kind, options, change, backend):
    params = parameters(SHAPES)
    optimizer = fused(kind, params, options, track="alignment", prev_grad="swap", backend=backend)
    train(optimizer, params, gradients(SHAPES, 2))
    change(params)
    before = everything(optimizer, params)
    with pytest.raises(RuntimeError, match=r"^lrkernels: prev_grad='swap' keeps each gradient .*zero_grad\(set_to"):
        train(optimizer, params, gradients(SHAPES, 1))
    assert everything(optimizer, params) == before
    train(optimizer, params, gradients(SHAPES, 1))  # said once, it goes on without them
    assert optimizer.stats["step"] == 3


class Own(torch.nn.Parameter):
    """A parameter of a type that is not torch's."""


@pytest.mark.parametrize("kind", [torch.nn.Parameter, Own])
def test_a_gradient_is_kept_while_none_arrives(kind, backend):
    params = [kind(p.detach()) for p in parameters(SHAPES)]
    optimizer = FusedSGD(params, LR, track="alignment", prev_grad="swap", backend=backend)
    first, second, third, fourth = gradients(SHAPES, 4)
    second[1] = fourth[1] = None
    train(optimizer, params, [first, second, third])
    before = [second[0], first[1], second[2]]
    alignment = sum(torch.sum(a.double() * b.double()).item() for a, b in zip(third, before, strict=True))
    assert optimizer.stats["alignment"].item() == pytest.approx(alignment, rel=1e-12)
    train(optimizer, params, [fourth])
    third[1].mul_(2.0)
    with pytest.raises(RuntimeError, match=r"^lrkernels: prev_grad='swap' keeps .* of shape \(33, 5\) was changed"):
        train(optimizer, params, [first])


def parameter(dtype=torch.float32, **more):
    return [torch.nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=dtype.is_floating_point, **more)]


REFUSED_ARGUMENTS = [
    (FusedSGD, {"lr": nan}, "lr must be finite and >= 0, got nan"),
    (FusedSGD, {"lr": -1.0}, "lr must be finite and >= 0, got -1.0"),
    (FusedSGD, {"lr": "fast"}, "lr must be finite and >= 0, got 'fast'"),
    (FusedSGD, {"lr": torch.tensor(-1.0)}, "lr must be finite and >= 0"),
    (FusedSGD, {"lr": torch.ones(3)}, "lr must be a float or a tensor of one element"),
    (FusedSGD, {"momentum": nan}, "momentum must be finite and >= 0, got nan"),
    (FusedSGD, {"momentum": -0.1}, "momentum must be finite and >= 0, got -0.1"),
    (FusedSGD, {"weight_decay": inf}, "weight_decay must be finite and >= 0, got inf"),
    (FusedSGD, {"dampening": nan}, "dampening must be finite, got nan"),
    (FusedSGD, {"nesterov": True}, "nesterov=True needs momentum > 0 and dampening = 0"),
    (FusedSGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov=True needs momentum > 0"),
    (FusedSGD, {"differentiable": True}, "differentiable=True is not supported"),
    (FusedAdamW, {"differentiable": True}, "differentiable=True is not supported"),
    (FusedAdamW, {"betas": (-0.1, 0.9)}, r"betas\[0\] must be in \[0, 1\), got -0.1"),
    (FusedAdamW, {"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), got 1.0"),
    (FusedAdamW, {"betas": (0.9, nan)}, r"betas\[1\] must be in \[0, 1\), got nan"),
    (FusedAdamW, {"eps": nan}, "eps must be finite and >= 0, got nan"),
    (FusedAdamW, {"weight_decay": -1.0}, "weight_decay must be finite and >= 0, got -1.0"),
    (FusedSGD, {"max_grad_norm": 0.0}, "max_grad_norm must be > 0 or None, got 0"),
    (FusedSGD, {"max_grad_norm": nan}, "max_grad_norm must be > 0 or None, got nan"),
    (FusedSGD, {"history_size": 0}, "history_size must be a whole number, at least 1, got 0"),
    (FusedSGD, {"track": "loss"}, r"track takes names of .*'alignment'.*, got \['loss'\]"),
    (FusedAdamW, {"track": ["grad_norm", "x"]}, r"track takes names of .*, got \['x'\]"),
    (FusedSGD, {"prev_grad": "keep"}, r"prev_grad must be one of \('store', 'swap', 'bfloat16'\), got 'keep'"),
    (FusedSGD, {"backend": "cuda"}, "backend must be None, 'native', 'triton' or 'eager', got 'cuda'"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), REFUSED_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_a_refused_argument(kind, arguments, message):
    with pytest.raises(ValueError, match="^lrkernels: " + message):
        kind(parameter(), **arguments)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.complex64, "takes no complex parameters; use torch.view_as_real"),
        (torch.int64, "takes parameters of .*torch.bfloat16.*, got torch.int64"),
        (torch.float8_e5m2, "takes parameters of .*, got torch.float8_e5m2"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_parameters_that_no_kernel_computes(kind, options, dtype, message):
    with pytest.raises(ValueError, match=f"^lrkernels: {kind.__name__} {message}"):
        fused(kind, parameter(dtype), options)
    params = parameters(SHAPES)
    optimizer = train(fused(kind, params, options), params, gradients(SHAPES, 2))
    before = everything(optimizer, params)
    with pytest.raises(ValueError, match=f"^lrkernels: {kind.__name__} {message}"):
        optimizer.add_param_group({"params": parameter(dtype)})
    assert len(optimizer.param_groups) == 1
    assert everything(optimizer, params) == before


def test_gala_without_a_closure(backend):
    params = parameters(SHAPES)
    optimizer = FusedSGD(params, LR, schedule=schedules.gala(delta=0.1), backend=backend)
    before = everything(optimizer, params)
    with pytest.raises(ValueError, match=r"^lrkernels: gala\(mode='same_batch'\) needs step\(closure\)"):
        train(optimizer, params, gradients(SHAPES, 1))
    assert everything(optimizer, params) == before


# ---- Without a compiler ----


def few_steps():
    """Train a little, with most of what there is; return tensors that tell it."""
    results = []
    for row in OPTIMIZERS:
        for dtype in (torch.float32, torch.bfloat16):
            params = parameters(SHAPES, dtype)
            optimizer = fused(row.values[0], params, row.values[1], max_grad_norm=1.0, schedule=schedules.alignment())
            train(optimizer, params, gradients(SHAPES, 4, dtype))
            results += [params, states(optimizer, params), optimizer.stats["step"]]
    return results


CHILD = """
import sys
sys.modules["lrkernels._C"] = None
sys.path.insert(0, {tests!r})
import torch, conftest, test_pains, lrkernels
torch.save([*conftest.tensors(test_pains.few_steps())], {path!r})
print(lrkernels.info())
try:
    lrkernels.FusedSGD(test_pains.parameter(), backend="native").step()
except RuntimeError as error:
    print(error)
"""


def test_without_the_binary_everything_works_and_info_says_why(tmp_path):
    """No compiler, or another torch's, and the import failed; or an older path ran without a word."""
    path = tmp_path / "steps.pt"
    tests = os.path.dirname(os.path.abspath(__file__))
    code = CHILD.format(tests=tests, path=str(path))
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=os.path.dirname(tests)
    )
    assert child.returncode == 0, child.stderr
    assert "cpu     eager: not available (ModuleNotFoundError: " in child.stdout or (
        "cpu     eager: not available (ImportError: " in child.stdout
    ), child.stdout
    assert "lrkernels: backend='native' is not available for cpu: " in child.stdout
    assert "pip install" in child.stdout
    assert_same_bits(torch.load(path, weights_only=True), few_steps())
    if ops.NATIVE in BACKENDS:
        assert "cpu     native: C++ kernels" in lrkernels.info()


def stepped(**options):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return FusedSGD([p], **{"lr": LR, **options})


def signals(*values):
    scheduler = lrkernels.VolSchedLR(torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=LR), total_steps=10)
    for value in values:
        scheduler.step(value)


WARNINGS = {
    "no-signal": lambda: stepped(schedule=schedules.volsched(10)).step(),
    "signal-nan": lambda: stepped(schedule=schedules.volsched(10)).observe(math.nan),
    "rate-zero": lambda: stepped(schedule=schedules.gala(mode="consecutive"), lr=0.0).step(),
    "scheduler-no-signal": lambda: signals(None),
    "scheduler-signal-nan": lambda: signals(math.nan),
    "norms-not-finite": lambda: schedules.refined([1.0, math.inf, 1.0]),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("cause", WARNINGS)
def test_a_warning_names_the_line_that_called(cause):
    """And so it is given once for each such line, which is what Python's own filter counts by."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        WARNINGS[cause]()
    found = [warning.filename for warning in caught if str(warning.message).startswith("lrkernels: ")]
    assert found == [__file__]
