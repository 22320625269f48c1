"""The four operators on lists of tensors: registration, native against eager, rounding, extremes, refusals."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import (
    ALL,
    CASES,
    CLOSED_LOOPS,
    CPU,
    DTYPES,
    IN_PARTS,
    LAYOUTS,
    SIZES,
    TRAINED,
    VERBS,
    Job,
    as_bits,
    assert_parts_are_a_step,
    assert_same_decisions,
    assert_same_job,
    assert_sums_are,
    cases,
    exact_sums,
    f64,
    hyper_row,
    in_parts,
    make,
    new_control,
    new_settings,
    on_a_gpu,
    orders,
    randn,
    refused,
    to_be_parted,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lrkernels import ops
from lrkernels.layout import SUMS_AT, Control, Count, Measure, Rule, Setting, Sum, Verb

needs_native = pytest.mark.skipif(ops._C is None, reason="the binary is not there")
backends = pytest.mark.parametrize("backend", ["eager", pytest.param("native", marks=needs_native)])

# ----------------------------------------------------------------------------------------------------------------------
# Registration


def example(rule=Rule.SGD):
    """Two parameters, one without a gradient, everything measured and kept."""
    rows = {
        Rule.SGD: hyper_row(MOMENTUM=0.9, WEIGHT_DECAY=0.1),
        Rule.ADAMW: hyper_row(BETA1=0.9, BETA2=0.99, EPS=1e-6, AMSGRAD=1.0, WEIGHT_DECAY=0.1),
    }
    job = make([(5, 3), (7,), ()], rule, prev=torch.float32, hyper=rows[rule], measure=ALL, two_pass=True)
    job.grads[1] = None
    job.settings[Setting.MAX_GRAD_NORM] = 1.0
    job.control[SUMS_AT + Sum.GRAD_SQ] = 4.0  # decide_ alone finds something to decide on
    return job


@pytest.mark.parametrize("rule", Rule, ids=lambda rule: rule.name.lower())
@pytest.mark.parametrize("name", VERBS.values())
def test_opcheck(name, rule):
    """Schema, autograd registration, fake tensors, and tracing by AOT dispatch."""
    job = example(rule)
    torch.library.opcheck(getattr(torch.ops.lrkernels, name).default, job.arguments, job.flags)


WRITTEN = {
    "measure_": {"counts", "control", "history"},
    "decide_": {"counts", "control", "history"},
    "apply_": {*TRAINED, "master", "control", "history"},
    "step_": {*TRAINED, "master", "control", "history"},
}


@pytest.mark.parametrize("name", VERBS.values())
def test_schema_says_what_is_written(name):
    schema = getattr(torch.ops.lrkernels, name).default._schema
    assert [argument.name for argument in schema.arguments] == list(vars(example()))
    written = {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write}
    assert written == WRITTEN[name]
    aliases = [a for argument in schema.arguments if argument.alias_info for a in argument.alias_info.before_set]
    assert len(aliases) == len(set(aliases))
    assert not schema.returns


@backends
@pytest.mark.parametrize("verb", VERBS, ids=VERBS.values())
def test_nothing_but_what_the_schema_says_is_written(verb, backend):
    job = example()
    before = job.copy()
    job.run(backend, verb)
    same = [name for name, x in job.tensors.items() if torch.equal(as_bits(x), as_bits(before.tensors[name]))]
    changed = {name.split("[")[0] for name in job.tensors if name not in same}
    assert changed <= WRITTEN[VERBS[verb]]
    assert "control" in changed
    assert ("params" in changed) == bool(verb & Verb.APPLY)
    assert {"params[1]", "state0[1]", "prev_write[1]", "grads[0]", "grads[2]", "hyper", "settings"} <= set(same)


@pytest.mark.parametrize("name", VERBS.values())
def test_dispatch_keys(name):
    def has(key):
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"lrkernels::{name}", key)

    assert has("CPU") == (ops._C is not None)
    assert has("CUDA") and has("XPU")
    assert has("CompositeExplicitAutograd")  # eager, wherever nothing better is
    assert has("Meta")
    assert not has("CompositeImplicitAutograd")


class Recorder:
    """Stands in for the binary."""

    def __init__(self):
        self.calls = []

    def run(self, *arguments):
        self.calls.append(arguments)
        return [], 0


@needs_native
@pytest.mark.parametrize("verb", VERBS, ids=VERBS.values())
def test_the_cpu_is_served_by_the_binary(verb, monkeypatch):
    recorder, job = Recorder(), example()
    monkeypatch.setattr(ops, "_C", recorder)
    before = job.copy()
    job.run("native", verb)
    (call,) = recorder.calls
    assert call[:4] == (verb, job.rule, job.measure, job.two_pass)
    assert call[6] is not None and call[9] is None  # an empty list is None
    assert_same_job(job, before)
    job.run("eager", verb)
    assert len(recorder.calls) == 1
    assert not torch.equal(job.control.nan_to_num(), before.control.nan_to_num())


@pytest.mark.parametrize("verb", VERBS, ids=VERBS.values())
def test_a_gpu_is_served_by_the_best_there_is(verb, monkeypatch):
    """Asked for once, and kept: a runner has its own memory for the device."""
    asked, make = [], ops.backend_for
    monkeypatch.setattr(ops, "_runners", {})
    monkeypatch.setattr(ops, "backend_for", lambda device, wanted: asked.append((device, wanted)) or make(CPU, "eager"))
    job = example()
    eager = job.copy()
    for _ in range(2):
        on_a_gpu(job, verb)
        eager.run("eager", verb)
    assert asked == [(CPU, None), (CPU, "eager"), (CPU, "eager")]  # the others are eager.run's
    assert_same_job(job, eager)


def test_meta_tensors_pass_through():
    job = example()
    meta = [[x if x is None else x.to("meta") for x in arg] if isinstance(arg, list) else arg for arg in job.arguments]
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in meta]
    assert torch.ops.lrkernels.step_(*meta, **job.flags) is None


def test_compiles_into_one_graph():
    """AOT dispatch makes the operator functional and writes the results back."""
    job = example()
    job.found_inf = job.grad_scale = None
    alone = job.copy().run("native")

    def train(job_arguments, flags, scale):
        torch.ops.lrkernels.step_(*job_arguments, **flags)
        return job_arguments[0][0] * scale, job_arguments[10].sum()

    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    doubled, total = compiled(job.arguments, job.flags, 2.0)
    assert_same_job(job, alone)
    assert torch.equal(doubled, 2.0 * alone.params[0])
    assert torch.equal(as_bits(total), as_bits(alone.control.sum()))


@backends
def test_writing_is_known_to_autograd(backend):
    """A graph that saved a parameter must not run on the new values."""
    job = Job([torch.ones(3)], [torch.ones(3)], [torch.zeros(3)], hyper=hyper_row(MOMENTUM=0.9))
    before = job.params[0]._version
    ops.backend_for(CPU, backend)(Verb.STEP, *job.flags.values(), *job.kernel_arguments)
    assert job.params[0]._version > before


@backends
@pytest.mark.parametrize("verb", [Verb.MEASURE, Verb.DECIDE], ids=str)
def test_what_only_reads_leaves_the_versions(verb, backend):
    """Also where a layout takes copies."""
    sliced = torch.ones(6, 4)[:, :3]
    job = Job([sliced], [torch.ones(6, 3)], [torch.zeros(6, 3)], hyper=hyper_row(MOMENTUM=0.9))
    ops.backend_for(CPU, backend)(verb, *job.flags.values(), *job.kernel_arguments)
    assert sliced._version == 0 and job.state0[0]._version == 0


# ----------------------------------------------------------------------------------------------------------------------
# The verbs alone are a step, and native is eager


@backends
@cases
@in_parts
def test_verbs_in_several_calls_are_a_step(two_pass, calls, rule, row, backend):
    run = ops.backend_for(CPU, backend)
    assert_parts_are_a_step(
        to_be_parted(rule, row, two_pass),
        calls,
        lambda job, verb: run(verb, *job.flags.values(), *job.kernel_arguments),
    )


@needs_native
def test_to_decide_needs_no_copies(monkeypatch):
    sliced = torch.ones(6, 4)[:, :3]
    job = Job([sliced], [torch.ones(6, 3)], [torch.zeros(6, 3)], hyper=hyper_row(MOMENTUM=0.9))
    job.run("native", Verb.MEASURE)
    job.run("native", Verb.APPLY)
    monkeypatch.setattr(ops, "run_copies", lambda *_: pytest.fail("copied"))
    job.run("native", Verb.DECIDE)
    assert job.control[Control.STEP] == 1 and job.stat("grad_norm") == pytest.approx(math.sqrt(18))


@needs_native
@orders
def test_operators_one_by_one_are_a_step(two_pass):
    calls = IN_PARTS["two-passes-each" if two_pass else "one-pass-each"][1]
    assert_parts_are_a_step(
        to_be_parted(*CASES["sgd-momentum"], two_pass), calls, lambda job, verb: job.run("native", verb)
    )


@orders
@cases
def test_native_has_the_bits_of_eager(rule, row, two_pass):
    """Parameters and states bit for bit; the sums, in float64 on both, within what they lose by it."""
    settings = {"settings": new_settings(MAX_GRAD_NORM=1.0 if two_pass else math.inf), "two_pass": two_pass}
    eager = make([(n,) for n in SIZES], rule, prev=torch.float32, hyper=hyper_row(**row), measure=ALL, **settings)
    eager.counts[:] = 0.0
    for state in (*eager.state0, *eager.state1, *eager.state2):
        state.zero_()
    jobs = {"eager": eager} | ({"native": eager.copy()} if ops._C is not None else {})
    for step in range(3):
        eager.grads[:] = [randn(n, 31 * step + i) for i, n in enumerate(SIZES)]
        before = eager.copy() if step == 2 else None
        for backend, job in jobs.items():
            job.grads[:] = eager.grads
            job.run(backend)
            assert (job.sums[Sum.PREV_SQ] > 0) == (step > 0)  # there is no previous gradient at first
    truth = exact_sums(eager, before)
    for backend, job in jobs.items():
        assert_sums_are(truth, job, backend)
        assert_same_job(eager, job, TRAINED)
        assert_same_decisions(eager, job, 1e-11)
        assert torch.allclose(eager.history, job.history, rtol=1e-11, atol=0)


@needs_native
@pytest.mark.parametrize("measure", range(16))
@orders
def test_every_set_of_measures_is_the_same_step(measure, two_pass):
    """Measuring changes no parameter, and both backends fill the same sums."""
    if two_pass and not measure:
        pytest.skip("nothing to decide on")
    job = make([(65,), (3, 5)], prev=torch.float32, hyper=hyper_row(MOMENTUM=0.5), measure=measure, two_pass=two_pass)
    eager, native = job.copy().run("eager"), job.copy().run("native")
    plain = job.copy()
    plain.measure, plain.two_pass = 0, False
    assert_same_job(eager, native, TRAINED)
    assert_same_job(plain.run("native"), native, TRAINED)
    for slot, name in [(Sum.DIRECTION_SQ, "DIRECTION"), (Sum.MOVE_SQ, "MOVE")]:
        assert (native.sums[slot] != 0) == bool(measure & Measure[name])
    if measure:
        assert_same_decisions(eager, native)


class NothingFromTheHost(TorchFunctionMode):
    """Refuses what a GPU would wait for: a tensor made of the host's numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor) or isinstance(args[0], Tensor), func
        return func(*args, **(kwargs or {}))


