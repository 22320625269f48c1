"""The memory that CUDA's runner hands to the kernels: enough, its own, and none that a copy may still read. No GPU."""

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from lrkernels import cuda_runner, ops
from lrkernels.cuda_runner import CudaRunner
from lrkernels.layout import Verb


class Device:
    """Stands in for the binary and for torch.cuda; takes lists of `rows` bytes and never ends a copy by itself."""

    def __init__(self, rows):
        self.memory, self.rows = 1000, rows
        self.capturing, self.calls, self.events = False, [], []
        self.uneven = []  # what the next call finds, and launches nothing
        self.current = None  # the index of a CPU

    def run(self, *arguments):
        workspace = arguments[-1] or (0, 0, 0, 0, 0)
        if workspace[1] < self.memory or workspace[4] < self.rows:
            raise BufferError(self.memory, self.rows)
        self.calls.append(SimpleNamespace(memory=workspace[0], list=workspace[2], pinned=workspace[3]))
        assert self.current is None
        found, self.uneven = self.uneven, []
        return found, 0

    def event(self):
        made = SimpleNamespace(done=False)
        made.record, made.query, made.synchronize = lambda stream: None, lambda: self.ask(made), lambda: self.ask(made)
        self.events.append(made)
        return made

    def ask(self, event):
        assert not self.capturing, "CUDA refuses it, and the graph is lost"
        event.asked = True
        return event.done

    @contextmanager
    def as_current(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before


@pytest.fixture
def device(request, monkeypatch):
    made = Device(getattr(request, "param", 500))
    monkeypatch.setattr(ops, "_C", made)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: made.current)
    monkeypatch.setattr(torch.cuda, "device", made.as_current)
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(CudaRunner, "_new_pinned", staticmethod(lambda size: torch.zeros(size, dtype=torch.uint8)))
    return made


def step(runner):
    runner(Verb.STEP, 0, 0, False, [], None)


@pytest.mark.parametrize("device", [0], indirect=True)
def test_rows_that_fit_into_the_argument_need_no_list(device):
    runner = CudaRunner(torch.device("cpu"))
    for _ in range(3):
        step(runner)
    assert {call.memory for call in device.calls} == {runner._memory.data_ptr()}
    assert not runner._memory.any() and all(call.pinned == 0 for call in device.calls)
    assert not device.events


def test_another_device_is_current_before_and_after(device):
    runner = CudaRunner(torch.device("cpu"))
    device.current = 1
    step(runner)
    assert len(device.calls) == 1 and device.current == 1


def test_pinned_memory_is_used_again_when_its_copy_is_made(device):
    runner = CudaRunner(torch.device("cpu"))
    for _ in range(3):
        step(runner)
    first, second, third = (call.pinned for call in device.calls)
    assert len({first, second, third}) == 3  # no copy has ended
    device.events[1].done = True
    step(runner)
    assert device.calls[-1].pinned == second
    step(runner)
    assert device.calls[-1].pinned not in (first, second, third)
    assert len({call.list for call in device.calls}) == 1


def test_a_captured_list_is_never_written_again(device):
    runner = CudaRunner(torch.device("cpu"))
    step(runner)
    device.capturing = True
    step(runner)
    captured = device.calls[-1].pinned
    device.capturing = False
    for _ in range(4):
        step(runner)
        for event in device.events:
            event.done = True
    assert captured not in {call.pinned for call in device.calls[2:]}
    device.capturing = True
    step(runner)  # a second graph
    assert device.calls[-1].pinned != captured
    assert {tensor.data_ptr() for tensor in runner._captured} >= {captured, device.calls[-1].pinned}


@pytest.mark.parametrize("device", [0, 500], indirect=True)
def test_a_capture_that_lacks_memory_is_refused(device):
    runner = CudaRunner(torch.device("cpu"))
    device.capturing = True
    with pytest.raises(RuntimeError, match=r"^lrkernels: .*one step"):
        step(runner)
    assert not device.calls


def test_two_captures_without_a_step_between_are_refused(device):
    runner = CudaRunner(torch.device("cpu"))
    step(runner)
    device.capturing = True
    step(runner)
    with pytest.raises(RuntimeError, match=r"^lrkernels: .*before each capture"):
        step(runner)


def test_a_captured_step_may_need_copies_of_some_tensors(device, monkeypatch):
    """The call that finds out launches nothing, so the list is for the call with the copies."""
    monkeypatch.setattr(ops, "run_copies", lambda runner, uneven, *arguments: step(runner))
    runner = CudaRunner(torch.device("cpu"))
    step(runner)
    device.capturing, device.uneven = True, [0]
    step(runner)
    assert len(device.calls) == 3 and device.calls[1].pinned == device.calls[2].pinned
    with pytest.raises(RuntimeError, match="before each capture"):
        step(runner)


@pytest.mark.parametrize("capturing", [False, True])
def test_at_its_end_a_runner_waits_for_its_copies_unless_a_graph_is_captured(device, capturing):
    """As when Python collects another optimizer meanwhile; the memory is kept then."""
    runner = CudaRunner(torch.device("cpu"))
    step(runner)
    pinned, before = device.calls[-1].pinned, len(cuda_runner._orphans)
    device.capturing = capturing
    del runner
    gc.collect()
    (event,) = device.events
    assert hasattr(event, "asked") != capturing
    assert [tensor.data_ptr() for tensor, _ in cuda_runner._orphans[before:]] == [pinned] * capturing


def test_memory_grows_with_the_parameters(device):
    runner = CudaRunner(torch.device("cpu"))
    step(runner)
    device.memory, device.rows = 3000, 900
    old, before = device.calls[-1].pinned, [device.calls[-1].memory, device.calls[-1].list]
    step(runner)
    assert runner._memory.numel() == 3000 and not runner._memory.any()
    assert runner._list.numel() == 900
    assert {old, *before} <= {tensor.data_ptr() for tensor in runner._captured}  # a graph may have them


def test_each_optimizer_has_its_own(monkeypatch):
    monkeypatch.setattr(ops, "_C", SimpleNamespace(cuda_architectures=lambda: "sm_90"))
    runners = [ops.backend_for(torch.device("cuda:0"), wanted) for wanted in (None, "native")]
    assert all(isinstance(runner, CudaRunner) for runner in runners) and runners[0] is not runners[1]
    assert ops.backend_for(torch.device("cuda:0"), "eager") is ops._eager_lists
    monkeypatch.setattr(ops, "_C", SimpleNamespace(cuda_architectures=lambda: None))
    with pytest.raises(RuntimeError, match="no kernels for cuda"):
        ops.backend_for(torch.device("cuda:0"), "native")
