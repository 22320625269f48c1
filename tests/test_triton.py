"""The Triton backend: in the interpreter against eager, compiled for GPUs that are not here, and on one."""

import ast
import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", "3.6")

import emulator  # noqa: E402
from emulator.ptx import PtxDevice  # noqa: E402
from jobs import (  # noqa: E402
    ALL,
    CASES,
    CLOSED_LOOPS,
    CPU,
    DTYPES,
    LAYOUTS,
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

import lrkernels as lrk  # noqa: E402
from lrkernels import devices, ops, rules  # noqa: E402
from lrkernels.layout import Control, Count, Measure, Rule, Setting, Sum, Verb  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter, started by test_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device")

from lrkernels import triton_kernels, triton_layout, triton_rules, triton_runner  # noqa: E402
from lrkernels.triton_runner import TritonRunner, registers  # noqa: E402


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("file, chosen", [("test_triton.py", "not gpu"), ("test_rules.py", "triton")])
def test_interpreter(file, chosen):
    """All that needs the interpreter, in a process of its own: Triton reads the variable when it is imported."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "interpreter", "-W", "ignore"]
    process = subprocess.run(
        [*command, str(Path(__file__).parent / file), "-k", chosen],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", process.stdout)[1]) >= 20, process.stdout[-500:]


def step(job, runner, verb=Verb.STEP):
    runner(verb, *job.flags.values(), *job.kernel_arguments)
    return job


# ----------------------------------------------------------------------------------------------------------------------
# The mathematics


def functions(module):
    body = ast.parse(Path(module.__file__).read_text()).body
    return [node.name for node in body if isinstance(node, ast.FunctionDef)]


def test_rules_are_those_of_rules_py_in_its_order():
    """Made from its source, or written again under the same name; the interpreter's tests compare the results."""
    source = Path(triton_rules.__file__).read_text()
    made = re.findall(r"^(\w+) = _device_function\(rules\.(\w+)\)", source, re.M)
    assert made == [(name, name) for name in ("sgd_step", "adamw_step", "adamw_direction", "mix")]
    order = [name for name in re.findall(r"^(?:def )?(\w+)(?:\(| = _device)", source, re.M) if name in functions(rules)]
    words = ["cast", "fma", "sqrt"]  # what the rules are written in
    assert order == words + [name for name in functions(rules) if name not in words]


# ----------------------------------------------------------------------------------------------------------------------
# In the interpreter: the bits of eager

SIZES = [0, 1, 7, 255, 256, 257, 1023, 1024, 1025, 16383, 16385]


@interpreted
@orders
@cases
def test_bits_of_eager(rule, row, two_pass):
    """Parameters and states bit for bit; sums within what float64 loses, which is far below 1e-6."""
    settings = {"settings": new_settings(MAX_GRAD_NORM=1.0 if two_pass else math.inf), "two_pass": two_pass}
    sizes = SIZES if not two_pass else SIZES[:-2]
    job = make([(n,) for n in sizes], rule, prev=torch.float32, hyper=hyper_row(**row), measure=ALL, **settings)
    job.counts[:] = 0.0
    for state in (*job.state0, *job.state1, *job.state2):
        state.zero_()
    here, runner = job.copy(), TritonRunner(CPU)
    for t in range(2):
        job.grads[:] = [randn(n, 31 * t + i) for i, n in enumerate(sizes)]
        here.grads[:] = [x.clone() for x in job.grads]
        before = job.copy()
        job.run("eager")
        step(here, runner)
        assert_same_job(job, here, TRAINED)
        assert_same_decisions(job, here, 1e-11)
        assert torch.allclose(job.history, here.history, rtol=1e-11, atol=0)
    assert_sums_are(exact_sums(job, before), here, "triton")


@interpreted
@pytest.mark.parametrize("measure", range(16))
@orders
def test_every_set_of_measures_is_the_same_step(measure, two_pass):
    if two_pass and not measure:
        pytest.skip("nothing to decide on")
    job = make([(65,), (3, 5)], prev=torch.float32, hyper=hyper_row(MOMENTUM=0.5), measure=measure, two_pass=two_pass)
    eager, here = job.copy().run("eager"), step(job.copy(), TritonRunner(CPU))
    assert_same_job(eager, here, TRAINED)
    for slot, name in [(Sum.DIRECTION_SQ, "DIRECTION"), (Sum.MOVE_SQ, "MOVE")]:
        assert (here.sums[slot] != 0) == bool(measure & Measure[name])
    if measure:
        assert_same_decisions(eager, here)


SHAPES = [(1025,), (7,), ()]


@interpreted
@orders
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["sgd", "adamw-amsgrad"])
def test_bits_of_eager_in_every_dtype(name, dtypes, two_pass):
    rule, row = CASES[name]
    kinds = dict(zip(("dtype", "grad_dtype", "state_dtype", "prev"), dtypes, strict=True))
    job = make(SHAPES, rule, **kinds, hyper=hyper_row(**row), measure=ALL, two_pass=two_pass)
    job.settings[Setting.MAX_GRAD_NORM] = 1.0
    here, runner = job.copy(), TritonRunner(CPU)
    for t in range(2):
        for i, shape in enumerate(SHAPES):
            job.grads[i] = here.grads[i] = randn(shape, 7 * t + i, dtypes[1])
        job.run("eager")
        step(here, runner)
    assert_same_job(job, here, TRAINED)
    assert_same_decisions(job, here, 1e-11)


