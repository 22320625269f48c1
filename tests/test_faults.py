"""What goes wrong in long runs: processes that are killed, files that are cut, and ten thousand steps of everything."""

import copy
import io
import math
import random

import pytest
import torch
from conftest import BACKENDS, assert_same_bits

from lrkernels import FusedAdamW, FusedSGD, reference, schedules

REFERENCE = {FusedSGD: reference.ReferenceSGD, FusedAdamW: reference.ReferenceAdamW}

# ---- Ten thousand steps of everything, against the reference ----


class Walk:
    """The fused optimizer and the reference, on the same random events: each pair of them a run of its own."""

    SHAPES = ((), (1,), (3,), (2, 2), (7,), (17,), (33,), (0,))

    def __init__(self, kind, more, seed, backend):
        self.kind, self.more, self.backend = kind, more, backend
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
        for optimizer in self.optimizers:
            optimizer.found_inf, optimizer.grad_scale = torch.ones(1), torch.full((1,), 4.0)
        self.gradients(math.inf)
        self.both("step")
        for optimizer in self.optimizers:
            del optimizer.found_inf, optimizer.grad_scale

    def both(self, name, *args):
        for optimizer in self.optimizers:
            getattr(optimizer, name)(*args)

    def gradients(self, poison=None):
        """Odd multiples of 1/16: their squares add up without rounding, in any order, and none is 0, whose sign torch
        takes differently in vectors and in what is left over of them (``lerp`` with a weight of 1).
        """
        missing = self.dice.random() < 0.2
        for p, twin in zip(*self.params, strict=True):
            silent = p in self.silent or (missing and self.dice.random() < 0.5)
            grad = (2 * torch.randint(-16, 16, p.shape, generator=self.generator) + 1) / 16
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

    def check(self):
        fused, slow = self.optimizers
        assert_same_bits(self.params[0], self.params[1])
        for p, twin in zip(*self.params, strict=True):
            for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", "prev_grad"):
                if twin in slow.state and slow.state[twin].get(key) is not None:
                    assert_same_bits(fused.state[p][key], slow.state[twin][key])
        assert fused.stats["step"] == slow.stats["step"]
        assert fused.stats["skipped"] == slow.stats["skipped"]
        got, want = fused.history(), slow.history()  # stats are of the last attempt, which may have been skipped
        for name in ("lr", "grad_norm") if len(got["lr"]) else ():  # loading clears the one and not the other
            assert got.get(name, want[name])[-1] == pytest.approx(want[name][-1], rel=1e-9)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WALKS = {
    "sgd-open": (FusedSGD, {"schedule": schedules.linear(9000, warmup_steps=100), "max_grad_norm": 2.0}),
    "sgd-alignment": (FusedSGD, {"schedule": schedules.alignment(kappa=0.05, min_lr=1e-4, max_lr=0.1)}),
    "sgd-volsched": (FusedSGD, {"schedule": schedules.volsched(9000, window=6), "track": "alignment"}),
    "adamw-open": (FusedAdamW, {"schedule": schedules.cosine(9000), "max_grad_norm": 2.0, "track": "alignment"}),
    "adamw-alignment": (FusedAdamW, {"schedule": schedules.alignment(kappa=0.05, min_lr=1e-4, max_lr=0.1)}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:lrkernels. volsched has no signal")
@pytest.mark.parametrize(("kind", "more"), WALKS.values(), ids=WALKS)
def test_ten_thousand_steps_of_everything(kind, more):
    """2000 in each row: random groups, missing and late gradients, overflows, groups added, settings changed, saved
    and loaded; float32 parameters, states and kept gradients of the same bits.
    """
    walk = Walk(kind, more, 1, BACKENDS[0])
    for n in range(2000):
        walk.event()
        if n % 10 == 9:
            walk.check()
    assert all(count > 3 for count in walk.events.values()), walk.events
