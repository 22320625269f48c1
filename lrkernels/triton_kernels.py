"""MEASURE, DECIDE, APPLY as one Triton kernel, for GPUs that the binary has no kernels for.

From the tile to the launch: a tile is loaded, measured, updated by the rules of ``triton_rules.py`` and stored; a chunk
of tiles is what a program takes at a time; ``work()`` hands the chunks out, and decides and finishes when it is time.
``triton_runner.py`` makes the table of rows and launches.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_layout import (
    _Control,
    _Count,
    _Counter,
    _Dtype,
    _Field,
    _Hyper,
    _Measure,
    _Rule,
    _Size,
    _Slot,
    _Sum,
    _Verb,
)
from .triton_rules import (
    adamw_direction,
    adamw_step,
    at,
    begin,
    cast,
    decide,
    finish,
    random_bits,
    random_key,
    rate,
    sgd_step,
    to_bfloat16_at_random,
    to_float16_at_random,
)

__all__ = ["step_kernel"]

# ----------------------------------------------------------------------------------------------------------------------
# Tiles: load, measure, apply the rule, store.


class Step(NamedTuple):
    """What all chunks share. What is in capitals is known to the compiler."""

    control: Any
    counts: Any
    lr: Any
    table: Any
    table_size: Any
    decay: Any
    decay_size: Any
    history: Any
    history_size: Any
    found_inf: Any
    grad_scale: Any
    settings: Any
    hypers: Any
    rows: Any
    chunk_rows: Any
    n_rows: Any
    counters: Any
    partials: Any
    chunks: Any
    most: Any  # chunks that one program takes
    RULE: Any
    STATES: Any  # how many kinds of states there are
    KEPT: Any  # whether there are previous gradients
    MASTERS: Any
    AT_RANDOM: Any
    WIDE: Any  # whether parameters are float64; MIXED where rows differ
    PARAM: Any  # codes of dtypes; MIXED where rows differ
    UPDATED: Any
    GRAD: Any
    STATE: Any
    PREV: Any


class Job(NamedTuple):
    """What the tiles of one chunk need besides their memory."""

    hyper: Any  # the group's row
    lr: Any
    length: Any
    scale: Any  # the clip, and the sign
    unscale: Any  # of a gradient scaler; or None
    updates: Any
    key: Any  # for rounding at random


class Row(NamedTuple):
    """A row of the table, its fields as in ``Field``."""

    param: Any
    updated: Any
    grad: Any
    state0: Any
    state1: Any
    state2: Any
    prev_read: Any  # 0 too while nothing has been kept
    prev_write: Any
    param_dtype: Any
    updated_dtype: Any
    grad_dtype: Any
    state_dtype: Any
    prev_dtype: Any


@triton.jit
def mask_of(inside, address, BLOCK: tl.constexpr):
    """Where to read or write an optional tensor: ``inside`` the row (None: all of the tile), if it is there at all."""
    there = tl.full([BLOCK], address, tl.int64) != 0
    if inside is None:
        return there
    else:
        return there & inside


@triton.jit
def pointer(address, offset, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The addresses of a tile."""
    base = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base + offset + tl.arange(0, BLOCK)


