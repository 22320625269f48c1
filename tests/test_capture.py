"""A step in a graph, played without a GPU: a captured call is made again and again with the tensors it had then.

And what a step would wait for on a GPU.
"""

import copy
import gc
import traceback
import weakref

import pytest
import torch
from cases import CLOSED_LOOPS, OPTIMIZERS, SCHEDULES
from conftest import assert_same_bits, fused, gradients, parameters, set_grads, states, train
from torch.utils._python_dispatch import TorchDispatchMode

from lrkernels import FusedSGD, ops
from lrkernels.control import CAPTURED_TABLE, Controller

pytestmark = pytest.mark.skipif(ops._C is None, reason="the binary is not there")
SHAPES = [(33,), (4, 6)]


class Graph:
    """What ``torch.cuda.graph`` would hold: the one call of a step, with its arguments' memory."""

    def __init__(self, optimizer, monkeypatch):
        self.calls = []
        run = optimizer._run
        with monkeypatch.context() as patch:
            patch.setattr(optimizer, "_is_capturing", lambda: True)
            patch.setattr(optimizer, "_run", lambda *arguments: self.calls.append(arguments))
            optimizer.step()
        assert len(self.calls) == 1 and optimizer._run is run

    def replay(self):
        ops.run_native(*self.calls[0])


def warmed_up(kind, options, **more):
    params = parameters(SHAPES)
    optimizer = fused(kind, params, {**options, **more})
    set_grads(params, [torch.zeros_like(p) for p in params])
    copy_into(params, gradients(SHAPES, 1)[0])
    optimizer.step()
    return optimizer, params


def copy_into(params, row):
    for p, g in zip(params, row, strict=True):
        p.grad.copy_(g)


@pytest.mark.parametrize(
    "more", [{"schedule": SCHEDULES["linear"]}, {"schedule": CLOSED_LOOPS["alignment-lag1"]}], ids=["open", "closed"]
)
@pytest.mark.parametrize("kind, options", OPTIMIZERS)
def test_replays_are_steps(kind, options, more, monkeypatch):
    optimizer, params = warmed_up(kind, options, max_grad_norm=0.5, **more)
    graph, rows = Graph(optimizer, monkeypatch), gradients(SHAPES, 5, seed=7)
    for row in rows:
        copy_into(params, row)
        graph.replay()
    expected = parameters(SHAPES)
    other = fused(kind, expected, {**options, "max_grad_norm": 0.5, **more})
    train(other, expected, [gradients(SHAPES, 1)[0], *rows])
    assert_same_bits(params, expected)
    assert_same_bits(states(optimizer, params), states(other, expected))
    assert optimizer.history()["lr"].tolist() == other.history()["lr"].tolist()
    assert optimizer.stats["step"] == 6


@pytest.mark.parametrize("kind, options", OPTIMIZERS)
def test_loading_takes_effect_in_the_next_replay(kind, options, monkeypatch):
    optimizer, params = warmed_up(kind, options, schedule=SCHEDULES["linear"])
    graph, row = Graph(optimizer, monkeypatch), gradients(SHAPES, 1, seed=7)[0]
    copy_into(params, row)
    saved, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    graph.replay()
    ends = [p.detach().clone() for p in params]
    for _ in range(3):
        graph.replay()
    saved["param_groups"][0]["lr"] = optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    graph.replay()
    assert_same_bits(params, ends)
    assert optimizer.stats["step"] == 2


def test_a_loaded_rate_is_the_replays(monkeypatch):
    optimizer, params = warmed_up(FusedSGD, {"lr": 0.5})
    graph = Graph(optimizer, monkeypatch)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.0
    optimizer.load_state_dict(saved)
    before = [p.detach().clone() for p in params]
    graph.replay()
    assert_same_bits(params, before)


def first(optimizer, params):
    optimizer._controller._calls = 0


def missing(optimizer, params):
    params[0].grad = None


def late(optimizer, params):
    optimizer.add_param_group({"params": parameters([(3,)])})


def changed_rate(optimizer, params):
    optimizer.param_groups[0]["lr"] = 0.7


def changed_decay(optimizer, params):
    optimizer.param_groups[0]["weight_decay"] = 0.7


def rate_on_the_cpu(optimizer, params):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)


def exchanged_state(optimizer, params):
    optimizer.state[params[0]] = dict(optimizer.state[params[0]])


REFUSED = {
    "first": ({}, first, "the first one"),
    "missing": ({}, missing, r"1 parameters have no gradient, one of them of shape \(33,\)"),
    "late": ({}, late, "have changed"),
    "rate": ({}, changed_rate, "param_groups have changed"),
    "decay": ({}, changed_decay, "param_groups have changed"),
    "cpu_rate": ({}, rate_on_the_cpu, "a tensor on the CPU"),
    "state": ({}, exchanged_state, "have changed"),
    "history": ({"history_size": None}, None, "give it a size"),
    "swap": ({"track": ("alignment",), "prev_grad": "swap"}, None, "prev_grad='store'"),
    "table": ({"schedule": lambda step: 1.0}, None, "tabulated further"),
}


