"""The Triton kernels; only :mod:`.kernels` imports this module, if Triton is installed.

To compile few variants, kernels are specialized by precision and sizes of the model, never by lengths.
"""

# ruff: noqa: N803  # compile-time constants are upper case, as in Triton's own code
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

# Triton specializes kernels for arguments that are 1 or multiples of 16; for these that would gain nothing.
_MASK = ["site", "dropped", "count", "rows", "blocks", "columns", "numbered_rows", "numbered_blocks", "stride"]
_ADAMW = ["scalars_stride", "constants_stride"]
_NORM = ["rows", "blocks", "shared_x", "shared_branch", "orders", "site", "dropped"]
_ROWS = ["tokens", "order_stride", "table_stride", "width"]
_ATTENTION = ["order_stride", "query_rows", "key_rows", "one_query", "site", "dropped", "query_blocks"]
_BATCH = ["first", "lengths"]
"""Views into the description of a batch, which have no alignment."""


@triton.jit
def _draw(key, site, counter):
    """Return 16 random bits for each of the eight positions of a ``counter``, along the last dimension."""
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox(key, counter, zero + site, zero, zero)
    even = tl.interleave(tl.interleave(w0 & 0xFFFF, w2 & 0xFFFF), tl.interleave(w1 & 0xFFFF, w3 & 0xFFFF))
    odd = tl.interleave(tl.interleave(w0 >> 16, w2 >> 16), tl.interleave(w1 >> 16, w3 >> 16))
    return tl.interleave(even, odd).to(tl.int32)


@triton.jit(do_not_specialize=_MASK)
def dropout_mask(
    keys, mask, site, dropped, count, rows, blocks, columns, numbered_rows, numbered_blocks, stride, BLOCK: tl.constexpr
):
    """Write the ones and zeros of one order, eight columns per counter."""
    order = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    block = place % blocks
    row = place // blocks % rows
    outer = place // (blocks * rows)
    bits = _draw(tl.load(keys + order), site, (outer * numbered_rows + row) * numbered_blocks + block)
    lane = tl.arange(0, 8 * BLOCK)
    place = tl.program_id(0) * BLOCK + lane // 8
    column = place % blocks * 8 + lane % 8
    target = (place // blocks).to(tl.int64) * columns + column
    values = (bits >= dropped).to(tl.float32).to(mask.dtype.element_ty)
    tl.store(mask + order.to(tl.int64) * stride + target, values, mask=(place < count) & (column < columns))


@triton.jit
def _load_gradient(grad, compute_grad, trial, column, size, low_start, low_stop):
    """Load these columns of a trial's gradient, which between ``low_start`` and ``low_stop`` is in low precision."""
    at, there = trial.to(tl.int64) * size + column, column < size
    if compute_grad is not None:
        low = (column >= low_start) & (column < low_stop)
        low_at = trial.to(tl.int64) * (low_stop - low_start) + (column - low_start)
        g = tl.load(grad + at, mask=there & ~low, other=0.0)
        g += tl.load(compute_grad + low_at, mask=low, other=0.0).to(g.dtype)
    else:
        g = tl.load(grad + at, mask=there, other=0.0)
    return g


@triton.jit
def square_sums(grad, compute_grad, sums, size, low_start, low_stop, BLOCK: tl.constexpr):
    """Sum the squares of one block of columns of one trial's gradient."""
    trial = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = _load_gradient(grad, compute_grad, trial, column, size, low_start, low_stop)
    tl.store(sums + trial * tl.num_programs(0) + tl.program_id(0), tl.sum(g * g, 0))


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["limits", "norms"])
def clipping_factors(sums, limits, norms, factors, blocks, BLOCK: tl.constexpr):
    """Sum the squares of all blocks of one trial, and compare the norm with the trial's limit."""
    trial = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        total += tl.load(sums + trial * blocks + block, mask=block < blocks, other=0.0)
    norm = tl.sqrt(tl.sum(total, 0))
    factor = tl.load(limits + trial) / (norm + 1e-6)
    tl.store(norms + trial, norm)
    tl.store(factors + trial, tl.where(factor > 1.0, 1.0, factor))  # NaN stays NaN


