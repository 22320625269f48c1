"""The binary: what it needs from the machine, that it compiles without a warning, that both instruction sets agree."""

import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import numpy as np
import pytest
import setuptools
import torch
from torch.utils import cpp_extension

import lrkernels as lrk
from lrkernels import layout, ops
from lrkernels.layout import RING_AT, STATS, SUMS_AT, Control, Count, Hyper, Measure, Rule, Setting, Sum, Verb

ROOT = Path(__file__).parent.parent
PYTHON_H = Path(sysconfig.get_paths()["include"]) / "Python.h"

needs_native = pytest.mark.skipif(ops._C is None, reason="the binary is not there")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") and PYTHON_H.exists() and (ROOT / "csrc").exists()),
    reason="needs g++, Python's headers and the sources",
)
x86_64 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86-64 has two paths")


def needs(tool):
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"needs {tool}")


def run(*command, **options):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True, **options).stdout


# ----------------------------------------------------------------------------------------------------------------------
# The binary that is installed


@needs_native
def test_one_binary_for_every_python():
    assert ops._C.__file__.endswith(".abi3.so")


@needs_native
@needs("nm")
def test_nothing_of_libtorch_but_its_c_shim():
    """So one build serves every torch that has DLPack's exchange API."""
    symbols = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", ops._C.__file__).splitlines()]
    readable = run("nm", "-D", "-C", "--undefined-only", ops._C.__file__)
    assert not re.findall(r"\b(?:c10|at|torch|caffe2|pybind11)::\S*", readable)
    shim = {name for name in symbols if re.match(r"(?:torch|aoti|at|c10)_", name)}
    read = {name for name in shim if re.match(r"aoti_torch_(?:get|dtype|layout|device_type)_", name)}
    assert read and shim - read == {"torch_parallel_for", "torch_get_num_threads"}
    assert any(name.startswith("PyList_") for name in symbols)  # the listing is of the right thing


@needs_native
@needs("objdump")
def test_libraries_that_the_binary_asks_for():
    libraries = re.findall(r"NEEDED\s+(\S+)", run("objdump", "-p", ops._C.__file__))
    assert any(name.startswith("libtorch_cpu") for name in libraries)
    assert not [name for name in libraries if name.startswith(("libpython", "libtorch_python", "libcudart"))]


@needs_native
@needs("nm")
def test_one_symbol_is_exported():
    defined = [line.split() for line in run("nm", "-D", "--defined-only", ops._C.__file__).splitlines()]
    assert [name for _, kind, name in defined if kind == "T"] == ["PyInit__C"]


def test_info_names_what_serves():
    text = lrk.info()
    assert f"torch {torch.__version__}" in text and f"lrkernels {lrk.__version__}" in text
    assert platform.python_version() in text
    (cpu,) = [line for line in text.splitlines() if line.startswith("cpu")]
    if ops._C is None:
        assert "eager" in cpu and ops.why_no_native in cpu
    else:
        assert "native" in cpu and ops._C.instruction_set() in cpu and f"{torch.get_num_threads()} thread" in cpu


@needs_native
@x86_64
def test_the_instruction_set_is_the_machines():
    """By what torch sees: it asks for AVX2 and FMA too."""
    wide = torch.backends.cpu.get_cpu_capability() != "DEFAULT" and "ATEN_CPU_CAPABILITY" not in os.environ
    if not wide:
        pytest.skip("torch has found no AVX2, or was told not to look")
    assert ops._C.instruction_set() == "x86-64-v3 (AVX2, FMA)"


WITHOUT = """
import sys
sys.modules["lrkernels._C"] = None
import torch
import lrkernels as lrk
from lrkernels import ops
assert ops._C is None
print(lrk.info())
for name in ("measure_", "decide_", "apply_", "step_"):
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"lrkernels::{name}", "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lrkernels::{name}", "CompositeExplicitAutograd")
p = torch.nn.Parameter(torch.arange(5.0))
optimizer = lrk.FusedSGD([p], lr=0.5, momentum=0.9, max_grad_norm=1.0)
for _ in range(3):
    p.grad = torch.ones(5)
    optimizer.step()
print(p.tolist())
try:
    lrk.FusedSGD([p], lr=0.5, backend="native").step()
except RuntimeError as error:
    print(error)
"""


