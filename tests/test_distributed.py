"""Several processes on gloo against one: DDP, FSDP, tensor parallel, sharding by hand, refusals, faults, examples.

Cases, and what runs them: processes.py. ZeRO and checkpoints: test_distributed_checkpoints.py.
"""

import contextlib
import datetime
import functools
import itertools
import math
import os
import pickle
import subprocess
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import assert_close, assert_same_bits, bits, gradients, parameters, train
from processes import (
    EVERY,
    KINDS,
    MODES,
    SOME,
    STEPS,
    assert_same_decisions,
    assert_same_everywhere,
    batches,
    case,
    compare,
    fsdp1,
    full,
    fully_sharded,
    loss_of,
    mesh_of,
    mine,
    needs_gloo,
    new_net,
    rows,
    spread,
)
from torch import nn
from torch.amp import GradScaler

from lrkernels import FusedAdamW, FusedSGD, schedules
from lrkernels.checkpoints import CONTROL_KEY
from lrkernels.distributed import where_added_up
from lrkernels.layout import Control, Verb

pytestmark = needs_gloo


def the_same(batch):
    return batch


# ---- Models in training ----


@case(2)
def ddp(folder):
    def build(net):
        model = nn.parallel.DistributedDataParallel(net)
        return model, model.parameters()

    compare(build)


@case(2)
def fsdp2(folder):
    compare(lambda net: (fully_sharded(net), net.parameters()))


@case(4)
def fsdp2_with_empty_parts(folder):
    compare(lambda net: (fully_sharded(net), net.parameters()), optimizers=SOME)


@case(4)
def hsdp(folder):
    mesh = mesh_of(2, 2, names=("replicate", "shard"))
    compare(lambda net: (fully_sharded(net, mesh=mesh), net.parameters()), optimizers=SOME)


@case(2)
def fsdp1_with_process_group(folder):
    """Its parts are flat and are no DTensors; a process may have nothing of a parameter."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    whole, world = FullyShardedDataParallel.summon_full_params, dist.group.WORLD

    def build(net, **more):
        model = fsdp1(net, **more)
        return model, model.parameters()

    compare(build, whole=whole, process_group=world)
    for more in (
        {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP},
        {"sharding_strategy": ShardingStrategy.NO_SHARD},
    ):
        group = world if more["sharding_strategy"] is ShardingStrategy.SHARD_GRAD_OP else None
        compare(functools.partial(build, **more), optimizers=SOME, whole=whole, process_group=group)


@case(4)
def fsdp1_sharded_in_halves(folder):
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    mesh = mesh_of(2, 2, names=("replicate", "shard"))
    strategy = ShardingStrategy.HYBRID_SHARD

    def build(net):
        model = fsdp1(net, device_mesh=mesh, sharding_strategy=strategy)
        return model, model.parameters()

    group = mesh["shard"].get_group()
    compare(build, optimizers=SOME, whole=FullyShardedDataParallel.summon_full_params, process_group=group)


@case(2)
def fsdp1_says_so_where_it_is_measured_in_parts(folder):
    rows = [({}, 0), ({"max_grad_norm": 1.0}, 1), ({"max_grad_norm": 1.0, "process_group": dist.group.WORLD}, 0)]
    for flat, (more, warned) in itertools.product((False, True), rows):
        model = fsdp1(new_net(), use_orig_params=not flat)
        optimizer = FusedSGD(model.parameters(), lr=0.1, **more)
        loss_of(model, *mine(next(batches()))).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert len([w for w in caught if "lrkernels: FullyShardedDataParallel" in str(w.message)]) == warned


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
    mesh = mesh_of(2)
    compare(lambda net: (tensor_parallel(net, mesh), net.parameters()), the_same)


@case(4)
def fsdp2_over_tensor_parallel(folder):
    """``scale`` is on the mesh's first dimension only, the others on both."""
    mesh = mesh_of(2, 2, names=("data", "tensor"))

    def build(net):
        tensor_parallel(net, mesh["tensor"])
        return fully_sharded(net, mesh=mesh["data"]), net.parameters()

    compare(build, functools.partial(mine, group=mesh["data"].get_group()), SOME)


