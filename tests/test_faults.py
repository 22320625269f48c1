"""What goes wrong in long runs: processes that are killed, files that are cut, and ten thousand steps of everything."""

import copy
import functools
import gc
import io
import math
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tracemalloc

import pytest
import torch
from conftest import BACKENDS, assert_close, assert_same_bits, bits, everything

from lrkernels import FusedAdamW, FusedSGD, reference, schedules
from lrkernels.checkpoints import CONTROL_KEY
from lrkernels.layout import Control

REFERENCE = {FusedSGD: reference.ReferenceSGD, FusedAdamW: reference.ReferenceAdamW}

# ---- Ten thousand steps of everything, against the reference ----


class Walk:
    """The fused optimizer and the reference, on the same random events: each pair of them a run of its own."""

    SHAPES = ((), (1,), (3,), (2, 2), (7,), (17,), (33,), (0,))

    def __init__(self, kind, more, seed, backend, exact=True):
        self.kind, self.more, self.backend, self.exact = kind, more, backend, exact
        self.dice = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        groups = [self.group() for _ in range(self.dice.randint(1, 3))]
        self.params = [[p for group in groups for p in group["params"]]]
        self.params.append([torch.nn.Parameter(p.detach().clone()) for p in self.params[0]])
        self.optimizers = self.build(groups)
        self.saved = None
        self.events = dict.fromkeys(("step", "overflow", "nothing", "group", "change", "fresh", "back", "late"), 0)
        self.silent = set()  # parameters that have no gradient for now

    # What is drawn

    def settings(self):
        dice = self.dice
        row = {"lr": dice.choice([0.05, 0.01, 0.002]), "weight_decay": dice.choice([0.0, 0.0, 0.01, 0.1])}
        if self.kind is FusedAdamW:
            return row | {
                "betas": dice.choice([(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)]),
                "eps": dice.choice([1e-8, 1e-3]),
            }
        momentum = dice.choice([0.0, 0.5, 0.9])
        nesterov = momentum > 0 and dice.random() < 0.3
        dampening = 0.0 if nesterov else dice.choice([0.0, 0.0, 0.5])
        return row | {"momentum": momentum, "nesterov": nesterov, "dampening": dampening}

    def group(self):
        shapes = [self.dice.choice(self.SHAPES) for _ in range(self.dice.randint(1, 3))]
        params = [torch.nn.Parameter(torch.randn(shape, generator=self.generator)) for shape in shapes]
        return self.settings() | {"params": params, "maximize": self.dice.random() < 0.2}

    # Both runs

    def build(self, groups):
        """New optimizers, of the groups as the first one has them."""
        twin = dict(zip(*self.params, strict=True))
        twins = [group | {"params": [twin[p] for p in group["params"]]} for group in groups]
        fused = self.kind(groups, backend=self.backend, **self.more)
        return fused, REFERENCE[self.kind](twins, **self.more)

    def overflow(self):
        self.gradients(math.inf)
        found = float(any(p.grad is not None and p.numel() for p in self.params[0]))
        for optimizer in self.optimizers:
            optimizer.found_inf, optimizer.grad_scale = torch.full((1,), found), torch.full((1,), 4.0)
        self.both("step")
        for optimizer in self.optimizers:
            del optimizer.found_inf, optimizer.grad_scale

    def both(self, name, *args):
        for optimizer in self.optimizers:
            getattr(optimizer, name)(*args)

    def gradients(self, poison=None):
        """Of any size, or odd multiples of 1/16: their squares add up without rounding, in any order, and none is 0,
        whose sign torch takes differently in vectors and in what is left over of them (``lerp`` with a weight of 1).
        """
        missing = self.dice.random() < 0.2
        for p, twin in zip(*self.params, strict=True):
            silent = p in self.silent or (missing and self.dice.random() < 0.5)
            if self.exact:
                grad = (2 * torch.randint(-16, 16, p.shape, generator=self.generator) + 1) / 16
            else:
                grad = torch.randn(p.shape, generator=self.generator) * 10.0 ** self.dice.uniform(-3, 1)
            if poison is not None and grad.numel():
                grad.view(-1)[-1] = poison
            p.grad, twin.grad = (None, None) if silent else (grad, grad.clone())

    def event(self):
        dice, roll = self.dice, self.dice.random()
        if roll < 0.04:
            self.events["overflow"] += 1
            self.overflow()
        elif roll < 0.05:
            self.events["nothing"] += 1
            for p in (*self.params[0], *self.params[1]):
                p.grad = None
            self.both("step")
        elif roll < 0.06 and len(self.params[0]) < 14:
            self.events["group"] += 1
            self.add_group()
        elif roll < 0.09:
            self.events["change"] += 1
            n = dice.randrange(len(self.optimizers[0].param_groups))
            row = self.settings() if dice.random() < 0.5 else {"lr": dice.choice([0.03, 0.0, 0.004])}
            for optimizer in self.optimizers:
                optimizer.param_groups[n].update(row)
        elif roll < 0.10:
            self.events["fresh"] += 1
            self.restart()
        elif roll < 0.11:
            self.events["back"] += 1
            self.roll_back()
        elif roll < 0.12:
            self.events["late"] += 1
            p = dice.choice(self.params[0])
            self.silent ^= {p}
        else:
            self.events["step"] += 1
            self.gradients()
            if dice.random() < 0.8:
                self.both("observe", dice.random())
            self.both("step")
            self.both("zero_grad", dice.random() < 0.5)

    def add_group(self):
        group = self.group()
        twins = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
        for optimizer, own in zip(self.optimizers, (group["params"], twins), strict=True):
            optimizer.add_param_group(group | {"params": own})
        for list_, own in zip(self.params, (group["params"], twins), strict=True):
            list_ += own
        self.saved = None

    def restart(self):
        """Save, and go on with new optimizers: a run that was stopped and resumed."""
        states = [through_a_file(optimizer.state_dict()) for optimizer in self.optimizers]
        groups = [{"params": group["params"]} for group in self.optimizers[0].param_groups]
        self.optimizers = self.build(groups)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(copy.deepcopy(state))  # torch's goes on in the very tensors it is given
        self.saved = (states, [[p.detach().clone() for p in params] for params in self.params])

    def roll_back(self):
        """Into the same optimizers, and their parameters."""
        if self.saved is None:
            return
        states, values = self.saved
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(copy.deepcopy(state))
        for params, row in zip(self.params, values, strict=True):
            for p, value in zip(params, row, strict=True):
                p.data.copy_(value)

    def check(self, statistics, same=assert_same_bits):
        fused, slow = self.optimizers
        same(self.params[0], self.params[1])
        for p, twin in zip(*self.params, strict=True):
            for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", "prev_grad"):
                if twin in slow.state and slow.state[twin].get(key) is not None:
                    same(fused.state[p][key], slow.state[twin][key])
        assert fused.stats["step"] == slow.stats["step"]
        assert fused.stats["skipped"] == slow.stats["skipped"]
        got, want = fused.history(), slow.history()  # stats are of the last attempt, which may have been skipped
        for name in statistics if len(got["lr"]) else ():  # loading clears the one alone
            assert got[name][-1] == pytest.approx(want[name][-1], rel=1e-9)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


