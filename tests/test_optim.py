"""FusedSGD and FusedAdamW against torch's loop, the backends against each other, statistics against float64."""

import collections
import copy
import functools
import itertools
import math
import warnings

import pytest
import torch
from cases import (
    CLOSED_LOOPS,
    DTYPES,
    LARGE_SIZES,
    LAYOUTS,
    LR,
    OPTIMIZERS,
    OPTIONS,
    SCHEDULES,
    SMALL_SIZES,
    TORCH_SCHEDULERS,
    sliced,
    sliced_columns,
)
from conftest import (
    BACKENDS,
    TORCH,
    TorchLoop,
    assert_close,
    assert_same_bits,
    bits,
    fused,
    gradients,
    parameters,
    random_tensors,
    set_grads,
    states,
    train,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

import lrkernels
from lrkernels import FusedAdamW, FusedSGD, layout, schedules

SHAPES = [(7,), (33, 5), (1025,)]
TOLERANCES = {  # of AdamW against torch's, whose roots are one unit off now and then
    torch.float32: (1e-5, 2e-6),
    torch.float64: (1e-12, 1e-14),
    torch.bfloat16: (2**-7, 2**-10),
    torch.float16: (2**-10, 2**-13),
}


def run(make, shapes, grads, dtype=torch.float32, layout=torch.clone):
    """Train new parameters; return them and their states."""
    params = parameters(shapes, dtype, layout)
    optimizer = train(make(params), params, grads)
    own = optimizer.states() if isinstance(optimizer, TorchLoop) else states(optimizer, params)
    return params, [{key: value for key, value in state.items() if key != "step"} for state in own]


def assert_parity(kind, options, shapes, grads, dtype, layout=torch.clone):
    """Bit for bit in all of SGD and in AdamW's moments; its parameters within torch's rounding of the root."""
    torch_params, torch_states = run(lambda params: TorchLoop(kind, params, options), shapes, grads, dtype, layout)
    makes = [functools.partial(fused, kind, options=options, backend=backend) for backend in BACKENDS]
    runs = [run(make, shapes, grads, dtype, layout) for make in makes]
    for params, own_states in runs:
        assert_same_bits(own_states, torch_states)
        if kind is FusedSGD:
            assert_same_bits(params, torch_params)
        else:
            assert_close(params, torch_params, *TOLERANCES[dtype])
    if kind is FusedSGD or dtype != torch.float64:  # in float64 the powers of beta may differ by a unit
        assert_same_bits(runs[0][0], runs[-1][0])


# ---- The update ----


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES)
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_fifty_steps_are_torch_s(kind, options, dtype, grad_dtype):
    assert_parity(kind, options, SHAPES, gradients(SHAPES, 50, grad_dtype), dtype)


@pytest.mark.parametrize(("sizes", "steps"), [(SMALL_SIZES, 20), (LARGE_SIZES, 4)], ids=["small", "large"])
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES)
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_every_size_is_torch_s(kind, options, dtype, grad_dtype, sizes, steps):
    shapes = [(size,) for size in sizes]
    assert_parity(kind, options, shapes, gradients(shapes, steps, grad_dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "layout", "grad_layout"), LAYOUTS)
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_every_layout_is_torch_s(kind, options, shape, layout, grad_layout, dtype):
    shapes = [shape, (9,)]

    def second(x):  # a neighbour of ordinary layout
        return x if x.shape == (9,) else layout(x)

    grads = [[grad_layout(first), other] for first, other in gradients(shapes, 10, dtype)]
    assert_parity(kind, options, shapes, grads, dtype, second)


@pytest.mark.parametrize("layout", [sliced, sliced_columns])
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_gaps_of_a_sliced_parameter_are_not_written(kind, options, layout, backend):
    [p] = parameters([(4, 3, 5, 6)], layout=layout)
    train(fused(kind, [p], options, backend=backend), [p], gradients([p.shape], 3))
    storage = torch.empty(0).set_(p.untyped_storage())
    assert int((storage == 7.0).sum()) == storage.numel() - p.numel() > 0


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_gradients_are_not_written(kind, options, backend):
    params = parameters(SHAPES)
    [grads] = gradients(SHAPES, 1)
    want = bits(grads)
    optimizer = fused(kind, params, options, backend=backend, max_grad_norm=0.1, track="alignment")
    train(optimizer, params, [grads] * 3)
    assert bits([p.grad for p in params]) == want
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))


