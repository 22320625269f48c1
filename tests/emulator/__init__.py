"""Compiles CUDA source for the emulated GPU, with g++ and the header beside this file, and calls what it has made."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
BUILD = HERE.parent.parent / "build" / "emulator"

COMMON = ["-std=c++17", "-O0", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
COMMON += [
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-unknown-pragmas",
    "-Wno-missing-field-initializers",
    f"-I{HERE}",
    f"-I{CSRC}",
    f"-I{CSRC / 'cuda'}",
]

# Every access to memory becomes a call, and so does every misaligned one; emulator.cpp has the functions.
RACES = ["-fsanitize=thread,alignment,bounds", "--param=tsan-distinguish-volatile=1"]
RACES += ["--param=tsan-instrument-func-entry-exit=0"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

DTYPES = ["torch.float32", "torch.float64", "torch.bfloat16", "torch.float16"]  # in the order of lrk::Dtype

available = sys.platform == "linux" and shutil.which("g++") is not None


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _made(path: Path, *command: str) -> Path:
    """Run g++ unless ``path``, whose name holds a digest of all that it is made from, is there."""
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        result = subprocess.run(["g++", *command, "-o", unfinished], capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"g++ {' '.join(command)}\n{result.stderr}")
        unfinished.rename(path)
    return path


def read(path: Path) -> dict[str, str]:
    """Return what ``build`` takes: the text of a source and those of the headers beside it, by name."""
    return {file.name: file.read_text() for file in (path, *sorted(path.parent.glob("*.cuh")))}


def changed(sources: dict[str, str], old: str, new: str) -> dict[str, str]:
    """Return the sources with ``old``, which must be in them once, replaced."""
    times = sum(text.count(old) for text in sources.values())
    assert times == 1, f"there is {times} times {old!r}"
    return {name: text.replace(old, new) for name, text in sources.items()}


def build(sources: dict[str, str], *parts: str, sanitizers: bool = False) -> Path:
    """Compile the first source, which may include the others, with the scheduler and ``parts`` of this folder."""
    headers = [path.read_text() for path in sorted([*HERE.glob("*.h"), *CSRC.glob("**/*.h")])]
    flags = [*COMMON, *(SANITIZERS if sanitizers else [])]
    objects = []
    for name in ("emulator.cpp", *parts):
        path = BUILD / f"{name}-{_digest(headers, flags, (HERE / name).read_text())}.o"
        objects.append(str(_made(path, *flags, "-c", str(HERE / name))))
    flags += ["-w"] if sanitizers else RACES  # g++ warns of what the sanitizers make of the code
    copies = BUILD / _digest(headers, flags, sources)
    copies.mkdir(parents=True, exist_ok=True)
    for name, text in sources.items():
        (copies / name).write_text(text)
    objects.append(str(_made(copies / "kernels.o", *flags, "-x", "c++", "-c", str(copies / next(iter(sources))))))
    link = [*(SANITIZERS if sanitizers else []), "-shared", "-Wl,-Bsymbolic", *objects]
    return _made(BUILD / f"kernels-{_digest(objects)}.so", *link)


def library_path(name: str) -> str:
    """Return where g++ has a library."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class EmulatedError(RuntimeError):
    """A race, a deadlock, or a misuse of CUDA, with the block, the thread, and the lines."""