@case(2)
def gala_on_the_same_batch(folder):
    """Also with a checkpoint on the way, which has the point before."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def step(model, optimizer, batch):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, *batch)
            loss.backward()
            return loss

        optimizer.step(closure)

    for name in KINDS:
        kind, options = KINDS[name]
        model, net = fully_sharded(new_net()), new_net()
        schedule = schedules.gala(delta=0.1, max_lr=1.0, mode="same_batch")
        optimizer, alone = (kind(m.parameters(), **options, schedule=schedule) for m in (model, net))
        for i, batch in enumerate(batches()):
            if i == 2:
                dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=f"{folder}/same-batch-{name}")
                optimizer.zero_grad()  # torch makes states only where there are no gradients
                optimizer = kind(model.parameters(), **options | {"lr": 99.0}, schedule=schedule)
                state = get_optimizer_state_dict(model, optimizer)
                dcp.load(state, checkpoint_id=f"{folder}/same-batch-{name}")
                set_optimizer_state_dict(model, optimizer, state)
                alone.load_state_dict(alone.state_dict())  # its history begins anew too
            step(model, optimizer, mine(batch))
            step(net, alone, batch)
        assert_same_decisions(optimizer, alone)
        assert_close([full(p) for p in model.parameters()], list(net.parameters()), rtol=1e-9, atol=1e-12)


@case(2)
def accumulation(folder):
    """Two batches a step, the first without communication: ``no_sync``, and FSDP2's way to say it."""

    def in_ddp(net):
        model = nn.parallel.DistributedDataParallel(net)
        return model, model.no_sync

    def in_fsdp2(net):
        model = fully_sharded(net)

        @contextlib.contextmanager
        def no_sync():
            model.set_requires_gradient_sync(False)
            yield
            model.set_requires_gradient_sync(True)

        return model, no_sync

    for build in (in_ddp, in_fsdp2):
        for name, mode in SOME:
            kind, options = KINDS[name]
            net = new_net()
            model, no_sync = build(new_net())
            optimizer, alone = (kind(m.parameters(), **options, **MODES[mode]) for m in (model, net))
            pairs = list(batches(8))
            for first, second in zip(pairs[::2], pairs[1::2], strict=True):
                with no_sync():
                    loss_of(model, *mine(first)).backward()
                loss_of(model, *mine(second)).backward()
                optimizer.step()
                optimizer.zero_grad()
                (loss_of(net, *first) + loss_of(net, *second)).backward()
                alone.step()
                alone.zero_grad()
            assert_same_decisions(optimizer, alone)
            assert_close([full(p) for p in model.parameters()], list(net.parameters()), rtol=1e-9, atol=1e-12)


@case(2)
def ddp_s_own_buckets_are_no_place_to_keep_a_gradient(folder):
    """The next backward pass writes into them: an error by name with "swap", right with "store"."""
    kind, options = KINDS["sgd"]
    nets = [new_net() for _ in range(2)]
    models = [nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True) for net in nets]
    store, swap = (
        kind(m.parameters(), **options, track="alignment", prev_grad=how)
        for m, how in zip(models, ("store", "swap"), strict=True)
    )
    alone_net = new_net()
    alone = kind(alone_net.parameters(), **options, track="alignment")
    refused = 0
    for batch in batches(6):  # torch makes the buckets anew for the second
        for model, optimizer, part in ((*z, mine(batch)) for z in zip(models, (store, swap), strict=True)):
            loss_of(model, *part).backward()
            before = [p.detach().clone() for p in model.parameters()]
            try:
                optimizer.step()
            except RuntimeError as error:
                assert "prev_grad='swap'" in str(error) and "gradient_as_bucket_view" in str(error)
                assert optimizer is swap
                assert_same_bits(list(model.parameters()), before)
                refused += 1
            optimizer.zero_grad()
        loss_of(alone_net, *batch).backward()
        alone.step()
        alone.zero_grad()
    assert refused == 2  # the third and the fifth: a step after an error goes on without the lost one
    assert_same_decisions(store, alone)
    assert_close(list(nets[0].parameters()), list(alone_net.parameters()), rtol=1e-9, atol=1e-12)