def mixed_rows():
    """Rows of every dtype in one call, whose groups have other rules."""
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    jobs = [make([(300,)], Rule.SGD, dtype=kind, prev=kind, hyper=hyper_row(MOMENTUM=0.9)) for kind in kinds]
    joined = {name: [x for job in jobs for x in getattr(job, name)] for name in ("params", "grads", "state0")}
    job = Job(**joined, prev_write=[x for job in jobs for x in job.prev_write], measure=ALL)
    job.grads[1] = job.grads[1].float()
    job.grads[3] = None
    job.hyper = torch.cat([hyper_row(MOMENTUM=0.9, WEIGHT_DECAY=0.1), hyper_row(), hyper_row(MOMENTUM=0.5, NESTEROV=1)])
    job.groups, job.lr = torch.tensor([0, 2, 1, 0], dtype=torch.int32), f64([0.1, 0.2, 0.3])
    job.state0[2] = None
    return job


@interpreted
@orders
def test_rows_of_several_dtypes_in_one_launch(two_pass, monkeypatch):
    eager = mixed_rows()
    eager.two_pass, eager.state0[2] = two_pass, torch.zeros(300, dtype=torch.float64)  # of no use to its group
    here, runner = mixed_rows(), TritonRunner(CPU)
    here.two_pass, here.counts[:] = two_pass, 1.0
    eager.counts[:] = 1.0
    launches = []
    launch = triton_kernels.step_kernel.run
    monkeypatch.setattr(triton_kernels.step_kernel, "run", lambda *a, **k: launches.append(k) or launch(*a, **k))
    for t in range(2):
        for i in (0, 1, 2):
            eager.grads[i] = here.grads[i] = randn((300,), 5 * t + i, eager.grads[i].dtype)
        eager.run("eager")
        step(here, runner)
    assert len(launches) == 2
    assert_same_job(eager, here, ("params", "prev_write", "counts"))
    assert_same_decisions(eager, here, 1e-11)


