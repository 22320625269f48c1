"""Several processes on gloo against one: DDP, FSDP2, tensor parallel, ZeRO, hand-made sharding, and their checkpoints.

A case is a function that every process of a world runs. All cases of a world run in one set of processes, each in a
process group of its own; a test reads what its case raised.
"""

import contextlib
import copy
import datetime
import functools
import math
import time
import traceback

import pytest
import torch
import torch.distributed as dist
from conftest import assert_close, assert_same_bits, bits, gradients, parameters, random_tensors
from torch import nn

from lrkernels import FusedAdamW, FusedSGD, ops, schedules

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

STEPS = 5
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
OPTIMIZERS = {(kind, mode): (KINDS[kind], MODES[mode]) for kind in KINDS for mode in MODES}
CASES = {2: {}, 4: {}}


def case(*worlds):
    def add(function):
        for world in worlds:
            CASES[world][function.__name__] = function
        return function

    return add


# ---- The processes ----


def work(rank, world, names, folder):
    torch.set_num_threads(1)
    from torch.distributed import tensor  # noqa: F401

    failures = {}
    for name in names:
        torch.manual_seed(0)
        method = f"file://{folder}/{world}-{name}"
        timeout = datetime.timedelta(seconds=60)
        try:
            dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world, timeout=timeout)
            CASES[world][name](folder)
        except BaseException:
            failures[name] = f"rank {rank}: {traceback.format_exc()}"
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    torch.save(failures, f"{folder}/{world}-failures-{rank}")


@pytest.fixture(scope="session")
def failures(request, tmp_path_factory):
    """Run a world's cases, of those that pytest has selected, once; return each one's tracebacks."""
    done = {}

    def run(world):
        if world not in done:
            folder = tmp_path_factory.mktemp(f"world{world}")
            chosen = [getattr(item, "callspec", None) for item in request.session.items]
            chosen = [c.params for c in chosen if c and c.params.get("world") == world]
            names = [params["name"] for params in chosen]
            torch.multiprocessing.spawn(work, (world, names, str(folder)), nprocs=world)
            ranks = [torch.load(folder / f"{world}-failures-{rank}") for rank in range(world)]
            done[world] = {name: "".join(r.get(name, "") for r in ranks) for name in names}
        return done[world]

    return run


def rows():
    return [pytest.param(world, name, id=f"{world}-{name}") for world, cases in CASES.items() for name in cases]


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


def assert_same_decisions(optimizer, rtol=1e-9, alone=None):
    """All processes have decided the same, bit for bit, and what one process alone decides."""
    assert_same_everywhere(optimizer._controller.control)
    if alone is not None:
        got, want = optimizer.history(), alone.history()
        assert got.keys() == want.keys()
        for name, values in want.items():
            torch.testing.assert_close(
                torch.tensor(got[name]), torch.tensor(values), rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


def compare(build, batch_of=mine, **more):
    """Train with each optimizer, and one process alone beside it.

    Args:
        build: makes of a model the one that is spread, and the optimizer's parameters.
        batch_of: the part of the batch that this process trains on.
        more: arguments of the spread optimizer.
    """
    for (kind, options), mode in OPTIMIZERS.values():
        model, params = build(new_net())
        optimizer = kind(params, **options, **mode, **more)
        net = new_net()
        alone = kind(net.parameters(), **options, **mode)
        for batch in batches():
            loss_of(model, *batch_of(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            loss_of(net, *batch).backward()
            alone.step()
            alone.zero_grad()
        assert_same_decisions(optimizer, alone=alone)
        got = [full(p) for p in model.parameters()]
        assert_close(got, list(net.parameters()), rtol=1e-9, atol=1e-12)


def the_same(batch):
    return batch


# ---- Ways to spread a model ----


@case(2)
def ddp(folder):
    def build(net):
        model = nn.parallel.DistributedDataParallel(net)
        return model, model.parameters()

    compare(build)


@case(2, 4)
def fsdp2(folder):
    from torch.distributed.fsdp import fully_shard

    def build(net):
        fully_shard(net.first)
        return fully_shard(net), net.parameters()

    compare(build)


@case(4)
def hsdp(folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    compare(lambda net: (fully_shard(net, mesh=mesh), net.parameters()))


def tensor_parallel(net, mesh):
    """Split the matrices; the norm's gradients come out partial, and ``scale`` stays a plain tensor."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan = {
        "first": ColwiseParallel(output_layouts=Shard(0)),
        "norm": SequenceParallel(sequence_dim=0, use_local_output=False),
        "second": RowwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
    }
    return parallelize_module(net, mesh, plan)


@case(2)
def tensor_parallel_beside_plain_tensors(folder):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    compare(lambda net: (tensor_parallel(net, mesh), net.parameters()), the_same)


@case(4)
def fsdp2_over_tensor_parallel(folder):
    """``scale`` is on the mesh of one dimension only, the others on that of two."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def build(net):
        tensor_parallel(net, mesh["tensor"])
        return fully_shard(net, mesh=mesh["data"]), net.parameters()

    compare(build, functools.partial(mine, group=mesh["data"].get_group()))


# ---- The test ----


@pytest.mark.parametrize(("world", "name"), rows())
def test_several_processes(world, name, failures):
    found = failures(world)[name]
    assert not found, found