# ---- Gradients by hand: the same bits ----

SHAPES = [(7, 3), (5,), (1,), (9, 2), (4, 4)]


def by_hand(layouts, optimizers=EVERY, process_group=None, present=lambda step, i: True, found_inf=None, half=False):
    """Train on gradients given by hand; each process has its part of them.

    Args:
        layouts: for each of ``SHAPES`` a mesh, its placements and those of its gradient; or None for a plain tensor;
            or False where this process does not have it.
        optimizers: rows of ``KINDS`` and ``MODES``.
        process_group: the optimizer's own.
        present: whether a parameter has a gradient at a step.
        found_inf: for each step, a gradient scaler's verdict in this process and what all should find.
        half: bfloat16 parameters, and an infinity in the gradient's first element at the second step.
    """

    def placed(x, layout, which):
        return x.clone() if layout is None else spread(x, layout[0], layout[which])

    for name, mode in optimizers:
        kind, options = KINDS[name]
        dtype = torch.bfloat16 if half else torch.float32
        values, rows = parameters(SHAPES, dtype), gradients(SHAPES, STEPS, dtype)
        if half and mode == "skip_nonfinite":
            rows[1][0].view(-1)[0] = math.inf
        mine = [i for i, layout in enumerate(layouts) if layout is not False]
        params = {i: nn.Parameter(placed(values[i].detach(), layouts[i], 1)) for i in mine}
        groups = [{"params": [params[i] for i in mine if i % 2 == k], "lr": options["lr"] / (k + 1)} for k in (0, 1)]
        optimizer = kind(groups, **options, **MODES[mode], process_group=process_group)
        alone = kind(
            [{"params": values[k::2], "lr": options["lr"] / (k + 1)} for k in (0, 1)], **options, **MODES[mode]
        )
        for step, row in enumerate(rows):
            for i, grad in enumerate(row):
                values[i].grad = grad if present(step, i) else None
                if i in params:
                    params[i].grad = placed(grad, layouts[i], 2) if present(step, i) else None
            if found_inf is not None:
                optimizer.found_inf, alone.found_inf = (torch.tensor(float(x)) for x in found_inf[step])
            versions = [p._version for p in params.values()]
            optimizer.step()
            alone.step()
            raised = [p._version > v for p, v in zip(params.values(), versions, strict=True)]
            assert raised == [present(step, i) for i in mine]
        assert_same_decisions(optimizer, alone)
        got = [full(p) for p in params.values()]
        if not half and ("schedule" in MODES[mode] or "max_grad_norm" in MODES[mode]):
            assert_close(got, [values[i] for i in mine], rtol=2e-7, atol=0)  # a rate or clip that is rounded otherwise
        else:
            assert_same_bits(got, [values[i] for i in mine])
        for i, p in params.items():
            entry = {key: x for key, x in optimizer.state[p].items() if x is not None}
            assert all(type(x) is type(p.data) for key, x in entry.items() if key != "step"), "a state of another kind"
            want = [x for x in alone.state[values[i]].values() if x is not None]
            assert_close([full(x) for x in entry.values()], want, rtol=2e-7, atol=1e-12)


@case(2)
def placements(folder):
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh = mesh_of(2)
    whole, rows, columns = [Replicate()], [Shard(0)], [Shard(1)]
    by_hand([(mesh, columns, columns), (mesh, rows, rows), None, (mesh, whole, whole), (mesh, whole, [Partial()])])
    missing = lambda step, i: step % 2 == 0 or i != 1  # noqa: E731
    by_hand([(mesh, rows, rows)] * 5, present=missing)
    by_hand([(mesh, whole, whole)] * 5, SOME)
    verdicts = [(dist.get_rank() == 1 and step == 1, step == 1) for step in range(STEPS)]
    by_hand([(mesh, rows, rows), None, None, (mesh, whole, whole), (mesh, rows, rows)], found_inf=verdicts)