def test_works_without_the_binary():
    """Eager serves, with the same bits; info and the error for backend="native" say what is missing."""
    lines = run(sys.executable, "-c", WITHOUT, cwd=ROOT, timeout=120).splitlines()
    p = torch.nn.Parameter(torch.arange(5.0))
    optimizer = lrk.FusedSGD([p], lr=0.5, momentum=0.9, max_grad_norm=1.0)
    for _ in range(3):
        p.grad = torch.ones(5)
        optimizer.step()
    assert lines[-2] == str(p.tolist())
    (cpu,) = [line for line in lines if line.startswith("cpu")]
    assert "eager" in cpu and "Error" in cpu
    assert "cuda    no C++ kernels in this build; see gpu" in lines  # Triton may serve it
    assert lines[-1].startswith("lrkernels: backend='native' is not available") and "pip install" in lines[-1]


# ----------------------------------------------------------------------------------------------------------------------
# The sources


@pytest.fixture(scope="module")
def setup_py():
    """What setup.py asks setuptools for, without building it, and what it defines."""
    asked = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: asked.update(arguments))
        patch.setenv("LRKERNELS_CUDA", "0")
        patch.chdir(ROOT)
        defined = runpy.run_path("setup.py")
    return asked, defined


@pytest.fixture(scope="module")
def extension(setup_py):
    asked, _ = setup_py
    (found,) = asked["ext_modules"]
    assert asked["options"]["bdist_wheel"]["py_limited_api"] == "cp310"
    return found