@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["clips", "does not clip"])
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_max_grad_norm_is_clip_grad_norm(kind, options, max_norm, backend):
    params, twins = parameters(SHAPES), parameters(SHAPES)
    optimizer = fused(kind, params, options, backend=backend, max_grad_norm=max_norm)
    loop = TORCH[kind](twins, foreach=False, **options)
    for grads in gradients(SHAPES, 20):
        train(optimizer, params, [grads])
        set_grads(twins, [grad.clone() for grad in grads])
        norm = torch.nn.utils.clip_grad_norm_(twins, max_norm)
        loop.step()
        assert_close(optimizer.stats["grad_norm"].float(), norm, rtol=1e-6)
    assert_close(params, twins, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_the_same_bits_whatever_the_threads_and_every_time(kind, options):
    shapes = [(65537,), (1000,), (300, 700)]
    grads = gradients(shapes, 3)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            params = parameters(shapes)
            optimizer = fused(kind, params, options, track=("direction", "alignment"), max_grad_norm=1.0)
            train(optimizer, params, grads)
            stats = torch.stack([optimizer.stats[name] for name in optimizer.stats])
            results.append([params, states(optimizer, params), stats])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


# ---- Groups, and what changes in mid-run ----

GROUPS = {
    FusedSGD: [
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        {"lr": torch.tensor(0.02), "momentum": 0.5, "nesterov": True},
        {"lr": 0.03, "maximize": True, "weight_decay": 0.1},
        {"lr": 0.01, "momentum": 0.8, "dampening": 0.5},
    ],
    FusedAdamW: [
        {"lr": 0.1, "weight_decay": 0.0},
        {"lr": torch.tensor(0.02, dtype=torch.float64), "betas": (0.3, 0.9), "eps": 1e-3},
        {"lr": 0.03, "maximize": True},
        {"lr": 0.01, "amsgrad": True, "weight_decay": 0.3},
    ],
}


def grouped(kind, params):
    """Every group its own settings, and one parameter of each size."""
    return [{"params": params[i::4], **row} for i, row in enumerate(GROUPS[kind])]


def assert_same_training(kind, params, twins):
    if kind is FusedSGD:
        assert_same_bits(params, twins)
    else:
        assert_close(params, twins, *TOLERANCES[torch.float32])


@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_groups_of_different_everything(kind, backend):
    shapes = [(5,), (6, 2), (17,), (1030,)] * 2
    params, twins = parameters(shapes), parameters(shapes)
    optimizer, loop = kind(grouped(kind, params), backend=backend), TORCH[kind](grouped(kind, twins), foreach=False)
    for grads in gradients(shapes, 20):
        train(optimizer, params, [grads])
        train(loop, twins, [grads])
    assert_same_training(kind, params, twins)


@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_a_group_added_later(kind, backend):
    shapes = [(5,), (6, 2), (17,), (1030,)]
    params, twins = parameters(shapes), parameters(shapes)
    rows, twin_rows = grouped(kind, params), grouped(kind, twins)
    optimizer, loop = kind(rows[:1], backend=backend), TORCH[kind](twin_rows[:1], foreach=False)
    for count, grads in enumerate(gradients(shapes, 12), start=1):
        if count in (3, 4, 8):
            optimizer.add_param_group(rows[len(optimizer.param_groups)])
            loop.add_param_group(twin_rows[len(loop.param_groups)])
        train(optimizer, params, [grads])
        train(loop, twins, [grads])
    assert len(optimizer.param_groups) == 4
    assert_same_training(kind, params, twins)


def _another_list(groups, spare):
    groups[0]["params"] = [spare, groups[0]["params"][1]]


def _another_parameter(groups, spare):
    groups[0]["params"][1] = spare


def _one_more(groups, spare):
    groups[1]["params"].append(spare)


def _one_less(groups, spare):
    del groups[0]["params"][0]


def _one_to_another_group(groups, spare):
    groups[1]["params"].insert(0, groups[0]["params"].pop())


def _a_group_less(groups, spare):
    del groups[0]


@pytest.mark.parametrize(
    "change",
    [_another_list, _another_parameter, _one_more, _one_less, _one_to_another_group, _a_group_less],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_parameters_exchanged_in_the_groups_themselves(kind, change, backend):
    """As Lightning's callbacks and accelerate do; no method of the optimizer is told."""
    results = []
    for build in (lambda groups: kind(groups, backend=backend), lambda groups: TORCH[kind](groups, foreach=False)):
        a, b, c, spare = params = parameters([(5,), (4, 3), (5,), (5,)])
        optimizer = build([{"params": [a, b], "lr": 0.1}, {"params": [c], "lr": 0.02}])
        grads = gradients([p.shape for p in params], 6)
        train(optimizer, params, grads[:3])
        change(optimizer.param_groups, spare)
        train(optimizer, params, grads[3:])
        results.append(params)
    assert_close(*results, rtol=1e-5, atol=2e-6)


CHANGES = [  # the optimizer, how it starts, and {completed steps: what is written into its group}
    pytest.param(FusedSGD, {}, {4: {"lr": 0.5}, 8: {"lr": 0.0}, 9: {"lr": torch.tensor(0.1)}}, id="lr"),
    pytest.param(FusedSGD, {}, {4: {"momentum": 0.9}, 8: {"momentum": 0}, 10: {"momentum": 0.5}}, id="momentum"),
    pytest.param(FusedSGD, {"dampening": 0.4}, {4: {"momentum": 0.9}}, id="momentum-dampening"),
    pytest.param(FusedSGD, {"momentum": 0.9}, {4: {"weight_decay": 0.1}, 8: {"weight_decay": 0}}, id="weight_decay"),
    pytest.param(FusedSGD, {"momentum": 0.9}, {4: {"nesterov": True}, 8: {"nesterov": False}}, id="nesterov"),
    pytest.param(FusedSGD, {"momentum": 0.9}, {4: {"dampening": 0.5}}, id="dampening"),
    pytest.param(FusedSGD, {"momentum": 0.9}, {4: {"maximize": True}}, id="maximize"),
    pytest.param(FusedAdamW, {}, {4: {"betas": (0.5, 0.9)}, 8: {"eps": 1e-2}}, id="betas-eps"),
    pytest.param(FusedAdamW, {"amsgrad": True}, {4: {"amsgrad": False}, 8: {"weight_decay": 0.5}}, id="amsgrad-off"),
]


@pytest.mark.parametrize(("kind", "options", "changes"), CHANGES)
def test_hyper_parameters_changed_in_mid_run(kind, options, changes, backend):
    params, twins = parameters(SHAPES), parameters(SHAPES)
    optimizer, loop = kind(params, LR, backend=backend, **options), TORCH[kind](twins, LR, foreach=False, **options)
    for done, grads in enumerate(gradients(SHAPES, 12)):
        optimizer.param_groups[0].update(changes.get(done, {}))
        loop.param_groups[0].update(changes.get(done, {}))
        train(optimizer, params, [grads])
        train(loop, twins, [grads])
    assert_same_training(kind, params, twins)


def test_amsgrad_switched_on_in_mid_run_remembers_from_then_on(backend):
    params, twins = parameters(SHAPES), parameters(SHAPES)
    optimizer, loop = FusedAdamW(params, backend=backend), torch.optim.AdamW(twins, foreach=False)
    for done, grads in enumerate(gradients(SHAPES, 8)):
        if done == 3:
            optimizer.param_groups[0]["amsgrad"] = loop.param_groups[0]["amsgrad"] = True
            for p in twins:  # torch itself has none to go on with
                loop.state[p]["max_exp_avg_sq"] = torch.zeros_like(p)
        train(optimizer, params, [grads])
        train(loop, twins, [grads])
    assert_same_training(FusedAdamW, params, twins)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_rate_in_a_tensor_is_changed_in_place(dtype, backend):
    params, twins = parameters(SHAPES), parameters(SHAPES)
    lr = torch.tensor(LR, dtype=dtype)
    optimizer = FusedSGD(params, lr, momentum=0.9, backend=backend)
    loop = torch.optim.SGD(twins, lr.clone(), momentum=0.9, foreach=False)
    for done, grads in enumerate(gradients(SHAPES, 10)):
        lr.mul_(0.7)
        loop.param_groups[0]["lr"].mul_(0.7)
        train(optimizer, params, [grads])
        train(loop, twins, [grads])
        assert optimizer.stats["lr"] == lr.double(), done
    assert optimizer.param_groups[0]["lr"] is lr
    assert_same_bits(params, twins)


SGD_DAMPENED = (FusedSGD, {"lr": LR, "momentum": 0.9, "dampening": 0.4})

MISSING = {  # at which of 12 steps each of the three parameters has a gradient
    "late": [range(12), range(5, 12), range(9, 12)],
    "now and then": [range(0, 12, 2), range(1, 12, 3), range(12)],
    "stops": [range(4), range(12), range(2, 7)],
    "never": [range(12), [], range(12)],
    "nothing at first": [range(3, 12), range(3, 12), range(5, 12)],
    "nothing at all": [[], [], []],
}


@pytest.mark.parametrize("present", MISSING.values(), ids=MISSING)
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_late_and_missing_gradients(kind, options, present, backend):
    def some(grads):
        return [
            [grad if step in steps else None for grad, steps in zip(row, present, strict=True)]
            for step, row in enumerate(grads)
        ]

    shapes = [(5,), (33,), (2, 3)]
    grads = some(gradients(shapes, 12))
    got = run(lambda params: fused(kind, params, options, backend=backend), shapes, grads)
    want = run(lambda params: TorchLoop(kind, params, options), shapes, grads)
    assert_same_bits(got[1], want[1])
    assert_same_training(kind, got[0], want[0])


def _emptied(optimizer, params):
    optimizer.state.clear()


def _exchanged(optimizer, params):
    optimizer.state = collections.defaultdict(dict)


def _each_exchanged(optimizer, params):
    for p in params:
        optimizer.state[p] = {}


def _each_emptied(optimizer, params):
    for p in params:
        optimizer.state[p].clear()


@pytest.mark.parametrize("forget", [_emptied, _exchanged, _each_exchanged, _each_emptied])
@pytest.mark.parametrize(("kind", "options"), [*OPTIMIZERS, pytest.param(*SGD_DAMPENED, id="sgd-dampening")])
def test_a_state_that_was_taken_away_starts_anew(kind, options, forget, backend):
    params, twins = parameters(SHAPES), parameters(SHAPES)
    optimizer, loop = fused(kind, params, options, backend=backend), TORCH[kind](twins, foreach=False, **options)
    for done, grads in enumerate(gradients(SHAPES, 8)):
        if done == 4:
            forget(optimizer, params)
            forget(loop, twins)
        train(optimizer, params, [grads])
        train(loop, twins, [grads])
    assert_same_training(kind, params, twins)


# ---- Schedules ----


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_is_lambda_lr(schedule, backend):
    params, twins = parameters(SHAPES), parameters(SHAPES)
    optimizer = FusedSGD(params, LR, momentum=0.9, schedule=schedule, backend=backend)
    loop = torch.optim.SGD(twins, LR, momentum=0.9, foreach=False)
    grads = gradients(SHAPES, 30)
    train(loop, twins, grads, [lr_scheduler.LambdaLR(loop, schedule)])
    train(optimizer, params, grads)
    assert_same_bits(params, twins)
    assert optimizer.param_groups[0]["lr"] == LR
    assert optimizer.history()["lr"].tolist() == [LR * schedule(step) for step in range(30)]


@pytest.mark.parametrize("schedule", [schedules.inverse_sqrt(10), lambda step: 1.0 / (1 + step)], ids=["ours", "any"])
def test_a_schedule_without_end_goes_on_past_its_first_table(schedule):
    steps = 2 * 4096 + 10
    [p], [grad] = parameters([(3,)]), random_tensors([(3,)])
    optimizer = FusedSGD([p], LR, schedule=schedule, history_size=None)
    p.grad = grad
    for _ in range(steps):
        optimizer.step()
    assert optimizer.history()["lr"].tolist() == [LR * schedule(step) for step in range(steps)]


def test_a_schedule_that_overflows_is_refused_at_that_step_and_not_before(backend):
    [p] = parameters([(3,)])
    optimizer = FusedSGD([p], LR, schedule=lambda step: 1.0 if step < 5 else math.inf, backend=backend)
    train(optimizer, [p], gradients([(3,)], 5))
    before = bits(p)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^lrkernels: the schedule .* is inf at step 5; bound it"):
            optimizer.step()
    assert bits(p) == before
    assert optimizer.stats["step"] == 5


def test_a_schedule_may_end_where_training_does(backend):
    [p] = parameters([(3,)])
    optimizer = FusedSGD([p], LR, schedule=[1.0, 0.5, 0.25].__getitem__, backend=backend)
    train(optimizer, [p], gradients([(3,)], 3))
    assert optimizer.history()["lr"].tolist() == [LR, LR / 2, LR / 4]
    before = bits(p)
    with pytest.raises(IndexError):
        optimizer.step()
    assert bits(p) == before


@pytest.mark.parametrize("lr", [0.2, torch.tensor(0.2)], ids=["float", "tensor"])
@pytest.mark.parametrize("schedule", [None, schedules.linear(35)], ids=["alone", "times ours"])
@pytest.mark.parametrize("make", TORCH_SCHEDULERS.values(), ids=TORCH_SCHEDULERS)
def test_torch_s_schedulers_drive_it(make, schedule, lr, backend):
    params, twins = parameters(SHAPES), parameters(SHAPES)
    lr = lr.double() if isinstance(lr, torch.Tensor) else lr
    optimizer = FusedSGD(params, lr, momentum=0.9, schedule=schedule, backend=backend)
    loop = torch.optim.SGD(twins, lr.clone() if isinstance(lr, torch.Tensor) else lr, momentum=0.9, foreach=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's SequentialLR calls what torch warns of
        schedulers = make(optimizer), make(loop)
    for step, grads in enumerate(gradients(SHAPES, 40)):
        train(optimizer, params, [grads])
        [group], multiplier = loop.param_groups, schedule(step) if schedule else 1.0
        written = float(group["lr"])
        group["lr"] = written * multiplier
        train(loop, twins, [grads])
        group["lr"] = torch.tensor(written, dtype=torch.float64) if isinstance(lr, torch.Tensor) else written
        for scheduler in schedulers:
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*[1.0 + step % 3] if plateau else ())
    assert float(optimizer.param_groups[0]["lr"]) != 0.2  # it has written
    assert_same_bits(params, twins)


# ---- Closed loops ----


def quadratic(kind, options, schedule, steps, backend, skip_at=(), **more):
    """Descend an ill-conditioned quadratic; return the rates of the completed steps and the parameters."""
    curvature = torch.logspace(-2, 0, 50)
    [p] = parameters([(50,)])
    optimizer = fused(kind, [p], options, schedule=schedule, backend=backend, **more)
    rates = []
    for step in range(steps):
        if step in skip_at:
            p.grad = torch.full_like(p, torch.inf)
            optimizer.found_inf = torch.tensor(1.0)
            optimizer.observe(1e9)
            optimizer.step()
            del optimizer.found_inf
            optimizer.zero_grad()
        p.grad = curvature * p.detach()
        if step % 3:  # a signal counts once
            optimizer.observe(0.5 + 0.4 * math.sin(step * step))
        optimizer.step()
        optimizer.zero_grad()
        rates.append(optimizer.stats["lr"])
    assert optimizer.stats["skipped"] == len(skip_at)
    return torch.stack(rates), p


@pytest.mark.parametrize("schedule", CLOSED_LOOPS.values(), ids=CLOSED_LOOPS)
@pytest.mark.parametrize(("kind", "options"), [*OPTIMIZERS, pytest.param(FusedSGD, {"lr": LR}, id="sgd-plain")])
def test_closed_loops_decide_the_same_on_every_backend(kind, options, schedule):
    (rates, p), (eager_rates, eager_p) = (quadratic(kind, options, schedule, 30, b) for b in (BACKENDS[0], "eager"))
    assert len(set(rates.tolist())) > 5  # it decides
    assert_close(rates, eager_rates, rtol=1e-12)
    assert_same_bits(p, eager_p)


@pytest.mark.parametrize("prev_grad", ["store", "swap", "bfloat16"])
@pytest.mark.parametrize("schedule", CLOSED_LOOPS.values(), ids=CLOSED_LOOPS)
@pytest.mark.parametrize(("kind", "options"), [*OPTIMIZERS, pytest.param(FusedSGD, {"lr": LR}, id="sgd-plain")])
def test_skipped_steps_add_nothing_to_a_closed_loop(kind, options, schedule, prev_grad, backend):
    want = quadratic(kind, options, schedule, 12, backend, prev_grad=prev_grad)
    got = quadratic(kind, options, schedule, 12, backend, skip_at=(0, 1, 5, 11), prev_grad=prev_grad)
    assert_same_bits(got, want)


WORST = {  # a gradient, and what observe() is given with it
    "constants": [(1.0, 0.5)],
    "zeros": [(0.0, 0.0), (1.0, 0.0)],
    "nan and infinity": [(1.0, 0.3), (math.nan, math.nan), (-2.0, 0.9), (math.inf, math.inf), (1.0, -1.0)],
    "huge and tiny": [(1e30, 1e30), (1e-30, 1e-30), (-1e30, 0.5)],
}
UNBOUNDED = {
    "alignment": schedules.alignment(kappa=20.0),
    "alignment at once": schedules.alignment(kappa=20.0, lag=0),
    "gala": schedules.gala(delta=0.0, mode="consecutive"),
    "volsched": schedules.volsched(60, window=3, sensitivity=10.0, decay=schedules.constant()),
}


@pytest.mark.filterwarnings("ignore:lrkernels. observe")
@pytest.mark.parametrize("sequence", WORST.values(), ids=WORST)
@pytest.mark.parametrize("schedule", UNBOUNDED.values(), ids=UNBOUNDED)
@pytest.mark.parametrize(("kind", "options"), [*OPTIMIZERS, pytest.param(FusedSGD, {"lr": LR}, id="sgd-plain")])
def test_no_signal_makes_a_rate_that_is_no_number_or_negative(kind, options, schedule, sequence, backend):
    """Whatever is watched, until e^710 would be the first factor that is not finite."""
    first, resting = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [first]}, {"params": [resting], "lr": 0.0}]
    optimizer = kind(groups, **options, schedule=schedule, backend=backend, history_size=None)
    for grad, signal in sequence * (60 // len(sequence)):
        first.grad = torch.full((2,), grad)
        resting.grad = torch.ones(2)
        optimizer.observe(signal)
        optimizer.step()
    rates = torch.from_numpy(optimizer.history()["lr"])
    assert rates.isfinite().all()
    assert (rates >= 0).all()
    assert torch.equal(resting, torch.ones(2))  # a rate of 0, times whatever was learnt


@pytest.mark.parametrize("loop", ["gala", "volsched"])
def test_a_first_group_at_rate_0_is_said_to_hold_the_others(loop, backend):
    """Their rates are in proportion to the first one's; nothing is decided, and nothing becomes nan."""
    first, second = parameters([(3,), (4,)])
    groups = [{"params": [first], "lr": 0.0}, {"params": [second]}]
    optimizer = FusedSGD(groups, LR, schedule=CLOSED_LOOPS[loop], backend=backend)
    before = bits(first)
    for step, row in enumerate(gradients([(3,), (4,)], 4)):
        set_grads([first, second], row)
        optimizer.observe(0.3)
        if step == 0:
            with pytest.warns(UserWarning, match="lrkernels: the first group's lr is 0.*put a group that trains first"):
                optimizer.step()
        else:
            optimizer.step()
    assert bits(first) == before
    assert second.isfinite().all()


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_alignment_with_a_lag_keeps_it_in_two_passes(kind, options, backend):
    def rates(max_norm):
        return quadratic(kind, options, schedules.alignment(), 6, backend, max_grad_norm=max_norm)[0].tolist()

    assert rates(None) == rates(1e9)
    assert rates(1e9)[:2] == [LR, LR]  # at the second step there is a cosine, which acts at the third


# ---- Statistics ----

MEASURED = [
    pytest.param(FusedSGD, {"momentum": 0.9}, id="sgd-momentum"),
    pytest.param(FusedSGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, id="sgd-nesterov-decay"),
    pytest.param(FusedSGD, {"momentum": 0.9, "maximize": True}, id="sgd-momentum-maximize"),
    pytest.param(FusedSGD, {}, id="sgd-plain"),
    pytest.param(FusedSGD, {"maximize": True}, id="sgd-plain-maximize"),
    pytest.param(FusedAdamW, {}, id="adamw"),
    pytest.param(FusedAdamW, {"amsgrad": True, "maximize": True}, id="adamw-amsgrad-maximize"),
]


def flat(values):
    return torch.cat([v.detach().double().flatten() for v in values])


def cosine(a, b):
    length = a.norm() * b.norm()
    return a @ b / length if length > 0 else length


def direction(kind, optimizer, params, prev):
    """The direction of the last update, downhill where maximised, in float64 from what torch keeps in the state."""
    [group] = optimizer.param_groups
    sign = -1.0 if group["maximize"] else 1.0
    if kind is FusedSGD and not group["momentum"]:
        return prev
    kept = [{k: v.double() for k, v in optimizer.state[p].items() if v is not None} for p in params]
    if kind is FusedSGD:
        return sign * flat([state["momentum_buffer"] for state in kept])
    beta1, beta2 = group["betas"]
    return sign * flat(
        [
            (s["exp_avg"] / (1 - beta1 ** s["step"]))
            / ((s.get("max_exp_avg_sq", s["exp_avg_sq"]) / (1 - beta2 ** s["step"])).sqrt() + group["eps"])
            for s in kept
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prev_grad", ["store", "swap", "bfloat16"])
@pytest.mark.parametrize("max_norm", [None, 20.0], ids=["one pass", "two passes"])
@pytest.mark.parametrize(("kind", "options"), MEASURED)
def test_statistics_are_float64_s(kind, options, max_norm, prev_grad, dtype, backend):
    shapes = [(1000,), (33, 5), (), (0,)]
    params = parameters(shapes, dtype)
    track = ("grad_norm", "grad_norm_l1", "direction", "alignment")
    optimizer = kind(params, LR, track=track, max_grad_norm=max_norm, prev_grad=prev_grad, backend=backend, **options)
    zeros = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)
    prev = moved = last_direction = zeros
    history = []
    for step, grads in enumerate(gradients(shapes, 6, dtype)):
        before, g = flat(params), flat(grads)
        train(optimizer, params, [grads])
        optimizer.zero_grad()
        want = {
            "step": step + 1.0,
            "lr": LR,
            "grad_norm": g.norm(),
            "grad_norm_l1": g.abs().sum(),
            "direction_cosine": cosine(g, last_direction),
            "alignment": g @ prev,
            "cosine": cosine(g, prev),
            "curvature": (g - prev).norm() / moved.norm() if step else 0.0,
            "clip": min(1.0, 20.0 / (g.norm() + 1e-6)),
            "skipped": 0.0,
        }
        if max_norm is None:
            del want["clip"]
        assert set(optimizer.stats) == set(want)
        history.append({key: float(value) for key, value in optimizer.stats.items()})
        assert history[-1] == pytest.approx({k: float(v) for k, v in want.items()}, rel=1e-6, abs=1e-7), step
        prev, moved = flat([g.bfloat16() for g in grads] if prev_grad == "bfloat16" else grads), flat(params) - before
        last_direction = direction(kind, optimizer, params, prev)
    assert {k: v.tolist() for k, v in optimizer.history().items()} == {k: [r[k] for r in history] for k in history[0]}


@pytest.mark.parametrize("max_norm", [None, 20.0], ids=["one pass", "two passes"])
@pytest.mark.parametrize("prev_grad", ["store", "swap", "bfloat16"])
@pytest.mark.parametrize(("kind", "options"), MEASURED)
def test_statistics_of_late_and_skipped_gradients(kind, options, prev_grad, max_norm, backend):
    """A skipped step measures nothing and leaves no row: not of the gradients it saw, even if they were the first."""

    def statistics(skip_at):
        params = parameters(SHAPES)
        more = {"track": ("direction", "alignment"), "max_grad_norm": max_norm, "prev_grad": prev_grad}
        optimizer = kind(params, LR, backend=backend, **options, **more)
        for step, grads in enumerate(gradients(SHAPES, 6)):
            row = [grads[0], grads[1] if step >= 2 else None, grads[2] if step != 3 else None]
            for _ in range(skip_at.count(step)):
                optimizer.found_inf = torch.tensor(1.0)
                train(optimizer, params, [[None if g is None else torch.full_like(g, torch.inf) for g in row]])
                optimizer.zero_grad()
                assert optimizer.stats["grad_norm"].isnan()
            optimizer.found_inf = torch.tensor(0.0)
            train(optimizer, params, [row])
            optimizer.zero_grad()
        assert optimizer.stats["skipped"] == len(skip_at)
        return {key: value.tolist() for key, value in optimizer.history().items() if key != "skipped"}

    want = statistics([])
    assert statistics([0, 2, 2, 5]) == want
    assert min(want["curvature"][1:]) > 0


@pytest.mark.parametrize(("kind", "options"), MEASURED)
def test_one_pass_and_two_measure_the_same(kind, options, backend):
    def statistics(max_norm):
        params = parameters(SHAPES)
        track = ("direction", "alignment")
        optimizer = kind(params, LR, track=track, max_grad_norm=max_norm, backend=backend, **options)
        train(optimizer, params, gradients(SHAPES, 10))
        return {key: value.tolist() for key, value in optimizer.history().items() if key != "clip"}

    assert statistics(None) == statistics(1e9)


TRACKED = [
    ((), {"step", "lr", "skipped"}),
    ("grad_norm", {"step", "lr", "skipped", "grad_norm", "grad_norm_l1"}),
    (("grad_norm_l1",), {"step", "lr", "skipped", "grad_norm", "grad_norm_l1"}),
    (["direction"], {"step", "lr", "skipped", "grad_norm", "grad_norm_l1", "direction_cosine"}),
    (
        {"alignment"},
        {"step", "lr", "skipped", "grad_norm", "grad_norm_l1", "alignment", "cosine", "curvature"},
    ),
]


@pytest.mark.parametrize(("track", "names"), TRACKED, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_only_what_is_asked_for_is_measured(kind, track, names):
    params = parameters(SHAPES)
    optimizer = train(kind(params, track=track), params, gradients(SHAPES, 2))
    assert set(optimizer.stats) == set(optimizer.history()) == names
    assert len(optimizer.stats) == len(names)
    assert all(torch.isfinite(value) for value in optimizer.stats.values())
    with pytest.raises(KeyError, match=r"lrkernels: 'loss' is not measured, only \[.*'lr'.*\]; ask for it with track="):
        optimizer.stats["loss"]


def test_stats_are_snapshots(backend):
    params = parameters(SHAPES)
    optimizer = FusedSGD(params, LR, track="grad_norm", backend=backend)
    first, second = gradients(SHAPES, 2)
    kept = train(optimizer, params, [first]).stats["grad_norm"]
    train(optimizer, params, [second])
    assert_close(kept, flat(first).norm(), rtol=1e-6)
    kept.fill_(-1.0)
    assert_close(optimizer.stats["grad_norm"], flat(second).norm(), rtol=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5, 8, 11])
def test_history_keeps_the_last_steps_oldest_first(steps, backend):
    params = parameters(SHAPES)
    optimizer = FusedSGD(params, LR, schedule=schedules.linear(20), history_size=4, backend=backend)
    history = train(optimizer, params, gradients(SHAPES, steps)).history()
    kept = range(max(0, steps - 4), steps)
    assert history["step"].tolist() == [step + 1 for step in kept]
    assert history["lr"].tolist() == [LR * (1 - step / 20) for step in kept]


@pytest.mark.parametrize("steps", [0, 1, 1023, 1024, 1025, 2048, 2500])
def test_history_without_a_size_keeps_everything(steps):
    [p], [grad] = parameters([(3,)]), random_tensors([(3,)])
    optimizer = FusedSGD([p], LR, history_size=None)
    p.grad = grad
    for _ in range(steps):
        optimizer.step()
    assert optimizer.history()["step"].tolist() == list(range(1, steps + 1))


# ---- torch's own manners ----


def test_closure_has_gradients_and_its_loss_is_returned(backend):
    [p], [target] = parameters([(5,)]), random_tensors([(5,)], seed=3)
    optimizer = FusedSGD([p], 0.5, backend=backend)
    start = p.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = (p - target).square().sum() / 2
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss == ((start - target).square().sum() / 2)
    assert_close(p, start - 0.5 * (start - target), rtol=1e-6, atol=1e-6)
    assert optimizer.step() is None


def test_step_hooks_see_every_step(backend):
    params, calls = parameters(SHAPES), []
    optimizer = FusedSGD(params, LR, backend=backend)
    before = bits(params)
    optimizer.register_step_pre_hook(lambda *_: calls.append(bits(params) == before))
    optimizer.register_step_post_hook(lambda *_: calls.append(bits(params) == before))
    train(optimizer, params, gradients(SHAPES, 1))
    assert calls == [True, False]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    params = parameters(SHAPES)
    optimizer = train(FusedSGD(params, LR), params, gradients(SHAPES, 1))
    optimizer.zero_grad(set_to_none)
    assert [p.grad is None for p in params] == [set_to_none] * 3
    assert set_to_none or not any(p.grad.any() for p in params)


def test_a_gradient_that_carries_a_graph(backend):
    [p] = parameters([(5,)])
    p.grad = random_tensors([(5,)])[0].requires_grad_()
    want = p.detach() - p.grad.detach()
    FusedSGD([p], 1.0, backend=backend).step()
    assert_same_bits(p, want)
    assert p.grad_fn is None


@pytest.mark.parametrize("prev_grad", ["store", "swap", "bfloat16"])
def test_a_kept_gradient_that_carries_a_graph_is_saved_without(prev_grad, backend):
    [p], grads = parameters([(5,)]), gradients([(5,)], 3)
    optimizer = FusedSGD([p], LR, prev_grad=prev_grad, track=("alignment",), backend=backend)
    for [grad] in grads[:2]:
        p.grad = grad.requires_grad_() * 1.0
        optimizer.step()
    (twin, other), saved = copy.deepcopy((p, optimizer)), copy.deepcopy(optimizer.state_dict())
    third = torch.nn.Parameter(p.detach().clone())
    resumed = FusedSGD([third], LR, prev_grad=prev_grad, track=("alignment",), backend=backend)
    resumed.load_state_dict(saved)
    runs = [(optimizer, p), (other, twin), (resumed, third)]
    want, *found = [[train(o, [x], grads[2:]).stats["alignment"], x] for o, x in runs]
    for each in found:
        assert_same_bits(each, want)


@pytest.mark.parametrize("size", [1, 5])
def test_a_gradient_with_a_pending_sign(size, backend):  # what complex models leave behind
    [p], grad = parameters([(size,)]), torch.randn(size, dtype=torch.complex64).conj().imag
    p.grad = grad
    assert p.grad.is_neg()
    want = p.detach() - grad.resolve_neg()
    FusedSGD([p], 1.0, backend=backend).step()
    assert_same_bits(p, want)


def test_parameters_moved_to_other_memory_or_dtype(backend):
    params, twins = parameters(SHAPES), parameters(SHAPES)
    optimizer, loop = FusedSGD(params, LR, momentum=0.9, backend=backend), torch.optim.SGD(twins, LR, momentum=0.9)
    for grads in gradients(SHAPES, 6):
        for p in (*params, *twins):
            p.data = p.data.clone()
        train(optimizer, params, [grads])
        train(loop, twins, [grads])
    assert_same_bits(params, twins)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_parameters_that_get_their_shape_later(kind, options, backend):
    model, x = torch.nn.Sequential(torch.nn.LazyLinear(6), torch.nn.LazyLinear(3)), torch.randn(4, 5)
    optimizer = fused(kind, model.parameters(), options, track=("direction",), backend=backend)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    model(x)
    params = list(model.parameters())
    twins = parameters([p.shape for p in params])
    with torch.no_grad():
        for p, twin in zip(params, twins, strict=True):
            twin.copy_(p)
    grads = gradients([p.shape for p in params], 3)
    other = train(fused(kind, twins, options, track=("direction",), backend=backend), twins, grads)
    train(optimizer, params, grads)
    assert_same_bits([params, dict(optimizer.stats)], [twins, dict(other.stats)])


def allocated(backend, kind, options, dtype, **more):
    """Return the bytes that torch allocates in a step, as a fraction of the parameters' own."""
    params = parameters([(1 << 19,)] * 2, dtype)
    optimizer = fused(kind, params, options, backend=backend, track=("direction", "alignment"), **more)
    train(optimizer, params, gradients([p.shape for p in params], 1, dtype))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    return sum(max(0, event.self_cpu_memory_usage) for event in profile.events()) / (2 * params[0].nbytes)


@pytest.mark.skipif("native" not in BACKENDS, reason="the binary is not there")
@pytest.mark.parametrize("max_norm", [None, 1.0], ids=["one pass", "two passes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_a_native_step_takes_no_memory_of_the_parameters_size(kind, options, dtype, max_norm):
    assert allocated("native", kind, options, dtype, max_grad_norm=max_norm) < 0.001


def test_the_meter_of_memory_works():
    assert allocated("eager", FusedSGD, {"momentum": 0.9}, torch.float32) > 1.0


# ---- Anything: native equals eager ----

SOME_OPTIONS = st.sampled_from([row.values for row in OPTIONS])
SOME_LAYOUTS = st.sampled_from([row.values for row in LAYOUTS])
SOME_DTYPES = st.sampled_from([row.values for row in DTYPES if torch.float64 not in row.values])
MASK = st.integers(0, 15)  # at which of four steps there is a gradient, as bits
GROUP = st.lists(st.tuples(SOME_LAYOUTS, SOME_DTYPES, MASK), min_size=1, max_size=4)


@given(
    st.sampled_from([FusedSGD, FusedAdamW]),
    st.lists(st.tuples(st.integers(0, len(OPTIONS)), GROUP), min_size=1, max_size=3),
    st.sampled_from([None, 0.5]),
    st.sampled_from(["store", "swap", "bfloat16"]),
    st.sampled_from([None, "linear", "uba", "product"]),
    MASK,
)
@settings(max_examples=150)
def test_native_equals_eager(kind, rows, max_norm, prev_grad, schedule, skipped):
    own_options = [row.values[1] for row in OPTIONS if row.values[0] is kind]
    drawn = [row for _, group in rows for row in group]
    grads = [
        [grad_layout(g) for g in (gradients([shape], 4, dtypes[1], seed=10 * i)[step])]
        for step in range(4)
        for i, ((shape, _, grad_layout), dtypes, _) in enumerate(drawn)
    ]
    results, histories = [], []
    for backend in BACKENDS:
        params = [parameters([shape], dtypes[0], layout)[0] for (shape, layout, _), dtypes, _ in drawn]
        remaining = iter(params)
        groups = [
            {
                **fused(dict, {}, own_options[which % len(own_options)]),
                "params": list(itertools.islice(remaining, len(g))),
            }
            for which, g in rows
        ]
        optimizer = kind(
            groups,
            max_grad_norm=max_norm,
            prev_grad=prev_grad,
            schedule=schedule and SCHEDULES[schedule],
            track=("direction", "alignment"),
            backend=backend,
        )
        for step in range(4):
            row = [g for [g] in grads[step * len(params) : (step + 1) * len(params)]]
            row = [g if mask >> step & 1 else None for g, (_, _, mask) in zip(row, drawn, strict=True)]
            optimizer.found_inf = torch.tensor(float(skipped >> step & 1))
            train(optimizer, params, [row])
            optimizer.zero_grad()
        results.append((params, states(optimizer, params), [optimizer.state[p].get("prev_grad") for p in params]))
        histories.append({key: value.tolist() for key, value in optimizer.history().items()})
    assert_same_bits(results[0], results[-1])
    for key, values in histories[0].items():
        assert values == pytest.approx(histories[-1][key], rel=1e-9, abs=1e-9, nan_ok=True), key


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_the_modes_of_gala_agree_after_a_skipped_step(skipped, backend):
    """With full gradients they are one method; a point that was not left is not the previous one."""
    curvature, rates = torch.tensor([1.0, 4.0]), {}
    for mode in ("same_batch", "consecutive"):
        x = torch.nn.Parameter(torch.ones(2))
        schedule = schedules.gala(delta=0.0, mode=mode)
        optimizer = FusedSGD([x], 0.1, schedule=schedule, skip_nonfinite=True, backend=backend)

        def closure(x=x, optimizer=optimizer, scales=(scales := [])):
            optimizer.zero_grad()
            loss = (curvature * x * x).sum() / 2 * scales[-1]
            loss.backward()
            return loss

        for step in range(6):
            scales.append(math.inf if step == skipped else 1.0)
            optimizer.step(closure)
        rates[mode] = optimizer.history()["lr"].tolist()
        assert optimizer.stats["skipped"] == 1
    assert rates["same_batch"] == pytest.approx(rates["consecutive"], rel=1e-5)
    assert rates["consecutive"] == pytest.approx(
        [0.1, 0.1588540445, 0.1462491612, 0.1483666691, 0.1508058455], rel=1e-5
    )


def test_betas_changed_in_place_are_noticed(backend):
    params, twins = parameters([(5,)]), parameters([(5,)])
    grads = gradients([(5,)], 4)
    betas = [0.9, 0.999]
    optimizer = train(FusedAdamW([{"params": params, "betas": betas}], LR, backend=backend), params, grads[:2])
    twin = train(FusedAdamW(twins, LR, betas=(0.9, 0.999), backend=backend), twins, grads[:2])
    betas[0] = 0.1
    twin.param_groups[0]["betas"] = (0.1, 0.999)
    train(optimizer, params, grads[2:])
    train(twin, twins, grads[2:])
    assert_same_bits(params, twins)


def test_a_signal_outlives_a_refused_step(backend):
    """Mended, the step has it, and nobody is told that there was none."""
    params = parameters([(5,)])
    optimizer = FusedSGD(params, LR, schedule=schedules.volsched(10), backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.observe(0.5)
        train(optimizer, params, gradients([(5,)], 1))
        optimizer.observe(0.6)
        with pytest.raises(ValueError, match=r"^lrkernels: "):
            train(optimizer, params, [[torch.ones(5).to_sparse()]])
        train(optimizer, params, gradients([(5,)], 1))
    assert optimizer._controller.control[layout.Control.SIGNALS] == 2


BAD = [
    (FusedSGD, {"max_grad_norm": "1"}, "max_grad_norm must be > 0 or None, got '1'"),
    (FusedSGD, {"history_size": 2.5}, "history_size must be a whole number, at least 1, got 2.5"),
    (FusedSGD, {"history_size": "3"}, "history_size must be a whole number, at least 1, got '3'"),
    (FusedSGD, {"track": None}, "track takes names of"),
    (FusedSGD, {"master_weights": "no"}, "master_weights must be True or False, got 'no'"),
    (FusedSGD, {"stochastic_rounding": None}, "stochastic_rounding must be True or False"),
    (FusedAdamW, {"skip_nonfinite": 2}, "skip_nonfinite must be True or False, got 2"),
    (FusedSGD, {"normalize": 1}, "normalize must be True or False, got 1"),
]


@pytest.mark.parametrize(("kind", "more", "message"), BAD)
def test_arguments_of_another_type_are_refused(kind, more, message):
    with pytest.raises(ValueError, match=r"^lrkernels: " + message):
        kind(parameters([(5,)]), LR, **more)


def test_an_unavailable_backend_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(lrkernels.ops, "why_not_native", lambda device: "it is somewhere else")
    message = r"^lrkernels: backend='native' is not available for cpu: it is somewhere else\. .*use backend='eager'"
    with pytest.raises(RuntimeError, match=message):
        FusedSGD(parameters([(5,)]), LR, backend="native")
    FusedSGD([torch.nn.Parameter(torch.ones(5, device="meta"))], LR, backend="native")  # not known yet


def test_triton_may_be_asked_for_before_the_model_moves_to_its_gpu(monkeypatch):
    monkeypatch.setattr(lrkernels.ops, "why_no_triton", lambda device: "it is somewhere else")
    params = parameters([(5,)])
    optimizer = FusedSGD(params, LR, backend="triton")
    set_grads(params, gradients([(5,)], 1)[0])
    with pytest.raises(RuntimeError, match=r"^lrkernels: backend='triton' is not available for cpu: it is somewhere"):
        optimizer.step()


def test_elements_that_share_a_place_are_refused():
    with pytest.raises(ValueError, match=r"^lrkernels: a parameter has several elements in one place"):
        FusedSGD([torch.zeros(1).expand(5).requires_grad_()], LR)


def test_coupled_weight_decay_is_refused_by_adamw():
    def group():
        return {"params": parameters([(5,)]), "decoupled_weight_decay": False}

    with pytest.raises(ValueError, match=r"^lrkernels: FusedAdamW decouples the weight decay"):
        FusedAdamW([group()], LR, weight_decay=0.1)
    FusedAdamW([group()], LR, weight_decay=0.0)


def test_the_backends_are_the_ones_named():
    assert [lrkernels.ops.backend_for(torch.device("cpu"), name).__name__ for name in BACKENDS] in (
        ["run_native", "_eager_lists"],
        ["_eager_lists"],
    )