@case(2)
def a_gradient_that_is_still_on_its_way(folder):
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import Partial, Replicate

    mesh, x = mesh_of(2), torch.randn(6, 2)
    p = nn.Parameter(spread(torch.zeros(6, 2), mesh, [Replicate()]))
    p.grad = spread(x, mesh, [Partial()]).redistribute(placements=[Replicate()], async_op=True)
    assert isinstance(p.grad.to_local(), AsyncCollectiveTensor)
    FusedSGD([p], lr=1.0, max_grad_norm=100.0).step()
    assert_same_bits([full(p)], [-x])


@case(2)
def low_precision(folder):
    """Stochastic rounding draws by the element's place in its process: the same bits where parameters are whole."""
    from torch.distributed.tensor import Replicate, Shard

    mesh = mesh_of(2)
    whole, rows = (mesh, [Replicate()], [Replicate()]), (mesh, [Shard(0)], [Shard(0)])
    optimizers = [(kind, mode) for kind in KINDS for mode in ("master_weights", "skip_nonfinite")]
    by_hand([rows, whole, None, rows, rows], optimizers, half=True)
    by_hand([whole, whole, None, whole, None], [(kind, "stochastic_rounding") for kind in KINDS], half=True)


@case(4)
def placements_on_parts_of_a_mesh(folder):
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh = mesh_of(2, 2, names=("a", "b"))
    both, first, second = [Shard(0), Shard(1)], [Shard(0), Replicate()], [Replicate(), Shard(0)]
    by_hand(
        [
            (mesh, both, [Shard(0), Partial()]),
            (mesh["a"], [Shard(0)], [Shard(0)]),
            None,
            (mesh["b"], [Replicate()], [Partial()]),
            (mesh, second, second),
        ]
    )
    by_hand([(mesh, first, first), None, (mesh, [Replicate()] * 2, [Replicate()] * 2), None, None], SOME)


@case(4)
def a_mesh_that_is_not_all_processes(folder):
    """Stages with sharded parameters of their own, on a mesh of two dimensions each where there are eight processes."""
    from torch.distributed.tensor import Replicate, Shard

    mesh = mesh_of(2, 2, 1, names=("stage", "shard", "one"))
    of_stage = mesh["shard", "one"]
    stage = mesh.get_local_rank("stage")
    rows, whole = [Shard(0), Replicate()], [Replicate()] * 2
    layouts = [(of_stage, rows, rows), (of_stage, whole, whole), (of_stage, rows, rows), None, (of_stage, rows, rows)]
    of_this = [layout if stage == int(i >= 2) else False for i, layout in enumerate(layouts)]
    by_hand(of_this, process_group=mesh["stage"].get_group())


@case(2, 4)
def process_group(folder):
    rank, world = dist.get_rank(), dist.get_world_size()
    split = [None if i % (world - 1) == rank else False for i in range(5)]  # the last process has none
    group = dist.group.WORLD
    by_hand(split, process_group=group)
    by_hand(split, SOME, group, present=lambda step, i: i % (world - 1) != 0 or step != 1 or world == 2)
    verdicts = [(rank == 0 and step == 2, step == 2) for step in range(STEPS)]
    by_hand(split, process_group=group, found_inf=verdicts)
    for first in (0.0, 1.0):  # a first step with a rate of 0 is none if all gradients are 0, in all processes
        p = nn.Parameter(torch.ones(3))
        optimizer = FusedSGD([p], lr=0.0, track="grad_norm", process_group=group)
        p.grad = torch.full_like(p, first if rank == 0 else 0.0)
        optimizer.step()
        assert len(optimizer.history()["step"]) == (first != 0)
        assert_same_everywhere(optimizer._controller.control)


