"""The seam between the host and the Triton kernel: a row's fields, counters, sizes, and the slots of ``layout.py``."""

from __future__ import annotations

import zlib
from enum import IntEnum
from types import ModuleType
from typing import Any

import triton
import triton.language as tl

from . import layout

__all__ = ["CHUNK", "LAYOUT", "Counter", "Dtype", "Field"]

CHUNK = 16384  # elements: what a program takes at a time; sums are added up in the order of the chunks
BLOCK = 1024  # elements: a tile, eight for each thread, so that those of 16 bits make 16 bytes
TAIL = 256  # elements: a tile of what is left over, or not aligned


class Field(IntEnum):
    """A row of the table: one parameter with a gradient. An address is 0 where there is no such tensor."""

    PARAM = 0
    UPDATED = 1  # what the update works on: the parameter, or its float32 master
    GRAD = 2
    STATE0 = 3
    STATE1 = 4
    STATE2 = 5
    PREV_READ = 6
    PREV_WRITE = 7
    NUMEL = 8
    GROUP = 9
    INDEX = 10  # among all parameters, those without a gradient too
    FIRST_CHUNK = 11
    ALIGNED = 12  # every address is a multiple of 16 bytes
    PARAM_DTYPE = 13
    UPDATED_DTYPE = 14
    GRAD_DTYPE = 15
    STATE_DTYPE = 16
    PREV_DTYPE = 17


class Dtype(IntEnum):
    """The codes of a row's dtypes, as in ``csrc/kernels.h``."""

    FLOAT32 = 0
    FLOAT64 = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    MIXED = 4  # the rows differ


class Counter(IntEnum):
    """The workspace's integers, each in a cache line of its own; all are 0 between two launches."""

    TICKET = 0  # chunks handed out
    MEASURED = 32  # of the first pass, done
    DECIDED = 64  # the decision is there to be read
    LEFT = 96  # programs that have nothing more to do


# Triton reads a number behind a module's name, but not behind a class's: so each enum becomes a module here.


def _module(name: str, members: dict[str, int]) -> Any:
    module = ModuleType(name)
    known = int if triton.knobs.runtime.interpret else tl.constexpr
    module.__dict__.update({key: known(value) for key, value in members.items()})
    return module


def _slots(kind: Any, start: int = 0) -> Any:
    return _module(kind.__name__, {name: start + int(slot) for name, slot in kind.__members__.items()})


_Control, _Setting, _Hyper, _Count = map(_slots, (layout.Control, layout.Setting, layout.Hyper, layout.Count))
_Loop, _Rule, _Measure, _Verb = map(_slots, (layout.ClosedLoopKind, layout.Rule, layout.Measure, layout.Verb))
_Field, _Dtype, _Counter = map(_slots, (Field, Dtype, Counter))
_Sum = _slots(layout.Sum, layout.SUMS_AT)  # as in the control tensor, like _Stat
_Slot = _slots(layout.Sum)  # as in the partial sums
_Stat = _module("Stat", {name.upper(): layout.STATS_AT + i for i, name in enumerate(layout.STATS)})
_Size = _module(
    "Size",
    {
        "STATS_AT": layout.STATS_AT,
        "STATS": len(layout.STATS),
        "SUMS_AT": layout.SUMS_AT,
        "RING_AT": layout.RING_AT,
        "SETTINGS": len(layout.Setting),
        "HYPERS": layout.HYPERS,
        "COUNTS": len(layout.Count),
        "FIELDS": len(Field),
        "CHUNK": CHUNK,
        "BLOCK": BLOCK,
        "TAIL": TAIL,
    },
)
_MODULES = (_Control, _Setting, _Hyper, _Count, _Loop, _Rule, _Measure, _Verb, _Field, _Dtype, _Counter, _Sum, _Stat)
#: Triton's cache of compiled kernels does not see those numbers: this argument of the kernel stands for all of them.
LAYOUT = zlib.crc32(str([sorted(m.__dict__.items(), key=str) for m in (*_MODULES, _Size)]).encode())
