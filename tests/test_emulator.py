"""The CUDA kernels, executed without a GPU; and the emulator that does it, which must notice broken kernels."""

import itertools
import os
import re
import subprocess
import sys

import emulator
import numpy as np
import pytest
import torch
from jobs import (
    ALL,
    CASES,
    TRAINED,
    assert_parts_are_a_step,
    assert_same_decisions,
    assert_same_job,
    f64,
    hyper_row,
    in_parts,
    make,
    orders,
    randn,
    to_be_parted,
)

from lrkernels.layout import ClosedLoopKind, Control, Measure, Setting, Verb

pytestmark = pytest.mark.skipif(not emulator.available, reason="there is no g++")

SEEDS = range(6)

# ----------------------------------------------------------------------------------------------------------------------
# The emulator itself, on small kernels

SAMPLES = emulator.read(emulator.HERE / "samples.cu")
GUARD = 1e9  # what lies behind the numbers


def last_block(library, seed, size):
    """One pass: the sum of the numbers."""
    numbers = np.random.default_rng(seed).uniform(1, 2, size).astype(np.float32)
    memory = np.append(numbers, np.float32([GUARD] * 8))
    partials, finished, total = np.full(size, np.nan), np.zeros(1, np.uint32), np.zeros(1)
    device = emulator.Device(library, seed, resident=1 + seed % 4)
    device.call("sample_last_block", memory, size, partials, finished, total)
    assert total[0] == pytest.approx(numbers.astype(np.float64).sum(), rel=1e-12)


def tickets(library, seed, size):
    """Two passes in one launch: the numbers divided by their sum; twice, for counters that are not reset."""
    numbers = np.random.default_rng(seed).uniform(1, 2, size).astype(np.float32)
    memory = np.append(numbers, np.float32([GUARD] * 8))
    partials, counters, total = np.full(size, np.nan), np.zeros(4, np.uint32), np.zeros(1)
    device = emulator.Device(library, seed, resident=1 + seed % 4)
    for _ in range(2):
        device.call("sample_tickets", memory, size, partials, counters, total, 1 + seed % 6)
        numbers = numbers * np.float32(1 / numbers.astype(np.float64).sum())
    assert np.array_equal(memory[:size], numbers) and np.all(memory[size:] == np.float32(GUARD))
    assert device.launches == 2


SAMPLE_KERNELS = {"last_block": last_block, "tickets": tickets}


@pytest.fixture(scope="module")
def samples():
    return emulator.build(SAMPLES)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 383, 384, 385, 1001])
@pytest.mark.parametrize("kernel", SAMPLE_KERNELS.values(), ids=SAMPLE_KERNELS)
def test_a_right_kernel_is_right_in_every_order(kernel, size, samples):
    for seed in range(12):
        kernel(samples, seed, size)


