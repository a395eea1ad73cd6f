"""The kernels themselves; only :mod:`.kernels` imports this, where Triton is there."""

from __future__ import annotations

# ruff: noqa: N803  # compile-time constants are written as Triton's own code writes them
# mypy: ignore-errors
import triton
import triton.language as tl

# Triton compiles anew for an argument that is 1 or a multiple of 16; of these it would know nothing useful.
_KEEP = ["site", "dropped", "count", "rows", "blocks", "columns", "numbered_rows", "numbered_blocks", "stride"]

_ATTEND = [
    "first_stride", "lengths_stride", "per_trial", "tokens", "kept_rows", "site", "dropped", "keep_factor", "extent",
]  # fmt: skip


@triton.jit(do_not_specialize=_KEEP)
def draw(
    keys, kept, site, dropped, count, rows, blocks, columns, numbered_rows, numbered_blocks, stride, SIZE: tl.constexpr
):
    """Write ones and zeros of one order, eight along the columns for each counter."""
    order = tl.program_id(1)
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    block = place % blocks
    row = place // blocks % rows
    outer = place // (blocks * rows)
    counter = (outer * numbered_rows + row) * numbered_blocks + block
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox(tl.load(keys + order), counter, zero + site, zero, zero)
    even = tl.interleave(tl.interleave(w0 & 0xFFFF, w2 & 0xFFFF), tl.interleave(w1 & 0xFFFF, w3 & 0xFFFF))
    odd = tl.interleave(tl.interleave(w0 >> 16, w2 >> 16), tl.interleave(w1 >> 16, w3 >> 16))
    bits = tl.interleave(even, odd)
    lane = tl.arange(0, 8 * SIZE)
    place = tl.program_id(0) * SIZE + lane // 8
    column = place % blocks * 8 + lane % 8
    target = (place // blocks).to(tl.int64) * columns + column
    values = (bits.to(tl.int32) >= dropped).to(tl.float32).to(kept.dtype.element_ty)
    tl.store(kept + order.to(tl.int64) * stride + target, values, mask=(place < count) & (column < columns))


@triton.jit
def adamw(
    rows, gradient, compute_grad, mean, square, copy, numbers, constants, factors,
    size, decayed, low_start, low_stop, numbers_stride, constants_stride, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the step of one block of columns of one trial."""
    trial = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = column < size
    at = trial.to(tl.int64) * size + column
    lr_times_weight_decay = tl.load(numbers + trial * numbers_stride + 1)
    step_size = tl.load(numbers + trial * numbers_stride + 2)
    root = tl.load(numbers + trial * numbers_stride + 3)
    to_mean = tl.load(constants + trial * constants_stride)
    keep_square = tl.load(constants + trial * constants_stride + 1)
    to_square = tl.load(constants + trial * constants_stride + 2)
    eps = tl.load(constants + trial * constants_stride + 3)
    if COPIES:
        low = (column >= low_start) & (column < low_stop)
        low_at = trial.to(tl.int64) * (low_stop - low_start) + (column - low_start)
        g = tl.load(gradient + at, mask=there & ~low, other=0.0)
        g += tl.load(compute_grad + low_at, mask=low, other=0.0).to(g.dtype)
    else:
        g = tl.load(gradient + at, mask=there, other=0.0)
    g *= tl.load(factors + trial)
    p = tl.load(rows + at, mask=there, other=0.0)
    m = tl.load(mean + at, mask=there, other=0.0)
    v = tl.load(square + at, mask=there, other=0.0)
    m += (g - m) * to_mean
    v = v * keep_square + g * g * to_square
    p = tl.where(column < decayed, p - p * lr_times_weight_decay, p)
    p -= step_size * m / (tl.sqrt(v) * root + eps)
    tl.store(rows + at, p, mask=there)
    tl.store(mean + at, m, mask=there)
    tl.store(square + at, v, mask=there)
    if COPIES:
        tl.store(copy + low_at, p.to(copy.dtype.element_ty), mask=low)


@triton.jit(do_not_specialize=_ATTEND)
def attend(
    rows, asked, kept, to_rows, to_asked, first, lengths, keys, first_stride, lengths_stride, per_trial,
    tokens, kept_rows, heads, size, factor, site, dropped, keep_factor, extent,
    FORWARD: tl.constexpr, APART: tl.constexpr, DROPS: tl.constexpr,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Attend in one sentence with one head; ``kept`` is the context to write, or the gradient of it to read."""
    sentence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    trial = tl.program_id(1).to(tl.int64)
    order = trial * per_trial
    start = tl.load(first + order * first_stride + sentence)
    length = tl.load(lengths + order * lengths_stride + sentence)
    query, column, part = tl.arange(0, QUERIES), tl.arange(0, WIDTH), tl.arange(0, SIZE)
    model = heads * size
    stride = 2 * model if APART else 3 * model
    known = (column < length)[:, None] & (part < size)[None, :]
    token = (trial * tokens + start + column) * stride + head * size
    key_at = token[:, None] + part[None, :] + (0 if APART else model)
    if APART:
        asking = (query < 1)[:, None] & (part < size)[None, :]
        query_at = (trial * kept_rows + sentence + query)[:, None] * model + head * size + part[None, :]
        kept_at = query_at
    else:
        asking = (query < length)[:, None] & (part < size)[None, :]
        row = trial * tokens + start + query
        query_at = row[:, None] * stride + head * size + part[None, :]
        kept_at = row[:, None] * model + head * size + part[None, :]
    q = tl.load(asked + query_at, mask=asking, other=0.0)
    k = tl.load(rows + key_at, mask=known, other=0.0)
    v = tl.load(rows + key_at + model, mask=known, other=0.0)

    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    scores = tl.where((column < length)[None, :], scores, -1e30)
    powers = tl.exp(scores - tl.max(scores, 1)[:, None])
    probabilities = powers / tl.sum(powers, 1)[:, None]
    keep = tl.full((QUERIES, WIDTH), 1.0, tl.float32)
    if DROPS:
        counter = ((sentence * heads + head) * extent + query[:, None]) * (extent // 8) + column[None, :] // 8
        zero = counter * 0
        w0, w1, w2, w3 = tl.philox(tl.load(keys + order), counter, zero + site, zero, zero)
        lane = column[None, :] % 8 + zero
        word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
        bits = tl.where(lane % 2 == 0, word & 0xFFFF, word >> 16).to(tl.int32)
        keep = tl.where(bits >= dropped, keep_factor, 0.0)
    left = (probabilities * keep).to(v.dtype)
    if FORWARD:
        context = tl.dot(left, v, input_precision="ieee")
        tl.store(kept + kept_at, context.to(kept.dtype.element_ty), mask=asking)
    else:
        g = tl.load(kept + kept_at, mask=asking, other=0.0)
        of_value = tl.dot(tl.trans(left), g, input_precision="ieee")
        of_left = tl.dot(g, tl.trans(v), input_precision="ieee") * keep
        grad_scores = probabilities * (of_left - tl.sum(probabilities * of_left, 1)[:, None]) * factor
        grad_scores = grad_scores.to(k.dtype)
        of_query = tl.dot(grad_scores, k, input_precision="ieee")
        of_key = tl.dot(tl.trans(grad_scores), q, input_precision="ieee")
        target = to_rows.dtype.element_ty
        if APART:
            tl.store(to_asked + query_at, of_query.to(target), mask=asking)
        else:
            tl.store(to_rows + query_at, of_query.to(target), mask=asking)
        tl.store(to_rows + key_at, of_key.to(target), mask=known)
        tl.store(to_rows + key_at + model, of_value.to(target), mask=known)
