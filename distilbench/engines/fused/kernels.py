"""Triton kernels: dropout masks, attention, add and norm, sums of rows, and clipping and AdamW of stacked parameters.

Every kernel has a plain PyTorch version next to its only caller, which is used without Triton or CUDA, and in tests as
the reference. Kernels are compiled once per machine and cached on disk. They are specialized by precision and head
size, not by lengths, so that all kernels of a training are compiled and tried before it starts.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from distilbench.engines.fused.cuda.side_stream import on_side_stream

log = logging.getLogger(__name__)

MAX_LENGTH = 512
"""Attention's draws are numbered as if all sentences had this length, the maximum of the supported encoders."""
DRAWS_PER_COUNTER = 8
"""Draws per counter."""
SLOW_SECONDS = 2.0
"""Compilation that takes longer than this is logged."""


class DropoutSite(NamedTuple):
    """One site of dropout: ``keys`` (orders,), its number, and how many of the 65,536 values of a draw drop."""

    keys: torch.Tensor
    site: int
    dropped: int


class Sentences(NamedTuple):
    """First token and length of each sentence, (orders, sentences); ``width`` is the size of a bin."""

    first: torch.Tensor
    lengths: torch.Tensor
    width: int


class Launch(NamedTuple):
    """A kernel with its grid and arguments."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def program(self) -> Any:
        """The kernel; importing it requires Triton."""
        from distilbench.engines.fused import _triton

        return getattr(_triton, self.kernel)

    def run(self) -> None:
        """Launch the kernel; Triton raises if the device has too little shared memory."""
        self.program[self.grid](**self.arguments, enable_fp_fusion=True)


def can_run(work: str, device: torch.device, *details: Any) -> bool:
    """Return whether to use kernels for ``work``, a key of :data:`SMOKE_TESTS`; the first call compiles them."""
    if device.type != "cuda" or torch.float64 in details:
        return False
    return _is_installed() and _is_working(work, device, *details)


def compile_all(device: torch.device, dtype: torch.dtype, heads: int, head_size: int) -> None:
    """Compile the kernels before training starts, and disable those that the device can't run."""
    if device.type != "cuda":
        return
    message = "compiling Triton's kernels for %s: once on a machine, up to half a minute"
    notice = threading.Timer(SLOW_SECONDS, log.info, (message, device))
    notice.start()
    try:
        can_run("dropout", device)
        can_run("adamw", device, dtype)
        can_run("rows", device, torch.float32)
        can_run("sums", device, dtype)
        can_run("attention", device, dtype, heads, head_size)
        can_run("norm", device, dtype, heads * head_size)
    finally:
        notice.cancel()


@cache
def _is_installed() -> bool:
    if importlib.util.find_spec("triton") is None:
        log.warning("Triton is not installed: a step takes thousands of launches instead of hundreds")
        return False
    return True


@cache
def _is_working(work: str, device: torch.device, *details: Any) -> bool:
    """Compile and try the kernels of ``work``; log a failure and return False."""
    try:
        with torch.enable_grad():
            SMOKE_TESTS[work](device, *details)
        torch.zeros(1, device=device).item()  # synchronizes
    except torch.OutOfMemoryError:  # not the kernels' fault, so not to be cached
        raise
    except Exception as error:  # a compiler's errors have no common class
        reason = str(error).partition("\n")[0]
        log.warning("%s takes its plain version, for Triton's fails: %s: %s", work, type(error).__name__, reason)
        return False
    return True