# ---- Refusals and faults ----


@contextlib.contextmanager
def refused(kind, message, optimizer):
    """It raises by that message, and changes neither parameters nor states nor what was decided."""

    def everything():
        params = [p for group in optimizer.param_groups for p in group["params"]]
        states = [[full(x) for x in optimizer.state.get(p, {}).values() if x is not None] for p in params]
        return bits([[full(p) for p in params], states, optimizer._controller.control[: Control.FACTOR]])

    before = everything()
    with pytest.raises(kind, match=message):
        yield
    assert everything() == before


@case(2)
def refusals(folder):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard

    mesh, rows = mesh_of(2), [Shard(0)]
    p = nn.Parameter(spread(torch.randn(6, 2), mesh, rows))
    p.grad = spread(torch.randn(6, 2), mesh, rows)

    doubled = FusedSGD([p], process_group=dist.group.WORLD, max_grad_norm=1.0)
    with refused(ValueError, r"^lrkernels: process_group holds the ranks \[0, 1\], over which", doubled):
        doubled.step()

    alone = nn.Parameter(torch.randn(6, 2))
    alone.grad = torch.randn(6, 2)
    of_the_first = dist.new_group([0])
    stranger = FusedSGD([alone], process_group=of_the_first, max_grad_norm=1.0)
    if dist.get_rank() == 1:
        with refused(ValueError, r"^lrkernels: this process is not in process_group", stranger):
            stranger.step()

    trained = FusedSGD([alone], momentum=0.9)
    trained.step()
    spread_out = FusedSGD([p], momentum=0.9)
    spread_out.step()
    with refused(ValueError, "^lrkernels: the checkpoint's momentum_buffer of parameter 0 .* not spread", spread_out):
        spread_out.load_state_dict(trained.state_dict())
    with refused(ValueError, "^lrkernels: the checkpoint's momentum_buffer of parameter 0 .* not spread", trained):
        trained.load_state_dict(spread_out.state_dict())
    q = nn.Parameter(spread(torch.randn(6, 2), mesh, [Replicate()]))
    q.grad = torch.zeros_like(q)
    replicated = FusedSGD([q], momentum=0.9)
    replicated.step()
    with refused(ValueError, "^lrkernels: the checkpoint's momentum_buffer of parameter 0 .* not spread", replicated):
        replicated.load_state_dict(spread_out.state_dict())

    for change in (lambda grad: grad.add_(1), lambda grad: grad.to_local().add_(1)):
        swapping = FusedSGD([p], track="alignment", prev_grad="swap")
        swapping.step()
        with torch.no_grad():
            change(p.grad)
        with refused(RuntimeError, "^lrkernels: prev_grad='swap' keeps each gradient until the next step", swapping):
            swapping.step()

    wrong = nn.Parameter(spread(torch.randn(6, 2), mesh, [Replicate()]))  # measured in the first process only
    wrong.grad = spread(torch.randn(6, 2), mesh, [Replicate()])
    clipping = FusedSGD([p, wrong], max_grad_norm=1.0)
    clipping.step()
    wrong.grad = None
    wrong.grad_dtype = torch.float64
    wrong.grad = spread(torch.randn(6, 2), mesh, [Replicate()]).double()
    with refused(ValueError, "^lrkernels: FusedSGD takes gradients of the parameter's dtype or float32", clipping):
        clipping.step()

    mirrored = DeviceMesh("cpu", [1, 0])
    q.grad = None
    q.grad = spread(torch.randn(6, 2), mirrored, [Replicate()])
    with refused(ValueError, r"^lrkernels: the gradient of parameter 0, of shape \(6, 2\), is on Device", replicated):
        replicated.step()


