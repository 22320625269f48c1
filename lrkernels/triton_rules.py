"""The mathematics, once for Triton: the update rules (per element) and the decisions (per step).

``rules.py`` and ``csrc/rules.h`` say the same, name by name and in the same order. The update rules are made of
``rules.py`` itself, by ``triton.jit``. The rounding at random and the decisions are written once more; what is decided
is in tensors that replace each other there, and in slots of memory here, as in ``csrc/rules.h``.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from . import rules
from .triton_layout import _Control, _Hyper, _Loop, _Rule, _Setting, _Size, _Stat, _Sum

# ----------------------------------------------------------------------------------------------------------------------
# APPLY: the rules of rules.py, and what they are written in. No multiply-add is fused but where it says fma; a quotient
# and a root of float32 are rounded correctly, which Triton's own are not.


@triton.jit
def cast(value, like):
    """A coefficient in the dtype of ``like``, rounded once."""
    return tl.cast(value, like.dtype)


@triton.jit
def fma(a, b, c):
    """a * b + c, rounded once."""
    return tl.fma(a, b, c)


@triton.jit
def sqrt(a):
    """The correctly rounded root."""
    if a.dtype == tl.float32:
        return tl.sqrt_rn(a)
    else:
        return tl.sqrt(a)


@triton.jit
def divide(a, b):
    """The correctly rounded quotient."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def maximum(a, b):
    """As torch's: NaN if one of them is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def power(base, exponent):
    """base ** exponent, for a base >= 0."""
    return tl.exp(exponent * tl.log(base))


@triton.jit
def where(condition, a, b):
    """One or the other."""
    return tl.where(condition, a, b)


def _device_function(rule: Callable[..., Any]) -> Any:
    """Return the rule for the GPU: the same source without its types, in which the names above are Triton's."""
    tree = ast.parse(inspect.getsource(rule))
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
    source, file = ast.unparse(tree), f"<{rule.__module__}.{rule.__name__} for Triton>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # where Triton looks for it
    words = {f.__name__: f for f in (cast, fma, sqrt, divide, maximum, power, where)}
    names = {
        "__name__": __name__,
        **words,
        "tl": tl,
        "float64": tl.float64,
        "LOW": tl.constexpr(rules.LOW),
        "Hyper": _Hyper,
    }
    exec(compile(source, file, "exec"), names)
    return triton.jit(names[rule.__name__])


sgd_step = _device_function(rules.sgd_step)
adamw_step = _device_function(rules.adamw_step)
adamw_direction = _device_function(rules.adamw_direction)
mix = _device_function(rules.mix)  # of unsigned 32-bit integers here


@triton.jit
def random_key(step, row):
    """One for each parameter and step."""
    return mix(mix(step.to(tl.int64).to(tl.uint32)) + row.to(tl.uint32))


@triton.jit
def random_bits(key, element):
    """32 bits for each element, counted through the parameter's memory."""
    return mix(mix(element.to(tl.uint32)) ^ key ^ (element >> 32).to(tl.uint32))


@triton.jit
def to_bfloat16_at_random(x, random):
    """Round float32 to bfloat16."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7FFFFFFF) < 0x7F800000
    rounded = tl.where(finite, bits + (random & 0xFFFF), bits) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_float16_at_random(x, random):
    """Round float32 to float16."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 16) & 0x8000
    magnitude = bits & 0x7FFFFFFF
    special = tl.where(x != x, 0x7E00, 0x7C00).to(tl.uint32)
    normal = (magnitude - 0x38000000 + (random & 0x1FFF)) >> 13
    is_normal = magnitude >= 0x38800000
    steps = tl.where(is_normal, 0.0, tl.abs(x)) * 16777216.0  # below 2^-14 the values are 2^-24 apart
    whole = tl.floor(steps)
    subnormal = whole.to(tl.uint32) + ((steps - whole) * 65536.0 > (random & 0xFFFF).to(tl.float32)).to(tl.uint32)
    half = tl.where(magnitude >= 0x47800000, special, tl.where(is_normal, normal, subnormal))
    return (sign | half).to(tl.uint16).to(tl.float16, bitcast=True)


# ----------------------------------------------------------------------------------------------------------------------
# DECIDE: float64 scalars. All threads of a program load and hold them, and one thread stores. So a function loads all
# it needs before it stores anything, with a barrier in between: a thread that is late must not load what is new. One
# more stands between two functions of which one loads what the other stored.


@triton.jit
def is_finite(x):
    """Neither infinite nor NaN."""
    return x - x == 0


