"""Guard: what counts as divergence, going back bit for bit, warnings, and that no step waits."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from conftest import Waits, assert_same_bits, bits, gradients, parameters, set_grads
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler

from lrkernels import FusedAdamW, FusedSGD, schedules
from lrkernels.closed_loop import VolSchedule
from lrkernels.guard import Guard
from lrkernels.reference import ReferenceSGD
from lrkernels.wrappers import GALA, Alignment, VolSchedLR

SHAPES = [(5,), (4, 3)]


def guarded(losses, *, optimizer=None, catch=True, **settings):
    """Show a guard these losses only; return it."""
    guard = Guard(optimizer or SGD(parameters(SHAPES), lr=0.1), **({"check_every": 4, "patience": 3} | settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if catch else "error")
        for loss in losses:
            guard.step(loss)
    return guard


# ---- A run ----


class Noisy:
    """1 + (x - noise)'A(x - noise)/2, A = diag(1, 4): plain SGD diverges above a rate of 0.5."""

    def __init__(self, make, steps=200):
        self.x = nn.Parameter(torch.ones(2))
        self.optimizer, self.others = make([self.x])
        self.noise = 0.1 * torch.randn(steps, 2, generator=torch.Generator().manual_seed(0))

    def run(self, guard=None):
        losses = []
        for noise in self.noise:
            loss = 1 + ((self.x - noise).square() * torch.tensor([1.0, 4.0])).sum() / 2
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if guard:
                guard.step(loss)
            for scheduler in self.others:
                scheduler.step()
            losses.append(loss.item())
        return losses


GROWING = schedules.staircase(2.0, 50, maximum=8.0)  # 0.1, 0.2, 0.4, and 0.8, which is too much


def with_schedule(params):
    return FusedSGD(params, lr=0.1, schedule=GROWING, track="grad_norm"), []


def with_torch(params):
    optimizer = SGD(params, lr=0.1)
    return optimizer, [lr_scheduler.LambdaLR(optimizer, GROWING)]


@pytest.mark.filterwarnings("ignore:lrkernels. step 155. the gradient norm")
@pytest.mark.parametrize("make", [with_schedule, with_torch])
def test_a_diverging_run_goes_back_and_then_finishes(make):
    assert not max(Noisy(make).run()) < 100.0
    problem = Noisy(make)
    guard = Guard(problem.optimizer, others=problem.others, check_every=5, snapshot_every=10)
    with pytest.warns(UserWarning, match=r"lrkernels: step \d+: the loss has been above .*went back to step 140"):
        losses = problem.run(guard)
    assert max(losses[-30:]) < 2.5 and guard.rollbacks == 1
    event = guard.events[-1]
    assert event.kind == "rollback" and 150 < event.step < 175
    assert [event.kind for event in guard.events[:-1]] == ["grad_norm"] * (make is with_schedule)
    history = guard.history()
    assert np.flatnonzero(history["rollback"]).tolist() == [event.step - 1]
    assert history["loss"].tolist() == losses
    lr = history["lr"]
    assert lr[[0, 60, 120, 152]] == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert lr[event.step :] == pytest.approx([0.2] * 10 + [0.4] * (200 - 10 - event.step))
    if make is with_schedule:
        assert problem.optimizer.param_groups[0]["lr"] == 0.05
        after = problem.optimizer.history()
        assert history["grad_norm"][event.step :].tolist() == after["grad_norm"].tolist()
        assert lr[event.step :].tolist() == after["lr"].tolist()
    else:
        assert np.isnan(history["grad_norm"]).all()


