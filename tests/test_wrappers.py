"""VolSchedLR, GALA and Alignment: the checked numbers, parity with the references, and all an optimizer must do."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from conftest import Waits, assert_same_bits, gradients, parameters, set_grads
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop, lr_scheduler

from lrkernels import FusedSGD, schedules
from lrkernels.reference import ReferenceAdamW, ReferenceSGD
from lrkernels.wrappers import GALA, Alignment, VolSchedLR

SIGNAL = [0.01, 0.05, 0.03, 0.08, 0.06, 0.10, 0.12, 0.11, 0.15, 0.14, 0.18, 0.20]
VOLSCHED_TRACE = [0.1] * 4 + [0.075] * 4 + [0.0264189849] * 4 + [0.0001]
GALA_TRACE = [0.1, 0.1588540445, 0.1462491612, 0.1483666691, 0.1508058455, 0.1528406213]
ALIGNMENT_TRACE = [0.1, 0.1, 0.1219823937, 0.1291980241, 0.1092044677, 0.0961322229, 0.1074226092, 0.1254444372]
SHAPES = [(5,), (4, 3), (17,)]
DOUBLE = torch.float64


def close(got, want, rel=1e-6):
    assert list(got) == pytest.approx(list(want), rel=rel, abs=1e-300)


class Quadratic:
    """f = x'Ax/2, A = diag(1, 4), from (1, 1): the problem of the checked runs."""

    def __init__(self, make, dtype=DOUBLE):
        self.x = nn.Parameter(torch.ones(2, dtype=dtype))
        self.optimizer = make([self.x])

    def closure(self):
        self.optimizer.zero_grad()
        loss = (self.x.square() * torch.tensor([1.0, 4.0], dtype=self.x.dtype)).sum() / 2
        loss.backward()
        return loss

    def run(self, steps):
        rates = []
        for _ in range(steps):
            self.optimizer.step(self.closure)
            rates.append(self.optimizer.stats["lr"])
        return rates


def train(optimizer, params, grads, schedulers=()):
    """Step once for each list of gradients; return the statistics of every step."""
    rows = []
    for row in grads:
        set_grads(params, row)
        optimizer.step()
        rows.append(dict(optimizer.stats))
        for scheduler in schedulers:
            scheduler.step()
    return rows


def column(rows, name):
    return [row[name] for row in rows]


# ---- VolSchedLR ----


