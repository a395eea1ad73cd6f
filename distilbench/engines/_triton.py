"""The kernels themselves; only :mod:`.kernels` imports this, where Triton is there."""

# ruff: noqa: N803  # compile-time constants are written as Triton's own code writes them
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep(
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
    rows, gradient, mean, square, copy, numbers, constants, factors,
    size, decayed, low_start, low_stop, numbers_stride, constants_stride, COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the step of one block of columns of one trial."""
    trial = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = column < size
    at = trial.to(tl.int64) * size + column
    shrink = tl.load(numbers + trial * numbers_stride + 1)
    pace = tl.load(numbers + trial * numbers_stride + 2)
    root = tl.load(numbers + trial * numbers_stride + 3)
    to_mean = tl.load(constants + trial * constants_stride)
    keep_square = tl.load(constants + trial * constants_stride + 1)
    to_square = tl.load(constants + trial * constants_stride + 2)
    eps = tl.load(constants + trial * constants_stride + 3)
    g = tl.load(gradient + at, mask=there, other=0.0) * tl.load(factors + trial)
    p = tl.load(rows + at, mask=there, other=0.0)
    m = tl.load(mean + at, mask=there, other=0.0)
    v = tl.load(square + at, mask=there, other=0.0)
    m += (g - m) * to_mean
    v = v * keep_square + g * g * to_square
    p = tl.where(column < decayed, p - p * shrink, p)
    p -= pace * m / (tl.sqrt(v) * root + eps)
    tl.store(rows + at, p, mask=there)
    tl.store(mean + at, m, mask=there)
    tl.store(square + at, v, mask=there)
    if COPIES:
        low = (column >= low_start) & (column < low_stop)
        width = low_stop - low_start
        tl.store(copy + trial.to(tl.int64) * width + (column - low_start), p.to(copy.dtype.element_ty), mask=low)