@triton.jit
def load_as(address, offset, mask, DTYPE: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of ``DTYPE``, in ``TYPE``."""
    source = pointer(address, offset, DTYPE, ALIGNED, BLOCK)
    if mask is None:
        return tl.load(source).to(TYPE)
    else:
        return tl.load(source, mask=mask, other=0.0).to(TYPE)


@triton.jit
def load(address, dtype, offset, mask, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """A tile in ``TYPE``, the arithmetic's. Where all rows have one dtype, the compiler knows it and drops the ifs."""
    if dtype == _Dtype.FLOAT32:
        values = load_as(address, offset, mask, tl.float32, TYPE, ALIGNED, BLOCK)
    elif dtype == _Dtype.BFLOAT16:
        values = load_as(address, offset, mask, tl.bfloat16, TYPE, ALIGNED, BLOCK)
    elif dtype == _Dtype.FLOAT16:
        values = load_as(address, offset, mask, tl.float16, TYPE, ALIGNED, BLOCK)
    else:
        values = load_as(address, offset, mask, tl.float64, TYPE, ALIGNED, BLOCK)
    return values


@triton.jit
def rounded(values, key, element, DTYPE: tl.constexpr, AT_RANDOM: tl.constexpr):
    """The values in ``DTYPE``."""
    if DTYPE == values.dtype:
        return values
    elif AT_RANDOM and DTYPE == tl.bfloat16:
        return to_bfloat16_at_random(values, random_bits(key, element))
    elif AT_RANDOM and DTYPE == tl.float16:
        return to_float16_at_random(values, random_bits(key, element))
    elif DTYPE == tl.float64:
        return values.to(tl.float64)
    else:
        return values.to(tl.float32).to(DTYPE)


@triton.jit
def store_as(
    address,
    offset,
    values,
    key,
    mask,
    DTYPE: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store a tile in ``DTYPE``; returns what is in memory then."""
    stored = rounded(values, key, offset + tl.arange(0, BLOCK), DTYPE, AT_RANDOM)
    tl.store(pointer(address, offset, DTYPE, ALIGNED, BLOCK), stored, mask=mask)
    return stored.to(values.dtype)


@triton.jit
def store(
    address,
    dtype,
    offset,
    values,
    key,
    mask,
    AT_RANDOM: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store a tile; returns what is in memory then."""
    # Where float64 comes last, Triton 3.8.0 does not compile one pass over kept gradients of several dtypes.
    if dtype == _Dtype.FLOAT64:
        stored = store_as(address, offset, values, key, mask, tl.float64, AT_RANDOM, ALIGNED, BLOCK)
    elif dtype == _Dtype.FLOAT32:
        stored = store_as(address, offset, values, key, mask, tl.float32, AT_RANDOM, ALIGNED, BLOCK)
    elif dtype == _Dtype.BFLOAT16:
        stored = store_as(address, offset, values, key, mask, tl.bfloat16, AT_RANDOM, ALIGNED, BLOCK)
    else:
        stored = store_as(address, offset, values, key, mask, tl.float16, AT_RANDOM, ALIGNED, BLOCK)
    return stored


@triton.jit
def add(sum, values):
    """Add float64 values to lanes, four neighbours to one: those that one thread holds, in registers."""
    return sum + tl.sum(tl.reshape(values, [values.shape[0] // 4, 4]), 1)


@triton.jit
def run_tile(
    step,
    row,
    job,
    sums,
    offset,
    inside,
    MEASURE: tl.constexpr,
    MOVE: tl.constexpr,
    APPLY: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Measure and update one tile of a row: all of it, or what is ``inside``. Returns the sums."""
    DIRECTED: tl.constexpr = MEASURE & _Measure.DIRECTION != 0
    STATES: tl.constexpr = step.STATES if APPLY or DIRECTED else 0
    hyper = job.hyper
    amsgrad = hyper[_Hyper.AMSGRAD] != 0

    grad = load(row.grad, row.grad_dtype, offset, inside, TYPE, ALIGNED, BLOCK)
    if job.unscale is not None:
        grad = grad * cast(job.unscale, grad)
    param = tl.zeros([BLOCK], TYPE)
    state0, state1, state2, prev = param, param, param, param
    if STATES > 0:
        mask = mask_of(inside, row.state0, BLOCK)
        state0 = load(row.state0, row.state_dtype, offset, mask, TYPE, ALIGNED, BLOCK)
    if STATES > 1:
        state1 = load(row.state1, row.state_dtype, offset, inside, TYPE, ALIGNED, BLOCK)
    if STATES > 2:
        mask = mask_of(inside, row.state2, BLOCK)
        state2 = load(row.state2, row.state_dtype, offset, mask, TYPE, ALIGNED, BLOCK)
    if MEASURE != 0 and step.KEPT:
        mask = mask_of(inside, row.prev_read, BLOCK)
        prev = load(row.prev_read, row.prev_dtype, offset, mask, TYPE, ALIGNED, BLOCK)
    if APPLY:
        param = load(row.updated, row.updated_dtype, offset, inside, TYPE, ALIGNED, BLOCK)

    grad_sq, grad_abs, dot_direction, direction_sq, dot_prev, prev_sq, diff_sq, move_sq = sums
    if MEASURE != 0:
        g, q = grad.to(tl.float64), prev.to(tl.float64)
        grad_sq = add(grad_sq, g * g)
        grad_abs = add(grad_abs, tl.abs(g))
        if DIRECTED:
            if step.RULE == _Rule.ADAMW:
                direction = adamw_direction(state0, tl.where(amsgrad, state2, state1), hyper, job.updates)
            else:
                direction = tl.where(hyper[_Hyper.MOMENTUM] != 0, state0, prev)
            if inside is not None:
                direction = tl.where(inside, direction, 0.0)
            d = direction.to(tl.float64)
            dot_direction = add(dot_direction, g * d)
            direction_sq = add(direction_sq, d * d)
        if step.KEPT:
            difference = tl.where(row.prev_read != 0, g - q, 0.0)
            dot_prev = add(dot_prev, g * q)
            prev_sq = add(prev_sq, q * q)
            diff_sq = add(diff_sq, difference * difference)

    if APPLY:
        if step.KEPT:
            tl.debug_barrier()  # the last gradient has been read, by whichever thread
            mask = mask_of(inside, row.prev_write, BLOCK)
            store(row.prev_write, row.prev_dtype, offset, grad, job.key, mask, False, ALIGNED, BLOCK)
        scaled = grad * cast(job.scale, grad)
        if step.RULE == _Rule.ADAMW:
            new, state0, state1, state2 = adamw_step(
                param, scaled, state0, state1, state2, hyper, job.lr, job.length, job.updates
            )
        else:
            new, state0 = sgd_step(param, scaled, state0, hyper, job.lr, job.length, job.updates)
        if STATES > 0:
            mask = mask_of(inside, row.state0, BLOCK)
            store(row.state0, row.state_dtype, offset, state0, job.key, mask, False, ALIGNED, BLOCK)
        if STATES > 1:
            store(row.state1, row.state_dtype, offset, state1, job.key, inside, False, ALIGNED, BLOCK)
        if STATES > 2:
            mask = mask_of(inside, row.state2, BLOCK)
            store(row.state2, row.state_dtype, offset, state2, job.key, mask, False, ALIGNED, BLOCK)
        stored = store(row.updated, row.updated_dtype, offset, new, job.key, inside, step.AT_RANDOM, ALIGNED, BLOCK)
        if step.MASTERS:
            mask = mask_of(inside, row.param - row.updated, BLOCK)
            store(row.param, row.param_dtype, offset, stored, job.key, mask, False, ALIGNED, BLOCK)
        if MOVE:
            moved = stored.to(tl.float64) - param.to(tl.float64)
            if inside is not None:
                moved = tl.where(inside, moved, 0.0)
            move_sq = add(move_sq, moved * moved)
    return grad_sq, grad_abs, dot_direction, direction_sq, dot_prev, prev_sq, diff_sq, move_sq


@triton.jit
def run_chunk(
    step,
    row,
    job,
    begin,
    end,
    aligned,
    partials,
    MEASURE: tl.constexpr,
    MOVE: tl.constexpr,
    APPLY: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Measure and update one chunk of a row; its sums go to ``partials``."""
    BLOCK: tl.constexpr = _Size.BLOCK * 32 // TYPE.primitive_bitwidth
    TAIL: tl.constexpr = _Size.TAIL
    zero = tl.zeros([BLOCK // 4], tl.float64)
    fast = (zero, zero, zero, zero, zero, zero, zero, zero)
    zero = tl.zeros([TAIL // 4], tl.float64)
    slow = (zero, zero, zero, zero, zero, zero, zero, zero)
    whole = tl.where(aligned, end // BLOCK * BLOCK, begin)  # sixteen bytes at once up to here
    for offset in range(begin, whole, BLOCK):
        offset = tl.multiple_of(offset, BLOCK)
        fast = run_tile(step, row, job, fast, offset, None, MEASURE, MOVE, APPLY, TYPE, True, BLOCK)
    for offset in range(whole, end, TAIL):
        inside = offset + tl.arange(0, TAIL) < end
        slow = run_tile(step, row, job, slow, offset, inside, MEASURE, MOVE, APPLY, TYPE, False, TAIL)
    # The direction already points uphill where the gradient is maximised; a previous gradient does not.
    uphill = (job.hyper[_Hyper.MAXIMIZE] != 0) & ((step.RULE == _Rule.ADAMW) | (job.hyper[_Hyper.MOMENTUM] != 0))
    sign = tl.where(uphill, -1.0, 1.0)
    if MEASURE != 0:
        tl.store(partials + _Slot.GRAD_SQ * step.chunks, tl.sum(fast[0]) + tl.sum(slow[0]))
        tl.store(partials + _Slot.GRAD_ABS * step.chunks, tl.sum(fast[1]) + tl.sum(slow[1]))
        if MEASURE & _Measure.DIRECTION != 0:
            tl.store(partials + _Slot.DOT_DIRECTION * step.chunks, sign * (tl.sum(fast[2]) + tl.sum(slow[2])))
            tl.store(partials + _Slot.DIRECTION_SQ * step.chunks, tl.sum(fast[3]) + tl.sum(slow[3]))
        if step.KEPT:
            tl.store(partials + _Slot.DOT_PREV * step.chunks, tl.sum(fast[4]) + tl.sum(slow[4]))
            tl.store(partials + _Slot.PREV_SQ * step.chunks, tl.sum(fast[5]) + tl.sum(slow[5]))
            tl.store(partials + _Slot.DIFF_SQ * step.chunks, tl.sum(fast[6]) + tl.sum(slow[6]))
    if MOVE:
        tl.store(partials + _Slot.MOVE_SQ * step.chunks, tl.sum(fast[7]) + tl.sum(slow[7]))


# ----------------------------------------------------------------------------------------------------------------------
# The launch


@triton.jit
def add_up(partials, chunks):
    """One sum over all chunks, in one order."""
    lanes = tl.zeros([_Size.BLOCK], tl.float64)
    for start in range(0, chunks, _Size.BLOCK):
        chunk = start + tl.arange(0, _Size.BLOCK)
        lanes += tl.load(partials + chunk, mask=chunk < chunks, other=0.0)
    return tl.sum(lanes)


@triton.jit
def take_sums(control, partials, chunks, skip, MEASURE: tl.constexpr, KEPT: tl.constexpr):
    """Put the chunks' sums into the control tensor; a skipped step has measured nothing."""
    nothing = tl.where(skip, float("nan"), 0.0).to(tl.float64)
    grad_sq, grad_abs, dot_direction, direction_sq = nothing, nothing, nothing, nothing
    dot_prev, prev_sq, diff_sq = nothing, nothing, nothing
    if (MEASURE != 0) & (skip == 0):
        grad_sq = add_up(partials, chunks)
        grad_abs = add_up(partials + _Slot.GRAD_ABS * chunks, chunks)
        if MEASURE & _Measure.DIRECTION != 0:
            dot_direction = add_up(partials + _Slot.DOT_DIRECTION * chunks, chunks)
            direction_sq = add_up(partials + _Slot.DIRECTION_SQ * chunks, chunks)
        if KEPT:
            dot_prev = add_up(partials + _Slot.DOT_PREV * chunks, chunks)
            prev_sq = add_up(partials + _Slot.PREV_SQ * chunks, chunks)
            diff_sq = add_up(partials + _Slot.DIFF_SQ * chunks, chunks)
    tl.store(control + _Sum.GRAD_SQ, grad_sq)
    tl.store(control + _Sum.GRAD_ABS, grad_abs)
    tl.store(control + _Sum.DOT_DIRECTION, dot_direction)
    tl.store(control + _Sum.DIRECTION_SQ, direction_sq)
    tl.store(control + _Sum.DOT_PREV, dot_prev)
    tl.store(control + _Sum.PREV_SQ, prev_sq)
    tl.store(control + _Sum.DIFF_SQ, diff_sq)
    tl.debug_barrier()


@triton.jit
def advance(counts, rows, n_rows):
    """Every parameter that had a gradient has been updated once more, and has a previous gradient."""
    for start in range(0, n_rows, _Size.BLOCK):
        row = start + tl.arange(0, _Size.BLOCK)
        inside = row < n_rows
        count = counts + tl.load(rows + row * _Size.FIELDS + _Field.INDEX, mask=inside, other=0) * _Size.COUNTS
        updates = tl.load(count + _Count.UPDATES, mask=inside, other=0.0)
        tl.store(count + _Count.UPDATES, updates + 1.0, mask=inside)
        tl.store(count + _Count.HAS_PREV, 1.0, mask=inside)


@triton.jit
def run_row(
    step,
    row,
    job,
    chunk,
    begin,
    end,
    aligned,
    MEASURE: tl.constexpr,
    MOVE: tl.constexpr,
    APPLY: tl.constexpr,
):
    """Run one chunk in the arithmetic of its parameter."""
    partials = step.partials + chunk
    wide = row.param_dtype == _Dtype.FLOAT64
    if step.WIDE == _Dtype.MIXED:
        if wide:
            run_chunk(step, row, job, begin, end, aligned, partials, MEASURE, MOVE, APPLY, tl.float64)
        else:
            run_chunk(step, row, job, begin, end, aligned, partials, MEASURE, MOVE, APPLY, tl.float32)
    elif step.WIDE:
        run_chunk(step, row, job, begin, end, aligned, partials, MEASURE, MOVE, APPLY, tl.float64)
    else:
        run_chunk(step, row, job, begin, end, aligned, partials, MEASURE, MOVE, APPLY, tl.float32)


@triton.jit
def run(step, chunk, MEASURE: tl.constexpr, MOVE: tl.constexpr, APPLY: tl.constexpr, BEGUN: tl.constexpr):
    """Read what belongs to one chunk, and run it. BEGUN: begin() has been called, as it is not yet in one pass."""
    row = step.rows + tl.load(step.chunk_rows + chunk) * _Size.FIELDS
    group = tl.load(row + _Field.GROUP)
    index = tl.load(row + _Field.INDEX)
    count = step.counts + index * _Size.COUNTS
    hyper = step.hypers + group * _Size.HYPERS
    hyper = (
        tl.load(hyper),
        tl.load(hyper + 1),
        tl.load(hyper + 2),
        tl.load(hyper + 3),
        tl.load(hyper + 4),
        tl.load(hyper + 5),
        tl.load(hyper + 6),
    )
    position = tl.load(step.control + _Control.STEP)
    multiplier = at(step.table, step.table_size, position)
    if BEGUN:
        factor = tl.load(step.control + _Control.FACTOR)
        clip, length = tl.load(step.control + _Control.CLIP), tl.load(step.control + _Control.LENGTH)
    else:
        factor = tl.load(step.control + _Control.NEXT_FACTOR)
        clip, length = tl.full((), 1.0, tl.float64), tl.full((), 1.0, tl.float64)
    unscale = None
    if step.grad_scale is not None:
        unscale = 1.0 / tl.load(step.grad_scale).to(tl.float64)
    begin = tl.multiple_of((chunk - tl.load(row + _Field.FIRST_CHUNK)) * _Size.CHUNK, _Size.CHUNK)
    run_row(
        step,
        Row(
            tl.load(row + _Field.PARAM),
            tl.load(row + _Field.UPDATED),
            tl.load(row + _Field.GRAD),
            tl.load(row + _Field.STATE0),
            tl.load(row + _Field.STATE1),
            tl.load(row + _Field.STATE2),
            tl.where(tl.load(count + _Count.HAS_PREV) != 0, tl.load(row + _Field.PREV_READ), 0),
            tl.load(row + _Field.PREV_WRITE),
            tl.load(row + _Field.PARAM_DTYPE) if step.PARAM == _Dtype.MIXED else step.PARAM,
            tl.load(row + _Field.UPDATED_DTYPE) if step.UPDATED == _Dtype.MIXED else step.UPDATED,
            tl.load(row + _Field.GRAD_DTYPE) if step.GRAD == _Dtype.MIXED else step.GRAD,
            tl.load(row + _Field.STATE_DTYPE) if step.STATE == _Dtype.MIXED else step.STATE,
            tl.load(row + _Field.PREV_DTYPE) if step.PREV == _Dtype.MIXED else step.PREV,
        ),
        Job(
            hyper,
            rate(tl.load(step.lr + group), multiplier, factor, step.settings),
            length,
            tl.where(hyper[_Hyper.MAXIMIZE] != 0, -clip, clip),
            unscale,
            tl.load(count + _Count.UPDATES),
            random_key(position, index),
        ),
        chunk,
        begin,
        tl.minimum(begin + _Size.CHUNK, tl.load(row + _Field.NUMEL)),
        tl.load(row + _Field.ALIGNED) != 0,
        MEASURE,
        MOVE,
        APPLY,
    )


@triton.jit
def work(step, MEASURE: tl.constexpr, VERBS: tl.constexpr, TWO_PASS: tl.constexpr):
    """Take chunks and run them, decide when all are measured, and finish the step after the last verb of its order.

    Programs take chunks by a ticket, those of the first pass before those of the second. A program with a ticket of
    the second pass waits for the decision, and so only for programs that run already: it cannot wait for ever, however
    many programs the device runs at once. The program that leaves last finishes the step and sets the counters back
    to 0. No other program of this launch looks at them then, and those of the next one start later; so a captured
    graph can be replayed, and the host resets nothing.
    """
    MEASURES: tl.constexpr = VERBS & _Verb.MEASURE != 0
    DECIDES: tl.constexpr = VERBS & _Verb.DECIDE != 0
    APPLIES: tl.constexpr = VERBS & _Verb.APPLY != 0
    TOGETHER: tl.constexpr = MEASURES and APPLIES and not TWO_PASS  # in one pass
    AHEAD: tl.constexpr = (MEASURES and not TOGETHER) or (DECIDES and TWO_PASS)  # there is a pass before it
    skip = tl.full((), 0, tl.int1)
    if MEASURES and step.found_inf is not None:
        skip = tl.load(step.found_inf) != 0
    first = 0
    if AHEAD:
        first = tl.maximum(step.chunks, 1) if MEASURES else 1  # somebody decides, even on nothing
    tickets = first + step.chunks if APPLIES else first
    taken = 1
    ticket = tl.atomic_add(step.counters + _Counter.TICKET, 1, sem="relaxed")
    while ticket < tickets:
        if ticket < first:
            if AHEAD:
                if MEASURES and MEASURE != 0:
                    if (skip == 0) & (ticket < step.chunks):
                        run(step, ticket, MEASURE, False, False, False)
                tl.debug_barrier()
                if tl.atomic_add(step.counters + _Counter.MEASURED, 1, sem="acq_rel") == first - 1:
                    if MEASURES:
                        begin(step.control, skip)
                        take_sums(step.control, step.partials, step.chunks, skip, MEASURE, step.KEPT)
                    if DECIDES and TWO_PASS and MEASURE != 0:
                        decide(step.control, step.settings, step.hypers, step.RULE, True)
                    tl.debug_barrier()
                    tl.atomic_xchg(step.counters + _Counter.DECIDED, 1, sem="release")
        else:
            if APPLIES:
                chunk = ticket - first
                if AHEAD:
                    chunk = step.chunks - 1 - chunk  # backwards: what the first pass read last is still in the cache
                    while tl.atomic_add(step.counters + _Counter.DECIDED, 0, sem="acquire") == 0:
                        pass
                skip_now = skip
                if not TOGETHER:
                    skip_now = tl.load(step.control + _Control.SKIP) != 0
                if skip_now == 0:
                    run(step, chunk, MEASURE if TOGETHER else 0, MEASURE & _Measure.MOVE != 0, True, not TOGETHER)
        taken += 1
        ticket = tickets
        if taken <= step.most:
            ticket = tl.atomic_add(step.counters + _Counter.TICKET, 1, sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(step.counters + _Counter.LEFT, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        if TOGETHER:
            begin(step.control, skip)
            if MEASURE != 0:
                take_sums(step.control, step.partials, step.chunks, skip, MEASURE, step.KEPT)
        if APPLIES:
            skip_now = tl.load(step.control + _Control.SKIP) != 0
            move_sq = tl.full((), 0.0, tl.float64)
            if skip_now == 0:
                if MEASURE & _Measure.MOVE != 0:
                    move_sq = add_up(step.partials + _Slot.MOVE_SQ * step.chunks, step.chunks)
                advance(step.counts, step.rows, step.n_rows)
            tl.store(step.control + _Sum.MOVE_SQ, move_sq)
            tl.debug_barrier()
        if DECIDES and not TWO_PASS and MEASURE != 0:
            decide(step.control, step.settings, step.hypers, step.RULE, False)
        if (APPLIES and TWO_PASS) or (DECIDES and not TWO_PASS):
            multiplier = at(step.table, step.table_size, tl.load(step.control + _Control.STEP))
            lr0 = tl.load(step.lr)
            finish(
                step.control,
                step.settings,
                step.decay,
                step.decay_size,
                step.history,
                step.history_size,
                lr0,
                multiplier,
            )
        tl.store(step.counters + _Counter.TICKET, 0)
        tl.store(step.counters + _Counter.MEASURED, 0)
        tl.store(step.counters + _Counter.DECIDED, 0)
        tl.store(step.counters + _Counter.LEFT, 0)


@triton.jit(
    do_not_specialize=["table_size", "decay_size", "history_size", "n_rows", "n_groups", "chunks", "most"],
    do_not_specialize_on_alignment=[
        *("control", "counts", "lr", "table", "decay", "history", "found_inf", "grad_scale"),
        *("memory", "counters", "partials"),
    ],
)
def step_kernel(
    control,
    counts,
    lr,
    table,
    decay,
    history,
    found_inf,
    grad_scale,
    memory,
    counters,
    partials,
    table_size,
    decay_size,
    history_size,
    n_rows,
    n_groups,
    chunks,
    most,
    RULE: tl.constexpr,
    MEASURE: tl.constexpr,
    VERBS: tl.constexpr,
    TWO_PASS: tl.constexpr,
    STATES: tl.constexpr,
    KEPT: tl.constexpr,
    MASTERS: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    WIDE: tl.constexpr,
    PARAM: tl.constexpr,
    UPDATED: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    PREV: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """The verbs of one call, in one launch."""
    settings = memory.to(tl.pointer_type(tl.float64), bitcast=True)
    hypers = settings + _Size.SETTINGS
    rows = memory + _Size.SETTINGS + n_groups * _Size.HYPERS
    chunk_rows = rows + n_rows * _Size.FIELDS

    work(
        Step(
            control,
            counts,
            lr,
            table,
            table_size,
            decay,
            decay_size,
            history,
            history_size,
            found_inf,
            grad_scale,
            settings,
            hypers,
            rows,
            chunk_rows,
            n_rows,
            counters,
            partials,
            chunks,
            most,
            RULE,
            STATES,
            KEPT,
            MASTERS,
            AT_RANDOM,
            WIDE,
            PARAM,
            UPDATED,
            GRAD,
            STATE,
            PREV,
        ),
        MEASURE,
        VERBS,
        TWO_PASS,
    )