def test_a_loss_of_nan_goes_back_and_after_max_rollbacks_it_raises():
    problem = Noisy(with_torch)
    problem.noise[20:23] = math.nan
    problem.noise[60:] = math.nan
    guard = Guard(problem.optimizer, others=problem.others, check_every=4, snapshot_every=4, max_rollbacks=2)
    with (
        pytest.warns(UserWarning, match="the loss is nan"),
        pytest.raises(RuntimeError, match="diverged again after 2"),
    ):
        problem.run(guard)
    assert [event.kind for event in guard.events] == ["rollback", "rollback", "stop"]
    assert [event.step for event in guard.events] == [24, 64, 68]
    assert "step 56" in guard.events[1].message and guard.rollbacks == 2
    assert problem.x.isfinite().all() and problem.x.grad is None
    assert problem.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4)


# ---- What counts as divergence ----


def wave(n, level=1.0, width=0.1):
    return [level + width * (-1) ** i for i in range(n)]


@pytest.mark.parametrize(
    ("losses", "rollbacks"),
    [
        (wave(40), 0),
        ([*wave(20), math.nan], 0),  # not looked at yet
        (wave(20) + [math.nan] * 4, 1),
        ([*wave(22), math.inf, 1.0], 1),
        (wave(20) + [2.01] * 3 + [1.0], 1),
        (wave(20) + [1.0] + [2.3] * 3, 1),
        (wave(18) + [2.3] * 3 + [1.0] * 3, 1),  # across two looks
        (wave(20) + [2.3] * 2 + [1.0] * 2 + [1e9] * 2 + [1.0] * 2, 0),  # spikes, less than patience
        (wave(20) + [1.99] * 8, 0),  # the limit is 1.0 + max(1.0, 0.1)
        (wave(20, level=-5.0) + [-1.0] * 4, 0),
        (wave(20, level=-5.0) + [0.2] * 4, 1),
        (wave(20, level=0.0, width=0.5) + [0.49] * 4, 0),
        (wave(20, level=0.0, width=0.5) + [0.51] * 4, 1),
        ([10.0 / (1 + i) for i in range(20)], 0),
        ([1.0, 2.0] + [1e3] * 6, 0),  # nothing to compare with yet
        (wave(20) + [2.3] * 12, 3),  # at every look anew
    ],
)
def test_what_counts_as_divergence(losses, rollbacks):
    guard = guarded(losses)
    assert guard.rollbacks == rollbacks
    assert guard.history()["rollback"].sum() == rollbacks


def test_threshold_and_memory():
    losses = wave(20) + [5.0] * 4
    assert guarded(losses).rollbacks == 1 and guarded(losses, threshold=10.0).rollbacks == 0
    falling = [100.0] * 20 + [1.0] * 20 + [5.0] * 4
    assert guarded(falling).rollbacks == 0 and guarded(falling, memory=8).rollbacks == 1


# ---- Going back, bit for bit ----


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.body(x).square().mean().float()


def plain(optimizer, *others):
    return optimizer, list(others)


def torch_sgd(params):
    optimizer = SGD(params, lr=torch.tensor(0.05), momentum=0.9)
    return plain(optimizer, lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=60))


def torch_volsched(params):
    optimizer = AdamW(params, lr=0.02, amsgrad=True)
    return plain(optimizer, VolSchedLR(optimizer, total_steps=60, window=3, sensitivity=0.5))


def torch_sequential(params):
    optimizer = SGD(params, lr=0.05)
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(optimizer, 30)]
    return plain(optimizer, lr_scheduler.SequentialLR(optimizer, parts, [6]))


LOOP = schedules.product(schedules.alignment(kappa=0.5), schedules.linear(60))
RUNS = {
    "sgd-onecycle": torch_sgd,
    "adamw-volsched": torch_volsched,
    "sgd-sequential": torch_sequential,
    "fused-sgd": lambda params: plain(FusedSGD(params, lr=0.05, momentum=0.9, schedule=LOOP, max_grad_norm=1.0)),
    "fused-sgd-tensor": lambda params: plain(FusedSGD(params, lr=torch.tensor(0.05), schedule=LOOP)),
    "fused-sgd-swap": lambda params: plain(
        FusedSGD(params, lr=0.05, schedule=schedules.gala(delta=1.0, mode="consecutive"), prev_grad="swap")
    ),
    "fused-adamw": lambda params: plain(
        FusedAdamW(params, lr=0.02, amsgrad=True, schedule=schedules.volsched(60, window=3, sensitivity=0.5))
    ),
    "reference": lambda params: plain(ReferenceSGD(params, lr=0.05, momentum=0.9, schedule=LOOP)),
    "alignment": lambda params: plain(Alignment(AdamW(params, lr=0.02), kappa=0.5)),
    "gala": lambda params: plain(GALA(SGD(params, lr=0.05, momentum=0.9), delta=1.0)),
}
BATCHES = torch.randn(40, 8, 4, generator=torch.Generator().manual_seed(3))