@case(4)
def meshes_that_have_no_whole(folder):
    """Sums over all of it cannot be had, and plain steps need none."""
    from torch.distributed.tensor import Shard

    mesh = mesh_of(2, 2, names=("a", "b"))
    params = [nn.Parameter(spread(torch.randn(6, 2), mesh[name], [Shard(0)])) for name in ("a", "b")]
    for p in params:
        p.grad = torch.ones_like(p)
    for more in ({"max_grad_norm": 1.0}, {}):
        optimizer = FusedSGD(params, **more)
        if not more:
            optimizer.found_inf = torch.tensor(0.0)
        with refused(RuntimeError, "^lrkernels: the parameters are DTensors on meshes of the ranks", optimizer):
            optimizer.step()
    before = [full(p).clone() for p in params]
    FusedSGD(params, lr=0.5).step()
    assert_same_bits([full(p) for p in params], [x - 0.5 for x in before])


@case(2)
def a_process_without_parameters_skips_with_the_other(folder):
    """It has no scaler, which would find nothing to look at."""
    for more in ({"track": "grad_norm"}, {"track": "alignment"}, {"max_grad_norm": 1.0}):
        params = [nn.Parameter(torch.ones(3))] if dist.get_rank() == 0 else []
        optimizer = FusedSGD([{"params": params}], lr=0.5, momentum=0.9, process_group=dist.group.WORLD, **more)
        for overflow in (0.0, 1.0, 0.0):
            for p in params:
                p.grad = torch.full_like(p, math.inf if overflow else 1.0)
                optimizer.found_inf = torch.tensor(overflow)
            optimizer.step()
        assert float(optimizer.stats["skipped"]) == 1 and float(optimizer.stats["step"]) == 2
        assert float(optimizer.stats["grad_norm"]) == pytest.approx(math.sqrt(3))
        assert all(p.isfinite().all() and (p < 1).all() for p in params)


@case(2)
def a_scaler_in_a_process_whose_gradients_are_missing(folder):
    p = nn.Parameter(torch.ones(3))
    optimizer = FusedSGD([p], lr=0.5, process_group=dist.group.WORLD, track="grad_norm")
    for overflow in (1.0, math.inf, 1.0):
        scaler = GradScaler("cpu", init_scale=2.0)  # its update() wants to have seen a gradient
        loss = scaler.scale((p * overflow).sum())
        if dist.get_rank() == 0:
            loss.backward()
        scaler.step(optimizer)
        optimizer.zero_grad()
    assert float(optimizer.stats["skipped"]) == 1 and float(optimizer.stats["step"]) == 2


@case(2)
def nothing_is_read_twice_where_the_decision_may_wait(folder):
    model = fully_sharded(new_net())
    whole, rest = Verb.MEASURE | Verb.APPLY, Verb.DECIDE | Verb.APPLY
    for mode, wanted in {"alignment-lag1": (whole, Verb.DECIDE), "clip": (Verb.MEASURE, rest)}.items():
        optimizer = FusedSGD(model.parameters(), lr=0.05, momentum=0.9, **MODES[mode])
        optimizer.step()  # the first one chooses the kernels
        loss_of(model, *mine(next(batches(1)))).backward()
        with mock.patch.object(optimizer, "_run", wraps=optimizer._run) as run:
            optimizer.step()
        assert [call.args[0] for call in run.call_args_list] == list(wanted), mode


@case(2)
def a_process_that_is_lost(folder):
    """Torch's own error, soon, and the parameters as they were; then training goes on."""
    group = dist.new_group()
    p = nn.Parameter(torch.randn(6, 2))
    optimizer = FusedSGD([p], lr=0.5, momentum=0.9, track="alignment", process_group=group)
    p.grad = torch.ones_like(p)
    optimizer.step()
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 1:
        store.wait(["done"])
        return
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2), group)
    before = bits([p, optimizer.state_dict()["state"], optimizer.stats])
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert not str(caught.value).startswith("lrkernels:"), caught.value
    assert time.monotonic() - start < 30
    store.set("done", "")
    assert bits([p, optimizer.state_dict()["state"], optimizer.stats]) == before
    assert len(optimizer.history()["step"]) == 1


