"""Checkpoints of several processes on gloo, loaded on as many, fewer or one; and the states that ZeRO spreads."""

import functools

import pytest
import torch
import torch.distributed as dist
from conftest import assert_close, assert_same_bits, gradients
from processes import (
    KINDS,
    MODES,
    SOME,
    assert_same_decisions,
    assert_same_everywhere,
    batches,
    case,
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

from lrkernels.layout import Control

pytestmark = needs_gloo

# ---- ZeRO ----


@case(2)
def zero(folder):
    """Trained, consolidated, saved, loaded into a new one and trained on: the same bits as without a break."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def new(kind, options, mode):
        model = nn.parallel.DistributedDataParallel(new_net())
        local = functools.partial(kind, **mode, process_group=dist.group.WORLD)
        return model, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=local, **options)

    def train(model, optimizer, rows):
        for batch in rows:
            loss_of(model, *mine(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()

    rows_of = ["clip", "linear", "alignment-lag1", "track-swap"]
    for name, mode in [*(("sgd", mode) for mode in rows_of), ("adamw", "gala")]:
        kind, options = KINDS[name]
        model, optimizer = new(kind, options, MODES[mode])
        rows = list(batches(6))
        train(model, optimizer, rows[:3])
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            torch.save([model.state_dict(), optimizer.state_dict()], f"{folder}/zero-{name}-{mode}")
        dist.barrier()
        of_model, of_optimizer = torch.load(f"{folder}/zero-{name}-{mode}", weights_only=True)
        resumed_model, resumed = new(kind, {**options, "lr": 99.0}, MODES[mode])
        resumed_model.load_state_dict(of_model)
        resumed.load_state_dict(of_optimizer)
        train(model, optimizer, rows[3:])
        train(resumed_model, resumed, rows[3:])
        net = new_net()
        alone = kind(net.parameters(), **options, **MODES[mode])
        train(net, alone, [])
        for batch in rows:
            loss_of(net, *batch).backward()
            alone.step()
            alone.zero_grad()
        assert_same_decisions(optimizer.optim, alone)
        assert_same_everywhere(resumed.optim._controller.control)
        assert_close(list(model.parameters()), list(net.parameters()), rtol=1e-9, atol=1e-12)
        assert_same_bits(list(resumed_model.parameters()), list(model.parameters()))
        for key, values in resumed.optim.history().items():
            assert values.tolist() == optimizer.optim.history()[key][3:].tolist()


@case(4)
def zero_with_fewer_parameters_than_processes(folder):
    """Two processes have none, and decide as the others do."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for name, mode in SOME:
        kind, options = KINDS[name]
        net, twin = new_net().first, new_net().first
        model = nn.parallel.DistributedDataParallel(net)
        local = functools.partial(kind, **MODES[mode], process_group=dist.group.WORLD)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=local, **options)
        assert [len(group["params"]) for group in optimizer.optim.param_groups] == [int(dist.get_rank() < 2)]
        alone = kind(twin.parameters(), **options, **MODES[mode])
        for x, _ in batches(5):
            for m, part, own in ((model, mine([x]), optimizer), (twin, [x], alone)):
                m(*part).square().mean().backward()
                own.step()
                own.zero_grad()
        assert_same_decisions(optimizer.optim, alone)
        assert_close(list(net.parameters()), list(twin.parameters()), rtol=1e-9, atol=1e-12)


# ---- Checkpoints ----


class Run:
    """A model and its optimizer on a mesh, or in one process alone; gradients come by hand."""

    def __init__(self, kind, options, mode, mesh=None, flatten=False, sharded=True):
        from torch.distributed.checkpoint.state_dict import StateDictOptions

        self.net, self.mesh = new_net(), mesh
        if mesh is not None:
            fully_sharded(self.net, mesh=mesh)
        self.optimizer = kind(self.net.parameters(), **options, **mode)
        self.options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        alone = mesh is None or mesh.size() == 1
        self.where = {"no_dist": True} if alone else {"process_group": mesh.get_group()}

    def train(self, steps):
        shapes = [p.shape for p in self.net.parameters()]
        for row in gradients(shapes, 12, torch.float64)[steps]:
            for p, grad in zip(self.net.parameters(), row, strict=True):
                p.grad = grad if self.mesh is None else spread(grad, p.device_mesh, p.placements)
            self.optimizer.step()
        return self

    def state(self):
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        of_optimizer = get_optimizer_state_dict(self.net, self.optimizer, options=self.options)
        return {"model": get_model_state_dict(self.net), "optimizer": of_optimizer}

    def save(self, path):
        import torch.distributed.checkpoint as dcp

        dcp.save(self.state(), checkpoint_id=path, **self.where)
        return path

    def load(self, path):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

        state = self.state()
        dcp.load(state, checkpoint_id=path, **self.where)
        set_model_state_dict(self.net, state["model"])
        set_optimizer_state_dict(self.net, self.optimizer, state["optimizer"], options=self.options)
        return self

    def everything(self):
        states = [self.optimizer.state[p] for p in self.net.parameters()]
        states = [{key: full(value) for key, value in state.items() if value is not None} for state in states]
        control = self.optimizer._controller.control.clone()
        control[Control.ROWS] = 0  # the history begins anew
        return [[full(p) for p in self.net.parameters()], states, control[: Control.SIGNAL]]