class Device:
    """An emulated GPU on which the library at ``path`` runs, ``resident`` blocks at a time.

    The seed decides on the order of everything. There is one device for each library: a new one takes its place.
    """

    def __init__(self, path: Path, seed: int = 0, resident: int = 2) -> None:
        self.path, self.library = path, ctypes.CDLL(str(path))
        self.library.emulator_error.restype = ctypes.c_char_p
        self.library.emulator_allocations.restype = ctypes.c_size_t
        self.library.emulator_reset(ctypes.c_uint64(seed), resident)

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the library; what it is given is passed by address, integers by value."""
        values = [ctypes.c_int64(x) if isinstance(x, int) else ctypes.c_void_p(_address(x)) for x in arguments]
        code = getattr(self.library, function)(*values)
        self.check(f"{function} returned {code}" if code else "")

    def check(self, error: str) -> None:
        """Raise for an error that was returned, or one that the device has found."""
        message = self.library.emulator_error().decode() or error
        if message:
            raise EmulatedError(self._with_lines(message))

    @property
    def launches(self) -> int:
        """How many kernels have been launched."""
        return self.library.emulator_launches()

    @property
    def allocations(self) -> int:
        """How many pieces of device memory have not been freed."""
        return self.library.emulator_allocations()

    def _with_lines(self, message: str) -> str:
        """Return the message with file and line where the library has offsets, in braces."""

        def line(match: re.Match[str]) -> str:
            command = ["addr2line", "-i", "-e", str(self.path), hex(int(match[1], 16) - 1)]  # the call, not the return
            try:
                frames = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
            except (OSError, subprocess.CalledProcessError):
                return match[1]
            ours = [frame for frame in frames if frame and "cuda_runtime.h" not in frame]
            return Path(ours[0]).name.split(" ")[0] if ours else match[1]

        return re.sub(r"\{([0-9a-f]+)\}", line, message)


def _address(x: Any) -> int | None:
    if x is None:
        return None
    return x.data_ptr() if hasattr(x, "data_ptr") else x.ctypes.data


# ----------------------------------------------------------------------------------------------------------------------
# The kernels' own entry


LISTS = ("param", "grad", "state0", "state1", "state2", "master", "prev_read", "prev_write")
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64


class _Row(ctypes.Structure):
    """``lrk::Row``, field by field."""

    _fields_ = (
        *((name, POINTER) for name in (*LISTS, "counts")),
        ("numel", INTEGER),
        ("group", ctypes.c_int32),
        ("index", ctypes.c_int32),
        *((name, ctypes.c_int8) for name in (*(f"{of}_dtype" for of in ("param", "grad", "state", "prev")), "head")),
    )


class _Job(ctypes.Structure):
    """``FlatJob`` of runner.cpp, field by field."""

    _fields_ = (
        *(("rows", POINTER), ("row_count", INTEGER)),
        *((name, POINTER) for name in ("control", "settings", "lr", "hyper")),
        ("groups", INTEGER),
        *(("table", POINTER), ("table_size", INTEGER), ("decay", POINTER), ("decay_size", INTEGER)),
        *(("history", POINTER), ("history_size", INTEGER), ("found_inf", POINTER), ("grad_scale", POINTER)),
        *((name, ctypes.c_int) for name in ("rule", "measure", "two_pass", "verbs")),
    )


class Kernels(Device):
    """A device with the kernels of csrc/cuda; ``run`` takes what ``lrkernels.ops.run_native`` takes.

    It says that it has so many ``multiprocessors``, so that is how many blocks a launch has at most.
    """

    def __init__(self, path: Path, seed: int = 0, multiprocessors: int = 2, resident: int = 2) -> None:
        super().__init__(path, seed, resident)
        self.multiprocessors = multiprocessors
        self.library.emulator_step.restype = ctypes.c_char_p
        assert self.library.emulator_sizes(0) == ctypes.sizeof(_Row), "csrc/kernels.h has another Row"
        assert self.library.emulator_sizes(1) == ctypes.sizeof(_Job), "runner.cpp has another FlatJob"
        self.finish()

    def run(self, verbs: int, rule: int, measure: int, two_pass: bool, *arguments: Any) -> None:
        """Run the verbs on dense tensors of one layout each, in memory of the host's."""
        columns = [column or None for column in arguments[: len(LISTS)]]
        groups, counts, control, settings, lr, hyper, table, decay, history, found_inf, grad_scale = arguments[8:]
        rows = []
        for index, param in enumerate(arguments[0]):
            tensors = {name: column[index] for name, column in zip(LISTS, columns, strict=True) if column}
            tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
            if "grad" not in tensors:
                continue
            assert all(tensor.stride() == param.stride() for tensor in tensors.values())
            memory = {name: tensor.data_ptr() for name, tensor in tensors.items()}
            if "prev_write" in memory:
                memory.setdefault("prev_read", memory["prev_write"])
            state = tensors.get("state0", param)
            prev = tensors.get("prev_write", tensors.get("prev_read", tensors["grad"]))
            dtypes = {"param": param, "grad": tensors["grad"], "state": state, "prev": prev}
            codes = {f"{name}_dtype": DTYPES.index(str(tensor.dtype)) for name, tensor in dtypes.items()}
            rows.append(
                _Row(
                    **memory,
                    **codes,
                    counts=counts[index].data_ptr(),
                    numel=param.numel(),
                    group=int(groups[index]),
                    index=index,
                )
            )
        listed = (_Row * len(rows))(*rows)
        small = {"control": control, "settings": settings, "lr": lr, "hyper": hyper, "table": table, "decay": decay}
        small |= {"history": history, "found_inf": found_inf, "grad_scale": grad_scale}
        job = _Job(
            rows=ctypes.addressof(listed),
            row_count=len(rows),
            groups=len(lr),
            table_size=len(table),
            decay_size=len(decay),
            history_size=len(history),
            rule=rule,
            measure=measure,
            two_pass=two_pass,
            verbs=verbs,
            **{name: _address(tensor) for name, tensor in small.items()},
        )
        error = self.library.emulator_step(ctypes.byref(job), self.multiprocessors)
        self.check((error or b"").decode())
        assert self.library.emulator_device() == self.multiprocessors, "the current device is not as it was"

    def finish(self) -> None:
        """Free the workspace, whose counters must be zero between launches."""
        clean = self.library.emulator_finish()
        assert clean, "a launch has not left its counters at zero"
        assert self.allocations == 0