@interpreted
@pytest.mark.parametrize("kept", ["master", "at-random"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw-amsgrad"])
def test_bits_of_eager_in_low_precision(name, half, kept):
    rule, row = CASES[name]
    shapes = [(1025,), (33, 5), (16_400,)]
    job = make(shapes, rule, dtype=half, state_dtype=torch.float32, hyper=hyper_row(**row), measure=ALL)
    job.params[1] = job.params[1].t().contiguous().t()  # elements are counted through memory
    job.state0[1] = job.state0[1].t().contiguous().t()
    if kept == "master":
        job.master = [p.float() for p in job.params]
    else:
        job.settings[Setting.STOCHASTIC_ROUNDING] = 1.0
    here, runner = job.copy(), TritonRunner(CPU)
    for t in range(2):
        for i, shape in enumerate(shapes):
            job.grads[i] = here.grads[i] = 1e-3 * randn(shape, 7 * t + i, half)
        job.run("eager")
        step(here, runner)
    assert_same_job(job, here, (*TRAINED, "master"))
    assert_same_decisions(job, here, 1e-11)
    for p, master in zip(here.params, here.master, strict=False):
        assert torch.equal(p, master.to(half))


@interpreted
@pytest.mark.parametrize("name", ["sgd-nesterov", "adamw", "adamw-small-beta"])
def test_eager_in_float64_but_for_the_last_bit(name):
    rule, row = CASES[name]
    job = make([(1025,), (7,)], rule, dtype=torch.float64, prev=torch.float64, hyper=hyper_row(**row), measure=ALL)
    eager, here = job.copy().run("eager"), step(job.copy(), TritonRunner(CPU))
    for name, x in here.tensors.items():
        if name.split("[")[0] in TRAINED:
            assert torch.allclose(x, eager.tensors[name], rtol=1e-13, atol=1e-15), name
    assert_same_decisions(eager, here, 1e-11)
    assert not torch.equal(here.params[0], here.params[0].float().double())  # really in float64


@interpreted
@in_parts
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw"])
def test_verbs_in_several_calls_are_a_step(name, two_pass, calls):
    runner = TritonRunner(CPU)
    assert_parts_are_a_step(to_be_parted(*CASES[name], two_pass), calls, lambda job, verb: step(job, runner, verb))


@interpreted
@orders
def test_same_bits_whatever_the_number_of_programs(two_pass):
    """The interpreter runs the programs one after another: each takes its share, the last one finishes the step."""
    job = make([(n,) for n in (33_000, 1025, 3)], prev=torch.float32, hyper=hyper_row(MOMENTUM=0.9), measure=ALL)
    job.two_pass, job.settings[Setting.MAX_GRAD_NORM] = two_pass, 1.0 if two_pass else math.inf
    tickets = 5 * (1 + two_pass)  # chunks: 3, 1 and 1
    results = []
    for programs in (1, 3, tickets + 2):
        here, runner = job.copy(), TritonRunner(CPU, programs, most=-(-tickets // programs))
        for _ in range(2):  # the counters are as before the first launch
            step(here, runner)
            assert not runner._counters.any()
        results.append(here)
    for here in results[1:]:
        assert_same_job(results[0], here)
    assert_same_decisions(job.run("eager").run("eager"), results[0], 1e-11)
    assert_same_job(job, results[0], TRAINED)


@interpreted
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout(name):
    param, grad = LAYOUTS[name]
    params = [param.clone(memory_format=torch.preserve_format), randn((33,), 11)]
    if name == "gaps":
        params[0] = torch.zeros(6, 10)[:, ::2].copy_(param)
    job = Job(
        *(params, [grad, -params[1]], [randn(param.shape, 9), params[1].clone()]),
        prev_write=[randn(param.shape, 10), params[1].clone()],
        hyper=hyper_row(MOMENTUM=0.9, WEIGHT_DECAY=0.1),
        measure=ALL,
        two_pass=True,
        counts=torch.ones(2, len(Count)),
    )
    here, runner = job.copy(), TritonRunner(CPU)
    here.params[0] = torch.zeros(6, 10)[:, ::2].copy_(param) if name == "gaps" else here.params[0]
    strides = here.params[0].stride()
    for _ in range(2):
        job.run("eager")
        step(here, runner)
    assert here.params[0].stride() == strides
    assert_same_job(job, here, TRAINED)
    assert_same_decisions(job, here)


@interpreted
def test_memory_of_any_alignment():
    """Views that begin at odd addresses take the narrow way."""
    job = Job([randn((3000,), 1)], [randn((3000,), 2)], [randn((3000,), 3)], hyper=hyper_row(MOMENTUM=0.9))
    here = job.copy()
    here.params, here.grads, here.state0 = (
        [torch.zeros(3001)[1:].copy_(x[0])] for x in (job.params, job.grads, job.state0)
    )
    runner = TritonRunner(CPU)
    step(here, runner)
    assert not runner._table.rows[0, triton_layout.Field.ALIGNED]
    assert_same_job(job.run("eager"), here, TRAINED)
    assert_same_decisions(job, here)


@interpreted
@pytest.mark.parametrize("verb", VERBS, ids=VERBS.values())
@pytest.mark.parametrize("size", [0, 2])
def test_nothing_to_do(verb, size):
    """No parameters, or none with a gradient: a step all the same."""
    job = Job([torch.zeros(3) for _ in range(size)], [None] * size, two_pass=True)
    step(job, TritonRunner(CPU), verb)
    assert job.control[Control.STEP] == bool(verb & Verb.APPLY)
    assert set(job.sums.values()) == {0.0} and not job.counts.any()


@interpreted
def test_the_table_is_uploaded_when_something_has_moved():
    uploads = []

    class Runner(TritonRunner):
        def _upload(self, moving):
            uploads.append(moving)
            super()._upload(moving)

    job = Job([randn((9,), 1)], [randn((9,), 2)], [randn((9,), 3)], hyper=hyper_row(MOMENTUM=0.9))
    eager, runner = job.copy(), Runner(CPU)

    def both(count):
        eager.grads = [job.grads[0].clone()]
        eager.hyper = job.hyper
        step(job, runner)
        eager.run("eager")
        assert_same_job(eager, job, TRAINED)
        assert len(uploads) == count

    both(1)
    both(1)
    job.grads[0].mul_(2.0)
    both(1)  # the same memory
    kept = job.grads  # so that its memory is not given out again
    job.grads = [randn((9,), 4)]
    both(2)
    job.grads = [torch.zeros(2, 9).t()[:, 0].copy_(randn((9,), 5)).float()]
    both(3)
    job.hyper = hyper_row(MOMENTUM=0.5)
    both(4)
    job.hyper[0, 2] = 0.25
    both(5)
    old = job.params
    job.params = [job.params[0].clone()]
    both(6)
    assert kept and old


def shorter(job):
    return {name: [x[:10] for x in getattr(job, name)] for name in ("params", "grads", "state0", "prev_write")}


def negated(job):
    return {"grads": [torch._neg_view(x) for x in job.grads]}


def differently_strided(job):
    return {name: [x.view(5, 8).t() for x in getattr(job, name)] for name in ("params", "state0", "prev_write")}


def halved(job):
    return {"params": [job.params[0].view(torch.bfloat16)[:40].copy_(job.params[0].clone())]}


@interpreted
@pytest.mark.parametrize("change", [shorter, negated, differently_strided, halved])
def test_other_tensors_at_the_same_addresses(change):
    """What an operator is called with next may lie where something else has lain."""
    job = Job(*([randn((40,), i)] for i in range(3)), prev_write=[randn((40,), 3)], hyper=hyper_row(MOMENTUM=0.9))
    job.measure, job.counts = ALL, torch.ones(1, len(Count))
    here, runner = job.copy(), TritonRunner(CPU)
    for each in (job, here):
        if change is differently_strided:
            for name in ("params", "grads", "state0", "prev_write"):
                setattr(each, name, [x.view(8, 5) for x in getattr(each, name)])
    job.run("eager")
    step(here, runner)
    rest = here.params[0].clone()
    for each in (job, here):
        each.__dict__.update(change(each))
    job.run("eager")
    step(here, runner)
    assert_same_job(job, here, TRAINED)
    assert_same_decisions(job, here, 1e-11)
    if change is shorter:
        assert torch.equal(here.params[0]._base[10:], rest[10:])


@interpreted
def test_a_previous_gradient_that_is_not_given_is_the_kept_one():
    """Where some are given and others kept, also when the given ones have moved."""
    job = make([(40,), (7,)], prev=torch.float32, hyper=hyper_row(MOMENTUM=0.9), measure=ALL)
    here, runner = job.copy(), TritonRunner(CPU)
    for t in range(3):
        for each in (job, here):
            each.prev_read = [None, randn((7,), t)]
        job.run("eager")
        step(here, runner)
        assert_same_decisions(job, here, 1e-11)
    assert_same_job(job, here, TRAINED)


@interpreted
def test_increments_versions():
    job = Job([torch.ones(3), torch.ones(3)], [torch.ones(3), None])
    before = [p._version for p in job.params]
    step(job, TritonRunner(CPU))
    assert job.params[0]._version > before[0] and job.params[1]._version == before[1]


@interpreted
@pytest.mark.parametrize("name, changes", refused(), ids=[name for name, _ in refused()])
def test_refusals(name, changes):
    job = make([(5,), (7,)], Rule.ADAMW, prev=torch.float32, hyper=hyper_row(BETA1=0.9, BETA2=0.9), measure=ALL)
    runner = TritonRunner(CPU)
    step(job.copy(), runner)  # what it remembers of a good call makes no bad one good
    job.__dict__.update(changes)
    before = {name: x.clone() for name, x in job.tensors.items() if x.device == CPU}
    with pytest.raises(ValueError, match=r"^lrkernels: .{23}"):
        runner(Verb.STEP, *job.flags.values(), *(x if x != [] else None for x in job.arguments))
    for name, x in before.items():
        assert torch.equal(as_bits(x), as_bits(job.tensors[name])), name


# ----------------------------------------------------------------------------------------------------------------------
# In the interpreter: decisions, and the optimizers


def assert_decides_as_eager(loop, two_pass, runner):
    """Nine steps, one skipped by the scaler, one with an infinite gradient, a schedule on top, a scaled loss."""
    if loop == "skip-nonfinite" and not two_pass:
        pytest.skip("it is too late to skip when the sums come with the update")
    rule, row = CASES["adamw" if loop in ("gala", "alignment") else "sgd-momentum"]
    job = make([(40,), (3, 5)], rule, prev=torch.float32, hyper=hyper_row(**row), measure=ALL, two_pass=two_pass)
    job.counts[:] = 0.0
    job.settings, job.control = new_settings(**CLOSED_LOOPS[loop]), new_control(ring=5)
    job.table, job.decay = torch.linspace(1, 0.5, 7, dtype=torch.float64), torch.linspace(1, 0, 9, dtype=torch.float64)
    job.grad_scale, job.found_inf = torch.tensor([8.0]), torch.tensor([0.0])
    here = job.copy()
    for t in range(9):
        for each in (job, here):
            each.grads = [8 * randn(p.shape, 50 * t + i) for i, p in enumerate(each.params)]
            if t == 5 and loop == "skip-nonfinite":
                each.grads[0][3] = math.inf
            each.found_inf = torch.tensor([float(t == 3)])
            each.control[Control.SIGNAL] = [0.3, 0.4, math.nan, 0.2, 0.6, 0.5, 0.55, 0.7, 0.1][t]
        job.run("eager")
        step(here, runner)
        assert_same_job(job, here, TRAINED)
        assert_same_decisions(job, here, 1e-9, 1e-15, sums=False)
    skipped = 2 if loop == "skip-nonfinite" else 1
    assert here.control[Control.SKIPPED] == skipped and here.control[Control.STEP] == 9 - skipped
    assert torch.allclose(job.history, here.history, rtol=1e-9, atol=1e-12, equal_nan=True)


@interpreted
@orders
@pytest.mark.parametrize("loop", CLOSED_LOOPS)
def test_decides_as_eager(loop, two_pass):
    assert_decides_as_eager(loop, two_pass, TritonRunner(CPU))


def every_way():
    yield "sgd-alignment", lrk.FusedSGD, {"momentum": 0.9, "schedule": lrk.schedules.alignment(kappa=0.3)}
    yield "sgd-plain-alignment", lrk.FusedSGD, {"schedule": lrk.schedules.alignment(kappa=0.3, lag=0)}
    yield "sgd-normalize", lrk.FusedSGD, {"momentum": 0.9, "normalize": True, "schedule": lrk.schedules.linear(9)}
    gala = lrk.schedules.gala(delta=0.1, max_lr=1.0, mode="consecutive")
    yield "sgd-gala", lrk.FusedSGD, {"momentum": 0.9, "schedule": gala, "prev_grad": "bfloat16"}
    yield "sgd-swap", lrk.FusedSGD, {"momentum": 0.9, "track": ("alignment", "direction"), "prev_grad": "swap"}
    yield "adamw-gala", lrk.FusedAdamW, {"schedule": gala, "max_grad_norm": 1.0}
    yield "adamw-volsched", lrk.FusedAdamW, {"schedule": lrk.schedules.volsched(9, window=2, warmup_steps=2)}


@interpreted
@pytest.mark.parametrize("kind, options", [row[1:] for row in every_way()], ids=[row[0] for row in every_way()])
def test_optimizers_every_way(kind, options):
    """Six steps through the optimizer, asked for Triton: a parameter whose gradient comes late, two groups."""
    shapes = [(17,), (3, 5), (40,)]
    runs = {}
    for backend in ("eager", "triton"):
        params = [torch.nn.Parameter(randn(shape, i)) for i, shape in enumerate(shapes)]
        groups = [{"params": params[:1], "lr": 0.02}, {"params": params[1:], "weight_decay": 0.0}]
        optimizer = kind(groups, lr=0.05, backend=backend, **options)
        for t in range(6):
            for i, p in enumerate(params):
                p.grad = randn(p.shape, 7 * t + i) + 0.5 if t > 1 or i < 2 else None
            optimizer.observe(0.3 + 0.1 * t)
            optimizer.step()
            if options.get("prev_grad") == "swap":
                optimizer.zero_grad()
        runs[backend] = params, optimizer
    assert isinstance(runs["triton"][1]._run, TritonRunner)
    for a, b in zip(runs["eager"][0], runs["triton"][0], strict=True):
        assert torch.equal(a, b)
    there, here = (optimizer.history() for _, optimizer in runs.values())
    for name, values in there.items():
        assert here[name] == pytest.approx(values, rel=1e-9, abs=1e-12, nan_ok=True), name


def test_serves_a_gpu_that_the_binary_has_no_kernels_for(monkeypatch):
    gpu = torch.device("cuda", 3)
    monkeypatch.setattr(ops, "why_not_native", lambda device: "it was built without nvcc")
    monkeypatch.setattr(triton_runner, "TritonRunner", lambda device: ("Triton", device))
    assert ops.backend_for(gpu, None) == ("Triton", gpu)
    monkeypatch.setattr(ops, "why_no_triton", lambda device: "it is too old")
    assert ops.is_eager(ops.backend_for(gpu, None))


@interpreted
@orders
def test_operators(two_pass, monkeypatch):
    """As torch.ops has them for GPUs."""
    backend_for = ops.backend_for
    monkeypatch.setattr(ops, "_runners", {})
    monkeypatch.setattr(ops, "backend_for", lambda device, wanted: backend_for(device, wanted or "triton"))
    job = make([(17,), (3, 5)], Rule.SGD, hyper=hyper_row(MOMENTUM=0.9), measure=ALL, two_pass=two_pass)
    eager = job.copy().run("eager")
    on_a_gpu(job)
    assert [type(runner) for runner in ops._runners.values()] == [TritonRunner]
    assert_same_job(eager, job, TRAINED)
    assert_same_decisions(eager, job, 1e-11)


@interpreted
@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 0.5, "track": ("alignment",)}], ids=["plain", "measured"])
def test_two_devices(more, monkeypatch):
    """As far as the optimizer knows: each has a runner, and the sums are those of both."""
    runs, make = {}, ops.backend_for
    for backend in ("eager", "triton"):
        if backend == "triton":
            monkeypatch.setattr(ops, "backend_for", lambda device, wanted: make(CPU, wanted))
            monkeypatch.setattr(devices, "device_of", lambda p: torch.device("cpu", p.numel() % 2))
        params = [torch.nn.Parameter(randn(shape, i)) for i, shape in enumerate([(18,), (3, 5), (40,), (7,)])]
        optimizer = lrk.FusedAdamW(params, lr=0.05, backend=backend, **more)
        for t in range(4):
            for i, p in enumerate(params):
                p.grad = randn(p.shape, 7 * t + i)
            optimizer.step()
        runs[backend] = params, optimizer
    assert [type(runner) for runner in runs["triton"][1]._run.runners] == [TritonRunner] * 2
    for a, b in zip(runs["eager"][0], runs["triton"][0], strict=True):
        assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------------------------
# Ahead of time, without a GPU

POINTERS = {"memory": "*i64", "counters": "*i32", "counts": "*fp32", "found_inf": "*fp32", "grad_scale": "*fp32"}
PLAIN = {
    **{"RULE": 0, "MEASURE": 0, "VERBS": 7, "TWO_PASS": False, "STATES": 1, "KEPT": False, "MASTERS": False},
    **{"AT_RANDOM": False, "WIDE": 0, "PARAM": 0, "UPDATED": 0, "GRAD": 0, "STATE": 0, "PREV": 0},
}
ADAMW = {**PLAIN, "RULE": 1, "STATES": 2}
HALF = {"PARAM": 2, "UPDATED": 2, "GRAD": 2, "STATE": 2}
MIXED = {"WIDE": 4, **dict.fromkeys(HALF, 4), "PREV": 4}
KERNELS = {
    # what is known to the compiler; loads and stores of 16 bytes for one pass over the tile, at least
    "sgd-one-pass": ({**PLAIN, "MEASURE": 3}, 6, 4),
    "adamw-two-passes": ({**ADAMW, "MEASURE": 1, "TWO_PASS": True}, 10, 6),
    "adamw-scaled-bf16": ({**ADAMW, **HALF, "MEASURE": 3, "AT_RANDOM": True, "STATE": 0}, 6, 5),
    "adamw-masters": ({**ADAMW, **HALF, "MEASURE": 3, "UPDATED": 0, "MASTERS": True, "STATE": 0}, 7, 7),
    "sgd-everything": ({**PLAIN, "MEASURE": 15, "KEPT": True, "TWO_PASS": True}, 12, 6),
    "amsgrad-float64": ({**ADAMW, "STATES": 3, "WIDE": 1, **dict.fromkeys(HALF, 1), "PREV": 1, "MEASURE": 3}, 10, 8),
    "mixed": ({**ADAMW, **dict.fromkeys(HALF, 4), "PREV": 4, "MEASURE": 3}, 20, 16),
    "mixed-kept-sgd": ({**PLAIN, **MIXED, "KEPT": True, "MEASURE": 3}, 40, 30),
    "mixed-kept-adamw": ({**ADAMW, **MIXED, "KEPT": True, "MEASURE": 3}, 50, 40),
    "measure": ({**PLAIN, "VERBS": 1, "MEASURE": 3}, 4, 0),
    "decide": ({**PLAIN, "VERBS": 2, "MEASURE": 15}, 0, 0),
    "decide-apply": ({**PLAIN, "VERBS": 6, "MEASURE": 3}, 6, 4),
}
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
EVERYWHERE = ("sgd-one-pass", "adamw-two-passes")
AHEAD = [
    pytest.param(name, target, id=f"{name}-{target}", marks=() if name in EVERYWHERE else pytest.mark.slow)
    for target in TARGETS
    for name in (KERNELS if target == "sm_90" else EVERYWHERE)
]


def compile_for(target, constants, scaled=None):
    """The binary of a kernel, as a launch on that GPU would make it; ``scaled``: for a step with a gradient scaler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = triton_kernels.step_kernel
    constants = {**constants, "LAYOUT": triton_layout.LAYOUT}
    scaled = constants["AT_RANDOM"] if scaled is None else scaled
    signature, known = {}, {}
    for name in kernel.arg_names:
        if name.isupper():
            signature[name], known[name] = "constexpr", constants[name]
        elif name in ("found_inf", "grad_scale") and not scaled:
            signature[name], known[name] = "constexpr", None
        else:
            small = name in ("control", "lr", "table", "decay", "history", "partials")
            signature[name] = POINTERS.get(name, "*fp64" if small else "i32")
    options = {"enable_fp_fusion": False, "num_warps": triton_runner.WARPS}
    if target[0] == "cuda":
        options["maxnreg"] = registers(constants)
    return triton.compile(ASTSource(kernel, signature, known), target=GPUTarget(*target), options=options)


@compiled
@pytest.mark.parametrize("name, target", AHEAD)
def test_compiles_ahead_of_time(name, target, tmp_path, monkeypatch):
    """Few registers and nothing spilt, 16 bytes at once, no multiply-add but the rule's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants, loads, stores = KERNELS[name]
    binary = compile_for(TARGETS[target], constants)
    if target == "gfx942":
        code = binary.asm["amdgcn"]
        assert binary.asm["hsaco"]
        counts = dict(
            re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s+(\d+)", code)
        )
        assert int(counts["vgpr_count"]) <= 256 and int(counts["vgpr_spill_count"]) == 0, counts
        wide = [len(re.findall(rf"global_{verb}_dwordx4", code)) for verb in ("load", "store")]
    else:
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        dump = [triton.knobs.nvidia.cuobjdump.path, "-sass", "--dump-resource-usage", str(cubin)]
        code = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        used, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", code).groups())
        assert used <= registers(constants)
        spills = name.startswith("mixed-kept")  # float32's and float64's code in one, and the sums of both
        spills |= name == "mixed" and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)  # one register
        if not spills:
            assert stack == 0 and not re.search(r"\b(LDL|STL)\b", code)
        wide = [len(re.findall(rf"{verb}\.E\.\S*128", code)) for verb in ("LDG", "STG")]
        ptx = binary.asm["ptx"]
        assert not re.search(r"div\.(full|approx)|sqrt\.approx", ptx)
        if constants["TWO_PASS"]:  # the wait for the decision, and what it waits for
            assert re.search(r"(ld|atom)\.global\.gpu\.acquire", ptx) and "atom.global.gpu.release" in ptx
        if name == "sgd-one-pass":  # decay, buffer, direction, parameter: of eight elements and of two
            assert len(re.findall(r"fma\.rn\.f32", ptx)) <= 6 * (8 + 2)
    assert wide[0] >= loads and wide[1] >= stores, wide