MEASURED = ("lr", "grad_norm")  # what both histories hold
CLIPPED = (*MEASURED, "clip")
ALIGNMENT = {"schedule": schedules.alignment(kappa=0.05, min_lr=1e-4, max_lr=0.1)}
VOLSCHED = {"schedule": schedules.volsched(9000, window=6), "track": "alignment"}
WALKS = {
    "sgd-open": (FusedSGD, {"schedule": schedules.linear(9000, warmup_steps=100), "max_grad_norm": 2.0}, CLIPPED),
    "sgd-alignment": (FusedSGD, ALIGNMENT, MEASURED),
    "sgd-volsched": (FusedSGD, VOLSCHED, MEASURED),
    "adamw-open": (
        FusedAdamW,
        {"schedule": schedules.cosine(9000), "max_grad_norm": 2.0, "track": "alignment"},
        CLIPPED,
    ),
    "adamw-alignment": (FusedAdamW, ALIGNMENT, MEASURED),
}


ALMOST = functools.partial(assert_close, rtol=1e-6, atol=1e-6)
LONG_WALKS = {
    "sgd-open": (FusedSGD, {"schedule": schedules.linear(12_000, warmup_steps=100)}, ("lr",), assert_same_bits),
    "adamw-open-clip": (FusedAdamW, {"schedule": schedules.cosine(12_000), "max_grad_norm": 2.0}, CLIPPED, ALMOST),
    "adamw-alignment": (FusedAdamW, ALIGNMENT | {"max_grad_norm": 2.0}, CLIPPED, ALMOST),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:lrkernels. volsched has no signal")
@pytest.mark.parametrize(("kind", "more", "statistics"), WALKS.values(), ids=WALKS)
def test_thousands_of_steps_of_everything(kind, more, statistics):
    """Random groups, missing and late gradients, overflows, groups added, settings changed, saved and loaded; with sums
    that are exact, so that decisions, float32 parameters, states and kept gradients have the same bits.
    """
    walk = Walk(kind, more, 1, BACKENDS[0])
    for n in range(2000):
        walk.event()
        if n % 10 == 9:
            walk.check(statistics)
    assert all(count > 3 for count in walk.events.values()), walk.events


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "more", "statistics", "same"), LONG_WALKS.values(), ids=LONG_WALKS)
def test_ten_thousand_steps_of_any_gradients(kind, more, statistics, same):
    """In one run; what depends on the sums is rounded otherwise here and there."""
    walk = Walk(kind, more, 2, BACKENDS[0], exact=False)
    for n in range(10_000):
        walk.event()
        if n % 50 == 49:
            walk.check(statistics, same)
    assert all(count > 30 for event, count in walk.events.items() if event != "group"), walk.events
    assert walk.events["group"] > 3