CHECKPOINTS = [
    ("sgd", "alignment-lag1", False),
    ("sgd", "gala", True),
    ("sgd", "linear", True),
    ("adamw", "gala", False),
    ("adamw", "track-swap", False),
    ("sgd", "track-swap", True),
    ("adamw", "track", True),
]


@case(4)
def checkpoints_on_four_two_one_and_four_processes(folder):
    from torch.distributed.device_mesh import DeviceMesh

    rank, four, two = dist.get_rank(), mesh_of(4), DeviceMesh("cpu", [0, 1])
    for name, mode, flatten in CHECKPOINTS:
        kind, options = KINDS[name]
        options = options | ({"dampening": 0.5} if name == "sgd" else {})
        path = f"{folder}/{name}-{mode}"
        new = functools.partial(Run, kind, options, MODES[mode], flatten=flatten)
        alone = new().train(slice(12))
        first = new(four).train(slice(3))
        path = first.save(f"{path}-first")
        same = new(four).load(path)
        assert_same_bits(same.everything()[0], first.everything()[0])
        assert_same_bits(same.train(slice(3, 6)).everything(), first.train(slice(3, 6)).everything())
        if rank < 2:
            path2 = new(two).load(path).train(slice(3, 6)).save(f"{path}-two")
        if rank == 0:
            path1 = new().load(path2).train(slice(6, 9)).save(f"{path}-one")
        dist.barrier()
        path1 = f"{path}-one"
        last = new(four).load(path1).train(slice(9, 12))
        assert_same_everywhere(last.optimizer._controller.control)
        for key, values in last.optimizer.history().items():
            want = alone.optimizer.history()[key][-3:]
            torch.testing.assert_close(torch.tensor(values), torch.tensor(want), rtol=1e-8, atol=1e-12)
        got, want = last.everything(), alone.everything()
        assert_close(got[:2], want[:2], rtol=1e-9, atol=1e-12)
        assert_close(got[2], want[2], rtol=1e-8)


@case(2)
def a_checkpoint_before_the_first_step_and_a_whole_one(folder):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    mesh = mesh_of(2)
    for name, mode, flatten in CHECKPOINTS:
        kind, options = KINDS[name]
        new = functools.partial(Run, kind, options, MODES[mode], mesh, flatten=flatten)
        untouched, asked = new(), new()
        saved = asked.state()
        assert asked.optimizer._controller.is_new and len(asked.optimizer.history()["step"]) == 0
        assert_same_bits(untouched.train(slice(4)).everything(), asked.train(slice(4)).everything())
        assert saved["optimizer"], "nothing to load into"
        early = new()
        early.load(new().save(f"{folder}/early-{name}-{mode}"))
        assert_close(early.train(slice(4)).everything()[0], asked.everything()[0], rtol=1e-12)
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        everything = get_optimizer_state_dict(asked.net, asked.optimizer, options=whole)
        assert bool(everything) == (dist.get_rank() == 0)
        from_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        resumed = new()
        with torch.no_grad():
            for p, q in zip(resumed.net.parameters(), asked.net.parameters(), strict=True):
                p.copy_(q)
        set_optimizer_state_dict(resumed.net, resumed.optimizer, everything, options=from_rank_0)
        assert_same_bits(resumed.train(slice(4, 8)).everything(), asked.train(slice(4, 8)).everything())


@case(2)
def fsdp1_checkpoints(folder):
    """As with FSDP2, and flattened parameters too: resumed with the bits of a run without a break."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel

    def new(kind, options, mode, flat):
        model = fsdp1(new_net(), use_orig_params=not flat)
        return model, kind(model.parameters(), **options, **MODES[mode], process_group=dist.group.WORLD)

    def go_on(model, optimizer, rows):
        for batch in rows:
            loss_of(model, *mine(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()

    def everything(model, optimizer):
        with FullyShardedDataParallel.summon_full_params(model):
            return [[p.detach().clone() for p in model.parameters()], dict(optimizer.stats)]

    rows = list(batches(6))
    for name, mode, flat in [*((*pair, False) for pair in SOME), ("sgd", "gala", True)]:
        kind, options = KINDS[name]
        model, optimizer = new(kind, options, mode, flat)
        go_on(model, optimizer, rows[:3])
        of_model, of_optimizer = get_state_dict(model, optimizer)
        path = f"{folder}/fsdp1-{name}-{mode}"
        dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=path)
        other, resumed = new(kind, options | {"lr": 99.0}, mode, flat)
        of_model, of_optimizer = get_state_dict(other, resumed)
        dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=path)
        set_state_dict(other, resumed, model_state_dict=of_model, optim_state_dict=of_optimizer)
        go_on(model, optimizer, rows[3:])
        go_on(other, resumed, rows[3:])
        assert_same_bits(everything(other, resumed), everything(model, optimizer))


# ---- The tests ----


@pytest.mark.parametrize(("world", "name"), rows(__name__))
def test_several_processes(world, name, failures):
    found = failures(world)[name]
    assert not found, found