class Run:
    """A net with BatchNorm, its optimizer, and whatever else has a position."""

    def __init__(self, make, guard=None, dtype=torch.float32):
        torch.manual_seed(0)
        self.net = Net(dtype)
        self.optimizer, self.others = make(self.net.parameters())
        self.guard = guard and Guard(self.optimizer, self.net, self.others, **guard)

    def train(self, indices):
        rates = []
        for i in indices:

            def closure(i=i):
                self.optimizer.zero_grad()
                loss = self.net(BATCHES[abs(i)].to(self.net.body[0].weight.dtype)) * (math.nan if i < 0 else 1.0)
                loss.backward()
                return loss

            if isinstance(self.optimizer, FusedAdamW):
                self.optimizer.observe(0.1 + abs(i) % 5 / 10)
            loss = self.optimizer.step(closure)
            rates.append(float(getattr(self.optimizer, "stats", {}).get("lr", self.optimizer.param_groups[0]["lr"])))
            for scheduler in self.others:
                scheduler.step(*[0.1 + abs(i) % 5 / 10] * isinstance(scheduler, VolSchedLR))
            if self.guard:
                self.guard.step(loss)
        return rates

    def tensors(self):
        states = [self.optimizer.state.get(p, {}) for p in self.net.parameters()]
        states = [{key: value for key, value in state.items() if key != "prev_grad"} for state in states]
        return [list(self.net.parameters()), list(self.net.buffers()), states]


EVERY = {"check_every": 5, "snapshot_every": 5, "lr_factor": 1.0}
FIRST, BAD, REST = range(0, 13), [-1] * 2, range(20, 32)  # looks at 5, 10, and 15: back to 5, which 6 to 10 have proved


@pytest.mark.filterwarnings("ignore:lrkernels. step 15")
@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_a_snapshot_is_the_run_at_that_step_bit_for_bit(make):
    """With a factor of 1 the run that went back goes on as one that never saw the steps in between."""
    run, twin = Run(make, EVERY), Run(make)
    run.train(FIRST)
    before = [id(t) for t in [*run.net.parameters(), *run.net.buffers()]]
    run.train(BAD)
    assert "went back to step 5" in run.guard.events[0].message
    twin.train(range(5))
    assert_same_bits(run.tensors(), twin.tensors())
    assert before == [id(t) for t in [*run.net.parameters(), *run.net.buffers()]]
    assert run.train(REST) == twin.train(REST)
    assert_same_bits(run.tensors(), twin.tensors())


@pytest.mark.filterwarnings("ignore:lrkernels. step 5")
@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_the_first_snapshot_is_of_the_beginning(make):
    run, twin = Run(make, EVERY), Run(make)
    run.train([0, 1, 2, -1, -1])
    assert "went back to step 0" in run.guard.events[0].message
    assert run.train(REST) == twin.train(REST)
    assert_same_bits(run.tensors(), twin.tensors())