# ---- Killed at any point, resumed from the last checkpoint ----


class Training:
    """A run of all that must go on where it was: a closed loop, its signal, a kept gradient, dropout, a scaler."""

    STEPS = 30

    def __init__(self, kind, options, scaled):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        layers = [torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(12, 3)]
        self.model = torch.nn.Sequential(*layers)
        self.optimizer = kind(self.model.parameters(), max_grad_norm=0.5, track="alignment", **options)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=2 * self.STEPS)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=5, enabled=scaled)
        self.step = 0

    def parts(self):
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}

    def save(self, path):
        """First beside it, then into its place: whoever looks sees a whole one, the old or the new."""
        states = {name: part.state_dict() for name, part in self.parts().items()}
        torch.save({**states, "step": self.step, "random": torch.get_rng_state()}, f"{path}.new")
        os.replace(f"{path}.new", path)

    def load(self, path):
        checkpoint = torch.load(path, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(checkpoint[name])
        self.step = checkpoint["step"]
        torch.set_rng_state(checkpoint["random"])

    def run(self, path):
        while self.step < self.STEPS:
            generator = torch.Generator().manual_seed(self.step)
            x = torch.randn(8, 6, generator=generator)
            y = x[:, :3].argmax(1)
            with torch.autocast("cpu", dtype=torch.float16, enabled=self.scaler.is_enabled()):
                outputs = self.model(x)
                loss = torch.nn.functional.cross_entropy(outputs, y)
            self.scaler.scale(loss).backward()
            self.optimizer.observe((outputs.argmax(1) == y).float().mean())
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.save(path)


def work(path, kill_after, *arguments):
    """What a process does: build, load where there is something, and train; killed at an event of the interpreter."""
    training = Training(*arguments)
    if os.path.exists(path):
        training.load(path)
    events = 0

    def count(frame, event, argument):
        nonlocal events
        events += 1
        if events == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count if kill_after else None)
    training.run(path)