@triton.jit
def clamp(x, low, high):
    """Between ``low`` and ``high``; NaN stays."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def clip_factor(norm, max_norm):
    """``torch.nn.utils.clip_grad_norm_``: min(1, max_norm / (norm + 1e-6))."""
    factor = max_norm / (norm + 1e-6)
    return tl.where(factor > 1.0, 1.0, factor)


@triton.jit
def cosine(dot, a_sq, b_sq):
    """<a, b> / (|a| |b|); 0 where a norm is zero or anything is not finite."""
    value = dot / (sqrt(a_sq) * sqrt(b_sq))
    return tl.where(is_finite(value), value, 0.0)


@triton.jit
def at(table, size, step):
    """The multiplier of an open-loop schedule, tabulated: its last value stays."""
    last = size - 1
    return tl.load(table + tl.where(step < last, step, last).to(tl.int64))


@triton.jit
def rate(lr, multiplier, factor, settings):
    """The rate of a group: its own lr times the closed loop's factor times the open-loop multiplier."""
    looped = lr * factor
    bounded = clamp(looped, tl.load(settings + _Setting.MIN_LR), tl.load(settings + _Setting.MAX_LR))
    return tl.where(tl.load(settings + _Setting.CLOSED_LOOP) == _Loop.ALIGNMENT, bounded, looped) * multiplier


@triton.jit
def alignment_factor(control, settings, direction_cosine):
    """Ours: exponentiated gradient on the normalised alignment, log factor += kappa (c + bias)."""
    step = tl.load(control + _Control.STEP)
    log_factor = tl.load(control + _Control.LOG_FACTOR)
    increment = tl.load(settings + _Setting.KAPPA) * (direction_cosine + tl.load(settings + _Setting.BIAS))
    counts = (step > 0) & (step < tl.load(settings + _Setting.FREEZE_AFTER))
    log_factor = tl.where(counts, log_factor + increment, log_factor)
    tl.debug_barrier()
    tl.store(control + _Control.LOG_FACTOR, log_factor)
    return tl.exp(tl.where(log_factor < 80.0, log_factor, 80.0))  # above that no float32 rate is finite


@triton.jit
def gala_factor(control, settings, sums, RULE: tl.constexpr):
    """Jiang, Kavis, Mokhtari 2025: lr = (delta lr_0 + sum a) / (delta + sum b), a = <g', g>, b = L |g|^2."""
    _, _, dot_direction, direction_sq, dot_prev, _, diff_sq, _ = sums
    delta, lr0 = tl.load(settings + _Setting.DELTA), tl.load(control + _Control.FIRST_LR)
    started = tl.load(control + _Control.STEP) > 0
    numerator, denominator = tl.load(control + _Control.NUMERATOR), tl.load(control + _Control.DENOMINATOR)
    held = tl.load(control + _Control.NEXT_FACTOR)
    smoothness = sqrt(diff_sq) / sqrt(tl.load(control + _Control.LAST_MOVE_SQ))
    smoothness = tl.where(started & is_finite(smoothness), smoothness, tl.load(control + _Control.SMOOTHNESS))
    normalize = tl.load(settings + _Setting.NORMALIZE) != 0
    unit = tl.where(normalize, sqrt(direction_sq), 1.0)
    a, length_sq = dot_direction / unit, direction_sq / (unit * unit)
    if RULE == _Rule.SGD:
        a = tl.where(normalize, a, dot_prev)
        length_sq = tl.where(normalize, length_sq, tl.load(control + _Control.LAST_GRAD_SQ))
    b = smoothness * length_sq
    counts = started & is_finite(a) & is_finite(b)
    numerator = tl.where(counts, numerator + a, numerator)
    denominator = tl.where(counts, denominator + b, denominator)
    tl.debug_barrier()
    tl.store(control + _Control.SMOOTHNESS, smoothness)
    tl.store(control + _Control.NUMERATOR, numerator)
    tl.store(control + _Control.DENOMINATOR, denominator)
    lr = (delta * lr0 + numerator) / (delta + denominator)
    factor = clamp(lr, tl.load(settings + _Setting.MIN_LR), tl.load(settings + _Setting.MAX_LR)) / lr0
    return tl.where(is_finite(factor), factor, held)


@triton.jit
def direction_length(sums, hyper):
    """|momentum m + (1 - dampening) g|, the length of SGD's next buffer; 1 where it is 0 or not finite."""
    grad_sq, _, dot_direction, direction_sq, _, _, _, _ = sums
    momentum = tl.load(hyper + _Hyper.MOMENTUM)
    undampened = 1.0 - tl.load(hyper + _Hyper.DAMPENING)
    square = momentum * momentum * direction_sq + 2.0 * momentum * undampened * dot_direction
    square = square + undampened * undampened * grad_sq
    length = sqrt(tl.where(momentum != 0, square, grad_sq))
    return tl.where((length > 0) & is_finite(length), length, 1.0)