@pytest.mark.filterwarnings("ignore:lrkernels. step")
@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_every_rate_is_lowered_and_again_from_the_same_snapshot(make):
    run, twin = Run(make, EVERY | {"lr_factor": 0.5}), Run(make)
    run.train([*FIRST, *BAD, 0, 1, 2, -1, -1])
    assert [event.message.split(",")[0][-6:] for event in run.guard.events] == ["step 5"] * 2
    twin.train(range(5))
    for group, other in zip(run.optimizer.param_groups, twin.optimizer.param_groups, strict=True):
        assert float(group["lr"]) == pytest.approx(float(other["lr"]) / 4, rel=1e-6)
    rates, want = run.train(REST[:2]), twin.train(REST[:2])
    assert rates[0] == pytest.approx(want[0] / 4, rel=1e-6)
    if run.others:  # a scheduler of torch's does not bring the old rates back
        assert rates[1] == pytest.approx(want[1] / 4, rel=1e-6)


@pytest.mark.filterwarnings("ignore:lrkernels. step")
@pytest.mark.parametrize(
    "make",
    [
        lambda params: FusedSGD(params, 0.1, momentum=0.9, schedule=schedules.alignment(kappa=1.0, max_lr=0.4)),
        lambda params: FusedAdamW(params, 0.1, schedule=schedules.alignment(kappa=1.0, lag=0, max_lr=0.4)),
        lambda params: Alignment(SGD(params, 0.1, momentum=0.9), kappa=1.0, max_lr=0.4),
    ],
    ids=["fused-sgd", "fused-adamw", "wrapper"],
)
def test_a_rate_that_alignment_holds_at_its_bound_is_lowered_too(make):
    """Twenty gradients that agree have made the factor e^20, of which the bound lets 4 through."""
    [p] = parameters([(5,)])
    optimizer = make([p])
    guard = Guard(optimizer, check_every=1, snapshot_every=1)
    rates = []
    for loss in [1.0] * 22 + [math.nan]:
        p.grad = torch.ones(5)
        optimizer.step()
        rates.append(float(optimizer.stats["lr"]))
        guard.step(loss)
    assert rates[-1] == pytest.approx(0.4)
    p.grad = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])  # across the last direction: nothing is learnt
    optimizer.step()
    assert float(optimizer.stats["lr"]) == pytest.approx(0.2, rel=1e-5)


@pytest.mark.filterwarnings("ignore:lrkernels. step 15")
@pytest.mark.parametrize("make", [RUNS["fused-sgd"], RUNS["sgd-onecycle"]], ids=["fused", "torch"])
def test_states_and_rates_are_restored_in_place(make):
    run = Run(make, EVERY)
    run.train(FIRST)
    p, group = next(run.net.parameters()), run.optimizer.param_groups[0]
    buffer, lr = run.optimizer.state[p]["momentum_buffer"], group["lr"]
    run.train(BAD)
    assert run.optimizer.state[p]["momentum_buffer"] is buffer
    assert not isinstance(lr, torch.Tensor) or run.optimizer.param_groups[0]["lr"] is lr


@pytest.mark.filterwarnings("ignore:lrkernels. step 15")
def test_states_of_another_precision_than_the_parameters_keep_their_bits():
    """torch's load_state_dict rounds them to bfloat16."""

    class Master(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.05})

        @torch.no_grad()
        def step(self, closure):
            with torch.enable_grad():
                loss = closure()
            for p in self.param_groups[0]["params"]:
                master = self.state[p].setdefault("master", p.float())
                master.sub_(0.05 * p.grad.float())
                p.copy_(master)
            return loss

    def make(params):
        return Master(params), []

    run, twin = Run(make, EVERY, torch.bfloat16), Run(make, dtype=torch.bfloat16)
    run.train([*FIRST, *BAD])
    twin.train(range(5))
    assert_same_bits(run.tensors(), twin.tensors())


@pytest.mark.filterwarnings("ignore:lrkernels. step")
def test_a_snapshot_is_taken_of_good_steps_and_counts_once_the_next_are_good():
    def back_to(losses, **settings):
        return guarded(losses, **{"snapshot_every": 4} | settings).events[0].message.partition("went back to ")[2][:7]

    assert back_to(wave(16) + [math.nan] * 4) == "step 12"
    assert back_to(wave(14) + [9.0] * 2 + [1.0] * 2 + [math.nan] * 2) == "step 8,"  # 16 was in doubt
    assert back_to(wave(16) + [math.nan] * 4, patience=4) == "step 12"
    assert back_to(wave(40) + [math.nan] * 4, snapshot_every=12) == "step 36"
    events = guarded(wave(16) + [math.nan] * 4 + wave(4) + [math.nan] * 4, snapshot_every=4).events
    assert [event.message.partition(";")[2][:23] for event in events] == [" went back to step 12, "] * 2  # not to 16


