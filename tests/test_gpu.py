"""The CUDA kernels on a device: bits, launches, waits, graphs, streams, sizes. Skipped where there is none."""

import copy
import gc

import jobs
import pytest
import torch
from cases import CLOSED_LOOPS, DTYPES, LAYOUTS, OPTIONS, SCHEDULES, SIZES
from conftest import assert_close, assert_same_bits, fused, gradients, parameters, set_grads, states, train
from torch import Tensor

from lrkernels import FusedAdamW, FusedSGD, ops
from lrkernels.layout import RING_AT, SUMS_AT, Control, Rule, Setting, Sum, Verb

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not (ops._C and ops._C.cuda_architectures()), reason="the binary has no CUDA kernels"),
]

CUDA = torch.device("cuda:0")
SHAPES = [(64, 3, 7, 7), (64,), (1000, 33), (7,), (1,), (300_001,)]
MOMENTUM = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
WATCHED = {"track": ("direction",)}


def on(device, tensors):
    return [None if x is None else x.to(device) for x in tensors]


def cuda_parameters(shapes, dtype=torch.float32, layout=torch.clone):
    return [torch.nn.Parameter(layout(p.detach().to(CUDA))) for p in parameters(shapes, dtype)]


def both(
    kind, options, shapes, steps=3, dtype=torch.float32, grad_dtype=None, layouts=(torch.clone, torch.clone), **more
):
    """The native kernels and the eager implementation, both on the device, after the same steps."""
    trained = []
    for backend in ("native", "eager"):
        params = cuda_parameters(shapes, dtype, layouts[0])
        optimizer = fused(kind, params, {**options, **more}, backend=backend)
        for row in gradients(shapes, steps, grad_dtype or dtype):
            set_grads(params, [layouts[1](g.to(CUDA)) for g in row])
            optimizer.step()
        trained.append((optimizer, params))
    return trained


# ----------------------------------------------------------------------------------------------------------------------
# The operators, over the tables of jobs.py


def moved(job):
    """A job of jobs.py on the device; what the host reads stays with it."""
    there = copy.deepcopy(job)
    for name, value in vars(there).items():
        if isinstance(value, list):
            setattr(there, name, on(CUDA, value))
        elif isinstance(value, Tensor) and name not in ("groups", "settings", "hyper"):
            setattr(there, name, value.to(CUDA))
    return there


def run(job, backend, verb=Verb.STEP):
    if backend == "native":
        getattr(torch.ops.lrkernels, jobs.VERBS[verb])(*job.arguments, **job.flags)
    else:
        ops.backend_for(CUDA, "eager")(verb, *job.flags.values(), *job.kernel_arguments)
    return job


def home(job):
    there = copy.copy(job)
    for name, value in vars(job).items():
        setattr(
            there,
            name,
            on("cpu", value) if isinstance(value, list) else value.cpu() if isinstance(value, Tensor) else value,
        )
    return there


def assert_same_step(native, eager):
    native, eager = home(native), home(eager)
    jobs.assert_same_job(eager, native, (*jobs.TRAINED, "master"))
    jobs.assert_same_decisions(eager, native, 1e-6, 1e-12)


@jobs.orders
@pytest.mark.parametrize("rule, row", jobs.CASES.values(), ids=jobs.CASES)
def test_bits_of_eager(rule, row, two_pass):
    job = jobs.make(
        [(n,) for n in jobs.SIZES],
        rule,
        prev=torch.float32,
        hyper=jobs.hyper_row(**row),
        measure=jobs.ALL,
        two_pass=two_pass,
    )
    job.settings[Setting.MAX_GRAD_NORM] = 1.0 if two_pass else float("inf")
    native, eager = moved(job), moved(job)
    for step in range(3):
        for each in (native, eager):
            each.grads = on(CUDA, [jobs.randn(n, 31 * step + i) for i, n in enumerate(jobs.SIZES)])
        run(native, "native")
        run(eager, "eager")
    assert_same_step(native, eager)