@triton.jit(do_not_specialize=_ADAMW)
def adamw(
    param, grad, compute_grad, mean, square, compute_copy, step_scalars, constants, factors,
    size, decayed, low_start, low_stop, scalars_stride, constants_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one block of columns of one trial."""
    trial = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = column < size
    at = trial.to(tl.int64) * size + column
    lr_times_weight_decay = tl.load(step_scalars + trial * scalars_stride + 1)
    step_size = tl.load(step_scalars + trial * scalars_stride + 2)
    root = tl.load(step_scalars + trial * scalars_stride + 3)
    to_mean = tl.load(constants + trial * constants_stride)
    keep_square = tl.load(constants + trial * constants_stride + 1)
    to_square = tl.load(constants + trial * constants_stride + 2)
    eps = tl.load(constants + trial * constants_stride + 3)
    g = _load_gradient(grad, compute_grad, trial, column, size, low_start, low_stop) * tl.load(factors + trial)
    p = tl.load(param + at, mask=there, other=0.0)
    m = tl.load(mean + at, mask=there, other=0.0)
    v = tl.load(square + at, mask=there, other=0.0)
    m += (g - m) * to_mean
    v = v * keep_square + g * g * to_square
    p = tl.where(column < decayed, p - p * lr_times_weight_decay, p)
    p -= step_size * m / (tl.sqrt(v) * root + eps)
    tl.store(param + at, p, mask=there)
    tl.store(mean + at, m, mask=there)
    tl.store(square + at, v, mask=there)
    if compute_copy is not None:
        low_at = trial.to(tl.int64) * (low_stop - low_start) + (column - low_start)
        low = (column >= low_start) & (column < low_stop)
        tl.store(compute_copy + low_at, p.to(compute_copy.dtype.element_ty), mask=low)


@triton.jit
def _find_rows(rows, WIDTH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Return this program's trial, rows, columns, offsets in a trial's (rows, WIDTH), and the mask of valid ones."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    there = (row < rows)[:, None] & (column < WIDTH)[None, :]
    return tl.program_id(1).to(tl.int64), row, column, row[:, None] * WIDTH + column[None, :], there


@triton.jit
def _kept_scale(keys, trial, orders, site, dropped, row, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Return the scaled dropout mask of these rows, (ROWS, SIZE), numbered as in :func:`dropout_mask`."""
    order = tl.where(orders > 1, trial, 0)
    counter = row[:, None] * ((WIDTH + 7) // 8) + tl.arange(0, SIZE // 8)[None, :]
    return tl.where(_draw(tl.load(keys + order), site, counter) >= dropped, 65536.0 / (65536 - dropped), 0.0)


@triton.jit
def _standardize(total, there, eps, WIDTH: tl.constexpr):
    """Return ``total`` (ROWS, SIZE), standardized by row, and one over the standard deviations."""
    centred = tl.where(there, total - (tl.sum(total, 1) / WIDTH)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)[:, None]
    return centred * scale, scale


@triton.jit(do_not_specialize=_NORM)
def add_norm_forward(
    x, branch, branch_bias, weight, bias, keys, total, normal, compute_copy, rows, shared_x, shared_branch, orders,
    branch_bias_stride, norm_stride, site, dropped, eps, WIDTH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add a branch and its bias, with dropout, to rows of the residual stream, and normalise each row."""
    trial, row, column, at, there = _find_rows(rows, WIDTH, SIZE, ROWS)
    own = trial * rows * WIDTH
    added = tl.load(branch + tl.where(shared_branch > 0, 0, own) + at, mask=there, other=0.0).to(tl.float32)
    added += tl.load(branch_bias + trial * branch_bias_stride + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if keys is not None:
        added *= _kept_scale(keys, trial, orders, site, dropped, row, WIDTH, SIZE)
    summed = tl.where(there, tl.load(x + tl.where(shared_x > 0, 0, own) + at, mask=there, other=0.0) + added, 0.0)
    tl.store(total + own + at, summed, mask=there)
    standard, _ = _standardize(summed, there, eps, WIDTH)
    gain = tl.load(weight + trial * norm_stride + column, mask=column < WIDTH, other=0.0)
    shift = tl.load(bias + trial * norm_stride + column, mask=column < WIDTH, other=0.0)
    result = standard * gain[None, :] + shift[None, :]
    tl.store(normal + own + at, result, mask=there)
    if compute_copy is not None:
        tl.store(compute_copy + own + at, result.to(compute_copy.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_NORM)
def add_norm_backward(
    grad_normal, grad_copy, total, weight, keys, grad_total, grad_branch, parts, rows, blocks, orders, norm_stride,
    site, dropped, eps, WIDTH: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of residual stream and branch, and this block's part of those of weight and both biases."""
    trial, row, column, at, there = _find_rows(rows, WIDTH, SIZE, ROWS)
    own = trial * rows * WIDTH
    grad = tl.load(grad_normal + own + at, mask=there, other=0.0)
    if grad_copy is not None:
        grad += tl.load(grad_copy + own + at, mask=there, other=0.0).to(tl.float32)
    standard, scale = _standardize(tl.load(total + own + at, mask=there, other=0.0), there, eps, WIDTH)
    gain = tl.load(weight + trial * norm_stride + column, mask=column < WIDTH, other=0.0)
    scaled = grad * gain[None, :]
    along, mean = tl.sum(scaled * standard, 1) / WIDTH, tl.sum(scaled, 1) / WIDTH
    grad_sum = tl.where(there, (scaled - mean[:, None] - standard * along[:, None]) * scale, 0.0)
    tl.store(grad_total + own + at, grad_sum, mask=there)
    grad_added = grad_sum
    if keys is not None:
        grad_added *= _kept_scale(keys, trial, orders, site, dropped, row, WIDTH, SIZE)
    tl.store(grad_branch + own + at, grad_added.to(grad_branch.dtype.element_ty), mask=there)
    part = parts + ((trial * blocks + tl.program_id(0)) * (3 * WIDTH) + column)
    tl.store(part, tl.sum(grad * standard, 0), mask=column < WIDTH)
    tl.store(part + WIDTH, tl.sum(grad, 0), mask=column < WIDTH)
    tl.store(part + 2 * WIDTH, tl.sum(grad_added, 0), mask=column < WIDTH)


@triton.jit(do_not_specialize=["rows"])
def sum_rows(x, sums, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum the rows of some columns of a trial, in a fixed order."""
    trial, column = tl.program_id(1).to(tl.int64), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < columns
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        at = (trial * rows + row[:, None]) * columns + column[None, :]
        total += tl.sum(tl.load(x + at, mask=(row < rows)[:, None] & there[None, :], other=0.0).to(tl.float32), 0)
    tl.store(sums + trial * columns + column, total.to(sums.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_ROWS, do_not_specialize_on_alignment=["index"])
def add_rows(
    table, index, values, tokens, order_stride, table_stride, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Add some columns of all values of a row, in the order of tokens, if this program's token is the row's first."""
    trial, token = tl.program_id(2).to(tl.int64), tl.program_id(0)
    own_index = index + trial * order_stride
    row = tl.load(own_index + token)
    earlier = 0
    for start in range(0, token, ROWS):
        other = start + tl.arange(0, ROWS)
        earlier += tl.sum((tl.load(own_index + other, mask=other < token, other=-1) == row).to(tl.int32), 0)
    if earlier > 0:
        return
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), values.dtype.element_ty)
    for start in range(token // ROWS * ROWS, tokens, ROWS):
        other = start + tl.arange(0, ROWS)
        same = tl.load(own_index + other, mask=other < tokens, other=-1) == row
        at = (trial * tokens + other[:, None]) * width + column[None, :]
        total += tl.sum(tl.load(values + at, mask=same[:, None] & (column < width)[None, :], other=0.0), 0)
    place = table + trial * table_stride + row * width + column
    tl.store(place, tl.load(place, mask=column < width, other=0.0) + total, mask=column < width)


@triton.jit
def _find_sentence(first, lengths, order_stride, query_rows, key_rows, one_query, HEADS: tl.constexpr):
    """Return this program's head and order, and its sentence's first row and number of queries, then of keys."""
    sentence, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    trial = tl.program_id(2).to(tl.int64)
    order = tl.where(order_stride > 0, trial, 0)
    at = order * order_stride + sentence
    start, length = tl.load(first + at), tl.load(lengths + at).to(tl.int32)
    query_row = trial * query_rows + tl.where(one_query > 0, sentence, start)
    return head, order, query_row, tl.where(one_query > 0, 1, length), trial * key_rows + start, length


@triton.jit
def _load(tensor, row, stride, number, count, head, HEAD_SIZE: tl.constexpr, SIZE: tl.constexpr):
    """Load the columns of ``head`` in rows ``row + number``, (BLOCK, SIZE); zeros from row ``count`` on.

    All but bfloat16 is converted to float32: Triton uses no tensor cores for float16 on a T4.
    """
    part = tl.arange(0, SIZE)
    there = (number < count)[:, None] & (part < HEAD_SIZE)[None, :]
    tile = tensor + (row * stride + head * HEAD_SIZE)  # offsets of a trial's rows need 64 bits; the rest fits 32
    values = tl.load(tile + (number[:, None] * stride + part[None, :]), mask=there, other=0.0)
    return values if tensor.dtype.element_ty == tl.bfloat16 else values.to(tl.float32)


@triton.jit
def _load_keys(k, v, row, stride, number, count, head, HEAD_SIZE: tl.constexpr, SIZE: tl.constexpr):
    """Load a block of keys and their values, (BLOCK, SIZE) each."""
    keys = _load(k, row, stride, number, count, head, HEAD_SIZE, SIZE)
    return keys, _load(v, row, stride, number, count, head, HEAD_SIZE, SIZE)


@triton.jit
def _store(tensor, values, row, stride, number, count, head, HEAD_SIZE: tl.constexpr, SIZE: tl.constexpr):
    """Write ``values`` (BLOCK, SIZE) to the addresses of :func:`_load`."""
    part = tl.arange(0, SIZE)
    there = (number < count)[:, None] & (part < HEAD_SIZE)[None, :]
    tile = tensor + (row * stride + head * HEAD_SIZE)
    tl.store(tile + (number[:, None] * stride + part[None, :]), values.to(tensor.dtype.element_ty), mask=there)


@triton.jit
def _kept(keys, order, site, dropped, query, key_start, MAX_LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return which probabilities of a block of keys dropout keeps, (queries, BLOCK)."""
    if keys is None:
        kept = tl.full((BLOCK, BLOCK), 1, tl.int1)
    else:
        eighth = key_start // 8 + tl.arange(0, BLOCK // 8)
        counter = (tl.program_id(0) * MAX_LENGTH + query[:, None]) * (MAX_LENGTH // 8) + eighth[None, :]
        kept = _draw(tl.load(keys + order), site, counter) >= dropped
    return kept


@triton.jit(do_not_specialize=_ATTENTION, do_not_specialize_on_alignment=_BATCH)
def attention_forward(
    q, k, v, context, log_sums, first, lengths, keys,
    order_stride, query_rows, key_rows, query_stride, key_stride, one_query, site, dropped,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, MAX_LENGTH: tl.constexpr,
):  # fmt: skip
    """Attend with a block of queries of one sentence and head to all of its keys, block by block.

    Partial sums are rescaled to the largest score so far (Dao et al., "FlashAttention", 2022, algorithm 1).
    """
    head, order, query_row, queries, key_row, length = _find_sentence(
        first, lengths, order_stride, query_rows, key_rows, one_query, HEADS
    )
    if tl.program_id(1) * BLOCK >= queries:
        return
    query = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    queries_ = _load(q, query_row, query_stride, query, queries, head, HEAD_SIZE, SIZE)
    largest = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    summed = tl.zeros((BLOCK, SIZE), tl.float32)
    for key_start in tl.range(0, length, BLOCK, num_stages=1):
        column = key_start + tl.arange(0, BLOCK)
        keys_, values = _load_keys(k, v, key_row, key_stride, column, length, head, HEAD_SIZE, SIZE)
        scores = tl.dot(queries_, tl.trans(keys_), input_precision="ieee") * HEAD_SIZE**-0.5
        scores = tl.where((column < length)[None, :], scores, -1e30)
        larger = tl.maximum(largest, tl.max(scores, 1))
        powers = tl.exp(scores - larger[:, None])  # (queries, keys)
        shrink = tl.exp(largest - larger)
        largest, total = larger, total * shrink + tl.sum(powers, 1)
        powers = tl.where(_kept(keys, order, site, dropped, query, key_start, MAX_LENGTH, BLOCK), powers, 0.0)
        summed = tl.dot(powers.to(values.dtype), values, summed * shrink[:, None], input_precision="ieee")
    total = tl.where(total > 0, total, 1.0)  # an absent sentence has no keys
    result = summed * (65536.0 / (65536 - dropped)) / total[:, None]
    _store(context, result, query_row, HEADS * HEAD_SIZE, query, queries, head, HEAD_SIZE, SIZE)
    tl.store(log_sums + (query_row + query) * HEADS + head, largest + tl.log(total), mask=query < queries)


@triton.jit
def _load_backward(
    q, context, grad_context, log_sums, row, stride, query, queries, head,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Load queries and the gradient of their contexts (BLOCK, SIZE), the log sums of their scores, and the sum that the
    softmax's gradient subtracts (BLOCK,): probabilities times their gradients, which equals context times gradient.
    """  # fmt: skip
    model: tl.constexpr = HEADS * HEAD_SIZE
    asked = _load(q, row, stride, query, queries, head, HEAD_SIZE, SIZE)
    answered = _load(context, row, model, query, queries, head, HEAD_SIZE, SIZE)
    grad = _load(grad_context, row, model, query, queries, head, HEAD_SIZE, SIZE)
    log_sum = tl.load(log_sums + (row + query) * HEADS + head, mask=query < queries, other=0.0)
    return asked, grad, log_sum, tl.sum(answered.to(tl.float32) * grad.to(tl.float32), 1)


@triton.jit
def _scores_backward(q, k, v, grad, log_sum, taken, known, kept, dropped, HEAD_SIZE: tl.constexpr):
    """Recompute the probabilities; return them after dropout, and the gradient of the scores, (queries, keys)."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * HEAD_SIZE**-0.5
    probabilities = tl.where(known[None, :], tl.exp(scores - log_sum[:, None]), 0.0)
    kept_scale = tl.where(kept, 65536.0 / (65536 - dropped), 0.0)
    grad_left = tl.dot(grad, tl.trans(v), input_precision="ieee")
    grad_scores = probabilities * (grad_left * kept_scale - taken[:, None]) * HEAD_SIZE**-0.5
    return (probabilities * kept_scale).to(grad.dtype), grad_scores.to(q.dtype)


@triton.jit(do_not_specialize=_ATTENTION, do_not_specialize_on_alignment=_BATCH)
def attention_backward(
    q, k, v, context, log_sums, grad_context, grad_q, grad_k, grad_v, first, lengths, keys,
    order_stride, query_rows, key_rows, query_stride, key_stride, one_query, site, dropped, query_blocks,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, MAX_LENGTH: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a block of queries, or of keys and values, from ``log_sums``; no sums cross programs."""
    head, order, query_row, queries, key_row, length = _find_sentence(
        first, lengths, order_stride, query_rows, key_rows, one_query, HEADS
    )
    begin = tl.program_id(1) * BLOCK
    if begin < query_blocks * BLOCK:
        if begin >= queries:
            return
        query = begin + tl.arange(0, BLOCK)
        asked, grad, log_sum, taken = _load_backward(
            q, context, grad_context, log_sums, query_row, query_stride, query, queries, head, HEADS, HEAD_SIZE, SIZE
        )
        grad_asked = tl.zeros((BLOCK, SIZE), tl.float32)
        for key_start in tl.range(0, length, BLOCK, num_stages=1):
            column = key_start + tl.arange(0, BLOCK)
            keys_, values = _load_keys(k, v, key_row, key_stride, column, length, head, HEAD_SIZE, SIZE)
            kept = _kept(keys, order, site, dropped, query, key_start, MAX_LENGTH, BLOCK)
            _, grad_scores = _scores_backward(
                asked, keys_, values, grad, log_sum, taken, column < length, kept, dropped, HEAD_SIZE
            )
            grad_asked = tl.dot(grad_scores, keys_, grad_asked, input_precision="ieee")
        _store(grad_q, grad_asked, query_row, query_stride, query, queries, head, HEAD_SIZE, SIZE)
    else:
        begin -= query_blocks * BLOCK
        if begin >= length:
            return
        column = begin + tl.arange(0, BLOCK)
        keys_, values = _load_keys(k, v, key_row, key_stride, column, length, head, HEAD_SIZE, SIZE)
        grad_keys = tl.zeros((BLOCK, SIZE), tl.float32)
        grad_values = tl.zeros((BLOCK, SIZE), tl.float32)
        for query_start in tl.range(0, queries, BLOCK, num_stages=1):
            query = query_start + tl.arange(0, BLOCK)
            asked, grad, log_sum, taken = _load_backward(
                q, context, grad_context, log_sums, query_row, query_stride, query, queries, head,
                HEADS, HEAD_SIZE, SIZE,
            )  # fmt: skip
            kept = _kept(keys, order, site, dropped, query, begin, MAX_LENGTH, BLOCK)
            left, grad_scores = _scores_backward(
                asked, keys_, values, grad, log_sum, taken, column < length, kept, dropped, HEAD_SIZE
            )
            grad_values = tl.dot(tl.trans(left), grad, grad_values, input_precision="ieee")
            grad_keys = tl.dot(tl.trans(grad_scores), asked, grad_keys, input_precision="ieee")
        _store(grad_k, grad_keys, key_row, key_stride, column, length, head, HEAD_SIZE, SIZE)
        _store(grad_v, grad_values, key_row, key_stride, column, length, head, HEAD_SIZE, SIZE)