@pytest.mark.filterwarnings("ignore:lrkernels. step")
def test_a_snapshot_outlives_what_is_made_of_it():
    """Where a state is gone torch takes the checkpoint's own tensor: it must be a copy."""
    run, twin = Run(torch_sgd, EVERY), Run(torch_sgd)
    run.train([*FIRST, -1])
    run.optimizer.state.clear()
    assert run.guard.check()
    run.train([0, 1, -1])
    assert run.guard.check()
    twin.train(range(5))
    assert_same_bits(run.tensors(), twin.tensors())


class Log:
    """Keeps what it loads, and writes into it."""

    def __init__(self):
        self.seen = []

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


@pytest.mark.filterwarnings("ignore:lrkernels. step")
def test_others_keep_what_they_load():
    log = Log()
    guard = Guard(SGD(parameters(SHAPES), lr=0.1), others=[log], check_every=2)
    for loss in (math.nan,) * 4:
        log.seen.append(loss)
        guard.step(loss)
    assert guard.rollbacks == 2 and log.seen == []


def test_others_go_back_too():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    params = parameters(SHAPES)
    optimizer = SGD(params, lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(net := Net())
    guard = Guard(optimizer, [net], [scaler, average], check_every=2)
    want = bits(average.state_dict())
    scaler.update(2.0)
    net(torch.randn(8, 4))
    average.update_parameters(net)
    assert bits(average.state_dict()) != want and int(net.calls) == 1
    with pytest.warns(UserWarning):
        guard.step(math.nan)
        assert guard.step(1.0)
    assert scaler.get_scale() == 8.0 and bits(average.state_dict()) == want and int(net.calls) == 0


# ---- Warnings ----


def warned(guard):
    return [(event.step, event.kind) for event in guard.events]


@pytest.mark.parametrize(
    ("schedule", "sign", "kinds"),
    [
        (schedules.alignment(kappa=1.0, max_lr=0.2), 1, ["max_lr"]),
        (schedules.product(schedules.alignment(kappa=1.0, max_lr=0.2), schedules.linear(40)), 1, ["max_lr"]),
        (schedules.product(schedules.alignment(kappa=1.0, max_lr=0.2), schedules.linear(8)), 1, []),  # 0 from there
        (schedules.alignment(kappa=1.0, min_lr=0.05), -1, ["min_lr"]),
        (schedules.gala(mode="consecutive", min_lr=0.05), -1, ["min_lr"]),
        (schedules.gala(mode="consecutive"), -1, ["min_lr"]),  # at rate 0
        (schedules.gala(mode="consecutive", max_lr=0.2), 1, ["max_lr"]),
        (schedules.volsched(500, window=2, max_lr=0.05, decay=schedules.constant()), 1, ["max_lr"]),
        (schedules.volsched(12, window=2, min_lr=0.01), 1, []),  # where its decay ends
        (schedules.alignment(kappa=1e-3, min_lr=0.05, max_lr=0.2), 1, []),
        (schedules.linear(4), 1, []),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [FusedSGD, ReferenceSGD])
def test_a_rate_at_a_bound_of_its_loop_warns_once(kind, schedule, sign, kinds):
    params = parameters(SHAPES)
    optimizer = kind(params, lr=0.1, schedule=schedule)
    guard = Guard(optimizer, check_every=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(30):
            set_grads(params, [torch.full_like(p, sign**step) for p in params])
            if isinstance(schedule, VolSchedule):
                optimizer.observe(0.5)
            optimizer.step()
            guard.step(1.0)
    assert [event.kind for event in guard.events] == kinds
    assert [str(w.message) for w in caught] == [f"lrkernels: step {e.step}: {e.message}" for e in guard.events]
    assert all(w.filename == __file__ for w in caught)


def test_a_bound_is_seen_in_wrappers_and_schedulers_too():
    params = parameters(SHAPES)
    wrapped = Alignment(SGD(params, lr=0.1), kappa=1.0, max_lr=0.2)
    guard = Guard(wrapped, check_every=5)
    with pytest.warns(UserWarning, match="at max_lr = 0.2 for 5 steps"):
        for grads in [[torch.ones_like(p) for p in params]] * 20:
            set_grads(params, grads)
            wrapped.step()
            guard.step(1.0)
    assert warned(guard) == [(10, "max_lr")]  # of the first five steps two were below
    optimizer = SGD(params, lr=0.1)
    scheduler = VolSchedLR(optimizer, 500, window=2, max_lr=0.05, decay=schedules.constant())
    guard = Guard(optimizer, others=[scheduler], check_every=5)
    with pytest.warns(UserWarning, match=r"at max_lr = 0.05"):
        for _ in range(20):
            optimizer.step()
            scheduler.step(0.5)
            guard.step(1.0)
    assert [kind for _, kind in warned(guard)] == ["max_lr"]
    guard = Guard(optimizer, others=[scheduler], check_every=5)
    guard.step(1.0)
    guard.check()
    assert guard.events == []  # one step is no window


@pytest.mark.parametrize("good", [0, 8], ids=["from the beginning", "in mid-run"])
def test_after_a_rollback_a_bound_is_still_seen(good):
    """GALA starts anew with the first snapshot, at a lower lr_0; later ones have lr_0, and a lower group's rate."""
    params = parameters(SHAPES)
    optimizer = GALA(SGD(params, lr=0.4), mode="consecutive", min_lr=0.1)
    guard = Guard(optimizer, check_every=4, snapshot_every=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, loss in enumerate([1.0] * good + [math.nan] * 4 + [1.0] * 8):
            bad = step >= good
            set_grads(params, [p.detach() * (1 + bad * (-1) ** step) + bad * (-1) ** step for p in params])
            optimizer.step()
            guard.step(loss)
    assert warned(guard) == [(good + 4, "rollback"), (good + 12, "min_lr")]
    assert guard.history()["lr"][-1] == pytest.approx(0.05 if good else 0.1)


def test_a_risen_norm_warns_once_until_it_is_over():
    params = parameters([(4,)])
    optimizer = FusedSGD(params, lr=1e-6, track="grad_norm")
    guard = Guard(optimizer, check_every=4, patience=3, norm_threshold=5.0)
    norms = [1, math.nan, 2, 3, 2, 2, 2, 2, 9, 1, 2, 3]  # at most five times the median
    norms += [1, 30, 2, 2, 20, 20, 2, 2, 1, 2, 2, 3, 2, 0.001, 2, 50]  # above, above, below, above
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for norm in norms:
            set_grads(params, [torch.full((4,), norm / 2.0)])
            optimizer.step()
            guard.step(1.0)
    assert warned(guard) == [(16, "grad_norm"), (28, "grad_norm")]
    assert str(caught[0].message) == "lrkernels: step 16: the gradient norm has risen to 30, from a median of 2"
    assert guard.history()["grad_norm"] == pytest.approx(norms, nan_ok=True)


# ---- What a step costs, and what can be read ----


@pytest.mark.parametrize("make", [RUNS["fused-sgd"], RUNS["fused-adamw"], RUNS["sgd-onecycle"]])
def test_no_step_waits_but_the_one_that_looks(make):
    run = Run(make)
    run.train(range(2))
    guard = Guard(run.optimizer, run.net, run.others, check_every=6, snapshot_every=1000)
    loss = torch.tensor(1.0)
    with Waits() as waits:
        for _ in range(5):
            guard.step(loss)
        assert waits.count == 0
        guard.step(loss)
    assert 1 <= waits.count <= 2 and guard.history()["loss"].tolist() == [1.0] * 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [RUNS["fused-sgd"], RUNS["sgd-onecycle"]])
def test_no_step_waits_for_a_gpu_and_snapshots_may_be_on_the_host(make):
    p = nn.Parameter(torch.ones(100, device="cuda"))
    optimizer, _ = make([p])
    guard = Guard(optimizer, check_every=4, snapshot_every=4, snapshot_device="cpu", lr_factor=1.0)
    before = p.detach().clone()
    with pytest.warns(UserWarning, match="went back to step 0"):
        for step in range(4):
            p.grad = torch.ones_like(p)
            optimizer.step()
            loss = p.sum() * (math.nan if step == 3 else 1.0)
            torch.cuda.set_sync_debug_mode("default" if step == 3 else "error")
            guard.step(loss)
            torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(p, before)
    assert guard._good.params[0][1].device.type == "cpu" and p.is_cuda


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_loss_is_noted_when_it_is_given(dtype):
    """A captured graph writes every loss to the same tensor."""
    loss, lr = torch.zeros(1, dtype=dtype, requires_grad=True), torch.tensor(0.0)
    guard = Guard(SGD(parameters(SHAPES), lr=lr), check_every=3)
    for value in range(5):
        loss.data.fill_(value)
        lr.fill_(-value)
        guard.step(loss)
    assert guard.history()["loss"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert guard.history()["lr"].tolist() == [0.0, -1.0, -2.0, -3.0, -4.0]


def test_history():
    guard = guarded([0.5, 0.25, 0.125], history_size=2)
    history = guard.history()
    assert list(history) == ["loss", "grad_norm", "lr", "rollback"]
    assert history["loss"].tolist() == [0.5, 0.25, 0.125]  # the last were not looked at
    assert history["lr"].tolist() == [0.1] * 3 and np.isnan(history["grad_norm"]).all()
    assert history["rollback"].dtype == bool
    guard.step(1.0)
    assert guard.history()["loss"].tolist() == [0.125, 1.0]
    assert {name: len(x) for name, x in guarded([]).history().items()} == dict.fromkeys(history, 0)


def test_check_looks_at_once():
    guard = guarded([1.0, math.nan], check_every=50)
    assert guard.rollbacks == 0
    with pytest.warns(UserWarning, match="the loss is nan"):
        assert guard.check()
    assert not guard.check()


def test_the_optimizer_is_not_touched_by_a_guard_that_sees_no_harm():
    grads, results = gradients(SHAPES, 12), []
    for watch in (False, True):
        params = parameters(SHAPES)
        optimizer = FusedSGD(params, lr=0.1, momentum=0.9, schedule=schedules.alignment(kappa=0.5))
        guard = Guard(optimizer, check_every=3, snapshot_every=3) if watch else None
        for row in copy.deepcopy(grads):
            set_grads(params, row)
            optimizer.step()
            if guard:
                assert guard.step(1.0) is False
        results.append([params, optimizer.state_dict()["state"], [torch.tensor(optimizer.history()["lr"])]])
    assert_same_bits(*results)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"check_every": 0}, "check_every"),
        ({"snapshot_every": 0}, "snapshot_every"),
        ({"patience": 0}, "patience"),
        ({"patience": 300}, "memory"),
        ({"threshold": 0.0}, "threshold"),
        ({"norm_threshold": 1.0}, "norm_threshold"),
        ({"max_rollbacks": -1}, "max_rollbacks"),
        ({"lr_factor": 0.0}, "lr_factor"),
        ({"lr_factor": 1.5}, "lr_factor"),
        ({"history_size": 0}, "history_size"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=f"lrkernels: .*{message}"):
        Guard(SGD(parameters(SHAPES), lr=0.1), **settings)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(ValueError, match="lrkernels: Guard watches an optimizer, got NoneType"):
        Guard(None)