def dropout_mask(draws: DropoutSite, whole: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return the same masks as :func:`distilbench.engines.fused.dropout.philox_mask`, bit for bit."""
    mask = torch.empty(len(draws.keys), *whole, dtype=dtype, device=draws.keys.device)
    orders, *outer, rows, columns = mask.shape
    blocks, size = -(-columns // DRAWS_PER_COUNTER), 256
    count = math.prod(outer) * rows * blocks
    arguments = draws._asdict() | {
        "mask": mask, "count": count, "rows": rows, "blocks": blocks, "columns": columns,
        "numbered_rows": MAX_LENGTH if outer else rows,
        "numbered_blocks": MAX_LENGTH // DRAWS_PER_COUNTER if outer else blocks,
        "stride": math.prod(mask.shape[1:]), "BLOCK": size,
    }  # fmt: skip
    Launch("dropout_mask", (-(-count // size), orders), arguments).run()
    return mask


def clip(
    grad: torch.Tensor, compute_grad: torch.Tensor | None, low: slice, limits: torch.Tensor, norms: torch.Tensor
) -> torch.Tensor:
    """Write each trial's gradient norm to ``norms``, and return the factor that limits it to ``limits``, (trials,) all.

    The gradient is ``grad`` (trials, size), or in the columns ``low`` that of ``compute_grad`` if that is not None.
    """
    (trials, size), block = grad.shape, 8192
    sums, factors = grad.new_empty(trials, -(-size // block)), torch.empty_like(norms)
    arguments = {
        "grad": grad, "compute_grad": compute_grad, "sums": sums, "size": size, "low_start": low.start,
        "low_stop": low.stop, "BLOCK": block, "num_warps": 8,
    }  # fmt: skip
    Launch("square_sums", (sums.shape[1], trials), arguments).run()
    arguments = {"sums": sums, "limits": limits, "norms": norms, "factors": factors, "blocks": sums.shape[1]}
    Launch("clipping_factors", (trials,), arguments | {"BLOCK": 2048}).run()
    return factors


def adamw(
    params: torch.Tensor, grad: torch.Tensor, compute: tuple[torch.Tensor | None, torch.Tensor | None],
    moments: Sequence[torch.Tensor], rule: tuple[torch.Tensor, torch.Tensor, torch.Tensor], parts: tuple[int, slice],
) -> Launch:  # fmt: skip
    """Return a launch equivalent to :func:`distilbench.engines.fused.cuda.optimizer.adamw`.

    ``rule`` is its step scalars, constants and factors. ``parts`` are the number of columns with weight decay, and the
    slice of columns with a low-precision copy: their gradient is in the first of ``compute`` (trials, columns), and
    their new values are written to the second. Both are None without such a copy.
    """
    trials, size = params.shape
    step_scalars, constants, factors = rule
    decayed, low = parts
    block = 1024
    arguments = {
        "param": params, "grad": grad, "mean": moments[0], "square": moments[1],
        "compute_grad": compute[0], "compute_copy": compute[1],
        "step_scalars": step_scalars, "constants": constants, "factors": factors,
        "size": size, "decayed": decayed, "low_start": low.start, "low_stop": low.stop,
        "scalars_stride": step_scalars.stride(0), "constants_stride": constants.stride(0), "BLOCK": block,
    }  # fmt: skip
    return Launch("adamw", (-(-size // block), trials), arguments)


def add_norm(
    x: torch.Tensor, branch: torch.Tensor, branch_bias: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor],
    draws: DropoutSite | None, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the layer norm of ``x + dropout(branch + branch_bias)``, ``(trials, rows, width)``.

    It is returned in the dtype of ``x`` and in that of ``branch``. ``branch_bias`` and the two vectors of ``norm`` are
    ``(trials, width)``. The leading size of each may be 1 if it needs no gradient. Draws are those of
    :func:`distilbench.engines.fused.dropout.philox_mask`.
    """
    normal, compute_copy = _AddNorm.apply(x, branch, branch_bias, *norm, draws, eps)
    return normal, normal if compute_copy is None else compute_copy


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, branch_bias, weight, bias, draws, eps):  # type: ignore[no-untyped-def]
        trials = max(map(len, (x, branch, branch_bias, weight)))
        total = x.new_empty(trials, *x.shape[1:])
        normal = torch.empty_like(total)
        compute_copy = None if branch.dtype == x.dtype else torch.empty_like(total, dtype=branch.dtype)
        ctx.save_for_backward(total, weight)
        ctx.draws, ctx.eps, ctx.dtype = draws, eps, branch.dtype
        shared = _norm_arguments(total, weight, draws, eps)
        arguments = shared | {
            "x": x, "branch": branch, "branch_bias": branch_bias, "weight": weight, "bias": bias,
            "total": total, "normal": normal, "compute_copy": compute_copy,
            "shared_x": int(len(x) < trials), "shared_branch": int(len(branch) < trials),
            "branch_bias_stride": branch_bias.stride(0) if len(branch_bias) > 1 else 0,
        }  # fmt: skip
        Launch("add_norm_forward", (-(-x.shape[1] // shared["ROWS"]), trials), arguments).run()
        return normal, compute_copy

    @staticmethod
    def backward(ctx, grad_normal, grad_copy):  # type: ignore[no-untyped-def]
        total, weight = ctx.saved_tensors
        trials, rows, width = total.shape
        grad_total, grad_branch = torch.empty_like(total), torch.empty_like(total, dtype=ctx.dtype)
        shared = _norm_arguments(total, weight, ctx.draws, ctx.eps)
        blocks = -(-rows // shared["ROWS"])
        parts = total.new_empty(trials, blocks, 3, width)  # each block's share of the three vectors' gradients
        arguments = shared | {
            "grad_normal": grad_normal.contiguous(), "grad_copy": None if grad_copy is None else grad_copy.contiguous(),
            "total": total, "weight": weight, "grad_total": grad_total, "grad_branch": grad_branch,
            "parts": parts, "blocks": blocks,
        }  # fmt: skip
        Launch("add_norm_backward", (blocks, trials), arguments).run()
        grad_weight = grad_bias = grad_branch_bias = None
        if any(ctx.needs_input_grad[2:5]):
            with on_side_stream(None, parts):  # only the optimizer needs these gradients
                grad_weight, grad_bias, grad_branch_bias = sum_rows(parts.flatten(2)).view(trials, 3, width).unbind(1)
                grad_branch_bias = grad_branch_bias.to(ctx.dtype)
        gradients = (grad_total, grad_branch, grad_branch_bias, grad_weight, grad_bias)
        own = [gradient if needed else None for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=False)]
        return *own, None, None


def _norm_arguments(total: torch.Tensor, weight: torch.Tensor, draws: DropoutSite | None, eps: float) -> dict[str, Any]:
    """Return the common arguments of forward and backward of :func:`add_norm`; a tile has at most 2,048 values."""
    _, rows, width = total.shape
    size = max(16, 1 << (width - 1).bit_length())
    return {
        "keys": None if draws is None else draws.keys, "orders": 1 if draws is None else len(draws.keys),
        "site": 0 if draws is None else draws.site, "dropped": 0 if draws is None else draws.dropped,
        "rows": rows, "norm_stride": weight.stride(0) if len(weight) > 1 else 0, "eps": eps,
        "WIDTH": width, "SIZE": size, "ROWS": max(1, min(8, 2048 // size)), "num_warps": 4,
    }  # fmt: skip


def sum_rows(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of contiguous ``x`` (trials, rows, columns) over its rows, (trials, columns), in its dtype."""
    trials, rows, columns = x.shape
    sums = x.new_empty(trials, columns)
    arguments = {"x": x, "sums": sums, "rows": rows, "columns": columns, "ROWS": 32, "COLUMNS": 32}
    Launch("sum_rows", (-(-columns // 32), trials), arguments).run()
    return sums


def add_rows(table: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """Add ``values`` (trials, tokens, width) to the rows ``index`` (orders, tokens) of ``table`` (trials, rows, width).

    Values of the same row are summed in the order of tokens. Each trial's rows of ``table`` are contiguous, and so are
    ``values`` and each order of ``index``.
    """
    trials, tokens, width = values.shape
    arguments = {
        "table": table, "index": index, "values": values, "tokens": tokens, "width": width,
        "order_stride": index.stride(0) if len(index) > 1 else 0, "table_stride": table.stride(0),
        "ROWS": 32, "COLUMNS": 128,
    }  # fmt: skip
    Launch("add_rows", (tokens, -(-width // 128), trials), arguments).run()


def attention(
    rows: torch.Tensor, query: torch.Tensor | None, sentences: Sentences, draws: DropoutSite | None, heads: int
) -> torch.Tensor:
    """Return attention within sentences, without bins, ``(trials, queries, heads * head size)``.

    ``rows`` (trials, tokens, 3 * heads * head size) holds query, key and value side by side; or only key and value, if
    ``query`` (trials, sentences, heads * head size) holds the only query of each sentence. Draws are those of
    :func:`distilbench.engines.fused.dropout.philox_mask` for one sentence per bin. Padding rows become zeros.
    """
    context: torch.Tensor = _Attention.apply(rows, query, sentences, draws, heads)
    return context


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, query, sentences, draws, heads):  # type: ignore[no-untyped-def]
        q, k, v = _parts(rows, query)
        context = torch.zeros(q.shape, dtype=rows.dtype, device=rows.device)
        log_sums = torch.empty(*q.shape[:2], heads, dtype=torch.float32, device=rows.device)
        ctx.save_for_backward(rows, query, context, log_sums, sentences.first, sentences.lengths)
        ctx.draws, ctx.heads, ctx.width = draws, heads, sentences.width
        shared, queries, _ = _attention_arguments(q, k, sentences, draws, heads)
        arguments = shared | {"q": q, "k": k, "v": v, "context": context, "log_sums": log_sums}
        Launch("attention_forward", (sentences.first.shape[1] * heads, queries, len(q)), arguments).run()
        return context

    @staticmethod
    def backward(ctx, grad_context):  # type: ignore[no-untyped-def]
        rows, query, context, log_sums, first, lengths = ctx.saved_tensors
        grad_rows = torch.zeros_like(rows)
        grad_query = None if query is None else torch.empty_like(query)
        q, k, v = _parts(rows, query)
        grad_q, grad_k, grad_v = _parts(grad_rows, grad_query)
        sentences = Sentences(first, lengths, ctx.width)
        shared, queries, keys = _attention_arguments(q, k, sentences, ctx.draws, ctx.heads)
        arguments = shared | {
            "q": q, "k": k, "v": v, "context": context, "log_sums": log_sums, "grad_context": grad_context.contiguous(),
            "grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v, "query_blocks": queries,
        }  # fmt: skip
        Launch("attention_backward", (first.shape[1] * ctx.heads, queries + keys, len(q)), arguments).run()
        return grad_rows, grad_query, None, None, None


def _parts(rows: torch.Tensor, query: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Return query, key and value as views, ``(trials, rows, heads * head size)`` each."""
    return rows.chunk(3, dim=2) if query is None else (query, *rows.chunk(2, dim=2))


def _attention_arguments(
    q: torch.Tensor, k: torch.Tensor, sentences: Sentences, draws: DropoutSite | None, heads: int
) -> tuple[dict[str, Any], int, int]:
    """Return the common arguments of forward and backward, and the longest sentence's blocks of queries and keys.

    A block is 32 tokens in bf16, otherwise 16: without tensor cores, unrolled code and registers limit it.
    """
    model, one_query = q.shape[2], q.stride(1) != k.stride(1)
    block = 32 if q.dtype == torch.bfloat16 else 16
    blocks = -(-sentences.width // block)
    arguments = {
        "first": sentences.first, "lengths": sentences.lengths,
        "keys": None if draws is None else draws.keys,
        "site": 0 if draws is None else draws.site, "dropped": 0 if draws is None else draws.dropped,
        "order_stride": sentences.first.stride(0) if len(sentences.first) > 1 else 0,
        "query_rows": q.shape[1], "key_rows": k.shape[1], "query_stride": q.stride(1), "key_stride": k.stride(1),
        "one_query": int(one_query), "HEADS": heads, "HEAD_SIZE": model // heads,
        "SIZE": max(16, 1 << (model // heads - 1).bit_length()), "BLOCK": block, "MAX_LENGTH": MAX_LENGTH,
    }  # fmt: skip
    return arguments, 1 if one_query else blocks, blocks


def _try_dropout(device: torch.device) -> None:
    dropout_mask(DropoutSite(torch.ones(1, dtype=torch.int64, device=device), 1, 6554), (8, 8), torch.float32)


def _try_adamw(device: torch.device, dtype: torch.dtype) -> None:
    """Try clipping and AdamW, with a copy in ``dtype`` if that is not float32."""
    params, grad, mean, square = torch.zeros(4, 1, 16, device=device)
    scalars = torch.ones(1, 6, device=device)
    low = torch.zeros(2, 1, 16, dtype=dtype, device=device)
    compute = (None, None) if dtype == torch.float32 else (low[0], low[1])
    factors = clip(grad, compute[0], slice(0, 16), scalars[0, :1], torch.zeros(1, device=device))
    adamw(params, grad, compute, [mean, square], (scalars, scalars, factors), (16, slice(0, 16))).run()


def _try_sums(device: torch.device, dtype: torch.dtype) -> None:
    sum_rows(torch.zeros(1, 1, 16, dtype=dtype, device=device))


def _try_rows(device: torch.device, dtype: torch.dtype) -> None:
    table, values = torch.zeros(2, 1, 1, 16, dtype=dtype, device=device)
    add_rows(table, torch.zeros(1, 1, dtype=torch.int64, device=device), values)


def _try_attention(device: torch.device, dtype: torch.dtype, heads: int, head_size: int) -> None:
    """Try forward and backward with dropout on one token."""
    one = torch.ones(1, 1, dtype=torch.int64, device=device)
    rows = torch.zeros(1, 1, 3 * heads * head_size, dtype=dtype, device=device, requires_grad=True)
    attention(rows, None, Sentences(one * 0, one, 1), DropoutSite(one[0], 1, 6554), heads).sum().backward()


def _try_norm(device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Try forward and backward with and without dropout on one row."""
    keys = torch.ones(1, dtype=torch.int64, device=device)
    x, (weight, bias) = torch.zeros(1, 1, width, device=device), torch.zeros(2, 1, width, device=device)
    branch = torch.zeros(1, 1, width, dtype=dtype, device=device, requires_grad=True)
    branch_bias = torch.zeros(1, width, dtype=dtype, device=device, requires_grad=True)
    for draws in (None, DropoutSite(keys, 1, 6554)):
        normal, compute_copy = add_norm(x, branch, branch_bias, (weight, bias), draws, 1e-12)
        (normal.sum() + compute_copy.sum()).backward()


SMOKE_TESTS: dict[str, Callable[..., None]] = {
    "dropout": _try_dropout,
    "adamw": _try_adamw,
    "rows": _try_rows,
    "sums": _try_sums,
    "attention": _try_attention,
    "norm": _try_norm,
}
"""Functions that launch all kernels of a kind of work on tiny tensors, given the device and the details."""
