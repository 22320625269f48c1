"""Two hundred steps of a small model on real data: every method, fused, against its reference."""

import copy

import pytest
import torch
from conftest import assert_same_bits
from torch import nn
from torch.nn import functional as F

from lrkernels import FusedAdamW, FusedSGD, schedules
from lrkernels.reference import ReferenceAdamW, ReferenceSGD

STEPS = 200

OPTIMIZERS = {
    "sgd": (FusedSGD, ReferenceSGD, {"lr": 0.05, "momentum": 0.9}),
    "sgd-plain": (FusedSGD, ReferenceSGD, {"lr": 0.1}),
    "adamw": (FusedAdamW, ReferenceAdamW, {"lr": 3e-3}),
}
METHODS = {  # what it takes beyond the optimizer's own options
    "refined": {"schedule": schedules.refined([3.0, 2.0, 2.5, 2.0, 1.5, 1.4], total_steps=STEPS), "track": "grad_norm"},
    "uba": {"schedule": schedules.uba(STEPS, phi=5.0, warmup_steps=10)},
    "linear-clip": {"schedule": schedules.linear(STEPS), "max_grad_norm": 0.5},
    "volsched": {"schedule": schedules.volsched(STEPS, window=20, warmup_steps=10, sensitivity=0.2)},
    "alignment": {"schedule": schedules.alignment(kappa=0.05)},
    "alignment-clip": {"schedule": schedules.alignment(kappa=0.05, lag=0), "max_grad_norm": 1.0},
    "alignment-annealed": {
        "schedule": schedules.product(schedules.alignment(freeze_after=100), schedules.linear(STEPS)),
        "max_grad_norm": 1.0,
    },
    "gala": {"schedule": schedules.gala(max_lr=1.0), "max_grad_norm": 1.0},
    "gala-consecutive": {"schedule": schedules.gala(mode="consecutive", max_lr=1.0), "max_grad_norm": 1.0},
}
EXACT = ("refined", "uba")  # nothing is decided from sums, whose order is each implementation's own


@pytest.fixture(scope="module")
def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).flatten(1) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(data.target)[order]


def model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)).to(dtype)


def groups(net):
    """Two groups of different rates, the second without weight decay."""
    weights, others = [p for p in net.parameters() if p.ndim > 1], [p for p in net.parameters() if p.ndim <= 1]
    return weights, others


def optimizer_of(kind, net, options, method, **more):
    weights, others = groups(net)
    rows = [{"params": weights, "weight_decay": 0.01}, {"params": others, "lr": 2 * options["lr"], "weight_decay": 0.0}]
    return kind(rows, **options, **copy.deepcopy(method), **more)


def backward(net, optimizer, batch):
    """Clear the gradients, make new ones; return the loss and the batch's accuracy."""
    images, labels = batch
    optimizer.zero_grad()
    logits = net(images.to(net[0].weight.dtype)).float()
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return loss, (logits.argmax(1) == labels).float().mean()


def train(nets, optimizers, data, *, closure, shared):
    """Train side by side. ``shared``: all get the first one's gradients, so that rounding cannot grow with training."""
    images, labels = data
    losses = []
    for step in range(STEPS):
        rows = torch.arange(step * 32, step * 32 + 32) % len(images)
        batch = images[rows], labels[rows]
        for i, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
            if closure:
                loss = optimizer.step(lambda net=net, it=optimizer, batch=batch: backward(net, it, batch)[0])
            elif i == 0 or not shared:
                loss, accuracy = backward(net, optimizer, batch)
            else:
                for p, q in zip(net.parameters(), nets[0].parameters(), strict=True):
                    p.grad = q.grad.clone()
            if i == 0:
                losses.append(float(loss))
            if not closure:
                optimizer.observe(accuracy)
        for optimizer in () if closure else optimizers:
            optimizer.step()
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_hundred_steps_are_the_reference_s(name, method, dtype, digits):
    fused, reference, options = OPTIMIZERS[name]
    closure = method == "gala"
    nets = [model(dtype) for _ in range(2)]
    pairs = zip((reference, fused), nets, strict=True)
    theirs, ours = optimizers = [optimizer_of(kind, net, options, METHODS[method]) for kind, net in pairs]
    losses = train(nets, optimizers, digits, closure=closure, shared=method not in EXACT)
    if "gala" not in method:  # which does not always learn on batches of 32: the rate is what it is
        assert sum(losses[-20:]) < 0.8 * sum(losses[:20]), "it does not learn: nothing is tested"
    here, there = (dict(optimizer.history()) for optimizer in (ours, theirs))
    assert len(there["lr"]) == STEPS and set(there) <= set(here)
    if method in EXACT:
        assert_same_bits(list(nets[1].parameters()), list(nets[0].parameters()))
    else:
        loose = 2e-2 if dtype == torch.bfloat16 else 1e-4
        for p, q in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
            assert float((p - q).float().norm()) <= loose * float(q.float().norm())
    rel = 1e-6 if method in EXACT else 1e-3 if closure or dtype == torch.bfloat16 else 1e-5
    for key in ("lr", "grad_norm", "clip"):
        if key in there:
            assert here[key] == pytest.approx(there[key], rel=rel), key
