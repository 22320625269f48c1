"""The mathematics, once for Python: the update rules (per element) and the decisions (per step).

``csrc/rules.h`` says the same for C++ and CUDA, name by name and in the same order. The functions are plain arithmetic.
Every multiply-add that is meant to be fused is written ``fma``, no other is fused, so that the float32 update has the
same bits on every backend; they are the bits of ``torch.optim``'s own loop too, whose kernels fuse exactly these.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .layout import RING_AT, STATS, STATS_AT, SUMS_AT, ClosedLoopKind, Control, Hyper, Rule, Setting, Sum

# ----------------------------------------------------------------------------------------------------------------------
# APPLY: one parameter. Coefficients are float64 scalars (floats or 0-dim tensors), rounded once to the tensors' dtype.
#
# ``triton_rules.py`` makes device functions of the steps, the direction and ``mix`` from this very source, with
# Triton's own of the names below. So these call nothing else but ``to``, and branch with ``if``.

divide, maximum, power, where = torch.true_divide, torch.maximum, torch.pow, torch.where
float64 = torch.float64


def cast(value: float | Tensor, like: Tensor) -> Tensor:
    """Return a coefficient in the dtype of ``like``, rounded once."""
    if not isinstance(value, Tensor):  # as_tensor() would copy it from the host, and wait for a GPU
        value = torch.full((), value, dtype=torch.float64, device=like.device)
    return value.to(like.device, torch.float64).to(like.dtype)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a * b + c, rounded once."""
    return torch.addcmul(c, a, b)


def sqrt(a: Tensor) -> Tensor:
    """Return the correctly rounded root; torch's own on the CPU may be one unit off."""
    if a.dtype != torch.float64:
        return a.double().sqrt().to(a.dtype)
    root = a.sqrt()
    nearer = root + fma(-root, root, a) * (0.5 / root)
    return torch.where((root > 0) & root.isfinite(), nearer, root)


def sgd_step(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    hyper: list[float],
    lr: Tensor,
    length: Tensor,
    updates: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """M <- momentum m + (1 - dampening) g; p <- p - lr d, with d = m, g + momentum m (Nesterov) or g (no momentum).

    Normalised: p <- p - lr d / |d|, with ``length`` = |d|.
    """
    if hyper[Hyper.WEIGHT_DECAY] != 0 and hyper[Hyper.DECOUPLED] != 0:
        param = param * cast(1.0 - lr * hyper[Hyper.WEIGHT_DECAY], param)
    elif hyper[Hyper.WEIGHT_DECAY] != 0:
        grad = fma(param, cast(hyper[Hyper.WEIGHT_DECAY], param), grad)
    direction = grad
    if hyper[Hyper.MOMENTUM] != 0:  # and there is a buffer
        undampened = cast(1.0 - hyper[Hyper.DAMPENING], lr)
        if hyper[Hyper.ZERO_INIT] == 0:  # the buffer starts at zero; torch starts it at the first gradient
            undampened = where(updates == 0, cast(1.0, lr), undampened)
        momentum = cast(hyper[Hyper.MOMENTUM], param)
        buffer = fma(grad, cast(undampened, param), buffer * momentum)  # type: ignore[operator]
        direction = buffer
        if hyper[Hyper.NESTEROV] != 0:
            direction = fma(buffer, momentum, grad)
    return fma(direction, cast(-(lr / length), param), param), buffer


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    hyper: list[float],
    lr: Tensor,
    length: Tensor,
    updates: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """M <- lerp(m, g, 1 - beta1); v <- beta2 v + (1 - beta2) g^2; p <- p (1 - lr wd) - lr m_hat / (sqrt(v_hat) + eps).

    As in ``torch.optim.AdamW``, whose roots may differ in the last bit and which divides by the root of 1 - beta2^t.
    """
    step = updates.to(float64) + 1.0
    param = param * cast(1.0 - lr * hyper[Hyper.WEIGHT_DECAY], param)
    weight1 = cast(1.0 - hyper[Hyper.BETA1], param)
    toward = grad - exp_avg
    if 1.0 - hyper[Hyper.BETA1] < 0.5:
        exp_avg = fma(weight1, toward, exp_avg)
    else:
        exp_avg = fma(weight1 - 1, toward, grad)
    weighted = grad * cast(1.0 - hyper[Hyper.BETA2], param)
    exp_avg_sq = fma(weighted, grad, exp_avg_sq * cast(hyper[Hyper.BETA2], param))
    second = exp_avg_sq
    if hyper[Hyper.AMSGRAD] != 0:  # and there is a third state
        max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)  # type: ignore[arg-type]
        second = max_exp_avg_sq
    unbias2_sqrt = 1.0 / sqrt(1.0 - power(hyper[Hyper.BETA2], step))
    denominator = sqrt(second) * cast(unbias2_sqrt, param) + cast(hyper[Hyper.EPS], param)
    step_size = lr / length / (1.0 - power(hyper[Hyper.BETA1], step))
    param = param + divide(exp_avg * cast(-step_size, param), denominator)
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq


def adamw_direction(exp_avg: Tensor, second: Tensor, hyper: list[float], updates: Tensor) -> Tensor:
    """Return the direction of AdamW's last update, m_hat / (sqrt(v_hat) + eps); zero before the first one."""
    step = updates.to(float64)
    unbias1 = cast(1.0 / (1.0 - power(hyper[Hyper.BETA1], step)), exp_avg)
    unbias2_sqrt = cast(1.0 / sqrt(1.0 - power(hyper[Hyper.BETA2], step)), exp_avg)
    denominator = sqrt(second) * unbias2_sqrt + cast(hyper[Hyper.EPS], exp_avg)
    return where(updates > 0, divide(exp_avg * unbias1, denominator), 0.0)


# Rounding at random, up with the probability of the part that is cut off, so that small updates are not lost on the
# average. The bits are a hash of the step, the parameter and the element: the same on every backend, in every run.
# 32-bit integers are kept in int64 tensors.

LOW = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits in which every input bit moves every output bit (Wellons' lowbias32)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & LOW
    return x ^ (x >> 16)


def random_key(step: Tensor, row: int) -> Tensor:
    """One for each parameter and step; ``row`` counts the optimizer's parameters."""
    return mix((mix(step.long() & LOW) + row) & LOW)


def random_bits(key: Tensor, element: Tensor) -> Tensor:
    """32 bits for each element, counted through the parameter's memory."""
    return mix(mix(element & LOW) ^ key ^ (element >> 32))


def to_bfloat16_at_random(x: Tensor, random: Tensor) -> Tensor:
    """Round float32 to bfloat16."""
    bits = x.view(torch.int32).long() & LOW
    rounded = torch.where(x.isfinite(), bits + (random & 0xFFFF), bits) >> 16
    return torch.where(x.isnan(), 0x7FC0, rounded).to(torch.int16).view(torch.bfloat16)


def to_float16_at_random(x: Tensor, random: Tensor) -> Tensor:
    """Round float32 to float16."""
    bits = x.view(torch.int32).long() & LOW
    sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    special = torch.where(x.isnan(), 0x7E00, 0x7C00)
    normal = (magnitude - 0x38000000 + (random & 0x1FFF)) >> 13
    is_normal, is_large = magnitude >= 0x38800000, magnitude >= 0x47800000
    steps = torch.where(is_normal, 0.0, x.abs()) * 2.0**24  # below 2^-14 the values are 2^-24 apart
    whole = steps.floor()
    subnormal = whole.long() + ((steps - whole) * 65536.0 > random & 0xFFFF).long()
    half = torch.where(is_large, special, torch.where(is_normal, normal, subnormal))
    return (sign | half).to(torch.int16).view(torch.float16)


# ----------------------------------------------------------------------------------------------------------------------
# DECIDE: 0-dim float64 tensors, so that nothing waits for the device.


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_``: min(1, max_norm / (norm + 1e-6))."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def cosine(dot: Tensor, a_sq: Tensor, b_sq: Tensor) -> Tensor:
    """<a, b> / (|a| |b|); 0 where a norm is zero or anything is not finite."""
    return (dot / (a_sq.sqrt() * b_sq.sqrt())).nan_to_num(0.0, 0.0, 0.0)


def at(table: Tensor, step: Tensor) -> Tensor:
    """The multiplier of an open-loop schedule, tabulated: its last value stays."""
    return table.index_select(0, step.clamp(max=len(table) - 1).long().reshape(1)).reshape(())


def rate(lr: Tensor, multiplier: Tensor, control: Tensor, settings: list[float]) -> Tensor:
    """The rate of a group: its own lr times the closed loop's factor times the open-loop multiplier.

    ``alignment`` bounds the rate of each group; ``gala`` and ``volsched`` bound the first group's, in their factor, and
    the others keep their proportion.
    """
    looped = lr * control[Control.FACTOR]
    if settings[Setting.CLOSED_LOOP] != ClosedLoopKind.ALIGNMENT:
        return looped * multiplier
    return looped.clamp(settings[Setting.MIN_LR], settings[Setting.MAX_LR]) * multiplier


def alignment_factor(control: Tensor, settings: list[float], direction_cosine: Tensor) -> Tensor:
    """Ours: exponentiated gradient on the normalised alignment, log factor += kappa (c + bias)."""
    step = control[Control.STEP]
    counts = (step > 0) & (step < settings[Setting.FREEZE_AFTER])
    increment = settings[Setting.KAPPA] * (direction_cosine + settings[Setting.BIAS])
    control[Control.LOG_FACTOR] += torch.where(counts, increment, torch.zeros_like(increment))
    return control[Control.LOG_FACTOR].clamp(max=80.0).exp()  # above that no float32 rate is finite


def gala_factor(control: Tensor, settings: list[float], sums: Tensor, rule: int) -> Tensor:
    """Jiang, Kavis, Mokhtari 2025: lr = (delta lr_0 + sum a) / (delta + sum b), a = <g', g>, b = L |g|^2."""
    delta, lr0 = settings[Setting.DELTA], control[Control.FIRST_LR]
    started = control[Control.STEP] > 0
    smoothness = sums[Sum.DIFF_SQ].sqrt() / control[Control.LAST_MOVE_SQ].sqrt()
    defined = started & smoothness.isfinite()
    control[Control.SMOOTHNESS] = torch.where(defined, smoothness, control[Control.SMOOTHNESS])
    along_gradient = rule == Rule.SGD and not settings[Setting.NORMALIZE]
    unit = sums[Sum.DIRECTION_SQ].sqrt() if settings[Setting.NORMALIZE] else torch.ones_like(lr0)
    a = sums[Sum.DOT_PREV] if along_gradient else sums[Sum.DOT_DIRECTION] / unit
    length_sq = control[Control.LAST_GRAD_SQ] if along_gradient else sums[Sum.DIRECTION_SQ] / (unit * unit)
    b = control[Control.SMOOTHNESS] * length_sq
    counts = started & a.isfinite() & b.isfinite()
    control[Control.NUMERATOR] += torch.where(counts, a, torch.zeros_like(a))
    control[Control.DENOMINATOR] += torch.where(counts, b, torch.zeros_like(b))
    lr = (delta * lr0 + control[Control.NUMERATOR]) / (delta + control[Control.DENOMINATOR])
    factor = lr.clamp(settings[Setting.MIN_LR], settings[Setting.MAX_LR]) / lr0
    return torch.where(factor.isfinite(), factor, control[Control.NEXT_FACTOR])


def direction_length(sums: Tensor, hyper: list[float]) -> Tensor:
    """|momentum m + (1 - dampening) g|, the length of SGD's next buffer, from the sums over both.

    1 where it is 0 or not finite, so that nothing is divided by it. All groups have the same momentum and dampening.
    """
    momentum, square = hyper[Hyper.MOMENTUM], sums[Sum.GRAD_SQ]
    if momentum:
        undampened = 1.0 - hyper[Hyper.DAMPENING]
        square = momentum * momentum * sums[Sum.DIRECTION_SQ] + 2.0 * momentum * undampened * sums[Sum.DOT_DIRECTION]
        square = square + undampened * undampened * sums[Sum.GRAD_SQ]
    length = square.sqrt()
    return torch.where((length > 0) & length.isfinite(), length, torch.ones_like(length))


def volatility(returns: Tensor, count: Tensor | float) -> Tensor:
    """std(r_i, ddof = 1) of the first ``count`` of ``returns``."""
    kept = torch.arange(len(returns), device=returns.device) < count
    values = torch.where(kept, returns, torch.zeros_like(returns))
    away = torch.where(kept, values - values.sum() / count, torch.zeros_like(returns))
    return (away.square().sum() / (count - 1)).sqrt()


def volatility_multiplier(control: Tensor, settings: list[float]) -> Tensor:
    """Ren 2025: M = 1 + sign(rho - 1) ln(1 + w |rho - 1|), rho = std(all) / std(last N)."""
    ring = control[RING_AT:]
    newest_first = (control[Control.SIGNALS] - 1 - torch.arange(len(ring), device=ring.device)) % len(ring)
    values = ring[newest_first.long()]
    returns = (values[:-1] / values[1:]).log()
    count = control[Control.SIGNALS].clamp(max=len(ring)) - 1
    window = settings[Setting.WINDOW]
    away = volatility(returns, count) / volatility(returns, window) - 1.0
    multiplier = 1.0 + away.sign() * (settings[Setting.SENSITIVITY] * away.abs()).log1p()
    defined = (count >= window) & multiplier.isfinite()
    return torch.where(defined, multiplier, torch.ones_like(multiplier))


def volsched_factor(control: Tensor, settings: list[float], decay: Tensor, step: Tensor) -> Tensor:
    """Every N steps lr <- max(lr_min, lr M A), A = s(e) / s(e - N); linear warm-up first."""
    lr0 = control[Control.FIRST_LR]
    warmup, window = settings[Setting.WARMUP_STEPS], settings[Setting.WINDOW]
    start = settings[Setting.WARMUP_START]
    elapsed = step - warmup
    climb = start + (1.0 - start) * (step / (warmup - 1.0) if warmup > 1 else torch.ones_like(step))
    before = at(decay, (elapsed - window).clamp(min=0.0))
    fall = torch.where(before == 0, torch.zeros_like(before), at(decay, elapsed.clamp(min=0.0)) / before)
    held = control[Control.NEXT_FACTOR]
    lr = lr0 * held * volatility_multiplier(control, settings) * fall
    moved = lr.clamp(settings[Setting.MIN_LR], settings[Setting.MAX_LR]) / lr0
    moved = torch.where(lr0 != 0, moved, held)
    decides = (elapsed % window == 0) & (elapsed - window < len(decay) - 1)  # for the last time at the decay's end
    later = torch.where(elapsed == 0, torch.ones_like(held), torch.where(decides, moved, held))
    return torch.where(elapsed < 0, climb, later)


def begin(control: Tensor, found_inf: Tensor | None) -> None:
    """Start a step: the factor decided so far, no clip, and whether the gradient scaler wants it skipped."""
    control[Control.FACTOR] = control[Control.NEXT_FACTOR]
    control[Control.CLIP].fill_(1.0)  # on a GPU, to assign a number would wait
    control[Control.LENGTH].fill_(1.0)
    control[Control.SKIP] = torch.zeros_like(control[0]) if found_inf is None else (found_inf.reshape(()) != 0).double()


def decide(control: Tensor, settings: list[float], hyper: list[float], rule: int, two_pass: bool) -> None:
    """What the sums say: the statistics, the clip, the length, whether to skip, the closed loop's next factor."""
    sums = control[SUMS_AT : SUMS_AT + len(Sum)]
    norm = sums[Sum.GRAD_SQ].sqrt()
    curvature = sums[Sum.DIFF_SQ].sqrt() / control[Control.LAST_MOVE_SQ].sqrt()
    values = {
        "grad_norm": norm,
        "grad_norm_l1": sums[Sum.GRAD_ABS],
        "direction_cosine": cosine(sums[Sum.DOT_DIRECTION], sums[Sum.GRAD_SQ], sums[Sum.DIRECTION_SQ]),
        "alignment": sums[Sum.DOT_PREV],
        "cosine": cosine(sums[Sum.DOT_PREV], sums[Sum.GRAD_SQ], sums[Sum.PREV_SQ]),
        "curvature": torch.where(curvature.isfinite(), curvature, torch.zeros_like(curvature)),
    }
    for name, value in values.items():
        control[STATS_AT + STATS.index(name)] = value
    finite = sums[Sum.GRAD_SQ].isfinite()
    skip = control[Control.SKIP] != 0
    if settings[Setting.SKIP_NONFINITE]:
        skip = skip | ~finite
        control[Control.SKIP] = skip.double()
    if math.isfinite(settings[Setting.MAX_GRAD_NORM]):
        clip = clip_factor(norm, settings[Setting.MAX_GRAD_NORM])
        control[Control.CLIP] = torch.where(skip, control[Control.CLIP], clip)
    if settings[Setting.NORMALIZE]:
        control[Control.LENGTH] = torch.where(skip, control[Control.LENGTH], direction_length(sums, hyper))
    trial = control.clone()
    if settings[Setting.CLOSED_LOOP] == ClosedLoopKind.ALIGNMENT:
        trial[Control.NEXT_FACTOR] = alignment_factor(trial, settings, values["direction_cosine"])
    elif settings[Setting.CLOSED_LOOP] == ClosedLoopKind.GALA:
        trial[Control.NEXT_FACTOR] = gala_factor(trial, settings, sums, rule)
    else:
        return
    if two_pass and settings[Setting.LAG] == 0:
        trial[Control.FACTOR] = trial[Control.NEXT_FACTOR]
    control.copy_(torch.where(skip | ~finite, control, trial))


def finish(
    control: Tensor,
    settings: list[float],
    decay: Tensor,
    history: Tensor,
    lr0: Tensor,
    multiplier: Tensor,
) -> None:
    """Advance the counters, take the observed signal, write the history's row. A skipped step only counts itself."""
    sums = control[SUMS_AT : SUMS_AT + len(Sum)]
    stats = control[STATS_AT : STATS_AT + len(STATS)]
    signal = control[Control.SIGNAL].clone()
    control[Control.SIGNAL].fill_(math.nan)
    stats[STATS.index("clip")] = control[Control.CLIP]
    stats[STATS.index("lr")] = rate(lr0, multiplier, control, settings)
    skip = control[Control.SKIP] != 0
    control[Control.SKIPPED] += skip.double()
    stats[STATS.index("skipped")] = control[Control.SKIPPED]
    trial = control.clone()
    trial[Control.STEP] += 1.0
    trial[STATS_AT + STATS.index("step")] = trial[Control.STEP]
    trial[Control.LAST_GRAD_SQ] = sums[Sum.GRAD_SQ]
    trial[Control.LAST_MOVE_SQ] = sums[Sum.MOVE_SQ]
    if settings[Setting.CLOSED_LOOP] == ClosedLoopKind.VOL_SCHED:
        taken = signal.isfinite()
        slot = (RING_AT + trial[Control.SIGNALS] % settings[Setting.CAPACITY]).long().reshape(1)
        value = torch.where(taken, signal.clamp(min=1e-8), trial[slot].reshape(()))
        trial.index_copy_(0, slot, value.reshape(1))
        trial[Control.SIGNALS] += taken.double()
        trial[Control.NEXT_FACTOR] = volsched_factor(trial, settings, decay, trial[Control.STEP])
    row = (trial[Control.ROWS] % len(history)).long().reshape(1)
    stats = trial[STATS_AT : STATS_AT + len(STATS)]
    history.index_copy_(0, row, torch.where(skip, history.index_select(0, row), stats.reshape(1, -1)))
    trial[Control.ROWS] += 1.0
    control.copy_(torch.where(skip, control, trial))