class Elsewhere:
    """As much of a driver as a launch asks for before there is a kernel; of a device that no machine has."""

    def get_current_device(self):
        return 77

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS["sm_90"])


@compiled
def test_one_optimizer_compiles_one_kernel(tmp_path, monkeypatch):
    """Whatever the sizes are, and where the small tensors lie; another set of measures is another kernel."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, known = triton_kernels.step_kernel, []
    compile_it = kernel._do_compile
    monkeypatch.setattr(kernel, "_do_compile", lambda key, *rest: known.append(key) or compile_it(key, *rest))

    class Launch:
        def __getitem__(self, grid):
            return functools.partial(kernel.run, grid=grid, warmup=True)

    monkeypatch.setattr(triton_runner, "step_kernel", Launch())
    monkeypatch.setattr(triton.runtime.driver, "_active", Elsewhere())
    runner = TritonRunner(CPU)
    runner.nvidia = True
    for shapes in ([(1,)], [(17,), (3,)], [(16 * triton_layout.CHUNK,), *[(5,)] * 15], [(3,)] * 16):
        job = make(shapes, Rule.SGD, hyper=hyper_row(MOMENTUM=0.9), measure=Measure.NORMS)
        job.lr = torch.cat([f64([0.0]), job.lr])[1:]  # eight bytes after what is aligned
        job.table = f64([1.0] * len(shapes))
        step(job, runner)
    assert len(known) == 1, known
    job.measure = Measure.NORMS | Measure.DIRECTION
    step(job, runner)
    assert len(known) == 2


# ----------------------------------------------------------------------------------------------------------------------
# The compiled code, executed without a GPU

emulated = pytest.mark.skipif(INTERPRETED or not emulator.available, reason="runs compiled code; there is no g++")


@functools.cache
def ptx_for(scaled, **constants):
    binary = compile_for(TARGETS["sm_90"], constants, scaled)
    return binary.asm["ptx"], binary.metadata.shared


class Emulated:
    """In place of the kernel: a launch runs what it is compiled to, in an order that the seed decides on."""

    def __init__(self, seed, change=lambda ptx: ptx):
        self.seed, self.change = seed, change

    def __getitem__(self, grid):
        return functools.partial(self.launch, *grid)

    def launch(self, programs, *arguments, num_warps, enable_fp_fusion, LAYOUT, **constants):
        assert not enable_fp_fusion and LAYOUT == triton_layout.LAYOUT
        found_inf, grad_scale = arguments[6:8]
        assert (found_inf is None) == (grad_scale is None)
        ptx, shared = ptx_for(found_inf is not None, **constants)
        device = PtxDevice(self.change(ptx), shared, 32 * num_warps, self.seed, resident=1 + self.seed % 4)
        self.seed += 1
        values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments if x is not None]
        device.launch(programs, [*values, 0, 0])  # and Triton's scratch memory, which these kernels have no use for


def everything(rule, row, sizes, two_pass, **kinds):
    job = make([(n,) for n in sizes], rule, **kinds, hyper=hyper_row(**row), measure=ALL, two_pass=two_pass)
    job.settings[Setting.MAX_GRAD_NORM] = 1.0 if two_pass else math.inf
    return job


def rounded_at_random(kind):
    half = {"dtype": kind, "grad_dtype": kind, "state_dtype": torch.float32, "prev": kind}
    job = everything(*CASES["adamw"], [1025, 7], False, **half)
    job.settings[Setting.STOCHASTIC_ROUNDING] = 1.0
    return job


def with_masters():
    half = {"dtype": torch.float16, "grad_dtype": torch.float16, "state_dtype": torch.float32, "prev": torch.float32}
    job = everything(*CASES["sgd-nesterov"], [1025, 7], True, **half)
    job.master = [p.float() for p in job.params]
    return job


def in_float64():
    double = {"dtype": torch.float64, "prev": torch.float64}
    return everything(*CASES["sgd-nesterov"], [513, 7], False, **double)


FLOATS = {"prev": torch.float32}
COMPILED = {
    "sgd": lambda: everything(*CASES["sgd-nesterov"], [0, 1, 255, 257, 16_385, 1025], False, **FLOATS),
    "amsgrad-two-passes": lambda: everything(*CASES["adamw-amsgrad"], [1, 255, 257, 16_385, 1025], True, **FLOATS),
    "bf16-at-random": lambda: rounded_at_random(torch.bfloat16),
    "fp16-at-random": lambda: rounded_at_random(torch.float16),
    "fp16-masters-two-passes": with_masters,
    "float64": in_float64,
    "several-dtypes": mixed_rows,
}


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_code_has_the_bits_of_eager(name, monkeypatch):
    """With several programs, in any order of their threads, and without a race: layouts, roundings, barriers."""
    kernel = Emulated(seed=0)
    monkeypatch.setattr(triton_runner, "step_kernel", kernel)
    for seed, programs in ((0, 1), (7, 2), (14, 5)):
        job = COMPILED[name]()
        job.counts[:] = 1.0
        if job.state0 and job.state0[-2] is None:
            job.state0[-2] = torch.zeros_like(job.params[-2])
        here, runner = job.copy(), TritonRunner(CPU, programs)
        kernel.seed = seed
        for t in range(2):
            for i, p in enumerate(job.params):
                if job.grads[i] is not None:
                    job.grads[i] = randn(p.shape, 31 * t + i, job.grads[i].dtype)
                    here.grads[i] = job.grads[i].clone()
            job.run("eager")
            step(here, runner)
            assert not runner._counters.any()
        assert_same_job(job, here, (*TRAINED, "master"))
        assert_same_decisions(job, here, 1e-11)


@emulated
@pytest.mark.slow
@orders
@pytest.mark.parametrize("loop", CLOSED_LOOPS)
def test_compiled_code_decides_as_eager(loop, two_pass, monkeypatch):
    monkeypatch.setattr(triton_runner, "step_kernel", Emulated(seed=3))
    assert_decides_as_eager(loop, two_pass, TritonRunner(CPU, 2))


def without_barrier_after(instruction):
    def change(ptx):
        barrier = ptx.index("bar.sync", ptx.index(instruction))
        return ptx[:barrier] + "// " + ptx[barrier:]

    return change


def with_another(old, new):
    def change(ptx):
        assert old in ptx
        return ptx.replace(old, new)

    return change


BROKEN = {
    "measured-not-released": with_another("gpu.acq_rel.add", "gpu.acquire.add"),
    "measured-not-acquired": with_another("gpu.acq_rel.add", "gpu.release.add"),
    "decision-not-released": with_another("gpu.release.exch", "gpu.relaxed.exch"),
    "decision-not-acquired": with_another("ld.global.gpu.acquire", "ld.global.gpu.relaxed"),
    "no-barrier-before-the-ticket-is-read": without_barrier_after("atom.global.gpu.relaxed.add"),
    "no-barrier-before-the-decision-is-read": without_barrier_after("ld.global.gpu.acquire"),
}


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_broken_compiled_code_is_noticed(change, monkeypatch):
    """So the tests above would notice it: what orders the programs' accesses is there for a reason."""
    monkeypatch.setattr(triton_runner, "step_kernel", Emulated(0, change))
    with pytest.raises(emulator.EmulatedError, match=r"race on|no thread has written"):
        for seed in range(6):
            triton_runner.step_kernel.seed = seed
            job = everything(*CASES["adamw-amsgrad"], [300, 300, 300, 300], True, **FLOATS)
            step(job, TritonRunner(CPU, 3))


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU


def on_gpu(job):
    """A copy of a job whose tensors, but for those that stay on the CPU, are on the device."""
    job = job.copy()
    for name, value in vars(job).items():
        if isinstance(value, list):
            setattr(job, name, [None if x is None else x.cuda() for x in value])
        elif isinstance(value, torch.Tensor) and name not in ("groups", "settings", "hyper"):
            setattr(job, name, value.cuda())
    return job


def on_cpu(job):
    for name, value in vars(job).items():
        if isinstance(value, list):
            setattr(job, name, [None if x is None else x.cpu() for x in value])
        elif isinstance(value, torch.Tensor):
            setattr(job, name, value.cpu())
    return job


@gpu
@needs_gpu
@orders
@cases
def test_gpu_has_the_bits_of_the_cpu(rule, row, two_pass):
    sizes = [*SIZES, 200_000]
    settings = {"settings": new_settings(MAX_GRAD_NORM=1.0 if two_pass else math.inf), "two_pass": two_pass}
    job = make([(n,) for n in sizes], rule, prev=torch.float32, hyper=hyper_row(**row), measure=ALL, **settings)
    here, runner = on_gpu(job), TritonRunner(torch.device("cuda", torch.cuda.current_device()))
    for t in range(3):
        job.grads[:] = [randn(n, 31 * t + i) for i, n in enumerate(sizes)]
        here.grads[:] = [x.cuda() for x in job.grads]
        job.run("native" if ops._C is not None else "eager")
        step(here, runner)
    here = on_cpu(here)
    assert_same_job(job, here, TRAINED)
    assert_same_decisions(job, here, 1e-11)


def trained_on_gpu(shapes, **options):
    params = [torch.nn.Parameter(randn(shape, i).cuda()) for i, shape in enumerate(shapes)]
    for i, p in enumerate(params):
        p.grad = randn(p.shape, 50 + i).cuda()
    return params, lrk.FusedAdamW(params, lr=1e-3, max_grad_norm=1.0, **options)


@gpu
@needs_gpu
def test_gpu_one_launch_and_no_wait():
    _, optimizer = trained_on_gpu([(1000,), (70_000,), (3, 5)], backend="triton")
    optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    there = [event for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    kernels = [event.name for event in there if not event.is_user_annotation]
    assert [name for name in kernels if "Memcpy" not in name] == ["step_kernel"]


@gpu
@needs_gpu
def test_gpu_capture():
    """Replays are steps: the schedule goes on, without the host."""
    shapes = [(1000,), (70_000,), (3, 5)]
    schedule = lrk.schedules.linear(20)
    params, captured = trained_on_gpu(shapes, backend="triton", schedule=schedule)
    others, plain = trained_on_gpu(shapes, backend="triton", schedule=schedule)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(5):
        graph.replay()
    for _ in range(8):
        plain.step()
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)
    assert captured.stats["step"] == 8
