"""Torch's global modes around construction, steps and checkpoints: the run is the same run."""

import contextlib
import copy
import warnings

import pytest
import torch
from cases import CLOSED_LOOPS, LR
from conftest import assert_same_bits, everything, gradients, parameters, set_grads, states, train
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lrkernels import FusedAdamW, FusedSGD, schedules

SHAPES = [(3, 5), (7,), (70, 500), ()]


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Overriding(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)  # fills what is made empty with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def warnings_as_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


MODES = {
    "default_device": lambda: torch.device("meta"),  # whatever is made there by mistake has no values
    "default_float64": lambda: default_dtype(torch.float64),
    "default_bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference": torch.inference_mode,
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch": Dispatching,
    "function": Overriding,
    "warnings": warnings_as_errors,
}
EVERYTHING = {"max_grad_norm": 1.0, "track": ("grad_norm_l1", "direction", "alignment"), "skip_nonfinite": True}
RUNS = [
    pytest.param(FusedSGD, {"momentum": 0.9, **EVERYTHING, "schedule": schedules.cosine(20)}, id="sgd-everything"),
    pytest.param(FusedAdamW, EVERYTHING, id="adamw-everything"),
    pytest.param(FusedSGD, {"schedule": CLOSED_LOOPS["gala"]}, id="gala"),
    pytest.param(FusedSGD, {"prev_grad": "swap", "schedule": CLOSED_LOOPS["alignment-lag1"]}, id="alignment-swap"),
    pytest.param(FusedAdamW, {"schedule": CLOSED_LOOPS["volsched"], "history_size": None}, id="volsched"),
]


def run(kind, options, built_in, stepped_in, loaded_in):
    """Return what five steps leave behind, with a checkpoint loaded by a new optimizer after the second."""
    params = parameters(SHAPES)
    with built_in():
        optimizer = kind(params, lr=LR, **options)
    for step, row in enumerate(gradients(SHAPES, 5)):
        set_grads(params, row)
        with stepped_in():
            optimizer.observe(0.1 * step)
            optimizer.step()
        if step == 1:
            saved = copy.deepcopy(optimizer.state_dict())
            with loaded_in():
                optimizer = kind(params, lr=LR, **options)
                optimizer.load_state_dict(saved)
    with stepped_in():
        history, stats = optimizer.history(), dict(optimizer.stats)
    return params, states(optimizer, params), stats, {key: torch.from_numpy(row) for key, row in history.items()}


@pytest.mark.parametrize("around", [0, 1, 2], ids=["construction", "steps", "loading"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize(("kind", "options"), RUNS)
def test_a_run_under_a_mode_is_the_same_run(kind, options, mode, around, backend):
    plain = [contextlib.nullcontext] * 3
    moded = [mode if i == around else contextlib.nullcontext for i in range(3)]
    options = {**options, "backend": backend}
    assert_same_bits(run(kind, options, *moded), run(kind, options, *plain))


def test_a_rate_that_is_a_tensor_is_loaded_where_it_is(backend):
    [p] = parameters([(3,)])
    optimizer = FusedSGD([p], torch.tensor(LR), backend=backend)
    with torch.device("meta"):
        optimizer.load_state_dict(FusedSGD([p], 2 * LR, backend=backend).state_dict())
    assert optimizer.param_groups[0]["lr"] == torch.tensor(2 * LR)


@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_steps_outside_of_inference_mode_go_on_from_those_inside(kind, backend):
    def steps(first_in):
        params = parameters(SHAPES)
        optimizer = kind(params, lr=LR, track="alignment", schedule=schedules.cosine(20), backend=backend)
        for step, row in enumerate(gradients(SHAPES, 4)):
            with first_in() if step < 2 else contextlib.nullcontext():
                train(optimizer, params, [row])
            optimizer.param_groups[0]["lr"] *= 0.9  # written in place, outside
        return everything(optimizer, params)

    assert steps(torch.inference_mode) == steps(contextlib.nullcontext)


def test_parameters_made_in_inference_mode_are_stepped_there(backend):
    with torch.inference_mode():
        params = parameters(SHAPES)
        optimizer = train(FusedSGD(params, LR, momentum=0.9, backend=backend), params, gradients(SHAPES, 3))
    twins = parameters(SHAPES)
    other = train(FusedSGD(twins, LR, momentum=0.9, backend=backend), twins, gradients(SHAPES, 3))
    assert_same_bits([params, states(optimizer, params)], [twins, states(other, twins)])


@pytest.mark.parametrize("done", [0, 3000, 4096], ids=["first", "later", "at_the_table_s_end"])
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_tensors_without_values_are_refused_and_leave_nothing_behind(kind, done, backend):
    def make(params):
        optimizer = kind(params, lr=LR, schedule=schedules.exponential(0.9, every=1024), backend=backend)
        saved = optimizer.state_dict()
        saved["param_groups"][0]["lrkernels_control"][0] = max(0, done - 2)
        optimizer.load_state_dict(saved)
        return train(optimizer, params, grads[:2] if done else [])

    grads = gradients(SHAPES, 4)
    params, twins = parameters(SHAPES), parameters(SHAPES)
    optimizer, twin = make(params), make(twins)
    before = everything(optimizer, params)
    set_grads(params, grads[2])
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=r"^lrkernels: a FakeTensorMode"):
        optimizer.step()
    assert everything(optimizer, params) == before
    with FakeTensorMode(), pytest.raises(ValueError, match=r"^lrkernels: a FakeTensorMode"):
        kind(params, lr=LR)
    train(optimizer, params, grads[2:])
    train(twin, twins, grads[2:])
    assert everything(optimizer, params) == everything(twin, twins)


@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_a_backward_pass_after_the_step_may_have_the_old_values(kind, backend):
    shapes = [(5, 3), (4, 5), (4,)]
    params = parameters(shapes)
    optimizer = kind(params, lr=LR, backend=backend)
    x = torch.randn(2, 3)

    def loss():
        return torch.tanh(torch.tanh(x @ params[0].T) @ params[1].T).square().sum()

    want = torch.autograd.grad(loss(), params[:2])
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        before = loss()
        train(optimizer, params, gradients(shapes, 1))
        assert_same_bits(torch.autograd.grad(before, params[:2]), want)


@pytest.mark.parametrize("stepped_in", [contextlib.nullcontext, torch.inference_mode], ids=["outside", "inside"])
@pytest.mark.parametrize("more", [{}, {"skip_nonfinite": True}], ids=["one_pass", "skip_nonfinite"])
@pytest.mark.parametrize("prev_grad", ["store", "swap"])
def test_gradients_made_in_inference_mode(prev_grad, more, stepped_in, backend):
    params, twins = parameters(SHAPES), parameters(SHAPES)
    options = {"track": ("alignment", "direction"), "prev_grad": prev_grad, "backend": backend, **more}
    optimizer, twin = FusedSGD(params, LR, **options), FusedSGD(twins, LR, **options)
    for row in gradients(SHAPES, 3):
        with torch.inference_mode():
            made = [grad.clone() for grad in row]
        with stepped_in():
            train(optimizer, params, [made])
        train(twin, twins, [row])
        assert_same_bits([params, dict(optimizer.stats)], [twins, dict(twin.stats)])
        with torch.inference_mode():
            torch._foreach_zero_(made)  # torch does not count it, so it must not matter to what is kept