@jobs.orders
@pytest.mark.parametrize("dtypes", jobs.DTYPES.values(), ids=jobs.DTYPES)
@pytest.mark.parametrize("name", ["sgd", "sgd-momentum", "adamw-amsgrad"])
def test_bits_of_eager_in_every_dtype(name, dtypes, two_pass):
    rule, row = jobs.CASES[name]
    kinds = dict(zip(("dtype", "grad_dtype", "state_dtype", "prev"), dtypes, strict=True))
    job = jobs.make([(70_001,), (7,), ()], rule, **kinds, hyper=jobs.hyper_row(**row), measure=jobs.ALL)
    job.two_pass = two_pass
    native, eager = run(moved(job), "native"), run(moved(job), "eager")
    assert_same_step(native, eager)


@jobs.orders
@pytest.mark.parametrize("kept", ["master", "at-random"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_bits_of_eager_in_low_precision(half, kept, two_pass):
    row = jobs.hyper_row(MOMENTUM=0.9, WEIGHT_DECAY=0.1)
    job = jobs.make([(70_001,), (7,)], Rule.SGD, dtype=half, state_dtype=torch.float32, hyper=row, measure=jobs.ALL)
    job.two_pass = two_pass
    if kept == "master":
        job.master = [p.float() for p in job.params]
    else:
        job.settings[Setting.STOCHASTIC_ROUNDING] = 1.0
    assert_same_step(run(moved(job), "native"), run(moved(job), "eager"))


@jobs.orders
@pytest.mark.parametrize("loop", jobs.CLOSED_LOOPS)
def test_decides_as_eager(loop, two_pass):
    """Six steps, one skipped by the scaler, with a schedule and a scaled loss."""
    if loop == "skip-nonfinite" and not two_pass:
        pytest.skip("it is too late to skip when the sums come with the update")
    row = jobs.hyper_row(MOMENTUM=0.9, WEIGHT_DECAY=0.1)
    job = jobs.make([(40,), (3, 5)], Rule.SGD, prev=torch.float32, hyper=row, measure=jobs.ALL, two_pass=two_pass)
    job.settings, job.control = jobs.new_settings(**jobs.CLOSED_LOOPS[loop]), jobs.new_control(ring=5)
    job.table, job.decay = (torch.linspace(1, end, 9, dtype=torch.float64) for end in (0.5, 0.0))
    job.grad_scale, job.found_inf = torch.tensor([8.0]), torch.tensor([0.0])
    native, eager = moved(job), moved(job)
    for step in range(6):
        for each, backend in ((native, "native"), (eager, "eager")):
            each.grads = on(CUDA, [8 * jobs.randn(p.shape, 50 * step + i) for i, p in enumerate(job.params)])
            each.found_inf.fill_(float(step == 3))
            each.control[Control.SIGNAL] = [0.3, 0.4, float("nan"), 0.2, 0.6, 0.5][step]
            run(each, backend)
        jobs.assert_same_decisions(home(eager), home(native), 1e-6, 1e-12, sums=False)
    assert native.control[Control.SKIPPED] == 1 and native.control[Control.STEP] == 5
    assert_close(native.params, eager.params, 1e-6, 1e-7)


@pytest.mark.parametrize("verb", jobs.VERBS, ids=jobs.VERBS.values())
def test_no_parameters(verb):
    job = run(moved(jobs.Job([], [], two_pass=True)), "native", verb)
    assert job.control[Control.STEP] == bool(verb & Verb.APPLY)
    assert set(job.sums.values()) == {0.0}


@jobs.in_parts
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw"])
def test_verbs_in_several_calls_are_a_step(name, two_pass, calls):
    runner = ops.backend_for(CUDA, "native")
    jobs.assert_parts_are_a_step(
        moved(jobs.to_be_parted(*jobs.CASES[name], two_pass, shapes=[(33,), (70_000,), (4, 5)])),
        calls,
        lambda job, verb: runner(verb, *job.flags.values(), *job.kernel_arguments),
    )


# ----------------------------------------------------------------------------------------------------------------------
# The optimizers


@pytest.mark.parametrize("kind, options", OPTIONS)
def test_optimizers_have_the_bits_of_eager(kind, options):
    (native, params), (eager, expected) = both(kind, options, [(n,) for n in SIZES], **WATCHED)
    assert_same_bits(params, expected)
    assert_same_bits(states(native, params), states(eager, expected))


@pytest.mark.parametrize("dtype, grad_dtype", DTYPES)
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_dtypes(kind, dtype, grad_dtype):
    (_, params), (_, expected) = both(kind, {"lr": 0.05}, SHAPES, dtype=dtype, grad_dtype=grad_dtype, max_grad_norm=1.0)
    if dtype == torch.float64:
        assert_close(params, expected, 1e-13, 1e-14)
    else:
        assert_same_bits(params, expected)


@pytest.mark.parametrize("shape, layout, grad_layout", LAYOUTS)
def test_layouts(shape, layout, grad_layout):
    (_, params), (_, expected) = both(FusedSGD, MOMENTUM, [shape, (33,)][:1], layouts=(layout, grad_layout))
    assert [p.stride() for p in params] == [p.stride() for p in expected]
    assert_same_bits(params, expected)


def test_mixed_dtypes_and_groups_are_one_launch():
    params = [
        torch.nn.Parameter(p.to(CUDA))
        for d in (torch.float32, torch.bfloat16, torch.float64)
        for p in parameters(SHAPES, d)
    ]
    groups = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(params)]
    optimizer = FusedSGD(groups, momentum=0.9, max_grad_norm=1.0)
    assert len(kernels(optimizer, params)) == 1


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("which", ["all", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_views_into_a_flat_buffer(dtype, which, offset):
    """As of a bucket of gradients: aligned to an element, not to sixteen bytes."""
    trained = []
    for backend in ("native", "eager"):
        storages = [torch.randn(70_100, generator=torch.Generator().manual_seed(s)).to(CUDA, dtype) for s in (0, 1)]
        param = torch.nn.Parameter(storages[0][offset if which == "all" else 0 :][:70_001])
        param.grad = storages[1][offset:][:70_001]
        optimizer = FusedSGD([param], lr=0.1, momentum=0.9, backend=backend, **WATCHED)
        for _ in range(2):
            optimizer.step()
        trained.append((storages, optimizer))
    (native, a), (eager, b) = trained
    assert_same_bits(native, eager)  # what lies around them too
    assert a.stats["grad_norm"].item() == pytest.approx(b.stats["grad_norm"].item(), rel=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    (native, params), (eager, expected) = both(FusedSGD, MOMENTUM, [(33,)], steps=25, schedule=SCHEDULES[name])
    assert_same_bits(params, expected)
    assert native.history()["lr"].tolist() == eager.history()["lr"].tolist()


@pytest.mark.parametrize("name", CLOSED_LOOPS)
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
@pytest.mark.filterwarnings("ignore:.*no signal")
def test_closed_loops(kind, name):
    (native, params), (eager, expected) = both(kind, {"lr": 0.05}, SHAPES, steps=12, schedule=CLOSED_LOOPS[name])
    for key, values in native.history().items():
        assert values == pytest.approx(eager.history()[key], rel=1e-5, abs=1e-9, nan_ok=True), key
    assert_close(params, expected, 1e-5, 1e-6)


def test_many_tensors_are_still_one_launch():
    """More rows than an argument holds: they are copied first, and that is no launch."""
    params = [torch.nn.Parameter(torch.randn(5, device=CUDA)) for _ in range(3000)]
    optimizer = FusedSGD(params, **MOMENTUM, max_grad_norm=1.0)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    eager = FusedSGD(copies, **MOMENTUM, max_grad_norm=1.0, backend="eager")
    for step in range(3):  # the copies of the rows overtake the launches that read them, if they can
        for p, c in zip(params, copies, strict=True):
            p.grad = torch.full_like(p, 0.1 * step + 0.01)
            c.grad = p.grad.clone()
        optimizer.step()
        eager.step()
    assert_close(params, copies, 1e-6, 1e-7)
    assert len(kernels(optimizer, params)) == 1


@pytest.mark.parametrize("count", [1, 2, 300, 320, 340, 1000])
def test_any_number_of_tensors_is_one_launch(count):
    """In the launch's argument, up to its last word, and beside it."""
    params = [torch.nn.Parameter(torch.zeros(5, device=CUDA)) for _ in range(count)]
    assert len(kernels(FusedSGD(params, lr=1.0), params)) == 1
    assert torch.equal(torch.stack([p.detach() for p in params]), torch.full((count, 5), -3.0, device=CUDA))


def kernels(optimizer, params):
    """The names of one step's kernels, after two steps to get ready, as the profiler has them."""
    for _ in range(2):
        set_grads(params, [torch.ones_like(p) for p in params])
        optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        optimizer.step()
        torch.cuda.synchronize()
    there = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in there if not event.is_user_annotation and not event.name.startswith("Mem")]


@pytest.mark.parametrize("more", [{}, WATCHED, {"max_grad_norm": 1.0}, {"track": ("alignment",)}], ids=str)
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_one_launch_a_step(kind, more):
    params = cuda_parameters(SHAPES)
    assert len(kernels(kind(params, lr=0.1, **more), params)) == 1


def assert_four_steps_wait_for_nothing(optimizer, params, between=lambda: None):
    set_grads(params, [torch.ones_like(p) for p in params])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            optimizer.observe(0.5)
            optimizer.step()
            between()
            assert optimizer.stats["grad_norm"].is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.stats["step"] == 4


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("name", [None, *CLOSED_LOOPS])
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
@pytest.mark.filterwarnings("ignore:.*no signal")
def test_no_step_waits(kind, name, backend):
    params = cuda_parameters(SHAPES)
    more = {"schedule": CLOSED_LOOPS[name] if name else SCHEDULES["cosine"], "track": ("grad_norm", "direction")}
    optimizer = kind(params, lr=0.05, max_grad_norm=1.0, backend=backend, **more)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    assert_four_steps_wait_for_nothing(optimizer, params, scheduler.step)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_step_waits_for_a_rate(device):
    params, rate = cuda_parameters(SHAPES), torch.tensor(0.05, device=device)
    optimizer = FusedSGD(params, lr=rate, momentum=0.9, nesterov=True, track="grad_norm")
    assert_four_steps_wait_for_nothing(optimizer, params, lambda: rate.mul_(0.5))


def test_same_bits_every_time():
    """Whatever else is on the device, and so however many blocks run at once."""
    results = []
    other = torch.randn(4096, 4096, device=CUDA)
    for busy in (False, True, False):
        params = cuda_parameters([(3_000_001,), (77,)])
        optimizer = FusedSGD(params, **MOMENTUM, max_grad_norm=1.0, track=("alignment", "direction"))
        side = torch.cuda.Stream()
        for row in gradients([(3_000_001,), (77,)], 3):
            set_grads(params, on(CUDA, row))
            if busy:
                with torch.cuda.stream(side):
                    for _ in range(10):
                        other @ other
            optimizer.step()
        results.append([params, optimizer._controller.control, optimizer.history()["grad_norm"].tolist()])
    for result in results[1:]:
        assert_same_bits(result[:2], results[0][:2])
        assert result[2] == results[0][2]


def assert_an_overflow_is_skipped(optimizer, params, loss):
    """``loss(factor)``: of the four steps, the second's gradients are not finite."""
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    for step in range(4):
        scaler.scale(loss(float("inf") if step == 1 else 1.0)).backward()
        before = [p.detach().clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 1:
            assert_same_bits(params, before)
    assert optimizer.stats["step"] == 3 and optimizer.stats["skipped"] == 1


def test_skipped_by_the_scaler():
    params = cuda_parameters(SHAPES)
    optimizer = FusedSGD(params, **MOMENTUM, schedule=SCHEDULES["linear"], **WATCHED)
    assert_an_overflow_is_skipped(optimizer, params, lambda factor: sum((p * factor).sum() for p in params))


# ----------------------------------------------------------------------------------------------------------------------
# Streams and graphs


def test_the_current_stream_is_taken():
    params = cuda_parameters(SHAPES)
    optimizer = FusedSGD(params, lr=1.0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the gradients come late, on this stream
        set_grads(params, [torch.ones_like(p) for p in params])
        before = [p.detach().clone() for p in params]
        optimizer.step()
    stream.synchronize()
    assert_close(params, [p - 1.0 for p in before], 0, 0)


def test_optimizers_on_several_streams():
    """Each has counters of its own."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    runs = []
    for stream in streams:
        params = cuda_parameters([(500_000,), (33,)])
        set_grads(params, [torch.full_like(p, 0.1) for p in params])
        runs.append((stream, params, FusedSGD(params, **MOMENTUM, max_grad_norm=1.0)))
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, _, optimizer in runs:
            with torch.cuda.stream(stream):
                optimizer.step()
    torch.cuda.synchronize()
    for _, params, _ in runs[1:]:
        assert_same_bits(params, runs[0][1])


def captured(kind, options, seed=0, **more):
    """An optimizer whose step is in a graph, its static gradients, and the graph."""
    params = cuda_parameters(SHAPES)
    optimizer = fused(kind, params, options, **more)
    set_grads(params, [torch.zeros_like(p) for p in params])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for p, g in zip(params, gradients(SHAPES, 1, seed=seed)[0], strict=True):
            p.grad.copy_(g)
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return optimizer, params, graph


def replay(params, graph, rows):
    for row in rows:
        for p, g in zip(params, row, strict=True):
            p.grad.copy_(g)
        graph.replay()


GRAPHS = {
    "schedule": {"schedule": SCHEDULES["linear"]},
    "clip": {"max_grad_norm": 0.5, "schedule": SCHEDULES["cosine"]},
    "alignment": {"schedule": CLOSED_LOOPS["alignment-lag1"]},
    "gala": {"schedule": CLOSED_LOOPS["gala"]},
    "kept": {"track": ("alignment",), "max_grad_norm": 0.5},
}


@pytest.mark.parametrize("more", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_replays_are_steps(kind, more):
    """Rates, position, clip and history go on as if each replay had been a call."""
    rows = gradients(SHAPES, 6, seed=5)
    optimizer, params, graph = captured(kind, {"lr": 0.05}, **more)
    replay(params, graph, rows)
    expected = cuda_parameters(SHAPES)
    eager = fused(kind, expected, {"lr": 0.05}, **more)
    train(eager, expected, [on(CUDA, row) for row in [gradients(SHAPES, 1, seed=0)[0], *rows]])
    assert_same_bits(params, expected)
    for key, values in optimizer.history().items():
        assert values.tolist() == pytest.approx(eager.history()[key].tolist(), rel=1e-12, nan_ok=True), key
    assert optimizer.stats["step"] == 7


def test_a_rate_on_the_device_is_read_by_replays():
    rate = torch.tensor(0.5, device=CUDA)
    _, params, graph = captured(FusedSGD, {}, lr=rate)
    before = [p.detach().clone() for p in params]
    rate.zero_()
    replay(params, graph, gradients(SHAPES, 1))
    assert_same_bits(params, before)


def test_loading_into_a_captured_optimizer_takes_effect():
    first, params, graph = captured(FusedAdamW, {"lr": 0.05}, schedule=SCHEDULES["linear"])
    rows = gradients(SHAPES, 3, seed=9)
    saved, values = copy.deepcopy(first.state_dict()), [p.detach().clone() for p in params]
    replay(params, graph, rows)
    ends = [p.detach().clone() for p in params]
    replay(params, graph, rows)
    first.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    replay(params, graph, rows)
    assert_same_bits(params, ends)
    assert first.stats["step"] == 4


@pytest.mark.parametrize("wrong", ["first", "gradient", "rate", "history", "swap", "cpu_rate"])
def test_what_cannot_be_captured_is_refused(wrong):
    options = {"history": {"history_size": None}, "swap": {"track": ("alignment",), "prev_grad": "swap"}}.get(wrong, {})
    params = cuda_parameters(SHAPES)
    optimizer = FusedSGD(params, lr=torch.tensor(0.1) if wrong == "cpu_rate" else 0.1, momentum=0.9, **options)
    set_grads(params, [torch.ones_like(p) for p in params])
    if wrong != "first":
        optimizer.step()
    if wrong == "gradient":
        params[0].grad = None
    if wrong == "rate":
        optimizer.param_groups[0]["lr"] = 0.2
    before = [p.detach().clone() for p in params]
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"^lrkernels: .*take a step outside"), torch.cuda.graph(graph):
        optimizer.step()
    torch.cuda.synchronize()
    assert_same_bits(params, before)


@pytest.mark.parametrize("backend, count", [("native", 3), ("native", 1500), ("triton", 3), ("triton", 1500)])
def test_a_graph_keeps_what_it_reads(backend, count):
    """The list of rows stays as it was at the capture, whatever steps come between."""
    if backend == "triton":
        pytest.importorskip("triton", "3.6")
    params = [torch.nn.Parameter(torch.zeros(5, device=CUDA)) for _ in range(count)]
    optimizer = FusedSGD(params, lr=1.0, backend=backend)
    static = [torch.ones_like(p) for p in params]
    set_grads(params, static)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(5):
        set_grads(params, [torch.zeros_like(p) for p in params])
        optimizer.step()
    torch.full((200_000,), 7, device=CUDA, dtype=torch.int64)  # whoever gets the memory that was given back
    graph.replay()
    assert all(bool((p == -2.0).all()) for p in params)


# ----------------------------------------------------------------------------------------------------------------------
# Several devices

several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
WAYS = {"plain": {}, "clip": {"max_grad_norm": 0.5}, "kept": {"track": ("alignment",)}}
WAYS |= {name: {"schedule": CLOSED_LOOPS[name]} for name in ("alignment-lag0", "alignment-lag1", "gala", "volsched")}


def spread_out(shapes, count):
    """Parameters that take turns on the first ``count`` devices."""
    return [torch.nn.Parameter(p.detach().to(f"cuda:{i % count}")) for i, p in enumerate(parameters(shapes))]


def steps(optimizer, params, count=5):
    for row in gradients([p.shape for p in params], count):
        set_grads(params, [g.to(p.device) for g, p in zip(row, params, strict=True)])
        optimizer.observe(0.5)
        optimizer.step()


@several
@pytest.mark.parametrize("more", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("kind", [FusedSGD, FusedAdamW])
def test_several_devices_train_as_one(kind, more):
    trained = []
    for count in (1, torch.cuda.device_count()):
        params = spread_out(SHAPES, count)
        optimizer = kind(params, lr=0.05, **more)
        steps(optimizer, params)
        trained.append(([p.cpu() for p in params], optimizer))
    (one, a), (two, b) = trained
    assert_same_bits(two, one)
    for name, values in a.history().items():
        assert b.history()[name] == pytest.approx(values, rel=1e-6, nan_ok=True), name


@several
@pytest.mark.parametrize("more", WAYS.values(), ids=WAYS)
def test_no_step_on_several_devices_waits(more):
    """Nor overtakes: the gradients come late on one device, and then on the other."""
    params = spread_out(SHAPES, 2)
    optimizer = FusedSGD(params, lr=0.05, momentum=0.9, **more)
    rows = [[g.to(p.device) for g, p in zip(row, params, strict=True)] for row in gradients(SHAPES, 5)]
    set_grads(params, [torch.zeros_like(p) for p in params])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for late, row in enumerate(rows):
            with torch.cuda.device(late % 2):
                torch.cuda._sleep(20_000_000)
            for p, g in zip(params, row, strict=True):
                p.grad.copy_(g)
            optimizer.observe(0.5)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = spread_out(SHAPES, 1)
    steps(FusedSGD(expected, lr=0.05, momentum=0.9, **more), expected)
    assert_same_bits([p.cpu() for p in params], [p.cpu() for p in expected])


@several
@pytest.mark.parametrize(
    "more, launches",
    [({}, 2), ({"track": "grad_norm"}, 3), ({"max_grad_norm": 0.5}, 4)],
    ids=["plain", "watched", "clip"],
)
def test_launches_on_several_devices(more, launches):
    """One on each, and one on the first if it decides for the next step; two on each where both decide for this one."""
    params = spread_out(SHAPES, 2)
    found = kernels(FusedSGD(params, lr=0.05, **more), params)
    assert len([name for name in found if "run_step" in name]) == launches, found


@several
def test_a_scaler_over_several_devices():
    params = spread_out(SHAPES, 2)

    def loss(factor):
        return sum((p * (factor if i == 1 else 1.0)).sum().to(CUDA) for i, p in enumerate(params))

    assert_an_overflow_is_skipped(FusedAdamW(params, lr=0.1), params, loss)


@several
def test_a_checkpoint_of_several_devices_continues_on_one():
    more = {"lr": 0.05, "schedule": CLOSED_LOOPS["gala"], "max_grad_norm": 0.5}
    params = spread_out(SHAPES, 2)
    optimizer = FusedAdamW(params, **more)
    steps(optimizer, params)
    copies = [torch.nn.Parameter(p.detach().to(CUDA, copy=True)) for p in params]
    other = FusedAdamW(copies, **more)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, params)
    steps(other, copies)
    assert_same_bits([p.cpu() for p in params], [p.cpu() for p in copies])


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.slow
def test_more_than_two_to_the_31st_elements():
    size = 2**31 + 12_345
    if torch.cuda.mem_get_info()[0] < 6 * size:
        pytest.skip("needs 13 GB")
    param = torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16, device=CUDA))
    param.grad = torch.zeros_like(param)
    spots = [0, 1, 2**31 - 1, 2**31, size - 1]
    param.grad[spots] = 2.0
    FusedSGD([param], lr=1.0, max_grad_norm=10.0, **WATCHED).step()
    assert param[spots].tolist() == [-2.0] * len(spots)
    assert torch.count_nonzero(param) == len(spots)
    del param
    gc.collect()


@several
def test_the_parameters_device_is_taken():
    param = torch.nn.Parameter(torch.ones(1000, device="cuda:1"))
    param.grad = torch.ones_like(param)
    assert torch.cuda.current_device() == 0
    FusedSGD([param], lr=1.0).step()
    assert torch.cuda.current_device() == 0 and not param.any()


def test_statistics_are_exact_enough():
    """Within 1e-6 of float64, for gradients of many magnitudes, and where float32 squares leave its range."""
    for scale in (1.0, 1e-30, 1e30):
        grad = torch.randn(1_000_003, generator=torch.Generator().manual_seed(3)) * scale
        param = torch.nn.Parameter(torch.zeros_like(grad, device=CUDA))
        param.grad = grad.to(CUDA)
        optimizer = FusedSGD([param], lr=0.0, momentum=0.9, **WATCHED)
        for _ in range(2):
            optimizer.step()
        exact = grad.double().norm().item()
        assert optimizer.stats["grad_norm"].item() == pytest.approx(exact, rel=1e-6)
        assert optimizer.stats["direction_cosine"].item() == pytest.approx(1.0, rel=1e-6)
        control = optimizer._controller.control
        assert len(control) > RING_AT and control[SUMS_AT + Sum.GRAD_ABS].item() == pytest.approx(
            grad.double().abs().sum().item(), rel=1e-6
        )