@pytest.mark.parametrize("more, change, said", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_captured_is_refused_and_nothing_changes(more, change, said, monkeypatch):
    optimizer, params = warmed_up(FusedSGD, {"lr": 0.1, "momentum": 0.9}, **more)
    if change:
        change(optimizer, params)
    if "schedule" in more:  # as far as it was tabulated
        optimizer._controller._steps = len(optimizer._controller._tabulated)
    before, steps = [p.detach().clone() for p in params], optimizer._controller.control.clone()
    monkeypatch.setattr(optimizer, "_is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=rf"^lrkernels: .*{said}.*take a step outside"):
        optimizer.step()
    assert_same_bits(params, before)
    assert_same_bits(optimizer._controller.control, steps)


@pytest.mark.parametrize("schedule, steps", [(SCHEDULES["linear"], 21), (SCHEDULES["inverse_sqrt"], CAPTURED_TABLE)])
def test_on_cuda_a_schedule_is_tabulated_ahead(schedule, steps, monkeypatch):
    """To its end, or far ahead: nobody tabulates while a graph is replayed."""
    controller = Controller(schedule, None, {}, 4)
    monkeypatch.setattr(Controller, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: self)
    controller.before_step()
    assert len(controller.table) == steps
    assert controller.table[-1] == schedule(steps - 1)


@pytest.mark.parametrize("change", ["group", "table"])
def test_what_a_graph_reads_outlives_a_change(change, monkeypatch):
    """A replay must not write to memory that is somebody else's by now."""
    optimizer, _ = warmed_up(FusedSGD, {"lr": 0.5, "momentum": 0.9}, schedule=SCHEDULES["inverse_sqrt"])
    graph = Graph(optimizer, monkeypatch)
    graph.calls.clear()  # they would keep it
    controller = optimizer._controller
    read = [weakref.ref(tensor) for tensor in (optimizer._lr, optimizer._all_counts, controller.table)]
    if change == "group":
        optimizer.add_param_group({"params": parameters([(3,)]), "lr": 0.1})
    else:
        controller._steps = len(controller.table)
    optimizer.step()
    now = (optimizer._lr, optimizer._all_counts, controller.table)
    replaced = [tensor is not before() for tensor, before in zip(now, read, strict=True)]
    assert replaced == {"group": [True, True, False], "table": [False, False, True]}[change]
    gc.collect()
    assert all(tensor() is not None for tensor in read)


def test_rates_change_in_place():
    """A graph reads them where they were."""
    optimizer, _ = warmed_up(FusedSGD, {"lr": 0.5})
    where = optimizer._lr
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert optimizer._lr is where and where.tolist() == [0.25]


class Numbers(TorchDispatchMode):
    """Notes where a number on its way into a tensor is a tensor of the host's first, as in ``tensor[0] = 1.0``.

    On a GPU that is a copy that is waited for, where ``fill_`` is a launch.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.lift_fresh.default and result.dim() == 0:
            self.found.append("".join(traceback.format_stack(limit=4)))
        return result


WATCHED = [
    {"schedule": SCHEDULES["cosine"], "max_grad_norm": 1.0},
    *({"schedule": CLOSED_LOOPS[name]} for name in ("alignment-lag0", "alignment-lag1", "gala", "volsched")),
    *({"track": ("alignment",), "prev_grad": how, "skip_nonfinite": True} for how in ("store", "swap", "bfloat16")),
]


@pytest.mark.parametrize(
    "put, noticed",
    [
        (lambda x: x.__setitem__(1, 0.5), 1),
        (lambda x: x.copy_(torch.as_tensor(0.5)), 1),
        (lambda x: x[1].fill_(0.5), 0),
        (lambda x: x.copy_(torch.full((), 0.5)), 0),
        (lambda x: x[1].copy_(x[2]), 0),
    ],
    ids=["assigned", "as_tensor", "filled", "full", "copied"],
)
def test_a_number_put_into_a_tensor_is_noticed(put, noticed):
    tensor = torch.zeros(3)
    with Numbers() as numbers:
        put(tensor)
    assert len(numbers.found) == noticed


@pytest.mark.parametrize("more", WATCHED, ids=str)
@pytest.mark.parametrize("kind, options", OPTIMIZERS)
@pytest.mark.parametrize("backend", [ops.NATIVE, ops.EAGER])
def test_no_number_goes_into_a_tensor_by_way_of_the_host(backend, kind, options, more):
    params = parameters(SHAPES)
    optimizer = fused(kind, params, {**options, **more}, backend=backend)
    with Numbers() as numbers:
        for step, row in enumerate(gradients(SHAPES, 4)):
            set_grads(params, row)
            optimizer.param_groups[0]["lr"] = 0.05 * (step + 1)
            optimizer.observe(0.5)
            optimizer.step()
    assert not numbers.found, numbers.found[0]


class Far(torch.Tensor):
    """As a rate on a GPU."""

    device = property(lambda self: torch.device("cuda"))

    def __format__(self, spec=""):
        pytest.fail("what is on another device was looked at")

    __float__ = __format__


def test_a_rate_on_a_device_is_not_looked_at():
    rate = torch.tensor(0.1).as_subclass(Far)
    FusedSGD(parameters(SHAPES), lr=rate)
    with pytest.raises(BaseException, match="looked at"):
        f"{rate}"