@case(2)
def a_gradient_scaler_finds_infinity_in_one_process(folder):
    for unscale in (False, True):
        for name, mode in SOME:
            kind, options = KINDS[name]
            model, net = fully_sharded(new_net()), new_net()
            optimizers = [kind(m.parameters(), **options, **MODES[mode]) for m in (model, net)]
            scalers = [GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in optimizers]
            for step, batch in enumerate(batches(5)):
                for m, part, optimizer, scaler in zip(
                    (model, net), (mine(batch), batch), optimizers, scalers, strict=True
                ):
                    scaler.scale(loss_of(m, *part)).backward()
                    if step in (0, 3):
                        grad = m.first.weight.grad
                        if m is net:
                            grad[-1] = math.inf
                        elif dist.get_rank() == 1:
                            grad.to_local()[-1] = math.inf
                    if unscale:
                        scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
            assert_same_decisions(*optimizers)
            assert float(optimizers[0].stats["skipped"]) == 2
            assert scalers[0].get_scale() == scalers[1].get_scale()
            assert_close([full(p) for p in model.parameters()], list(net.parameters()), rtol=1e-9, atol=1e-12)


@case(2)
def a_sharded_gradient_scaler_with_process_group(folder):
    """After ``unscale_`` all processes know of an infinity in one, and the scale is the same everywhere."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    for name, mode in SOME:
        kind, options = KINDS[name]
        model, net = fsdp1(new_net()), new_net()
        optimizer = kind(model.parameters(), **options, **MODES[mode], process_group=dist.group.WORLD)
        alone = kind(net.parameters(), **options, **MODES[mode])
        scaler, other = (cls("cpu", init_scale=1024.0, growth_interval=2) for cls in (ShardedGradScaler, GradScaler))
        for step, batch in enumerate(batches(5)):
            scaler.scale(loss_of(model, *mine(batch))).backward()
            other.scale(loss_of(net, *batch)).backward()
            if step in (0, 3):
                net.first.weight.grad[-1] = math.inf
                for grad in [p.grad for p in model.parameters() if p.grad is not None][: dist.get_rank()]:
                    grad[-1] = math.inf
            scaler.unscale_(optimizer)
            for each, own in ((scaler, optimizer), (other, alone)):
                each.step(own)
                each.update()
                own.zero_grad()
        assert_same_decisions(optimizer, alone)
        assert float(optimizer.stats["skipped"]) == 2
        assert scaler.get_scale() == other.get_scale()
        with FullyShardedDataParallel.summon_full_params(model):
            assert_close(list(model.parameters()), list(net.parameters()), rtol=1e-9, atol=1e-12)


# ---- The tests ----


@pytest.mark.parametrize(("lr", "grad", "steps"), [(0.0, 1.0, 1), (0.1, 0.0, 1), (0.0, 0.0, 0)])
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_only_a_first_step_of_rate_and_gradient_zero_is_none(kind, lr, grad, steps):
    p = nn.Parameter(torch.ones(3))
    optimizer = kind([p], lr=lr, schedule=schedules.gala(delta=0.1, mode="consecutive"))
    p.grad = torch.full_like(p, grad)
    optimizer.step()
    assert len(optimizer.history()["step"]) == steps
    assert bool(optimizer.state_dict()["state"]) and "prev_grad" in optimizer.state_dict()["state"][0]
    optimizer.step(lambda: None)
    assert len(optimizer.history()["step"]) == steps + 1


def test_the_control_tensor_hangs_in_the_first_group_and_is_not_shown():
    optimizer = FusedSGD([{"params": parameters([(3,)])}, {"params": parameters([(4,)])}])
    assert optimizer.param_groups[0][CONTROL_KEY] is optimizer._controller.control
    assert CONTROL_KEY not in optimizer.param_groups[1] and CONTROL_KEY not in repr(optimizer)
    assert CONTROL_KEY in optimizer.param_groups[0]
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.param_groups[0][CONTROL_KEY] is twin._controller.control


@pytest.mark.parametrize("before_state_dict", [False, True])
def test_a_control_tensor_put_into_the_group_is_taken_over(before_state_dict):
    """As ZeroRedundancyOptimizer does when it loads; one of another schedule is refused."""
    params, twins = parameters([(3,)]), parameters([(3,)])
    trained = train(FusedSGD(params, lr=1.0, schedule=schedules.linear(10)), params, gradients([(3,)], 4))
    optimizer = FusedSGD(twins, lr=1.0, schedule=schedules.linear(10))
    optimizer.param_groups[0][CONTROL_KEY] = trained._controller.control.clone()
    if before_state_dict:
        assert optimizer.state_dict()["param_groups"][0][CONTROL_KEY][Control.STEP] == 4
    train(optimizer, twins, gradients([(3,)], 1))
    assert float(optimizer.stats["lr"]) == pytest.approx(0.6)
    optimizer.param_groups[0][CONTROL_KEY] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"^lrkernels: the checkpoint's schedule state has another size"):
        optimizer.step()


ALL_KINDS = "cpu:gloo,cuda:nccl,xpu:xccl,mps:gloo"  # of a group that was made without naming a backend


@pytest.mark.parametrize(
    ("config", "there", "device"),
    [
        ("cuda:nccl", "cuda", "cuda:1"),
        ("cpu:gloo,cuda:gloo", "cuda", "cpu"),
        ("cpu:mpi,cuda:mpi", "cuda", "cpu"),
        (ALL_KINDS, "cuda", "cuda:1"),
        (ALL_KINDS, "xpu", "xpu:1"),
        (ALL_KINDS, "none", "cpu"),
        ("cpu:gloo,meta:own", "meta", "meta:1"),
    ],
    ids=lambda value: value.replace(":", "_").replace(",", "-"),
)
def test_where_a_process_without_parameters_takes_part(config, there, device, monkeypatch):
    """On the others' device: NCCL adds up nothing that is on the CPU."""

    class Module:
        current_device = staticmethod(lambda: 1)

        def __init__(self, kind):
            self.is_available = lambda: kind == there

    group = object()
    monkeypatch.setattr(dist, "get_backend_config", {group: config}.__getitem__)
    monkeypatch.setattr(dist, "get_process_group_ranks", {group: [0, 1]}.__getitem__)
    monkeypatch.setattr(torch, "get_device_module", Module)
    assert where_added_up(group) == torch.device(device)
    if there in ("meta", "none"):  # for the others there is no memory on every machine
        optimizer = FusedSGD([{"params": []}], process_group=group)
        plan = optimizer._make_plan()
        assert {x.device.type for x in (plan, plan.counts, optimizer._controller.control)} == {
            torch.device(device).type
        }
    assert where_added_up(None) == torch.device("cpu")


@pytest.mark.parametrize(("world", "name"), rows(__name__))
def test_several_processes(world, name, failures):
    found = failures(world)[name]
    assert not found, found


# ---- The examples ----

EXAMPLES = {  # what they say with two processes, and then with one
    "fsdp2": ["2 processes, loss", "1 processes, loss"],
    "zero": ["rank 1 keeps moments of 7434 elements"],
    "tensor_parallel": ["(128, 64) of (256, 64) in this process"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "says"), EXAMPLES.items(), ids=EXAMPLES)
def test_the_examples_run(name, says, tmp_path):
    """By torch's own launcher; a second time on from the first run's checkpoint."""
    pytest.importorskip("sklearn")
    script = Path(__file__).parents[1] / "examples" / f"{name}.py"
    path = os.pathsep.join([str(script.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "CHECKPOINT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for processes, said in zip((2, 1), says, strict=False):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run([*launch, str(script)], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
    if name == "fsdp2":
        assert sorted(folder.name for folder in tmp_path.iterdir()) == ["000060", "000120"]
