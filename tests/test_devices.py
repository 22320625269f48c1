"""Parameters on several devices in one optimizer, without a second device: those of odd size are said to be on one.

What runs is all that runs on GPUs but the copying between them: the split, a runner, counts and small tensors for each,
the sums over both, and the decisions, which must be those of one device.
"""

import copy

import pytest
import torch
from cases import CLOSED_LOOPS, OPTIMIZERS, SCHEDULES
from conftest import assert_close, assert_same_bits, fused, gradients, parameters, set_grads, states, train

from lrkernels import FusedAdamW, FusedSGD, devices, ops, schedules
from lrkernels.layout import Control, Verb

HERE, THERE = torch.device("cpu"), torch.device("cpu", 1)
SHAPES = [(6,), (33,), (4, 6), (1025,), (64, 3), (7,), (1000,)]
COUNTS, CONTROL, HISTORY = 13, 14, 20  # among what a runner is given, verbs and all
SMALL = (COUNTS, CONTROL, 16, 18, 19, HISTORY)  # with lr, table and decay: what each device has for itself


def pretended(param):
    return THERE if param.numel() % 2 else HERE


class Watched:
    """A device's runner, which looks that nothing of another device is asked of it."""

    def __init__(self, device, runner, calls, memory):
        self.device, self.runner, self.calls, self.memory = device, runner, calls, memory
        if ops.is_eager(runner):
            self.runners = [runner]

    def __call__(self, verbs, rule, measure, two_pass, params, grads, *rest):
        there = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
        assert {pretended(p) for p in there} <= {self.device}
        arguments = (verbs, rule, measure, two_pass, params, grads, *rest)
        for k in SMALL:
            whose, _ = self.memory.setdefault(arguments[k].data_ptr(), (self.device, arguments[k]))  # alive from now on
            assert whose == self.device
        self.calls.append((self.device, Verb(verbs), len(there)))
        self.runner(*arguments)


@pytest.fixture
def two(monkeypatch):
    """Has optimizers find two devices from here on, and lists the calls of their runners."""
    calls, memory = [], {}
    make = ops.backend_for
    monkeypatch.setattr(devices, "device_of", pretended)
    monkeypatch.setattr(ops, "backend_for", lambda device, wanted: Watched(device, make(device, wanted), calls, memory))
    return calls


@pytest.fixture
def one_and_two(request):
    """What a function returns on one device, and then on two."""

    def call(run):
        one = run()
        request.getfixturevalue("two")
        return one, run()

    return call


def both(one_and_two, kind, options, dtype=torch.float32, **more):
    """The same steps on one device and on two."""

    def run():
        params = parameters(SHAPES, dtype)
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.02}]
        optimizer = fused(kind, groups, {**options, **more})
        for step, row in enumerate(gradients(SHAPES, 8, dtype)):
            set_grads(params, [g if step or i % 3 else None for i, g in enumerate(row)])  # some come late
            optimizer.observe(0.5 + 0.1 * step)
            optimizer.step()
            if more.get("prev_grad") == "swap":
                optimizer.zero_grad()
        return optimizer, params

    return one_and_two(run)


def assert_same_training(one, two):
    (a, params), (b, expected) = two, one
    assert_same_bits(params, expected)
    assert_same_bits(states(a, params), states(b, expected))
    assert [a.state[p].get("step") for p in params] == [b.state[p].get("step") for p in expected]
    assert a.stats.keys() == b.stats.keys()
    for name, values in b.history().items():
        assert a.history()[name] == pytest.approx(values, rel=1e-6, nan_ok=True), name


WAYS = {
    "plain": {},
    "open-loop": {"schedule": SCHEDULES["cosine"]},
    "clip": {"max_grad_norm": 0.5},
    "direction": {"track": ("direction", "grad_norm_l1")},
    "previous": {"track": "alignment"},
    "previous-swap": {"track": "alignment", "prev_grad": "swap"},
    "previous-bfloat16": {"track": "alignment", "prev_grad": "bfloat16", "max_grad_norm": 1.0},
    "skip": {"skip_nonfinite": True},
    "whole-history": {"history_size": None, "track": "grad_norm"},
} | {name: {"schedule": loop} for name, loop in CLOSED_LOOPS.items()}