RUNS = {
    "sgd-volsched": (FusedSGD, {"lr": 0.1, "momentum": 0.9, "schedule": schedules.volsched(40, window=5)}, False),
    "adamw-alignment": (FusedAdamW, {"lr": 0.02, "schedule": schedules.alignment(kappa=0.5)}, False),
    "adamw-volsched-swap-scaler": (
        FusedAdamW,
        {"lr": 0.02, "schedule": schedules.volsched(40, window=5), "prev_grad": "swap"},
        True,
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
@pytest.mark.parametrize("arguments", RUNS.values(), ids=RUNS)
def test_a_killed_run_goes_on_bit_for_bit(arguments, tmp_path):
    """At random calls of Python or C: in the forward pass, in the step, while a checkpoint is written."""
    processes = multiprocessing.get_context("forkserver")  # torch is imported once; no threads are inherited
    processes.set_forkserver_preload(["torch._dynamo", "hypothesis", "pytest", "lrkernels"])
    dice, whole, killed = random.Random(5), str(tmp_path / "whole.pt"), str(tmp_path / "killed.pt")

    def process(path, kill_after):
        child = processes.Process(target=work, args=(path, kill_after, *arguments))
        child.start()
        child.join(120)
        return child.exitcode

    assert process(whole, 0) == 0
    codes, half_written = [], 0
    while len(codes) < 15 and 0 not in codes:
        codes.append(process(killed, dice.randint(1, 12_000)))
        half_written += os.path.exists(f"{killed}.new")
    assert codes.count(-signal.SIGKILL) >= 5, codes
    assert half_written, "no process was killed while it wrote"
    assert set(codes) <= {0, -signal.SIGKILL}
    assert 0 in codes or process(killed, 0) == 0
    want, got = torch.load(whole, weights_only=True), torch.load(killed, weights_only=True)
    assert got["step"] == Training.STEPS
    for checkpoint in (want, got):  # how many rows the history has had in this process is nobody's business
        checkpoint["optimizer"]["param_groups"][0][CONTROL_KEY][Control.ROWS] = 0
    assert got["scheduler"] == want["scheduler"]
    assert got["scaler"] == want["scaler"]
    assert bits(got) == bits(want)


# ---- Checkpoints that are not whole ----


def used(kind, seed=0, steps=4):
    """An optimizer with all kinds of state, and its parameters."""
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(3,), (4, 2), (5,)]]
    more = {"momentum": 0.9} if kind is FusedSGD else {"amsgrad": True}
    groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "weight_decay": 0.1}]
    optimizer = kind(groups, schedule=schedules.volsched(40, window=4), track="alignment", max_grad_norm=1.0, **more)
    for step in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.observe(float(step))
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_a_file_that_was_cut_is_torch_s_error_and_changes_nothing(kind, tmp_path):
    optimizer, params = used(kind)
    whole = io.BytesIO()
    torch.save(optimizer.state_dict(), whole)
    before, dice = everything(optimizer, params), random.Random(2)
    for length in [0, 1, len(whole.getvalue()) - 1, *(dice.randrange(len(whole.getvalue())) for _ in range(20))]:
        path = tmp_path / "cut.pt"
        path.write_bytes(whole.getvalue()[:length])
        with pytest.raises((RuntimeError, EOFError, pickle.UnpicklingError, OSError)):
            optimizer.load_state_dict(torch.load(path, weights_only=True))
        assert everything(optimizer, params) == before


GARBLED_CONTROL = {
    "steps_nan": (Control.STEP, math.nan),
    "steps_negative": (Control.STEP, -1.0),
    "steps_half": (Control.STEP, 2.5),
    "steps_infinite": (Control.STEP, math.inf),
    "skipped_nan": (Control.SKIPPED, math.nan),
    "signals_negative": (Control.SIGNALS, -3.0),
    "factor_nan": (Control.FACTOR, math.nan),
    "factor_negative": (Control.NEXT_FACTOR, -1.0),
    "factor_infinite": (Control.NEXT_FACTOR, math.inf),
}


@pytest.mark.parametrize(("slot", "value"), GARBLED_CONTROL.values(), ids=GARBLED_CONTROL)
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_a_garbled_schedule_state_is_refused(kind, slot, value):
    optimizer, params = used(kind)
    saved = copy.deepcopy(used(kind, seed=3)[0].state_dict())
    saved["param_groups"][0][CONTROL_KEY][slot] = value
    before = everything(optimizer, params)
    with pytest.raises(ValueError, match=rf"^lrkernels: the checkpoint's schedule state is garbled: {slot.name} is "):
        optimizer.load_state_dict(saved)
    assert everything(optimizer, params) == before


JUNK = [None, True, -1, 3, math.nan, -math.inf, "text", b"bytes", [], {}, (), [1.0], {"a": 1}, object()]
JUNK += [
    torch.zeros(3),
    torch.zeros(4, 2),
    torch.zeros(()),
    torch.full((5,), math.nan),
    torch.zeros(3, dtype=torch.int8),
]
JUNK += [torch.zeros(3, dtype=torch.complex64), torch.zeros(3).to_sparse(), torch.zeros(3, device="meta")]