@triton.jit
def log_return(ring, capacity, signals, count, i):
    """r = ln(x / the one before) of the last ``count`` values of the ring; 0 beyond."""
    counts = i < count
    newest = signals - 1 - tl.where(counts, i, 0)
    return tl.log(tl.load(ring + newest % capacity) / tl.load(ring + (newest + capacity - 1) % capacity)), counts


@triton.jit
def volatility(ring, capacity, signals, count):
    """std(r_i, ddof = 1) of the last ``count`` log-returns in the ring of signals."""
    mean = tl.full((), 0.0, tl.float64)
    for start in range(0, count, _Size.BLOCK):
        r, counts = log_return(ring, capacity, signals, count, start + tl.arange(0, _Size.BLOCK))
        mean += tl.sum(tl.where(counts, r, 0.0)) / count
    squares = tl.full((), 0.0, tl.float64)
    for start in range(0, count, _Size.BLOCK):
        r, counts = log_return(ring, capacity, signals, count, start + tl.arange(0, _Size.BLOCK))
        squares += tl.sum(tl.where(counts, (r - mean) * (r - mean), 0.0))
    return sqrt(squares / (count - 1))


@triton.jit
def volatility_multiplier(control, settings):
    """Ren 2025: M = 1 + sign(rho - 1) ln(1 + w |rho - 1|), rho = std(all) / std(last N)."""
    capacity = tl.load(settings + _Setting.CAPACITY).to(tl.int64)
    window = tl.load(settings + _Setting.WINDOW).to(tl.int64)
    signals = tl.load(control + _Control.SIGNALS).to(tl.int64)
    returns = tl.minimum(signals, capacity) - 1
    multiplier = tl.full((), 1.0, tl.float64)
    if returns >= window:
        ring = control + _Size.RING_AT
        away = volatility(ring, capacity, signals, returns) / volatility(ring, capacity, signals, window) - 1.0
        change = tl.log(1.0 + tl.load(settings + _Setting.SENSITIVITY) * tl.abs(away))
        moved = 1.0 + tl.where(away > 0, change, -change)
        multiplier = tl.where(is_finite(moved), moved, 1.0)
    return multiplier


@triton.jit
def volsched_factor(control, settings, decay, decay_size, step):
    """Every N steps lr <- max(lr_min, lr M A), A = s(e) / s(e - N); linear warm-up first."""
    lr0, held = tl.load(control + _Control.FIRST_LR), tl.load(control + _Control.NEXT_FACTOR)
    warmup, window = tl.load(settings + _Setting.WARMUP_STEPS), tl.load(settings + _Setting.WINDOW)
    start = tl.load(settings + _Setting.WARMUP_START)
    elapsed = step - warmup
    factor = held
    if elapsed < 0:
        factor = start + (1.0 - start) * tl.where(warmup > 1, step / (warmup - 1.0), 1.0)
    elif elapsed == 0:
        factor = tl.full((), 1.0, tl.float64)
    elif (elapsed.to(tl.int64) % window.to(tl.int64) == 0) & (elapsed - window < decay_size - 1):
        before = at(decay, decay_size, elapsed - window)
        fall = tl.where(before == 0, 0.0, at(decay, decay_size, elapsed) / before)
        lr = lr0 * held * volatility_multiplier(control, settings) * fall
        moved = clamp(lr, tl.load(settings + _Setting.MIN_LR), tl.load(settings + _Setting.MAX_LR)) / lr0
        factor = tl.where(lr0 != 0, moved, held)
    return factor


@triton.jit
def begin(control, skip):
    """Start a step: the factor decided so far, no clip, and whether the gradient scaler wants it skipped."""
    tl.store(control + _Control.FACTOR, tl.load(control + _Control.NEXT_FACTOR))
    tl.store(control + _Control.CLIP, 1.0)
    tl.store(control + _Control.LENGTH, 1.0)
    tl.store(control + _Control.SKIP, tl.where(skip, 1.0, 0.0))
    tl.debug_barrier()