@pytest.mark.parametrize("more", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kind, options", OPTIMIZERS)
def test_two_devices_train_as_one(kind, options, more, backend, one_and_two):
    assert_same_training(*both(one_and_two, kind, options, **more, backend=backend))


LOW = {"masters": {"master_weights": True}, "at-random": {"stochastic_rounding": True}, "rounded": {}}


@pytest.mark.parametrize("more", LOW.values(), ids=LOW)
def test_low_precision(more, backend, one_and_two):
    """The bits at random are the same, since each parameter has its number among all."""
    more = {**more, "state_dtype": torch.float32, "track": "direction"}
    assert_same_training(*both(one_and_two, FusedAdamW, {"lr": 0.05}, dtype=torch.bfloat16, **more, backend=backend))


def test_normalized_steps(backend, one_and_two):
    assert_same_training(*both(one_and_two, FusedSGD, {"lr": 0.5, "momentum": 0.9}, normalize=True, backend=backend))


def test_one_call_a_device_where_nothing_is_measured(two):
    params = parameters(SHAPES)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9)
    train(optimizer, params, gradients(SHAPES, 2))
    whole = [(HERE, Verb.STEP, 4), (THERE, Verb.STEP, 3)]
    assert two == 2 * [(THERE, Verb(0), 3), *whole]  # a check is no launch
    assert_same_bits(optimizer._run._copies[0].of(optimizer._controller.control), [optimizer._controller.control] * 2)


def test_one_call_a_device_where_the_decision_may_wait(two):
    params = parameters(SHAPES)
    train(FusedSGD(params, lr=0.1, momentum=0.9, track="direction"), params, gradients(SHAPES, 1))
    whole = Verb.MEASURE | Verb.APPLY
    assert two == [(THERE, Verb(0), 3), (HERE, whole, 4), (THERE, whole, 3), (HERE, Verb.DECIDE, 4)]


def test_two_calls_a_device_where_this_step_s_sums_are_decided_on(two):
    params = parameters(SHAPES)
    train(FusedSGD(params, lr=0.1, max_grad_norm=1.0), params, gradients(SHAPES, 1))
    assert two[1:] == [(device, verbs, n) for verbs in (1, 6) for device, n in ((HERE, 4), (THERE, 3))]


@pytest.mark.parametrize("kind, options", OPTIMIZERS)
def test_each_device_decides_alike(kind, options, two):
    params = parameters(SHAPES)
    loop = CLOSED_LOOPS["gala"]
    optimizer = fused(kind, params, options, schedule=loop, max_grad_norm=1.0)
    train(optimizer, params, gradients(SHAPES, 5))
    here, there = optimizer._run._copies[0]._tensors
    assert here is optimizer._controller.control and here[Control.STEP] == 5
    assert_same_bits(there, here)
    assert optimizer._run._copies[0]._version == here._version  # so that the next step copies nothing


@pytest.mark.parametrize("kind, options", OPTIMIZERS)
def test_a_gradient_that_is_nowhere_but_on_one_device(kind, options, backend, one_and_two):
    def run():
        params = parameters(SHAPES)
        optimizer = fused(kind, params, options, max_grad_norm=0.5, backend=backend, schedule=SCHEDULES["linear"])
        for step, row in enumerate(gradients(SHAPES, 6)):
            set_grads(params, [g if p.numel() % 2 == step % 2 else None for p, g in zip(params, row, strict=True)])
            optimizer.step()
        return optimizer, params

    assert_same_training(*one_and_two(run))


def test_a_scalers_verdict_holds_on_both(backend, one_and_two):
    def run():
        params = parameters(SHAPES)
        optimizer = FusedAdamW(params, lr=0.1, track="alignment", prev_grad="swap", backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step, row in enumerate(gradients(SHAPES, 5)):
            optimizer.zero_grad()
            wrong = float("inf") if step == 2 else 1.0
            terms = [
                (p * g * (wrong if i == 1 else 1.0)).sum() for i, (p, g) in enumerate(zip(params, row, strict=True))
            ]
            scaler.scale(sum(terms)).backward()
            before = [p.detach().clone() for p in params]
            scaler.step(optimizer)
            scaler.update()
            if step == 2:
                assert_same_bits(params, before)
        return optimizer, params

    trained = one_and_two(run)
    assert_same_training(*trained)
    assert trained[1][0].stats["skipped"] == 1


@pytest.mark.parametrize("which", range(2), ids=["on the first device", "on the second"])
def test_a_gradient_that_is_not_finite_skips_both(which, backend, two):
    params = parameters(SHAPES)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, skip_nonfinite=True, track="alignment", backend=backend)
    rows = gradients(SHAPES, 3)
    train(optimizer, params, rows[:1])
    before = copy.deepcopy([params, states(optimizer, params)])
    rows[1][which][0] = torch.nan
    train(optimizer, params, rows[1:2])
    assert_same_bits([params, states(optimizer, params)], before)
    train(optimizer, params, rows[2:])
    assert optimizer.stats["skipped"] == 1 and optimizer.stats["step"] == 2
    assert optimizer.stats["curvature"] > 0