def volsched_rates(scheduler, signal):
    """The first group's rate before each step, and after the last."""
    rates = []
    for x in [*signal, None]:
        rates.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        assert scheduler.get_last_lr()[0] == scheduler.optimizer.param_groups[0]["lr"]
        scheduler.optimizer.step()
        if x is not None:
            scheduler.step(x)
    return rates


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_volsched_checked_trace(kind):
    optimizer = SGD(parameters(SHAPES), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = VolSchedLR(optimizer, total_steps=12, window=4, min_lr=1e-4)
        close(volsched_rates(scheduler, map(kind, SIGNAL)), VOLSCHED_TRACE, rel=1e-6)


def test_volsched_is_the_reference_with_every_setting():
    settings = dict(window=3, sensitivity=0.7, min_lr=0.01, warmup_steps=4, warmup_start=0.3, history=6, max_lr=0.08)
    settings |= {"total_steps": 20, "decay": schedules.linear(16)}
    signal = (torch.rand(25, generator=torch.Generator().manual_seed(1)) + 0.1).tolist()
    params = parameters(SHAPES)
    reference, want = ReferenceSGD(params, lr=0.1, schedule=schedules.volsched(**settings)), []
    for x in signal:
        set_grads(params, [p.detach() for p in params])
        reference.observe(x)
        reference.step()
        want.append(reference.stats["lr"])
    got = volsched_rates(VolSchedLR(SGD(parameters(SHAPES), lr=0.1), **settings), signal)
    close(got[:-1], want, rel=1e-15)
    assert {0.01, 0.08, 0.1 * 0.3} <= {round(rate, 12) for rate in want} and len(set(want)) > 6


def test_volsched_groups_keep_their_proportion_and_tensors_stay():
    first, *rest = parameters(SHAPES)
    lr = torch.tensor(0.2, dtype=DOUBLE)
    optimizer = SGD([{"params": [first]}, {"params": rest, "lr": lr}], lr=0.1)
    scheduler = VolSchedLR(optimizer, total_steps=12, window=4, min_lr=1e-4)
    for x, want in zip(SIGNAL, VOLSCHED_TRACE, strict=False):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(want, rel=1e-6)
        assert optimizer.param_groups[1]["lr"] is lr and float(lr) == pytest.approx(2 * want, rel=1e-6)
        optimizer.step()
        scheduler.step(x)


@pytest.mark.parametrize(("value", "message"), [(None, "no signal"), (math.nan, "not finite"), (math.inf, "finite")])
def test_volsched_leaves_out_a_signal_with_a_warning_and_the_step_counts(value, message):
    scheduler = VolSchedLR(SGD(parameters(SHAPES), lr=0.1), total_steps=12, window=4)
    scheduler.optimizer.step()
    scheduler.step(0.5)
    with pytest.warns(UserWarning, match=message):
        scheduler.step(value)
    assert scheduler.state_dict()["rule"]["signal"] == [0.5] and scheduler.last_epoch == 2
    assert scheduler.optimizer.param_groups[0]["lr"] == 0.1
    for _ in range(2):
        scheduler.step(0.5)
    assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(0.075)


def test_volsched_resumes_bit_for_bit():
    def make():
        optimizer = SGD(parameters(SHAPES), lr=0.1)
        return VolSchedLR(optimizer, total_steps=14, window=3, sensitivity=0.5, warmup_steps=2, warmup_start=0.1)

    whole = make()
    rates = volsched_rates(whole, SIGNAL)
    part = make()
    first = volsched_rates(part, SIGNAL[:7])
    file = io.BytesIO()
    torch.save([part.optimizer.state_dict(), part.state_dict()], file)
    file.seek(0)
    resumed = make()
    saved = torch.load(file)  # plain numbers: nothing has to be trusted
    resumed.optimizer.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert first[:-1] + volsched_rates(resumed, SIGNAL[7:]) == rates
    assert resumed.state_dict()["rule"] == whole.state_dict()["rule"]
    assert part.state_dict()["rule"] == saved[1]["rule"] and len(set(rates)) > 4


def test_volsched_from_a_later_epoch_goes_on_at_the_groups_rates():
    optimizer = SGD(parameters(SHAPES), lr=0.1)
    volsched_rates(VolSchedLR(optimizer, total_steps=12, window=4), [0.5] * 5)
    scheduler = VolSchedLR(optimizer, total_steps=12, window=4, last_epoch=4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.075) and scheduler.last_epoch == 5
    close(volsched_rates(scheduler, [0.5] * 3), [0.075] * 3 + [0.025])


def test_volsched_in_a_sequence_of_schedulers_starts_at_the_beginning():
    """Torch then sets it up twice, and gives no signal."""
    optimizer = SGD(parameters(SHAPES), lr=0.1)
    parts = [VolSchedLR(optimizer, total_steps=12, window=4), lr_scheduler.ConstantLR(optimizer, 0.5)]
    scheduler, rates = lr_scheduler.SequentialLR(optimizer, parts, [6]), []
    with pytest.warns(UserWarning, match="no signal"):
        for _ in range(8):
            rates += scheduler.get_last_lr()
            optimizer.step()
            scheduler.step()
    close(rates, [0.1] * 4 + [0.075] * 2 + [0.05] * 2)


def test_volsched_refuses():
    optimizer = SGD(parameters(SHAPES), lr=0.1)
    with pytest.raises(ValueError, match="lrkernels: window"):
        VolSchedLR(optimizer, total_steps=12, window=1)
    with pytest.raises(TypeError, match="not an Optimizer"):
        VolSchedLR([], total_steps=12)


# ---- The checked runs, and parity with the references ----


@pytest.mark.parametrize(("dtype", "rel"), [(DOUBLE, 1e-6), (torch.float32, 1e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize("mode", ["same_batch", "consecutive"])
def test_gala_checked_run(mode, dtype, rel):
    problem = Quadratic(lambda params: GALA(SGD(params, lr=0.1), delta=0.0, mode=mode), dtype)
    close(problem.run(6), GALA_TRACE, rel)


@pytest.mark.parametrize(("dtype", "rel"), [(DOUBLE, 1e-6), (torch.float32, 1e-4)], ids=["float64", "float32"])
def test_alignment_checked_run(dtype, rel):
    close(Quadratic(lambda params: Alignment(SGD(params, lr=0.1, momentum=0.9)), dtype).run(8), ALIGNMENT_TRACE, rel)


PAIRS = {
    "sgd": (ReferenceSGD, SGD, {}),
    "sgd-momentum": (ReferenceSGD, SGD, {"momentum": 0.9}),
    "sgd-dampening-maximize": (ReferenceSGD, SGD, {"momentum": 0.8, "dampening": 0.3, "maximize": True}),
    "adamw": (ReferenceAdamW, AdamW, {"weight_decay": 0.0}),
    "adamw-amsgrad-maximize": (ReferenceAdamW, AdamW, {"weight_decay": 0.0, "amsgrad": True, "maximize": True}),
}
SETTINGS = {
    "alignment": (Alignment, schedules.alignment, {}),
    "lag0": (Alignment, schedules.alignment, {"lag": 0, "kappa": 0.5, "bias": 0.1}),
    "freeze": (Alignment, schedules.alignment, {"freeze_after": 6, "min_lr": 0.009, "max_lr": 0.06}),
    "gala": (GALA, schedules.gala, {"mode": "consecutive", "delta": 0.5, "min_lr": 1e-3}),
}


@pytest.mark.parametrize(("wrapper", "schedule", "settings"), SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("reference", "inner", "options"), PAIRS.values(), ids=PAIRS)
def test_parity_with_the_reference(reference, inner, options, wrapper, schedule, settings):
    """Two groups of different rates, and a scheduler of torch's that multiplies."""
    grads = gradients(SHAPES, 15, DOUBLE)
    runs = []
    for make in (
        lambda groups, **options: wrapper(inner(groups, **options), **settings),
        lambda groups, **options: reference(groups, schedule=schedule(**settings), **options),
    ):
        params = parameters(SHAPES, DOUBLE)
        optimizer = make([{"params": params[:1]}, {"params": params[1:], "lr": 0.01}], lr=0.05, **options)
        scheduler = lr_scheduler.LambdaLR(optimizer, schedules.warmup(3, schedules.linear(20), start=0.3))
        runs.append((params, train(optimizer, params, grads, [scheduler])))
    (params, rows), (twins, want) = runs
    for name in rows[0]:
        got, expected = column(rows, name), column(want, name)
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-6), name
    torch.testing.assert_close(params, twins, rtol=1e-7, atol=1e-9)
    assert len(set(column(rows, "lr"))) > 8


class Net(nn.Module):
    """What could betray a second evaluation: running statistics, dropout, spectral norm's vectors."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
        self.norm = nn.utils.parametrizations.spectral_norm(nn.Linear(1, 1))

    def forward(self, x):
        return self.norm(self.body(x)).square().mean()


def train_net(make, steps=6):
    """Train with a closure; return everything that training could have changed, and the rates."""
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net.parameters())
    losses, rates = [], []
    for batch in torch.randn(steps, 16, 6, generator=torch.Generator().manual_seed(1)):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = net(batch)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure))
        rates.append(getattr(optimizer, "stats", {}).get("lr"))
    return [*losses, net.state_dict(), [p.grad for p in net.parameters()], torch.get_rng_state().float()], rates


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gala_second_evaluation_leaves_no_trace(momentum):
    """With the rate pinned it is the plain run: losses, weights, module buffers, gradients and random numbers."""
    options = {"lr": 0.05, "momentum": momentum}
    plain, _ = train_net(lambda params: SGD(params, **options))
    pinned, _ = train_net(lambda params: GALA(SGD(params, **options), min_lr=0.05, max_lr=0.05))
    assert_same_bits(pinned[:-2], plain[:-2])
    assert_same_bits(pinned[-2:], plain[-2:])
    _, rates = train_net(lambda params: GALA(SGD(params, **options)))
    _, want = train_net(lambda params: ReferenceSGD(params, schedule=schedules.gala(), **options))
    close(rates, want, rel=1e-4)
    assert len(set(rates)) == 6


def test_gala_same_batch_needs_a_closure():
    optimizer = GALA(SGD(parameters(SHAPES), lr=0.1))
    with pytest.raises(ValueError, match=r"lrkernels: GALA.*closure"):
        optimizer.step()


def test_gala_clips_after_the_measurement():
    params, grads = parameters(SHAPES), gradients(SHAPES, 5)
    inner = SGD(params, lr=0.1)
    inner.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(params, 0.01) and None)
    reference = ReferenceSGD(
        twins := parameters(SHAPES), lr=0.1, max_grad_norm=0.01, schedule=schedules.gala(mode="consecutive")
    )
    got = train(GALA(inner, mode="consecutive"), params, copy.deepcopy(grads))
    want = train(reference, twins, grads)
    close(column(got, "lr"), column(want, "lr"), rel=1e-4)
    assert min(column(got, "grad_norm")) > 1


# ---- The direction of any optimizer ----

ANY = {
    "RMSprop": lambda params: RMSprop(params, lr=0.01, momentum=0.5),
    "nesterov-weight_decay": lambda params: SGD(params, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.5),
    "AdamW": lambda params: AdamW(params, lr=0.01, weight_decay=0.5),
    "Fused": lambda params: FusedSGD(params, lr=0.01, momentum=0.9, schedule=schedules.linear(20)),
}


@pytest.mark.parametrize("make", ANY.values(), ids=ANY)
def test_direction_is_the_last_move(make):
    """Whatever the optimizer does; weight decay and its own schedule included."""
    params = parameters(SHAPES, DOUBLE)
    optimizer, before, moves, grads = Alignment(make(params), lag=0), None, [], gradients(SHAPES, 6, DOUBLE)
    rows, total = [], 0.0
    for row in grads:
        before = torch.cat([p.detach().flatten() for p in params])
        rows += train(optimizer, params, [row])
        moves.append(before - torch.cat([p.detach().flatten() for p in params]))
    flat = [torch.cat([g.flatten() for g in row]) for row in grads]
    want = [torch.cosine_similarity(g, d, 0).item() for g, d in zip(flat[1:], moves, strict=False)]
    assert column(rows, "direction_cosine") == pytest.approx([0.0, *want], rel=1e-9)
    for row, c in zip(rows, [0.0, *want], strict=True):
        total += c
        assert row["lr"] == pytest.approx(0.01 * math.exp(0.2 * total), rel=1e-9)


def test_no_signal_where_nothing_moved_and_where_a_gradient_is_not_finite():
    """Every cosine is 1: each step with a signal multiplies the next rate by exp(kappa * (1 + bias))."""
    params = parameters(SHAPES, DOUBLE)
    optimizer = Alignment(SGD(params, lr=0.1), kappa=1.0, bias=1.0)
    bases = [0.1, 0.1, 0.0, 0.1, 0.1, 0.1]
    rows = []
    for step, base in enumerate(bases):
        optimizer.param_groups[0]["lr"] = base
        rows += train(optimizer, params, [[torch.full_like(p, math.nan if step == 4 else 1e-3) for p in params]])
    #  step 1 sees the move of step 0, and 2 that of 1; that of 2 was at rate 0; 4 is not finite, nor then is its move
    close(column(rows, "lr"), [0.1, 0.1, 0.0, 0.1 * math.exp(4), 0.1 * math.exp(4), 0.1 * math.exp(4)])
    assert column(rows, "direction_cosine") == pytest.approx([0, 1, 1, 0, 0, 0])


def test_gala_adds_nothing_where_a_gradient_is_not_finite():
    params = parameters(SHAPES, DOUBLE)
    optimizer = GALA(SGD(params, lr=0.1), mode="consecutive")
    grads = gradients(SHAPES, 3, DOUBLE)
    before = train(optimizer, params, grads)[-1]["lr"]
    grads[0][0][0] = math.inf
    assert train(optimizer, params, grads[:1])[-1]["lr"] == before
    train(optimizer, params, [[*grads[1][:2], None], [*grads[2][:2], None]])
    before = optimizer.state_dict()["lrkernels_gala"]["rule"]
    train(optimizer, params, [[*grads[1][:2], torch.full((17,), math.nan, dtype=DOUBLE)]])  # it has no pair yet
    assert optimizer.state_dict()["lrkernels_gala"]["rule"] == before
    train(optimizer, params, [[*grads[1][:2], None]] * 2)
    assert optimizer.state_dict()["lrkernels_gala"]["rule"] != before


def test_gala_takes_a_fused_sgd_for_the_sgd_it_is():
    grads, rates = gradients(SHAPES, 6, DOUBLE), []
    for kind in (SGD, FusedSGD):
        params = parameters(SHAPES, DOUBLE)
        rows = train(GALA(kind(params, lr=0.05, momentum=0.9), mode="consecutive"), params, grads)
        rates.append(column(rows, "lr"))
    close(*rates, rel=1e-9)


# ---- The rate, and who sees it ----

WRAPPERS = {
    "alignment-sgd": lambda params: Alignment(SGD(params, lr=0.05, momentum=0.9), kappa=0.5, lag=0),
    "alignment-adam": lambda params: Alignment(Adam(params, lr=0.05, amsgrad=True), kappa=0.5, bias=0.01),
    "gala-sgd": lambda params: GALA(SGD(params, lr=0.05, momentum=0.9), delta=1.0, mode="consecutive"),
    "gala-rmsprop": lambda params: GALA(RMSprop(params, lr=0.05), delta=1.0, mode="consecutive"),
    "gala-fused": lambda params: GALA(FusedSGD(params, lr=0.05, track="grad_norm"), delta=1.0, mode="consecutive"),
    "gala-same_batch": lambda params: GALA(SGD(params, lr=0.05), delta=1.0),
}
each_wrapper = pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS)


def steps(optimizer, params, grads):
    """Step by closures that pull towards 0: same_batch sees other gradients at other points."""
    rates = []
    for row in grads:

        def closure(row=row):
            set_grads(params, [g + p.detach() for g, p in zip(row, params, strict=True)])
            return sum(p.detach().square().sum() for p in params)

        optimizer.step(closure)
        rates.append(optimizer.stats["lr"])
    return rates


@each_wrapper
def test_the_rate_is_in_the_group_during_the_inner_step_only(make):
    optimizer, seen = make(params := parameters(SHAPES, DOUBLE)), []
    optimizer.optimizer.register_step_pre_hook(lambda inner, *_: seen.append(inner.param_groups[0]["lr"]))
    rates = steps(optimizer, params, gradients(SHAPES, 6, DOUBLE))
    assert rates == seen and len(set(rates)) > 3
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_a_tensor_as_rate_stays(dtype):
    lr = torch.tensor(0.05, dtype=dtype)
    params = parameters(SHAPES, DOUBLE)
    optimizer = Alignment(SGD(params, lr=lr), kappa=0.2, max_lr=0.07)
    rates = steps(optimizer, params, gradients(SHAPES, 6, DOUBLE))
    assert optimizer.param_groups[0]["lr"] is lr and float(lr) == pytest.approx(0.05)
    twins = parameters(SHAPES, DOUBLE)
    want = steps(Alignment(SGD(twins, lr=0.05), kappa=0.2, max_lr=0.07), twins, gradients(SHAPES, 6, DOUBLE))
    close(rates, want, rel=1e-5)
    assert rates[-1] == pytest.approx(0.07) and len(set(want)) > 3


def test_the_rate_is_restored_when_the_inner_step_fails():
    params = parameters(SHAPES, DOUBLE)
    optimizer = Alignment(SGD(params, lr=0.05), kappa=0.5, lag=0)
    steps(optimizer, params, gradients(SHAPES, 3, DOUBLE))
    handle = optimizer.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        steps(optimizer, params, gradients(SHAPES, 1, DOUBLE))
    assert optimizer.param_groups[0]["lr"] == 0.05
    handle.remove()
    assert math.isfinite(steps(optimizer, params, gradients(SHAPES, 1, DOUBLE))[0])


@pytest.mark.parametrize("of", ["wrapper", "inner"])
def test_schedulers_of_torch_multiply(of):
    """Alignment without a signal (kappa 0) at the rates of torch's scheduler; with one, exactly so much more."""
    grads, runs = gradients(SHAPES, 8, DOUBLE), []
    for kappa in (0.0, 0.3):
        params = parameters(SHAPES, DOUBLE)
        optimizer = Alignment(SGD(params, lr=0.05), kappa=kappa)
        scheduler = lr_scheduler.OneCycleLR(optimizer if of == "wrapper" else optimizer.optimizer, 0.1, total_steps=9)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            runs.append(train(optimizer, params, grads, [scheduler]))
    plain, watched = runs
    twin = SGD(parameters(SHAPES), lr=0.05)
    scheduler, want = lr_scheduler.OneCycleLR(twin, 0.1, total_steps=9), []
    for _ in range(8):
        want += scheduler.get_last_lr()
        twin.step()
        scheduler.step()
    close(column(plain, "lr"), want, rel=1e-12)
    total = [0.0, *(sum(column(watched, "direction_cosine")[:t]) for t in range(1, 8))]
    close(column(watched, "lr"), [lr * math.exp(0.3 * c) for lr, c in zip(want, total, strict=True)], rel=1e-9)


def test_grad_scaler_unscales_and_skips():
    grads, runs = gradients(SHAPES, 6), []
    for scaled in (False, True):
        params = parameters(SHAPES)
        optimizer = Alignment(SGD(params, lr=0.05, momentum=0.9))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
        for step, row in enumerate(grads):
            overflow = step == 3
            if overflow and not scaled:
                continue
            scaler.scale(torch.zeros(()))
            scale = 2.0**8 if step < 3 else 2.0**7
            set_grads(params, [g * (math.inf if overflow else scale if scaled else 1.0) for g in row])
            scaler.step(optimizer)
            scaler.update()
        runs.append((params, optimizer.stats))
    assert_same_bits(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] and runs[0][1]["step"] == 5


@each_wrapper
def test_a_step_waits_once(make):
    """Beside what the wrapped optimizer does by itself: Adam reads its count of steps."""
    optimizer = make(params := parameters(SHAPES, DOUBLE))
    grads = gradients(SHAPES, 3, DOUBLE)
    steps(optimizer, params, grads[:2])
    with Waits() as inner:
        optimizer.optimizer.step()
    with Waits() as waits:
        steps(optimizer, params, grads[2:])
    assert waits.count == inner.count + 1


# ---- An optimizer like any other ----


def saved_and_loaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file)  # only tensors and plain numbers


@each_wrapper
def test_a_resumed_run_is_the_same_run(make):
    grads = gradients(SHAPES, 10, DOUBLE)
    optimizer = make(params := parameters(SHAPES, DOUBLE))
    whole = steps(optimizer, params, grads)
    part = make(twins := parameters(SHAPES, DOUBLE))
    rates = steps(part, twins, grads[:6])
    resumed = make(copies := parameters(SHAPES, DOUBLE))
    steps(resumed, copies, grads[4:])  # it has a past of its own, which must go
    for copied, twin in zip(copies, twins, strict=True):
        copied.data.copy_(twin)
    resumed.load_state_dict(saved_and_loaded(part.state_dict()))
    assert rates + steps(resumed, copies, grads[6:]) == whole
    assert_same_bits(copies, params)
    assert resumed.stats["step"] == 10
    assert steps(part, twins, grads[6:]) == whole[6:]  # the checkpoint shares nothing with it


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@each_wrapper
def test_a_copy_goes_on_by_itself(make, copied):
    grads = gradients(SHAPES, 9, DOUBLE)
    optimizer = make(params := parameters(SHAPES, DOUBLE))
    lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # it patches step
    steps(optimizer, params, grads[:5])
    twins, twin = copied((params, optimizer))
    assert twin.param_groups[0]["params"][0] is twins[0] is not params[0]
    before = copy.deepcopy(params)
    rates = steps(twin, twins, grads[5:])
    assert_same_bits(params, before)
    assert steps(optimizer, params, grads[5:]) == rates
    assert_same_bits(params, twins)


def test_checkpoints_of_the_wrapped_optimizer_move_both_ways():
    params, grads = parameters(SHAPES), gradients(SHAPES, 6)
    wrapped = Alignment(Adam(params, lr=0.01), kappa=0.5)
    rates = steps(wrapped, params, grads)
    plain = Adam(parameters(SHAPES), lr=0.3)
    plain.load_state_dict(wrapped.state_dict())
    assert_same_bits(plain.state_dict()["state"], wrapped.optimizer.state_dict()["state"])
    assert plain.param_groups[0]["lr"] == 0.01
    wrapped.load_state_dict(plain.state_dict())  # the rate stays as it was learnt; there is no last move
    assert steps(wrapped, params, grads[:1])[0] != rates[-1]
    assert wrapped.stats["direction_cosine"] == 0.0 and wrapped.stats["step"] == 7


@each_wrapper
def test_it_is_an_optimizer(make):
    params = parameters(SHAPES, DOUBLE)
    optimizer = make(params)
    inner = optimizer.optimizer
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups is inner.param_groups and optimizer.defaults is inner.defaults
    assert optimizer.state is inner.state
    assert repr(inner) in repr(optimizer) and f"{type(optimizer).__name__}(min_lr=0.0" in repr(optimizer)

    seen = []
    pre = optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append((opt, "pre")))
    post = optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append((opt, "post")))
    optimizer.register_state_dict_post_hook(lambda opt, state: state | {"mine": 1})
    steps(optimizer, params, gradients(SHAPES, 1, DOUBLE))
    assert seen == [(optimizer, "pre"), (optimizer, "post")]
    pre.remove()
    post.remove()
    assert optimizer.state_dict()["mine"] == 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state

    extra = nn.Parameter(torch.ones(2, dtype=DOUBLE))
    optimizer.add_param_group({"params": [extra], "lr": 0.02})
    assert inner.param_groups[1]["lr"] == 0.02
    steps(optimizer, [*params, extra], gradients([*SHAPES, (2,)], 3, DOUBLE))
    assert not torch.equal(extra, torch.ones(2))
    optimizer.zero_grad()
    assert all(p.grad is None for p in [*params, extra])
    before = copy.deepcopy(params)
    if not isinstance(optimizer, GALA) or optimizer.closed_loop.mode == "consecutive":
        optimizer.step()
        assert optimizer.stats["step"] == 4
    assert_same_bits(params, before)


@pytest.mark.parametrize("wrapper", [GALA, Alignment])
def test_refusals(wrapper):
    with pytest.raises(TypeError, match=r"lrkernels: .* wraps a torch.optim.Optimizer, got list"):
        wrapper([])
    with pytest.raises(ValueError, match=r"lrkernels: .*LBFGS"):
        wrapper(torch.optim.LBFGS(parameters(SHAPES)))
    with pytest.raises(ValueError, match="lrkernels: need 0 <= min_lr"):
        wrapper(SGD(parameters(SHAPES)), min_lr=2.0, max_lr=1.0)
    (p,) = params = parameters([(3,)])
    optimizer = wrapper(SGD(params, lr=0.1), **({"mode": "consecutive"} if wrapper is GALA else {}))
    before = p.detach().clone()
    p.grad = torch.sparse_coo_tensor([[1]], [1.0], (3,), check_invariants=True)
    with pytest.raises(ValueError, match="takes no sparse gradients"):
        optimizer.step()
    assert_same_bits(p, before)