def test_votes_and_shuffles(samples):
    values = np.random.default_rng(0).standard_normal(96).astype(np.float32)
    out = np.zeros((96, 8), np.uint32)
    for seed in SEEDS:
        emulator.Device(samples, seed).call("sample_votes", values, out)
        positive = (values > 0).reshape(3, 32)
        for thread, (ballot, any_, all_, count, one, both, total, first) in enumerate(out.tolist()):
            warp = thread // 32
            assert ballot == sum(1 << i for i in range(32) if positive[warp, i])
            assert (any_, all_, count, one, both) == (1, 0, positive.sum(), 1, 0)
            assert np.uint32(first).view(np.float32) == values[thread // 8 * 8]
            assert np.uint32(total).view(np.float32) == pytest.approx(values.reshape(3, 32)[warp].sum(), rel=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_that_wait_for_blocks_that_have_not_started(seed, samples):
    emulator.Device(samples, seed, resident=3).call("sample_everybody", np.zeros(1, np.uint32), 3)
    with pytest.raises(emulator.EmulatedError, match=r"deadlock.* 2 blocks are resident and 1 have not started.*cu:\d"):
        emulator.Device(samples, seed, resident=2).call("sample_everybody", np.zeros(1, np.uint32), 3)


def broken(line, instead=""):
    return (line + "\n", instead and instead + "\n")


# What becomes of which text, and what is said of it; None: the result is wrong.
BROKEN_SAMPLES = {
    "no barrier in a block's sum": (
        broken("  __syncthreads();  // the warps' sums are there"),
        "no thread has written",
    ),
    "no barrier between two sums": (broken("  __syncthreads();  // the sum before this one has been read"), "race on"),
    "no barrier before the flag is read": (broken("  __syncthreads();  // last"), "no thread has written|race on"),
    "no barrier before the ticket is read": (broken("    __syncthreads();  // taken"), "no thread has written|race on"),
    "no barrier after the wait": (broken("      __syncthreads();  // waited"), "race on"),
    "no fence before the count": (broken("    __threadfence();  // out"), "race on .* but written by block"),
    "no fence after the count": (broken("    __threadfence();  // in"), "race on .* but written by block"),
    "no fence before the tickets' count": (broken("        __threadfence();  // partial"), "race on"),
    "no fence before the partials are read": (
        broken("          __threadfence();  // every partial is there"),
        "race on",
    ),
    "no fence before the sum is published": (broken("          __threadfence();  // publish"), "race on"),
    "no fence after the wait": (broken("        __threadfence();  // what was summed is there"), "race on"),
    "no wait": (broken("        while (*ready == 0) __nanosleep(20);"), "race on"),
    "a wait for another value": (("while (*ready == 0)", "while (*ready != 2)"), "deadlock"),
    "a count that is not atomic": (("atomicAdd(taken, 1u)", "(*taken)++"), "race on"),
    "a vector too many": (("i + 4 <= end", "i + 1 <= end"), None),
    "an element too few": (("i < end; ++i) rest", "i < end - 1; ++i) rest"), None),
    "a misaligned vector": (("(values + i)", "(values + i + 1)"), "misaligned"),
    "an index out of bounds": (("i < kWarps", "i <= kWarps"), "samples.cu:.*out of bounds"),
    "a barrier that not all reach": (
        broken("  __syncthreads();  // last", "  if (threadIdx.x) __syncthreads();"),
        "barrier",
    ),
    "two barriers for one": (
        broken("  __syncthreads();  // last", "  if (threadIdx.x)\n    __syncthreads();\n  else\n    __syncthreads();"),
        "barrier of line",
    ),
    "a shuffle that not all reach": (
        ("for (int offset = 16;", "if (threadIdx.x != 5) for (int offset = 16;"),
        "deadlock|ended",
    ),
    "a mask without the lane": (
        ("__shfl_down_sync(0xffffffffu", "__shfl_down_sync(0x7fffffffu"),
        "not in its own mask",
    ),
}


@pytest.mark.parametrize("change, message", BROKEN_SAMPLES.values(), ids=BROKEN_SAMPLES)
def test_a_broken_kernel_is_noticed(change, message):
    library = emulator.build(emulator.changed(SAMPLES, *change))
    found = [error for kernel in SAMPLE_KERNELS.values() for error in errors(kernel, library, 1001)]
    assert found
    if message is None:
        assert all(isinstance(error, AssertionError) for error in found)
    else:
        assert re.search(message, str(found[0])), found


def errors(kernel, library, *arguments):
    for seed in SEEDS:
        try:
            kernel(library, seed, *arguments)
        except (AssertionError, emulator.EmulatedError) as error:
            yield error


# ----------------------------------------------------------------------------------------------------------------------
# The kernels

KERNELS = emulator.read(emulator.CSRC / "cuda" / "kernels.cu")
LEARNT = (*TRAINED, "master")
CHUNK = 8192
SANITIZERS = os.environ.get("LRKERNELS_SANITIZERS")  # set by the test that runs some of these with them
OVERRUN = ("scalars = size - vectors * V;", "scalars = size - vectors * V + 1;")


def only(sources, *wanted):
    """Without the other kernels, which g++ would take long for."""
    text = sources["kernels.cu"]
    for rule, kind, full in itertools.product(
        ("kSgd", "kAdamW"), ("kFloats", "kHalves", "kAnything"), ("false", "true")
    ):
        kernel = f"run_step<{rule}, {kind}, {full}>"
        if kernel not in wanted and kernel in text:
            text = text.replace(kernel, "nullptr")
    assert all(kernel in text for kernel in wanted)
    return sources | {"kernels.cu": text}


SANITIZED = ("run_step<kSgd, kFloats, true>", "run_step<kSgd, kHalves, true>")


@pytest.fixture(scope="module")
def kernels():
    if not SANITIZERS:
        return emulator.build(KERNELS, "runner.cpp")
    sources = emulator.changed(KERNELS, *OVERRUN) if SANITIZERS == "overrun" else KERNELS
    return emulator.build(only(sources, *SANITIZED), "runner.cpp", sanitizers=True)


def emulate(job, library, verbs=(Verb.STEP,), **device):
    """Run the job on a new device, as often as there are verbs."""
    kernels = emulator.Kernels(library, **device)
    for verb in verbs:
        kernels.run(int(verb), *job.flags.values(), *job.kernel_arguments)
    assert kernels.launches == len(verbs)
    kernels.finish()
    return job


def assert_is_eager(job, library, steps=1, rel=1e-11, sums=True, **device):
    """The same bits as the eager implementation after some steps, and the same decisions but for rounding."""
    eager, native = job.copy(), job.copy()
    kernels = emulator.Kernels(library, **device)
    for step in range(steps):
        for i, grad in enumerate(job.grads):
            if step and grad is not None:
                eager.grads[i] = native.grads[i] = randn(grad.shape, 50 * step + i, grad.dtype)
        eager.run("eager")
        kernels.run(Verb.STEP, *native.flags.values(), *native.kernel_arguments)
    assert kernels.launches == steps
    kernels.finish()
    assert_same_job(eager, native, LEARNT)
    assert_same_decisions(eager, native, rel, sums=sums)
    assert torch.allclose(eager.history, native.history, rel, 0, equal_nan=True)
    return native


cases = pytest.mark.parametrize("rule, row", CASES.values(), ids=CASES)

# Around the vectors, the warps, what a block takes at once, and the chunk
SIZES = [0, 1, 7, 15, 16, 17, 31, 33, 63, 64, 65, 1000, 4097, CHUNK + 1]


@orders
@cases
def test_kernels_have_the_bits_of_eager(rule, row, two_pass, kernels):
    job = make([(size,) for size in SIZES], rule, prev=torch.float32, hyper=hyper_row(**row), measure=ALL)
    job.two_pass, job.grads[5] = two_pass, None
    job.settings[Setting.MAX_GRAD_NORM] = 1.0
    assert_is_eager(job, kernels, multiprocessors=3, resident=2)


DTYPES = {  # of parameter, gradient, state, previous gradient
    "bfloat16": (torch.bfloat16,) * 4,
    "float16": (torch.float16,) * 4,
    "bfloat16, float32 states": (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
    "float16, float32 gradients": (torch.float16, torch.float32, torch.float16, torch.float32),
    "float32, bfloat16 kept": (torch.float32, torch.float32, torch.float32, torch.bfloat16),
    "float64": (torch.float64,) * 4,
}


@orders
@pytest.mark.parametrize("name", ["sgd-nesterov", "adamw-amsgrad"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_kernels_have_the_bits_of_eager_in_every_dtype(dtypes, name, two_pass, kernels):
    rule, row = CASES[name]
    param, grad, state, prev = dtypes
    job = make([(3,), (0,), (17,), (1025,)], rule, param, grad, state, prev, hyper=hyper_row(**row), measure=ALL)
    job.two_pass = two_pass
    if param == torch.float64:  # of which only eager's sums of products are in another order
        assert_is_close(job, kernels)
    else:
        assert_is_eager(job, kernels, steps=2)


def assert_is_close(job, library):
    """In float64 the fused multiply-adds are not eager's."""
    eager, native = job.copy().run("eager"), emulate(job.copy(), library)
    for name, x in eager.tensors.items():
        assert torch.allclose(x.double(), native.tensors[name].double(), 1e-12, 1e-15, equal_nan=True), name


def mixed(two_pass=False):
    """Every dtype in one launch, two groups, a parameter without a gradient."""
    rows = torch.cat([hyper_row(MOMENTUM=0.9, WEIGHT_DECAY=0.1), hyper_row(MOMENTUM=0.5, MAXIMIZE=1.0)])
    job = make([(65,), (130,), (9,), (8200,), (40,)], prev=torch.float32, hyper=rows, lr=f64([0.1, 0.02]), measure=ALL)
    for i, (param, grad, state, prev) in zip([0, 1, 2], [*DTYPES.values()][:3], strict=True):
        job.params[i], job.grads[i] = job.params[i].to(param), job.grads[i].to(grad)
        job.state0[i], job.prev_write[i] = job.state0[i].to(state), job.prev_write[i].to(prev)
    job.groups[:] = torch.tensor([0, 1, 0, 1, 1])
    job.grads[4] = None
    job.two_pass = two_pass
    return job


@orders
def test_every_grid_and_order_has_the_same_bits(two_pass, kernels):
    first = emulate(mixed(two_pass), kernels, [Verb.STEP] * 2)
    eager = mixed(two_pass).run("eager").run("eager")
    assert_same_job(first, eager, LEARNT)
    for seed, (multiprocessors, resident) in enumerate([(1, 1), (2, 1), (4, 4), (16, 3)]):
        again = emulate(
            mixed(two_pass), kernels, [Verb.STEP] * 2, seed=seed, multiprocessors=multiprocessors, resident=resident
        )
        assert_same_job(first, again)


@in_parts
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw"])
def test_verbs_in_several_calls_are_a_step(name, two_pass, calls, kernels):
    assert_parts_are_a_step(
        to_be_parted(*CASES[name], two_pass), calls, lambda job, verb: emulate(job, kernels, [verb])
    )


@pytest.mark.parametrize("two_pass", [False, True], ids=["one-pass", "two-passes"])
@pytest.mark.parametrize(
    "measure", [0, Measure.NORMS, Measure.NORMS | Measure.DIRECTION, ALL], ids=lambda m: f"measure{int(m)}"
)
def test_what_is_measured(measure, two_pass, kernels):
    if two_pass and not measure:
        pytest.skip("there is nothing to decide")
    rule, row = CASES["sgd-momentum"]
    prev = torch.float32 if measure == ALL else None
    job = make([(17,), (300,)], rule, hyper=hyper_row(**row), measure=measure, two_pass=two_pass, prev=prev)
    assert_is_eager(job, kernels, steps=2)


def with_found_inf(job):
    job.found_inf = torch.ones(1)


def with_scale(job):
    job.grad_scale, job.found_inf = torch.tensor([1024.0]), torch.zeros(1)


def with_nonfinite(job):
    job.settings[Setting.SKIP_NONFINITE] = 1.0
    job.grads[0][3] = torch.inf


def with_normalized(job):
    job.settings[Setting.NORMALIZE] = 1.0


def with_alignment(job):
    job.settings[[Setting.CLOSED_LOOP, Setting.KAPPA]] = f64([ClosedLoopKind.ALIGNMENT, 0.3])
    job.settings[Setting.LAG] = float(not job.two_pass)
    job.table = f64([1.0, 0.5])


def with_gala(job):
    job.settings[[Setting.CLOSED_LOOP, Setting.DELTA]] = f64([ClosedLoopKind.GALA, 1.0])


def with_volsched(job):
    job.settings[[Setting.CLOSED_LOOP, Setting.WINDOW, Setting.CAPACITY]] = f64([ClosedLoopKind.VOL_SCHED, 2.0, 4.0])
    job.control = torch.cat([job.control, torch.ones(3, dtype=torch.float64)])
    job.control[Control.SIGNAL] = 1.5
    job.decay = f64([1.0, 0.9, 0.8])


CHANGES = [with_found_inf, with_scale, with_nonfinite, with_normalized, with_alignment, with_gala, with_volsched]


@orders
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_decisions_are_those_of_eager(change, two_pass, kernels):
    rule, row = CASES["sgd-momentum"]
    job = make([(33,), (300,)], rule, prev=torch.float32, hyper=hyper_row(**row), measure=ALL, two_pass=two_pass)
    change(job)
    assert_is_eager(job, kernels, steps=2, sums=change is not with_found_inf)  # of which nobody asks for a skipped move


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kept", ["master", "at random"])
def test_low_precision(kept, half, kernels):
    rule, row = CASES["sgd-momentum"]
    job = make([(1025,), (7,), ()], rule, half, state_dtype=torch.float32, hyper=hyper_row(**row), measure=ALL)
    if kept == "master":
        job.master = [p.float() for p in job.params]
    else:
        job.settings[Setting.STOCHASTIC_ROUNDING] = 1.0
    assert_is_eager(job, kernels, steps=2)


FRAME = 7.0


def frame(job, offsets=(0, 0, 0, 0)):
    """Move the tensors so many elements behind an aligned address, in the middle of sevens, and return the frames."""
    frames = []
    for name, offset in zip(("params", "grads", "state0", "prev_write"), offsets, strict=True):
        tensors = getattr(job, name)
        for i, x in enumerate(tensors):
            around = torch.full((x.numel() + 48,), FRAME, dtype=x.dtype)
            tensors[i] = around[16 + offset :][: x.numel()].copy_(x)
            frames.append((around, 16 + offset, 16 + offset + x.numel()))
    return frames


def assert_whole(frames):
    assert all((around[:begin] == FRAME).all() and (around[end:] == FRAME).all() for around, begin, end in frames)


@orders
@pytest.mark.parametrize("offsets", [(1, 1, 1, 1), (3, 3, 3, 3), (0, 1, 0, 0), (2, 0, 2, 3)], ids=str)
def test_tensors_that_begin_between_the_vectors(offsets, two_pass, kernels):
    """Alike, they have a head and a tail of single elements; otherwise no vectors. Nothing else is written."""
    rule, row = CASES["sgd-momentum"]
    job = make([(2,), (66,), (1030,)], rule, prev=torch.float32, hyper=hyper_row(**row), measure=ALL, two_pass=two_pass)
    eager, frames = job.copy().run("eager"), frame(job, offsets)
    emulate(job, kernels)
    assert_same_job(eager, job, LEARNT)
    assert_whole(frames)


@orders
def test_more_rows_than_an_argument_holds(two_pass, kernels):
    """They go through device memory; most are empty, so that the test is quick."""
    job = make([(0 if i % 40 else 5,) for i in range(400)], prev=torch.float32, measure=ALL, two_pass=two_pass)
    eager, device = job.copy().run("eager"), emulator.Kernels(kernels)
    device.run(Verb.STEP, *job.flags.values(), *job.kernel_arguments)
    assert device.allocations == 3  # counters and partial sums, and the list twice
    device.finish()
    assert_same_job(eager, job, LEARNT)
    assert_same_decisions(eager, job, 1e-11)


# What becomes of which text of the kernels, and what is said of it; None: the result is wrong.
BROKEN = {
    "no barrier in a block's sum": (
        ("  __syncthreads();\n  double sum = 0;", "  double sum = 0;"),
        "no thread|race on",
    ),
    "no fence before a count": (("__threadfence();  // what", "// what"), "race on .* written by block"),
    "no fence after a count": (("if (shared_last) __threadfence();", ""), "race on .* written by block"),
    "no wait for the decision": (("while (load_acquire(&counters.decided) == 0) __nanosleep(100);", ";"), "race on"),
    "no decision": (("store_release(&counters.decided, 1u)", "(void)0"), "deadlock"),
    "a decision without release": (("store_release(&counters.decided, 1u)", "counters.decided = 1"), "race on"),
    "counters not left at zero": (("counters.left = counters.decided = 0", "(void)0"), "counters at zero"),
    "an element too few": (("scalars = size - vectors * V", "scalars = size - vectors * V - 1"), None),
    "a vector too many": (("(size - head) / V;", "(size - head + V - 1) / V;"), None),
    "vectors without regard to alignment": (
        ("if (std::all_of(std::begin(tensors), std::end(tensors), aligned))", "if (aligned(tensors[0]) || true)"),
        "misaligned",
    ),
}


ALWAYS = ["no barrier in a block's sum", "no fence before a count", "no wait for the decision", "an element too few"]


@pytest.mark.parametrize(
    "change, message",
    [pytest.param(*row, id=name, marks=[] if name in ALWAYS else pytest.mark.slow) for name, row in BROKEN.items()],
)
def test_a_broken_copy_of_the_kernels_is_noticed(change, message):
    sources = only(emulator.changed(KERNELS, *change), "run_step<kSgd, kFloats, true>")
    library = emulator.build(sources, "runner.cpp")
    found = []
    for seed in range(4):
        job = make([(CHUNK + 1,), (37,)], prev=torch.float32, hyper=hyper_row(MOMENTUM=0.9), measure=ALL, two_pass=True)
        eager, frames = job.copy().run("eager"), frame(job, (int(message == "misaligned"), 0, 0, 0))
        try:
            assert_same_job(eager, emulate(job, library, seed=seed, multiprocessors=3, resident=1 + seed), LEARNT)
            assert_same_decisions(eager, job, 1e-11)
            assert_whole(frames)
        except (AssertionError, emulator.EmulatedError) as error:
            found.append(error)
    assert found
    if message is not None:
        assert re.search(message, str(found[0])), found


@pytest.mark.slow
@pytest.mark.skipif(SANITIZERS is not None, reason="this is that process")
@pytest.mark.parametrize(
    "kind, names, found",
    [("as it is", "sgd-momentum-two-passes or has_the_same_bits", ""), ("overrun", "sgd-momentum-two-passes", "heap-")],
    ids=["as it is", "one element beyond"],
)
def test_under_the_address_and_undefined_behaviour_sanitizers(kind, names, found):
    """Whatever reads or writes outside of a tensor, on the device or on the host."""
    libraries = [emulator.library_path("libasan.so"), emulator.library_path("libubsan.so")]
    environment = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "LRKERNELS_SANITIZERS": kind}
    command = [sys.executable, "-m", "pytest", "-x", "-s", "-p", "no:cacheprovider", "-k", names, __file__]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    output = result.stdout[-3000:] + result.stderr[-3000:]
    assert (result.returncode == 0) == (not found), output
    assert found in result.stdout + result.stderr, output