def test_a_closure_at_the_last_point(backend, one_and_two):
    def run():
        params, goals = parameters(SHAPES), parameters(SHAPES, seed=3)
        loop = schedules.gala(delta=1.0, max_lr=0.4, mode="same_batch")
        optimizer = FusedSGD(params, lr=0.1, schedule=loop, backend=backend)

        def closure():
            optimizer.zero_grad()
            loss = sum(((p - goal) ** 2).sum() for p, goal in zip(params, goals, strict=True)) / 8
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(6)]
        assert losses[-1] < 0.8 * losses[0]
        return optimizer, params

    assert_same_training(*one_and_two(run))


@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clip"])
@pytest.mark.parametrize("change", ["lr", "tensor", "decay"])
def test_what_the_host_changes_is_changed_on_both(change, more, one_and_two):
    def run():
        params = parameters(SHAPES)
        rate = torch.tensor(0.1) if change == "tensor" else 0.1
        optimizer = FusedSGD(params, lr=rate, momentum=0.9, weight_decay=0.1, **more)
        for step, row in enumerate(gradients(SHAPES, 4)):
            if change == "tensor":
                rate.fill_(0.1 / (1 + step))
            else:
                optimizer.param_groups[0]["lr" if change == "lr" else "weight_decay"] = 0.1 / (1 + step)
            set_grads(params, row)
            optimizer.step()
        return optimizer, params

    assert_same_training(*one_and_two(run))


# ---- Checkpoints, copies, groups ----

LOOPS = {"gala": CLOSED_LOOPS["gala"], "volsched": CLOSED_LOOPS["volsched"], "linear": SCHEDULES["linear"]}


@pytest.mark.filterwarnings("ignore:.*no signal")
@pytest.mark.parametrize("first", ["one", "two"])
@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("kind, options", OPTIMIZERS)
def test_a_checkpoint_of_one_device_continues_on_two_and_back(kind, options, name, first, monkeypatch):
    more = {"schedule": LOOPS[name], "max_grad_norm": 0.5, "track": "alignment"}
    rows, unbroken = gradients(SHAPES, 9), parameters(SHAPES)
    want = train(fused(kind, unbroken, options, **more), unbroken, rows)
    params, saved = parameters(SHAPES), None
    for i in range(3):
        several = (first == "two") == (i % 2 == 0)
        with monkeypatch.context() as patch:
            if several:
                patch.setattr(devices, "device_of", pretended)
            optimizer = fused(kind, params, options, **more)
            if saved is not None:
                optimizer.load_state_dict(saved)
            train(optimizer, params, rows[3 * i :][:3])
            assert len(optimizer._devices) == 1 + several
            saved = copy.deepcopy(optimizer.state_dict())
    assert_same_bits(params, unbroken)
    assert_same_bits(states(optimizer, params), states(want, unbroken))
    loop = slice(Control.FACTOR, Control.SIGNAL)  # its state; the history begins anew
    assert_close(optimizer._controller.control[loop], want._controller.control[loop], 1e-6)


def test_a_checkpoint_that_is_loaded_in_mid_way(two):
    params = parameters(SHAPES)
    optimizer = FusedAdamW(params, lr=0.1, schedule=CLOSED_LOOPS["gala"])
    rows = gradients(SHAPES, 5)
    train(optimizer, params, rows[:2])
    saved, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    train(optimizer, params, rows[2:])
    ends = [p.detach().clone() for p in params]
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    train(optimizer, params, rows[2:])
    assert_same_bits(params, ends)
    assert optimizer.stats["step"] == 5