@triton.jit
def decide(control, settings, hyper, RULE: tl.constexpr, TWO_PASS: tl.constexpr):
    """What the sums say: the statistics, the clip, the length, whether to skip, the closed loop's next factor."""
    grad_sq, grad_abs = tl.load(control + _Sum.GRAD_SQ), tl.load(control + _Sum.GRAD_ABS)
    dot_direction, direction_sq = tl.load(control + _Sum.DOT_DIRECTION), tl.load(control + _Sum.DIRECTION_SQ)
    dot_prev, prev_sq = tl.load(control + _Sum.DOT_PREV), tl.load(control + _Sum.PREV_SQ)
    diff_sq, move_sq = tl.load(control + _Sum.DIFF_SQ), tl.load(control + _Sum.MOVE_SQ)
    sums = (grad_sq, grad_abs, dot_direction, direction_sq, dot_prev, prev_sq, diff_sq, move_sq)
    skip = tl.load(control + _Control.SKIP) != 0
    finite = is_finite(grad_sq)
    skip = skip | ((tl.load(settings + _Setting.SKIP_NONFINITE) != 0) & (finite == 0))
    norm = sqrt(grad_sq)
    max_norm = tl.load(settings + _Setting.MAX_GRAD_NORM)
    curvature = sqrt(diff_sq) / sqrt(tl.load(control + _Control.LAST_MOVE_SQ))
    direction_cosine = cosine(dot_direction, grad_sq, direction_sq)
    tl.debug_barrier()
    tl.store(control + _Stat.GRAD_NORM, norm)
    tl.store(control + _Stat.GRAD_NORM_L1, grad_abs)
    tl.store(control + _Stat.DIRECTION_COSINE, direction_cosine)
    tl.store(control + _Stat.ALIGNMENT, dot_prev)
    tl.store(control + _Stat.COSINE, cosine(dot_prev, grad_sq, prev_sq))
    tl.store(control + _Stat.CURVATURE, tl.where(is_finite(curvature), curvature, 0.0))
    tl.store(control + _Control.SKIP, tl.where(skip, 1.0, 0.0))
    if skip == 0:
        if is_finite(max_norm):
            tl.store(control + _Control.CLIP, clip_factor(norm, max_norm))
        if tl.load(settings + _Setting.NORMALIZE) != 0:
            tl.store(control + _Control.LENGTH, direction_length(sums, hyper))
        loop = tl.load(settings + _Setting.CLOSED_LOOP)
        if finite & ((loop == _Loop.ALIGNMENT) | (loop == _Loop.GALA)):
            if loop == _Loop.ALIGNMENT:
                factor = alignment_factor(control, settings, direction_cosine)
            else:
                factor = gala_factor(control, settings, sums, RULE)
            tl.store(control + _Control.NEXT_FACTOR, factor)
            if TWO_PASS:
                if tl.load(settings + _Setting.LAG) == 0:
                    tl.store(control + _Control.FACTOR, factor)
    tl.debug_barrier()


@triton.jit
def finish(control, settings, decay, decay_size, history, history_size, lr0, multiplier):
    """Advance the counters, take the observed signal, write the history's row. A skipped step only counts itself."""
    signal = tl.load(control + _Control.SIGNAL)
    skip = tl.load(control + _Control.SKIP)
    skipped = tl.load(control + _Control.SKIPPED) + skip
    step = tl.load(control + _Control.STEP) + 1.0
    rows = tl.load(control + _Control.ROWS)
    signals = tl.load(control + _Control.SIGNALS)
    grad_sq, move_sq = tl.load(control + _Sum.GRAD_SQ), tl.load(control + _Sum.MOVE_SQ)
    applied = rate(lr0, multiplier, tl.load(control + _Control.FACTOR), settings)
    clip = tl.load(control + _Control.CLIP)
    tl.debug_barrier()
    tl.store(control + _Control.SIGNAL, float("nan"))
    tl.store(control + _Stat.CLIP, clip)
    tl.store(control + _Stat.LR, applied)
    tl.store(control + _Stat.SKIPPED, skipped)
    tl.store(control + _Control.SKIPPED, skipped)
    if skip == 0:
        tl.store(control + _Stat.STEP, step)
        tl.store(control + _Control.STEP, step)
        tl.store(control + _Control.LAST_GRAD_SQ, grad_sq)
        tl.store(control + _Control.LAST_MOVE_SQ, move_sq)
        tl.store(control + _Control.ROWS, rows + 1.0)
        if tl.load(settings + _Setting.CLOSED_LOOP) == _Loop.VOL_SCHED:
            if is_finite(signal):
                slot = signals.to(tl.int64) % tl.load(settings + _Setting.CAPACITY).to(tl.int64)
                floor = tl.full((), 1e-8, tl.float64)
                tl.store(control + _Size.RING_AT + slot, tl.where(signal > floor, signal, floor))
                tl.store(control + _Control.SIGNALS, signals + 1.0)
            tl.debug_barrier()
            factor = volsched_factor(control, settings, decay, decay_size, step)
            tl.debug_barrier()
            tl.store(control + _Control.NEXT_FACTOR, factor)
        tl.debug_barrier()
        stat = tl.arange(0, 16)
        values = tl.load(control + _Size.STATS_AT + stat, mask=stat < _Size.STATS)
        row = history + rows.to(tl.int64) % history_size * _Size.STATS
        tl.store(row + stat, values, mask=stat < _Size.STATS)