@orders
@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_eager_makes_its_coefficients_on_the_device(dtype, rule, row, two_pass):
    job = make([(5,), ()], rule, dtype=dtype, prev=dtype, hyper=hyper_row(**row), measure=ALL, two_pass=two_pass)
    job.settings[Setting.MAX_GRAD_NORM] = 1.0
    job.settings[Setting.STOCHASTIC_ROUNDING] = 1.0
    with NothingFromTheHost():
        job.run("eager")
    assert job.control[Control.STEP] == 1


@needs_native
@orders
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["sgd", "sgd-momentum", "adamw-amsgrad"])
def test_native_has_the_bits_of_eager_in_every_dtype(name, dtypes, two_pass):
    rule, row = CASES[name]
    dtype, grad_dtype, state_dtype, prev = dtypes
    kinds = {"dtype": dtype, "grad_dtype": grad_dtype, "state_dtype": state_dtype, "prev": prev}
    job = make([(1025,), (7,), ()], rule, **kinds, hyper=hyper_row(**row), measure=ALL, two_pass=two_pass)
    job.settings[Setting.MAX_GRAD_NORM] = 1.0
    eager, native = job.copy(), job.copy()
    for step in range(3):
        for i, shape in enumerate([(1025,), (7,), ()]):
            eager.grads[i] = native.grads[i] = randn(shape, 7 * step + i, grad_dtype)
        eager.run("eager")
        native.run("native")
    assert_same_job(eager, native, TRAINED)
    assert_same_decisions(eager, native, 1e-11)
    assert native.params[0].dtype == dtype and not torch.equal(native.params[0], job.params[0])