@pytest.fixture(scope="module")
def objects(extension, tmp_path_factory):
    """Compiles every source twice, as setup.py would and without the path for AVX2; warnings are errors."""
    folder = tmp_path_factory.mktemp("objects")
    flags = extension.extra_compile_args
    flags = [*(flags["cxx"] if isinstance(flags, dict) else flags), "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    flags += ["-fPIC", "-DPy_LIMITED_API=0x030a0000"]
    for include in [*cpp_extension.include_paths(), PYTHON_H.parent]:
        flags += ["-isystem", str(include)]
    jobs = {}
    for path, more in [("wide", []), ("baseline", ["-DLRK_BASELINE_ONLY"])]:
        for source in extension.sources:
            target = folder / f"{path}-{Path(source).stem}.o"
            command = ["g++", *flags, *more, "-c", str(ROOT / source), "-o", str(target)]
            jobs[target] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    return {target.stem: (target, job.communicate()[1], job.returncode) for target, job in jobs.items()}


@pytest.fixture(scope="module")
def modules(objects, extension, tmp_path_factory):
    """Two binaries of the same sources: one with both paths, and one that has to take the baseline."""
    loaded = {}
    for path in ("wide", "baseline"):
        target = tmp_path_factory.mktemp(path) / "_C.abi3.so"
        parts = [target for name, (target, _, _) in objects.items() if name.startswith(path)]
        folders = [f"-L{folder}" for folder in extension.library_dirs]
        libraries = [f"-l{name}" for name in extension.libraries]
        run("g++", "-shared", *parts, "-o", target, *folders, *libraries)
        spec = importlib.util.spec_from_file_location(f"{path}._C", target)
        loaded[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[path])
        loaded[path].connect(torch.Tensor.__dlpack_c_exchange_api__)
    return loaded


# What nvcc does: what it compiles, and what it says in a dry run. $0 is itself, in the toolkit's bin
NVCCS = {
    "old": ("exit 1", None, "nvcc does not compile csrc/cuda/kernels.cu for 10.0: set TORCH_CUDA_ARCH_LIST"),
    "no-runtime": ("echo '#$ TOP=/nowhere' >&2", None, "no libcudart_static.a in /nowhere: "),
    "nothing-said": ("", None, "no libcudart_static.a in {toolkit}: "),
    "whole": ('echo "#$ TOP=$(dirname $0)/.." >&2', "targets/x86_64-linux/lib", ""),
    "whole-nothing-said": ("", "lib64", ""),
}


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the sources")
@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize("does, library, message", NVCCS.values(), ids=NVCCS)
def test_what_nvcc_lacks_is_said_with_a_remedy(setup_py, tmp_path, monkeypatch, does, library, message):
    _, defined = setup_py
    toolkit = tmp_path.resolve()
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\n{does}\n")
    nvcc.chmod(0o755)
    if library:
        runtime = toolkit / library / "libcudart_static.a"
        runtime.parent.mkdir(parents=True)
        runtime.touch()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    extension = setuptools.Extension("lrkernels._C", [])
    arguments = (extension, str(nvcc), tmp_path / "build" / "kernels.cu.o")
    if library:
        defined["add_cuda"](*arguments)
        assert extension.extra_objects == [str(arguments[-1]), str(runtime)]
        return
    with pytest.raises(SystemExit, match="^lrkernels: .*" + re.escape(message.format(toolkit=toolkit))) as refusal:
        defined["add_cuda"](*arguments)
    assert str(refusal.value).endswith("or build without CUDA by LRKERNELS_CUDA=0")
    assert not extension.extra_objects


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the sources")
def test_nvcc_compiles_anew_what_includes_a_changed_file(setup_py):
    first, *others = [(ROOT / source).resolve() for source in setup_py[1]["CUDA_SOURCES"]]
    included = [(file.parent, re.findall('#include "(.*)"', file.read_text())) for file in (first, *others)]
    assert {(folder / name).resolve() for folder, names in included for name in names} == set(others)


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the sources")
def test_a_source_distribution_can_be_compiled(tmp_path):
    pytest.importorskip("setuptools", minversion="77")  # as pyproject.toml has it
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "lrkernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    run(sys.executable, "setup.py", "sdist", cwd=tmp_path)
    with tarfile.open(*tmp_path.glob("dist/*.tar.gz")) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("**/*.*")}
    assert "csrc/cuda/kernels.cu" in sources and sources <= packed, sources - packed


@needs_compiler
def test_compiles_without_a_warning(objects):
    assert len(objects) >= 4
    for name, (_, said, status) in objects.items():
        assert status == 0 and not said, f"{name}: {said}"


@pytest.fixture(scope="module")
def disassembly(objects):
    """The functions of kernels.cpp: each name with its instructions."""
    text = run("objdump", "-d", "-C", "--no-show-raw-insn", objects["wide-kernels"][0])
    functions = {}
    for name, body in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", text, re.MULTILINE):
        functions[name] = re.findall(r"^\s+[0-9a-f]+:\s+(\S.*)", body, re.MULTILINE)
    return functions


@needs_compiler
@needs("objdump")
@x86_64
@pytest.mark.parametrize("rule", ["SgdStep", "AdamWStep"])
@pytest.mark.parametrize("dtype, suffix", [("float", "ps"), ("double", "pd")])
def test_the_update_is_vectorised(disassembly, rule, dtype, suffix):
    """Fused multiply-adds and divisions of whole 32-byte registers in the rule's loops."""
    code = [
        line
        for name, lines in disassembly.items()
        if "x86_64_v3::" in name and f"{rule}<{dtype}>" in name
        for line in lines
    ]
    assert [line for line in code if re.match(rf"vfn?m(?:add|sub)\d+{suffix} .*%ymm", line)]
    if rule == "AdamWStep":
        assert [line for line in code if re.match(rf"vdiv{suffix} .*%ymm", line)]
        assert [line for line in code if re.match(rf"vsqrt{suffix} .*%ymm", line)]