def places(tree, path=()):
    """Every place in nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@pytest.mark.filterwarnings("ignore:Casting complex values", "ignore:lrkernels. volsched has no signal")
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_a_garbled_checkpoint_loads_whole_or_changes_nothing(kind):
    """In a random place a random thing, or nothing: it is refused with a reason, or training goes on with it."""
    optimizer, params = used(kind)
    valid = used(kind, seed=3)[0].state_dict()
    rest, dice, refused = copy.deepcopy(optimizer.state_dict()), random.Random(4), 0
    for path in [place for place in places(valid) for _ in range(6)]:
        spoilt = copy.deepcopy(valid)
        *upper, last = path
        inner = spoilt
        for key in upper:
            inner = inner[key]
        if dice.random() < 0.2:
            del inner[last]
        else:
            inner[last] = copy.deepcopy(dice.choice(JUNK))
        before = everything(optimizer, params)
        groups = [{k: v for k, v in group.items() if k != CONTROL_KEY} for group in optimizer.param_groups]
        try:
            optimizer.load_state_dict(spoilt)
        except ValueError as error:
            assert str(error).startswith("lrkernels: "), (path, inner, error)
            assert everything(optimizer, params) == before, (path, inner)
            now = [{k: v for k, v in group.items() if k != CONTROL_KEY} for group in optimizer.param_groups]
            assert now == groups, (path, inner)
            refused += 1
        else:
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.load_state_dict(rest)
    assert refused > 100


# ---- Memory ----


def in_a_closure(optimizer, params):
    def closure():
        optimizer.zero_grad()
        loss = sum((p * p).sum() for p in params)
        loss.backward()
        return loss

    optimizer.step(closure)


def by_hand(optimizer, params):
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.observe(0.5)
    optimizer.step()
    optimizer.zero_grad()


def with_checkpoints(optimizer, params):
    by_hand(optimizer, params)
    optimizer.load_state_dict(optimizer.state_dict())


def with_overflows(optimizer, params):
    optimizer.found_inf, optimizer.grad_scale = torch.ones(1), torch.full((1,), 8.0)
    by_hand(optimizer, params)
    del optimizer.found_inf, optimizer.grad_scale
    by_hand(optimizer, params)
    float(optimizer.stats["lr"])


def with_other_parameters(optimizer, params):
    """A layer that is exchanged again and again, as in a search."""
    group = optimizer.param_groups[0]
    optimizer.state.pop(group["params"][-1], None)
    group["params"][-1] = torch.nn.Parameter(torch.ones(500))
    by_hand(optimizer, group["params"])


LONG = {
    "open-sgd": (FusedSGD, {"momentum": 0.9, "schedule": schedules.linear(100), "max_grad_norm": 1.0}, by_hand),
    "volsched-adamw": (FusedAdamW, {"schedule": schedules.volsched(100, window=5)}, by_hand),
    "swap-sgd": (FusedSGD, {"track": "alignment", "prev_grad": "swap"}, by_hand),
    "gala-sgd": (FusedSGD, {"schedule": schedules.gala(delta=0.1)}, in_a_closure),
    "alignment-adamw": (FusedAdamW, {"schedule": schedules.alignment(), "track": "alignment"}, with_checkpoints),
    "overflows-sgd": (FusedSGD, {"track": "alignment", "prev_grad": "swap"}, with_overflows),
    "exchanged-adamw": (FusedAdamW, {"track": "alignment"}, with_other_parameters),
}


@pytest.mark.filterwarnings("ignore:lrkernels. volsched has no signal")
@pytest.mark.parametrize(("kind", "more", "step"), LONG.values(), ids=LONG)
def test_memory_does_not_grow(kind, more, step):
    """Python's own, its objects, and the tensors alive, after 200 steps and after 600."""
    params = [torch.nn.Parameter(torch.ones(50)) for _ in range(3)]
    optimizer = kind(params, lr=1e-4, history_size=16, **more)
    tracemalloc.start()
    try:
        seen = []
        for steps in (200, 400):
            for _ in range(steps):
                step(optimizer, params)
            gc.collect()
            objects = gc.get_objects()
            elements = sum(x.numel() for x in objects if type(x) in (torch.Tensor, torch.nn.Parameter))
            seen.append((len(objects), elements, tracemalloc.get_traced_memory()[0]))
            del objects
    finally:
        tracemalloc.stop()
    (objects, elements, traced), (more_objects, more_elements, more_traced) = seen
    assert more_elements == elements
    assert more_objects - objects < 100  # of 400 steps
    assert more_traced - traced < 40_000  # 100 bytes a step; what torch's own objects come and go by is half of that
