"""Running a case in several processes, and comparing it with one.

A case is a function that every process of a world runs. All cases of a world run in one set of processes, each in a
process group of its own; a test reads what its case raised.
"""

import contextlib
import datetime
import math
import traceback

import pytest
import torch
import torch.distributed as dist
from conftest import assert_close, bits
from torch import nn

from lrkernels import FusedAdamW, FusedSGD, schedules

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

STEPS = 4
KINDS = {
    "sgd": (FusedSGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (FusedAdamW, {"lr": 0.01}),
}
MODES = {
    "plain": {},
    "linear": {"schedule": schedules.linear(20)},
    "clip": {"max_grad_norm": 0.05, "track": "grad_norm_l1"},
    "alignment-lag0": {"schedule": schedules.alignment(kappa=0.3, lag=0)},
    "alignment-lag1": {"schedule": schedules.alignment(kappa=0.3, bias=0.05)},
    "gala": {"schedule": schedules.gala(delta=0.1, max_lr=1.0, mode="consecutive"), "max_grad_norm": 0.5},
    "track": {"track": ("alignment", "direction")},
    "track-swap": {"track": ("alignment", "direction"), "prev_grad": "swap"},
}
LOW_PRECISION = {
    "master_weights": {"master_weights": True, "max_grad_norm": 0.5, "state_dtype": torch.float32},
    "skip_nonfinite": {"skip_nonfinite": True, "track": "alignment", "prev_grad": "swap"},
    "stochastic_rounding": {"stochastic_rounding": True, "schedule": schedules.alignment(kappa=0.3)},
}
MODES |= LOW_PRECISION
EVERY = [("sgd", mode) for mode in MODES if mode not in LOW_PRECISION] + [
    ("adamw", mode) for mode in ("clip", "alignment-lag1", "gala", "track")
]
SOME = [("sgd", "clip"), ("sgd", "track-swap"), ("adamw", "alignment-lag0"), ("adamw", "gala")]
CASES = {2: {}, 4: {}}  # of all test files


def case(*worlds):
    """Make a function a case of worlds of so many processes."""

    def add(function):
        for world in worlds:
            assert function.__name__ not in CASES[world], "two test files have a case of this name"
            CASES[world][function.__name__] = function
        return function

    return add


def rows(module):
    """The cases of one test file."""
    return [
        pytest.param(world, name, id=f"{world}-{name}")
        for world, cases in CASES.items()
        for name, function in cases.items()
        if function.__module__ == module
    ]


# ---- The processes ----


def work(rank, world, cases, folder):
    torch.set_num_threads(1)
    from torch.distributed import tensor  # noqa: F401

    failures = {}
    for name, function in cases.items():
        torch.manual_seed(0)
        method = f"file://{folder}/{world}-{name}"
        timeout = datetime.timedelta(seconds=180)  # a machine may be busy while the processes start
        try:
            dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world, timeout=timeout)
            function(folder)
        except BaseException:
            failures[name] = f"rank {rank}: {traceback.format_exc()}"
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    torch.save(failures, f"{folder}/{world}-failures-{rank}")


def failures_of(world, items, folder):
    """Run a world's cases, of those that pytest has selected; return each one's tracebacks."""
    chosen = [getattr(item, "callspec", None) for item in items]
    names = [c.params["name"] for c in chosen if c and c.params.get("world") == world]
    cases = {name: CASES[world][name] for name in names}
    torch.multiprocessing.spawn(work, (world, cases, str(folder)), nprocs=world)
    ranks = [torch.load(folder / f"{world}-failures-{rank}") for rank in range(world)]
    return {name: "".join(r.get(name, "") for r in ranks) for name in names}


# ---- The pieces ----


class Net(nn.Module):
    """Sizes that no number of processes divides, and a parameter smaller than four processes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 10, dtype=torch.float64)
        self.norm = nn.LayerNorm(10, dtype=torch.float64)
        self.second = nn.Linear(10, 3, dtype=torch.float64)
        self.scale = nn.Parameter(torch.full((1,), 1.5, dtype=torch.float64))

    def forward(self, x):
        return self.second(self.norm(self.first(x).tanh())) * self.scale


def batches(steps=STEPS):
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        yield (torch.randn(8, 6, generator=generator).double(), torch.randn(8, 3, generator=generator).double())


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def mine(batch, group=None):
    """This process's part of the batch."""
    return [part.chunk(dist.get_world_size(group))[dist.get_rank(group)] for part in batch]


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def new_net():
    torch.manual_seed(1)
    return Net()


def assert_same_everywhere(tensor):
    """The same bits in all the processes."""
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    for other in gathered:
        assert bits(other) == bits(tensor), f"{other.tolist()} is not {tensor.tolist()}"


def assert_same_decisions(optimizer, alone):
    """All processes have decided the same, bit for bit, and what one process alone decides."""
    assert_same_everywhere(optimizer._controller.control)
    got, want = optimizer.history(), alone.history()
    assert got.keys() == want.keys()
    for name, values in want.items():
        assert len(values), "no steps"
        torch.testing.assert_close(
            torch.tensor(got[name]), torch.tensor(values), rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def compare(build, batch_of=mine, optimizers=EVERY, whole=contextlib.nullcontext, **more):
    """Train with each optimizer, and one process alone beside it.

    Args:
        build: makes of a model the one that is spread, and the optimizer's parameters.
        batch_of: the part of the batch that this process trains on.
        optimizers: rows of ``KINDS`` and ``MODES``.
        whole: makes of a model a context in which its parameters are not spread.
        more: arguments of the spread optimizer.
    """
    for name, mode in optimizers:
        kind, options = KINDS[name]
        model, params = build(new_net())
        optimizer = kind(params, **options, **MODES[mode], **more)
        net = new_net()
        alone = kind(net.parameters(), **options, **MODES[mode])
        for batch in batches():
            loss_of(model, *batch_of(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            loss_of(net, *batch).backward()
            alone.step()
            alone.zero_grad()
        assert_same_decisions(optimizer, alone)
        with whole(model):
            assert_close([full(p) for p in model.parameters()], list(net.parameters()), rtol=1e-9, atol=1e-12)


# ---- Models and tensors that are spread ----


def mesh_of(*shape, names=None):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def fully_sharded(net, **more):
    from torch.distributed.fsdp import fully_shard

    fully_shard(net.first, **more)
    return fully_shard(net, **more)


def fsdp1(net, **more):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(net, **{"use_orig_params": True, "device_id": torch.device("cpu")} | more)


def spread(x, mesh, placements):
    """A DTensor from what every process has; where it is partial, its parts are equal, and their sum has x's bits."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    partial = [placement.is_partial() for placement in placements]
    whole = [Replicate() if p else placement for p, placement in zip(partial, placements, strict=True)]
    part = distribute_tensor(x.clone(), mesh, whole, src_data_rank=None).to_local()
    part = part / math.prod(size for p, size in zip(partial, mesh.shape, strict=True) if p)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())