@needs_compiler
@needs("objdump")
@x86_64
def test_nothing_else_needs_more_than_the_oldest_processor(disassembly):
    """The baseline, and what both paths share, run before or without a look at the processor."""
    shared = {name: lines for name, lines in disassembly.items() if "x86_64_v3::" not in name}
    assert len(shared) > 5 and [name for name in shared if "baseline::" in name]
    beyond = {name for name, lines in shared.items() for line in lines if line.startswith("v") or "%ymm" in line}
    assert not beyond


# ----------------------------------------------------------------------------------------------------------------------
# Reading tensors: by handle where it is found, through DLPack otherwise

NO_HANDLE = {
    "a list too short": lambda: [torch.zeros(1)],
    "no tensor": lambda: [torch.zeros(1), 1.0],
    "no memory to compare": lambda: [torch.zeros(0), torch.nn.Parameter(torch.zeros(1))],
    "not in the object": lambda: [torch.zeros(1), type("Says", (torch.nn.Parameter,), {"_cdata": 1})(torch.zeros(1))],
}


@needs_native
@needs_compiler
@pytest.mark.parametrize("tensors", NO_HANDLE.values(), ids=NO_HANDLE)
def test_a_handle_that_is_not_found_is_not_used(modules, tensors):
    assert modules["baseline"].locate(tensors()) is False
    step(modules["baseline"], *ROWS["sgd"], torch.float32, False)


@needs_native
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_both_ways_of_reading_have_the_same_bits(modules, dtype):
    through_dlpack = step(modules["baseline"], *ROWS["adamw"], dtype, False)
    assert modules["baseline"].locate([torch.zeros(1), torch.nn.Parameter(torch.zeros(1))])
    by_handle = step(modules["baseline"], *ROWS["adamw"], dtype, False)
    assert not modules["baseline"].locate([])
    for name, x in by_handle.items():
        assert torch.equal(x.reshape(-1).view(torch.uint8), through_dlpack[name].reshape(-1).view(torch.uint8)), name


@needs_native
def test_gradients_are_the_parameters_own():
    class Other(torch.Tensor):
        @property
        def grad(self):
            return "its own"

    params = [torch.nn.Parameter(torch.zeros(n)) for n in range(4)] + [torch.zeros(2, requires_grad=True)]
    for p in params[1:]:
        p.grad = torch.ones_like(p)
    found = ops.gradients([*params, torch.zeros(1).as_subclass(Other)])
    assert found[0] is None and found[-1] == "its own"
    assert all(a is p.grad for a, p in zip(found[1:-1], params[1:], strict=True))


@needs_native
def test_versions_rise_with_every_change_in_place():
    class Other(torch.Tensor):
        @property
        def _version(self):
            return "its own"

    tensors = [torch.zeros(2), torch.nn.Parameter(torch.zeros(2), requires_grad=False), None]
    assert ops.versions(tensors) == [0, 0, None]
    tensors[0].add_(1)
    tensors[1].add_(1).mul_(2)
    assert ops.versions([*tensors, torch.zeros(1).as_subclass(Other)]) == [1, 2, None, "its own"]


BASE = torch.zeros(4, 4)
TOLD_APART = {
    "another place": (BASE[0], BASE[1]),
    "another size": (BASE[0, :3], BASE[0, :2]),
    "other strides": (BASE, BASE.t()),
    "another number of dimensions": (BASE[0], BASE[:1]),
    "another dtype": (BASE, BASE.view(torch.int32)),
    "none": (BASE, None),
}


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False], ids=["native", "python"])
@pytest.mark.parametrize(("a", "b"), TOLD_APART.values(), ids=TOLD_APART)
def test_what_is_seen_of_tensors_tells_them_apart(a, b, native, monkeypatch):
    if not native:
        monkeypatch.setattr(ops, "_C", None)
    assert ops.seen([a, None, torch.nn.Parameter(BASE)]) != ops.seen([b, None, torch.nn.Parameter(BASE)])
    assert ops.seen([a, b]) == ops.seen([a, b])
    assert ops.seen([a])[1] == np.array([a.data_ptr()]).tobytes()
    assert ops.seen([a, BASE.to_sparse()]) is None
    assert ops.seen([a, "a tensor"]) is None