@needs_native
@orders
@pytest.mark.parametrize("kept", ["master", "at-random"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw-amsgrad"])
def test_native_has_the_bits_of_eager_in_low_precision(name, half, kept, two_pass):
    rule, row = CASES[name]
    shapes = [(1025,), (7,), (), (33, 5), (70_000,)]
    job = make(shapes, rule, dtype=half, state_dtype=torch.float32, hyper=hyper_row(**row), measure=ALL)
    job.two_pass = two_pass
    job.params[3] = job.params[3].t().contiguous().t()  # elements are counted through memory
    job.state0[3] = job.state0[3].t().contiguous().t()
    if kept == "master":
        job.master = [p.float() for p in job.params]
    else:
        job.settings[Setting.STOCHASTIC_ROUNDING] = 1.0
    eager, native = job.copy(), job.copy()
    for step in range(3):
        for i, shape in enumerate(shapes):
            eager.grads[i] = native.grads[i] = randn(shape, 7 * step + i, half)
        eager.run("eager")
        native.run("native")
    assert_same_job(eager, native, (*TRAINED, "master"))
    assert_same_decisions(eager, native, 1e-11)
    for p, master in zip(native.params, native.master, strict=False):
        assert torch.equal(p, master.to(half))


@needs_native
@cases
def test_native_is_eager_in_float64_but_for_the_last_bit(rule, row):
    job = make([(1025,), (7,)], rule, dtype=torch.float64, prev=torch.float64, hyper=hyper_row(**row), measure=ALL)
    eager, native = job.copy().run("eager"), job.copy().run("native")
    for name, x in native.tensors.items():
        if name.split("[")[0] in TRAINED:
            assert torch.allclose(x, eager.tensors[name], rtol=1e-14, atol=1e-15), name
    assert_same_decisions(eager, native)
    assert not torch.equal(native.params[0], native.params[0].float().double())  # really in float64


@needs_native
@orders
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout(name, two_pass):
    """The binary takes one dense layout per parameter; other tensors go through copies, and come back."""
    param, grad = LAYOUTS[name]

    def job():
        made = Job(
            *([param.clone(memory_format=torch.preserve_format)], [grad], [randn(param.shape, 9)]),
            prev_write=[randn(param.shape, 10)],
            hyper=hyper_row(MOMENTUM=0.9, WEIGHT_DECAY=0.1),
            measure=ALL,
            two_pass=two_pass,
        )
        if name == "gaps":  # clone() has closed them
            made.params = [torch.zeros(6, 10)[:, ::2].copy_(param)]
        other = randn((33,), 11)
        for column, x in [("params", other), ("grads", -other), ("state0", other), ("prev_write", other)]:
            getattr(made, column).append(x.clone())  # a neighbour that needs no copy
        made.groups, made.counts = torch.zeros(2, dtype=torch.int32), torch.ones(2, len(Count))
        return made

    eager, native = job(), job()
    strides = native.params[0].stride()
    for _ in range(2):
        eager.run("eager")
        native.run("native")
    assert native.params[0].stride() == strides
    assert_same_job(eager, native, TRAINED)
    assert_same_decisions(eager, native)
    assert param.numel() == 0 or not torch.equal(native.params[0], param)
    assert torch.equal(native.prev_write[0], grad)


@needs_native
def test_gaps_are_not_written():
    storage = torch.full((6, 10), 7.0)
    job = Job([storage[:, ::2]], [torch.ones(6, 5)]).run("native")
    assert torch.equal(storage[:, 1::2], torch.full((6, 5), 7.0))
    assert torch.equal(job.params[0], torch.full((6, 5), 7.0) - torch.tensor(0.1))


@backends
@pytest.mark.parametrize("gaps", [False, True])
def test_states_may_come_as_dictionaries(gaps, backend):
    """As the optimizers hand them over: a list of the parameters' states, and the key."""
    job = make([(33,), (4, 6)], Rule.ADAMW, hyper=hyper_row(BETA1=0.9, BETA2=0.9, EPS=1e-8))
    if gaps:  # this one goes through a copy and back
        job.state1[1] = torch.zeros(4, 12)[:, ::2].copy_(job.state1[1])
    as_lists, keys = job.copy().run(backend), ("exp_avg", "exp_avg_sq")
    states = [dict(zip(keys, pair, strict=True)) for pair in zip(job.state0, job.state1, strict=True)]
    columns = [(states, key) for key in (*keys, "max_exp_avg_sq")]
    arguments = [*job.kernel_arguments[:2], *columns, *job.kernel_arguments[5:]]
    ops.backend_for(CPU, backend)(Verb.STEP, *job.flags.values(), *arguments)
    assert_same_job(job, as_lists)


@needs_native
def test_groups_have_their_own_rows():
    hyper = torch.cat([hyper_row(), hyper_row(WEIGHT_DECAY=0.5), hyper_row(MAXIMIZE=1.0)])
    groups = torch.tensor([2, 0, 1, 0], dtype=torch.int32)
    job = Job([torch.ones(3) for _ in range(4)], [torch.ones(3) for _ in range(4)], groups=groups, hyper=hyper)
    job.lr = f64([0.5, 0.25, 0.125])
    eager, native = job.copy().run("eager"), job.copy().run("native")
    assert_same_job(eager, native, TRAINED)
    assert [p[0].item() for p in native.params] == [1.125, 0.5, 1 - 0.25 * 1.5, 0.5]
    assert native.stat("lr") == 0.5  # of the first group


@needs_native
def test_same_bits_whatever_the_number_of_threads():
    threads = torch.get_num_threads()
    job = make([(n,) for n in (200_000, 65_537, 3)], prev=torch.float32, hyper=hyper_row(MOMENTUM=0.9), measure=ALL)
    results = []
    try:
        for count in (1, 2, 3, 2, 1):
            torch.set_num_threads(count)
            results.append(job.copy().run("native"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same_job(results[0], result)


@needs_native
@orders
@pytest.mark.parametrize("name", ["sgd", "sgd-momentum", "adamw"])
@pytest.mark.parametrize("loop", CLOSED_LOOPS)
def test_native_decides_as_eager(loop, name, two_pass):
    """Nine steps, one skipped by the scaler, one with an infinite gradient, a schedule on top, a scaled loss."""
    if loop == "skip-nonfinite" and not two_pass:
        pytest.skip("it is too late to skip when the sums come with the update")
    rule, row = CASES[name]
    job = make([(40,), (3, 5)], rule, prev=torch.float32, hyper=hyper_row(**row), measure=ALL, two_pass=two_pass)
    job.counts[:] = 0.0
    job.settings, job.control = new_settings(**CLOSED_LOOPS[loop]), new_control(ring=5)
    job.table, job.decay = torch.linspace(1, 0.5, 7, dtype=torch.float64), torch.linspace(1, 0, 9, dtype=torch.float64)
    job.grad_scale, job.found_inf = torch.tensor([8.0]), torch.tensor([0.0])
    eager, native = job.copy(), job.copy()
    for step in range(9):
        for each, backend in ((eager, "eager"), (native, "native")):
            each.grads = [8 * randn(p.shape, 50 * step + i) for i, p in enumerate(each.params)]
            if step == 5 and loop == "skip-nonfinite":
                each.grads[0][3] = math.inf
            each.found_inf.fill_(float(step == 3))
            each.control[Control.SIGNAL] = [0.3, 0.4, math.nan, 0.2, 0.6, 0.5, 0.55, 0.7, 0.1][step]
            each.run(backend)
        assert_same_job(eager, native, TRAINED)
        assert_same_decisions(eager, native, 1e-9, 1e-15, sums=False)
    skipped = 2 if loop == "skip-nonfinite" else 1
    assert native.control[Control.SKIPPED] == skipped and native.control[Control.STEP] == 9 - skipped
    assert native.control[Control.ROWS] == 9 - skipped  # a skipped step writes no row
    assert torch.allclose(eager.history, native.history, rtol=1e-9, atol=1e-12, equal_nan=True)


@backends
@orders
def test_a_previous_gradient_may_be_the_tensor_itself(backend, two_pass):
    """Kept by the caller, without its step's loss scale; one is missing. As if it had been stored."""
    kept = make([(33,), (1025,), (7,)], prev=torch.float32, hyper=hyper_row(MOMENTUM=0.9), measure=ALL)
    kept.two_pass, kept.counts = two_pass, torch.zeros_like(kept.counts)
    swapped = kept.copy()
    swapped.prev_write = []
    for step, scale in enumerate([8.0, 2.0, 0.5]):
        grads = [randn(p.shape, 40 * step + i) * scale for i, p in enumerate(kept.params)]
        if step == 0:
            grads[2] = None
        for job in (kept, swapped):
            job.grads, job.grad_scale = grads, torch.tensor([scale])
            job.run(backend)
        assert_same_job(kept, swapped, ("params", "state0"))
        assert_same_decisions(kept, swapped)
        swapped.prev_read = [g if g is None else g / scale for g in grads]  # a power of two: nothing is rounded
    assert swapped.stat("alignment") != 0 and swapped.stat("curvature") > 0


@backends
@orders
def test_a_previous_gradient_may_be_read_in_one_place_and_kept_in_another(backend, two_pass):
    kept = make([(33,), (1025,)], prev=torch.float32, hyper=hyper_row(MOMENTUM=0.9), measure=ALL, two_pass=two_pass)
    moved = kept.copy()
    moved.prev_read, moved.prev_write = moved.prev_write, [torch.full_like(x, math.nan) for x in moved.prev_write]
    before = moved.copy()
    assert_same_job(kept.run(backend), moved.run(backend), (*TRAINED, "control"))
    assert_same_job(before, moved, ("prev_read",))
    assert moved.stat("alignment") != 0


@needs_native
def test_a_previous_gradient_of_two_dtypes_is_refused():
    job = make([(33,)], prev=torch.float32, measure=ALL)
    job.prev_read = [x.bfloat16() for x in job.prev_write]
    before = job.copy()
    with pytest.raises(ValueError, match=r"^lrkernels: prev_read\[0\] and prev_write\[0\] are of different dtypes"):
        job.run("native")
    assert_same_job(job, before)


# ----------------------------------------------------------------------------------------------------------------------
# Extremes


@backends
@orders
@pytest.mark.parametrize("value", [1e30, 3e38, 1e-30, 1e-45, 0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_norm_of_extreme_gradients(value, grad_dtype, backend, two_pass):
    """Squares that overflow or underflow float32 are nothing to float64."""
    n = 1500
    grad = torch.full((n,), value).to(grad_dtype)
    value = grad[0].item()
    params = [torch.zeros(n, dtype=grad_dtype), torch.zeros(3)]
    job = Job(params, [grad, torch.zeros(3)], two_pass=two_pass).run(backend)
    assert job.stat("grad_norm") == pytest.approx(abs(value) * math.sqrt(n), rel=1e-12, abs=0, nan_ok=True)
    assert job.stat("grad_norm_l1") == pytest.approx(abs(value) * n, rel=1e-12, abs=0, nan_ok=True)


@backends
@pytest.mark.parametrize("at", [0, 7, 8, 1023, 1024, 1499])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_bad_element_is_found_anywhere(value, at, backend):
    grad = torch.ones(1500)
    grad[at] = value
    job = Job([torch.zeros(1500)], [grad], settings=new_settings(SKIP_NONFINITE=1.0), two_pass=True).run(backend)
    assert job.stat("grad_norm") == pytest.approx(abs(value), nan_ok=True)
    assert job.control[Control.SKIPPED] == 1 and job.control[Control.STEP] == 0
    assert torch.equal(job.params[0], torch.zeros(1500))


@backends
def test_huge_gradients_are_clipped_to_a_finite_step(backend):
    settings = new_settings(MAX_GRAD_NORM=1.0)
    job = Job([torch.zeros(4)], [torch.full((4,), 1e30)], settings=settings, two_pass=True, lr=f64([1.0]))
    job.run(backend)
    assert torch.allclose(job.params[0], torch.full((4,), -0.5), rtol=1e-6)


@backends
@orders
@pytest.mark.parametrize("rule", Rule, ids=lambda rule: rule.name.lower())
def test_no_gradient_at_all(rule, backend, two_pass):
    job = example(rule)
    job.two_pass, job.grads = two_pass, [None] * 3
    before = job.copy()
    job.run(backend)
    assert_same_job(job, before, TRAINED)
    assert job.control[Control.STEP] == 1 and job.control[Control.CLIP] == 1
    assert set(job.sums.values()) == {0.0}
    assert job.stat("grad_norm") == 0 and job.stat("direction_cosine") == 0 and job.stat("lr") == 0.1


@backends
@pytest.mark.parametrize("verb", VERBS, ids=VERBS.values())
def test_empty_lists(verb, backend):
    """An optimizer without parameters still counts its steps."""
    job = Job([], [], two_pass=True).run(backend, verb)
    assert job.control[Control.STEP] == bool(verb & Verb.APPLY)
    assert set(job.sums.values()) == {0.0}


# ----------------------------------------------------------------------------------------------------------------------
# Rounding, over all patterns of 16 bits

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def all_patterns(half):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(half)


def between_patterns(half):
    """Float32 at and around every number of the half type and every midpoint between two, then whatever else."""
    finite = all_patterns(half).double()
    finite = finite[finite.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2  # a bit more than the half type has: exact in float32
    past = torch.tensor([65504.0, 65519.996, 65520.0, 65536.0, 1e30, 3.3953139e38, 3.4028235e38, math.inf, math.nan])
    seeds = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31, (200_000,), generator=seeds).to(torch.int32).view(torch.float32)
    usual = torch.randn(100_000, generator=seeds) * 10.0 ** torch.randint(-9, 5, (100_000,), generator=seeds)
    subnormal = torch.randint(0, 2**23, (20_000,), generator=seeds).to(torch.int32).view(torch.float32)
    exact = torch.cat([finite.float(), middles.float(), past, -past])
    up = torch.nextafter(exact, torch.tensor(math.inf))
    down = torch.nextafter(exact, torch.tensor(-math.inf))
    return torch.cat([exact, up, down, any_bits, usual, subnormal, -subnormal])


def kept(grads, dtype):
    """The gradients as the step keeps them in ``dtype``: read, made float32, and stored."""
    job = Job([torch.zeros_like(grads)], [grads], prev_write=[torch.zeros(grads.shape, dtype=dtype)])
    return job.run("native").prev_write[0]


@needs_native
@HALVES
def test_reading_is_exact(half):
    patterns = all_patterns(half)
    assert torch.equal(as_bits(kept(patterns, torch.float32)), as_bits(patterns.float()))
    assert torch.equal(as_bits(kept(patterns, half)), as_bits(patterns))


@needs_native
def test_a_subnormal_float16_is_no_subnormal_float32_to_be_flushed():
    patterns = all_patterns(torch.float16)
    exact = patterns.float()
    assert torch.set_flush_denormal(True)
    try:
        read = kept(patterns, torch.float32)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(as_bits(read), as_bits(exact))


@needs_native
@HALVES
def test_every_parameter_survives_a_step_of_zero(half):
    patterns = all_patterns(half)
    job = Job([patterns.clone()], [torch.ones(len(patterns), dtype=half)], lr=f64([0.0])).run("native")
    # -0.0 goes to 0.0 or stays, by the sign of what is added; nothing else moves.
    assert torch.equal(as_bits(job.params[0]), as_bits(patterns))


@needs_native
@HALVES
def test_rounding_is_torchs(half):
    values = between_patterns(half)
    assert torch.equal(as_bits(kept(values, half)), as_bits(values.to(half)))


@needs_native
@HALVES
def test_rounding_from_the_other_half_and_from_float64_is_torchs(half):
    other = torch.float16 if half == torch.bfloat16 else torch.bfloat16
    patterns = all_patterns(other)
    assert torch.equal(as_bits(kept(patterns, half)), as_bits(patterns.to(half)))
    values = between_patterns(half).double()
    values = torch.cat([values, values * (1 + 2.0**-40), values * (1 - 2.0**-40)])
    assert torch.equal(as_bits(kept(values, half)), as_bits(values.to(half)))
    assert torch.equal(as_bits(kept(values, torch.float32)), as_bits(values.to(torch.float32)))


@needs_native
@HALVES
def test_the_update_is_rounded_once(half):
    """p - lr g in float32, then one rounding."""
    values = between_patterns(half)
    values = values[values.isfinite() & (values.abs() < 1e4)]
    param = torch.randn(len(values), generator=torch.Generator().manual_seed(1)).to(half)
    job = Job([param.clone()], [values.clone()], lr=f64([1.0])).run("native")
    assert torch.equal(as_bits(job.params[0]), as_bits((param.float() - values).to(half)))


# ----------------------------------------------------------------------------------------------------------------------
# Refusals: a ValueError of ours, and nothing has changed


def refuse(changes):
    """Run one such job; returns what was raised, and whether anything has changed."""
    job = make([(5,), (7,)], Rule.ADAMW, prev=torch.float32, hyper=hyper_row(BETA1=0.9, BETA2=0.9), measure=ALL)
    job.__dict__.update(changes)
    before = {name: x.clone() for name, x in job.tensors.items() if x.device == CPU}
    try:
        ops._C.run(Verb.STEP, *job.flags.values(), *(x if x != [] else None for x in job.arguments))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = "nothing"
    changed = [name for name, x in before.items() if not torch.equal(as_bits(x), as_bits(job.tensors[name]))]
    return said, changed


REFUSALS = """
import json, os, jobs, test_ops
for name, changes in jobs.refused():
    child = os.fork()
    if child == 0:
        print(json.dumps([name, *test_ops.refuse(changes)]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def refusals():
    """Each of them in a process of its own: a wild pointer would take this one along."""
    here = Path(__file__).parent
    process = subprocess.run([sys.executable, "-c", REFUSALS], cwd=here, capture_output=True, text=True, timeout=120)
    return {name: (said, changed) for name, said, changed in map(json.loads, process.stdout.splitlines())}


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.parametrize("name", [name for name, _ in refused()])
def test_refusals(name, refusals):
    assert name in refusals, "the process died"
    said, changed = refusals[name]
    assert said.startswith("ValueError: lrkernels: "), said
    assert len(said) > 35 and not changed
