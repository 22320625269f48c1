"""The CUDA kernels as they were compiled: every architecture asked for, no spills, whole accesses. Needs no GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lrkernels import ops
from lrkernels.layout import Verb

RULES, KINDS = ("sgd", "adamw"), ("floats", "halves", "anything")
KERNELS = {  # rule, kind of dtypes, whether every sum is taken: the most registers that leave room for enough blocks
    ("sgd", "floats", False): 102,
    ("sgd", "floats", True): 128,
    ("sgd", "halves", True): 168,
    ("sgd", "anything", True): 168,
    ("adamw", "floats", False): 128,
    ("adamw", "floats", True): 128,
    ("adamw", "halves", True): 255,
    ("adamw", "anything", True): 255,
}


def find_cuobjdump():
    """Of the toolkit, or of Triton's package, which carries one."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    nvcc = shutil.which("nvcc")
    folders += [Path(nvcc).resolve().parent] if nvcc else []
    folders.append(Path("/usr/local/cuda/bin"))
    return shutil.which("cuobjdump") or next(
        (str(f / "cuobjdump") for f in folders if (f / "cuobjdump").exists()), None
    )


CUOBJDUMP = find_cuobjdump()
ARCHITECTURES = re.findall(r"\bsm_\d+", (ops._C and ops._C.cuda_architectures()) or "")

pytestmark = pytest.mark.skipif(not ARCHITECTURES, reason="the binary has no CUDA kernels")
needs_cuobjdump = pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump")


def dump(what, *more):
    command = [CUOBJDUMP, what, *more, ops._C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernel(mangled):
    """Which of KERNELS a symbol is."""
    rule, kind, full = re.search(r"run_stepILNS_4RuleE(\d)ELNS\w*?_4KindE(\d)ELb(\d)", mangled).groups()
    return RULES[int(rule)], KINDS[int(kind)], full == "1"


@pytest.fixture(scope="module")
def resources():
    """By architecture and kernel: registers, stack, local memory."""
    found = {}
    for architecture, text in re.findall(
        r"arch = (sm_\d+)\n(.*?)(?=Fatbin|\Z)", dump("--dump-resource-usage"), re.DOTALL
    ):
        for name, report in re.findall(r"Function (\S*run_step\S*):\n(.*)", text):
            found[architecture, kernel(name)] = {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", report)}
    return found


@needs_cuobjdump
def test_every_architecture_has_every_kernel(resources):
    assert {architecture for architecture, _ in resources} == set(ARCHITECTURES)
    for architecture in ARCHITECTURES:
        assert {name for there, name in resources if there == architecture} == set(KERNELS), architecture


@needs_cuobjdump
def test_nothing_spills_and_nothing_is_on_a_stack(resources):
    for name, used in resources.items():
        assert used["STACK"] == used["LOCAL"] == 0, name


@needs_cuobjdump
def test_registers_leave_room_for_enough_blocks(resources):
    for (architecture, name), used in resources.items():
        assert used["REG"] <= KERNELS[name], (architecture, name, used["REG"])


@needs_cuobjdump
def test_ptx_is_there_for_architectures_to_come():
    wanted = re.findall(r"compute_(\d+)", ops._C.cuda_architectures().split("sm_")[-1])
    if not wanted:
        pytest.skip("this build was asked for none")
    assert f"sm_{wanted[-1]}" in dump("--list-ptx")


@needs_cuobjdump
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES[:2])
def test_accesses_are_16_bytes_wide(architecture):
    """Parameter, gradient and state, read and written; and no fused multiply-add that nobody asked for."""
    text = dump("--dump-sass", "-arch", architecture)
    bodies = dict(re.findall(r"Function : (\S*run_step\S*)\n(.*?)(?=\n\s*Function :|\Z)", text, re.DOTALL))
    assert {kernel(name) for name in bodies} == set(KERNELS)
    for name, body in bodies.items():
        loads, stores = (re.findall(rf"\b{op}\.E\S*\.128\S* ", body) for op in ("LDG", "STG"))
        assert len(loads) >= 3 and len(stores) >= 2, (kernel(name), len(loads), len(stores))
        assert not re.search(r"\bLDG\S*\.CONSTANT", body), f"{kernel(name)}: by a cache that no block's store reaches"
        assert "CCTL.IVALL" in body, f"{kernel(name)}: after a fence, old lines are in the cache still"


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_loads_where_there_is_no_cuda():
    listed = subprocess.run(["readelf", "-d", ops._C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in listed and not re.findall(r"libcuda\S*|libcudart\S*|libnv\S*", listed)


HIDDEN = """
import torch, lrkernels
from lrkernels import ops
assert not torch.cuda.is_available() and ops._C.cuda_architectures()
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
lrkernels.FusedSGD([p], lr=0.5).step()
assert p.tolist() == [0.5] * 3
(line,) = [line for line in lrkernels.info().splitlines() if line.startswith("cuda")]
assert "native" in line and "sm_" in line and "no CUDA device" in line
"""


def test_the_cpu_is_served_by_the_same_binary():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", HIDDEN], check=True, env=environment, timeout=120)


def test_a_workspace_that_is_none_is_refused():
    f64 = {"dtype": torch.float64}
    control = torch.zeros(40, device="meta", **f64)
    with pytest.raises(ValueError, match="control is not a tensor on a device that this build has kernels for"):
        ops._C.run(Verb.STEP, 0, 0, False, [], [], *[None] * 6, *[control] * 9, None, None, (1, 2))