# ----------------------------------------------------------------------------------------------------------------------
# Both paths


ALL = Measure.NORMS | Measure.DIRECTION | Measure.PREVIOUS | Measure.MOVE
SIZES = [1, 7, 15, 16, 17, 33, 1000, 1025, 66_001]
ROWS = {
    "sgd": (Rule.SGD, {Hyper.MOMENTUM: 0.9, Hyper.WEIGHT_DECAY: 0.1, Hyper.NESTEROV: 1.0}),
    "adamw": (
        Rule.ADAMW,
        {Hyper.BETA1: 0.9, Hyper.BETA2: 0.99, Hyper.EPS: 1e-8, Hyper.WEIGHT_DECAY: 0.1, Hyper.AMSGRAD: 1.0},
    ),
}


def step(module, rule, row, dtype, two_pass):
    """Two steps of one binary on the same numbers; returns everything that it has written."""
    random = torch.Generator().manual_seed(0)

    def one_each(positive=False):
        drawn = [torch.randn(n, generator=random, dtype=torch.float64) for n in SIZES]
        # Of many magnitudes, so that every bit of a sum counts
        drawn = [x * 10.0 ** torch.randint(-4, 4, x.shape, generator=random) for x in drawn]
        return [(x.abs() if positive else x).to(dtype) for x in drawn]

    control = torch.zeros(RING_AT + 1, dtype=torch.float64)
    control[[Control.FACTOR, Control.NEXT_FACTOR, Control.FIRST_LR, Control.CLIP]] = 1.0
    settings = torch.zeros(len(Setting), dtype=torch.float64)
    settings[[Setting.MAX_LR, Setting.FREEZE_AFTER]] = float("inf")
    settings[Setting.MAX_GRAD_NORM] = 1.0
    hyper = torch.zeros(1, layout.HYPERS, dtype=torch.float64)
    for slot, value in row.items():
        hyper[0, slot] = value
    params, prev = one_each(), one_each()
    states = [one_each(), one_each(True), one_each(True)] if rule == Rule.ADAMW else [one_each(), None, None]
    counts = torch.ones(len(SIZES), len(Count))
    one, groups = torch.ones(1, dtype=torch.float64), torch.zeros(len(SIZES), dtype=torch.int32)
    history = torch.zeros(4, len(STATS), dtype=torch.float64)
    for _ in range(2):
        uneven = module.run(
            *(Verb.STEP, rule, ALL, two_pass, params, one_each(), *states, None, None, prev, groups, counts, control),
            *(settings, 0.1 * one, hyper, one, one, history, None, None),
        )
        assert not uneven[0]
    sums = {slot.name: control[SUMS_AT + slot].clone() for slot in Sum}
    tensors = {"params": params, "prev": prev} | {f"state{k}": state for k, state in enumerate(states) if state}
    return sums | {"control": control} | {name: torch.cat(list_of) for name, list_of in tensors.items()}


@needs_native
@needs_compiler
@x86_64
@pytest.mark.parametrize("two_pass", [False, True], ids=["one-pass", "two-passes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule, row", ROWS.values(), ids=ROWS)
def test_both_paths_have_the_same_bits(modules, rule, row, dtype, two_pass):
    """Parameters, states, and every sum: a checkpoint goes on alike on any processor."""
    assert modules["baseline"].instruction_set() == "baseline"
    if modules["wide"].instruction_set() == "baseline":
        pytest.skip("this processor has no AVX2")
    wide, baseline = (step(modules[path], rule, row, dtype, two_pass) for path in ("wide", "baseline"))
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    for name, x in wide.items():
        a, b = (y.view(integers[y.element_size()]) for y in (x, baseline[name]))
        assert torch.equal(a, b), name
        assert x.count_nonzero() > 0, name
