"""What every refusal and warning looks like: the package's name, what was wrong, and the remedy."""

from __future__ import annotations

import math
import numbers
import os
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

__all__ = ["check", "check_number", "check_whole", "is_real", "on_host", "warn"]

_INSIDE = tuple(os.path.dirname(path) + os.sep for path in (__file__, torch.__file__))


def check(condition: bool, message: str) -> None:
    """Raise ``ValueError`` unless the condition holds."""
    if not condition:
        raise ValueError(f"lrkernels: {message}")


def check_number(name: str, value: Any, low: float = -math.inf) -> None:
    """Raise unless ``value`` is a finite real number, at least ``low``."""
    bound = "" if low == -math.inf else f" and >= {low:g}"
    good = isinstance(value, numbers.Real) and math.isfinite(float(value)) and float(value) >= low
    check(good, f"{name} must be finite{bound}, got {value!r}")


def check_whole(name: str, value: Any, low: int) -> None:
    """Raise unless ``value`` is a whole number, at least ``low``."""
    good = isinstance(value, numbers.Integral) and int(value) >= low
    check(good, f"{name} must be a whole number, at least {low}, got {value!r}")


def on_host(values: list[Any], dtype: torch.dtype) -> Tensor:
    """Return a tensor on the CPU, whatever torch's default device; raise where it would have no values."""
    made = torch.tensor(values, dtype=dtype, device="cpu")
    check(
        not hasattr(made, "fake_mode"),
        "a FakeTensorMode is active, and the step decides by values; go on outside of it",
    )
    return made


def is_real(value: Tensor) -> bool:
    """Whether the tensor has memory, with one real number for each element."""
    return value.layout == torch.strided and not value.is_meta and not value.is_complex()


def warn(message: str) -> None:
    """Warn at the line that called the package, be it through torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"lrkernels: {message}", stacklevel=level)