def test_a_copy_goes_on_as_the_original(two):
    params = parameters(SHAPES)
    optimizer = FusedAdamW(params, lr=0.1, max_grad_norm=1.0, schedule=SCHEDULES["linear"])
    rows = gradients(SHAPES, 6)
    train(optimizer, params, rows[:3])
    twin = copy.deepcopy(optimizer)
    twins = [p for group in twin.param_groups for p in group["params"]]
    train(optimizer, params, rows[3:])
    train(twin, twins, rows[3:])
    assert_same_bits(twins, params)
    assert_same_bits(states(twin, twins), states(optimizer, params))


def test_a_group_on_another_device_is_added(one_and_two):
    def run():
        params, rows = parameters(SHAPES), gradients(SHAPES, 6)
        even = [i for i, p in enumerate(params) if p.numel() % 2 == 0]
        odd = [i for i in range(len(params)) if i not in even]
        optimizer = FusedAdamW([params[i] for i in even], lr=0.1, max_grad_norm=0.5, schedule=SCHEDULES["linear"])
        train(optimizer, [params[i] for i in even], [[row[i] for i in even] for row in rows[:3]])
        optimizer.add_param_group({"params": [params[i] for i in odd], "lr": 0.05})
        train(optimizer, params, rows[3:])
        return optimizer, params

    assert_same_training(*one_and_two(run))


def test_a_captured_optimizer_gets_a_group_on_another_device_and_loses_it(two):
    """Its counts are a tensor, then one for each device, and then a tensor again."""
    params, more = parameters([(4,), (6,)]), parameters([(3,)], seed=5)
    optimizer = FusedAdamW(params, lr=0.1)
    rows = gradients([(4,), (6,), (3,)], 4)
    train(optimizer, params, [row[:2] for row in rows[:1]])
    optimizer._captured = True
    optimizer.add_param_group({"params": more})
    train(optimizer, params + more, rows[1:3])
    assert [optimizer.state[p]["step"] for p in params + more] == [3, 3, 2]
    del optimizer.param_groups[1]
    train(optimizer, params, [row[:2] for row in rows[3:]])
    assert [optimizer.state[p]["step"] for p in params] == [4, 4]


# ---- Refused ----


def wrong_dtype(optimizer, params):
    params[1].grad = None
    params[1].grad_dtype = torch.float64
    params[1].grad = params[1].detach().double()


def wrong_state(optimizer, params):
    optimizer.state[params[1]]["exp_avg_sq"] = optimizer.state[params[1]]["exp_avg_sq"].double()


@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clip"])
@pytest.mark.parametrize("spoil", [wrong_dtype, wrong_state])
def test_what_one_device_refuses_changes_nothing_on_the_other(spoil, more, two):
    if ops._C is None and spoil is wrong_state:
        pytest.skip("the eager implementation takes it")
    params = parameters(SHAPES)
    optimizer = FusedAdamW(params, lr=0.1, **more)
    train(optimizer, params, gradients(SHAPES, 2))
    spoil(optimizer, params)
    before = copy.deepcopy([params, states(optimizer, params), optimizer._plan.counts])
    with pytest.raises(ValueError, match=r"^lrkernels: "):
        optimizer.step()
    assert_same_bits([params, states(optimizer, params), optimizer._plan.counts], before)


def test_devices_of_different_kinds_are_refused():
    params = [*parameters([(3,)]), torch.nn.Parameter(torch.zeros(3, device="meta"))]
    optimizer = FusedSGD(params, lr=0.1)
    set_grads(params, [torch.ones_like(p) for p in params])
    with pytest.raises(ValueError, match=r"^lrkernels: .* different kinds \(cpu, meta\): make one optimizer for each"):
        optimizer.step()
    assert_same_bits(params[:1], parameters([(3,)]))


def test_several_devices_and_processes_are_refused(two, monkeypatch):
    params = parameters(SHAPES)
    optimizer = FusedSGD(params, lr=0.1)
    monkeypatch.setattr("lrkernels.plan.spread_of", lambda params, group, measure: object())
    set_grads(params, gradients(SHAPES, 1)[0])
    with pytest.raises(ValueError, match=r"^lrkernels: .* \(cpu, cpu:1\) and spread over processes: make one"):
        optimizer.step()


def test_a_capture_is_refused(two, monkeypatch):
    params = parameters(SHAPES)
    optimizer = FusedSGD(params, lr=0.1)
    train(optimizer, params, gradients(SHAPES, 1))
    monkeypatch.setattr(optimizer, "_is_capturing", lambda: True)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"^lrkernels: .* on several devices.*make one optimizer for each"):
        optimizer.step()
    assert_same_bits(params, before)
