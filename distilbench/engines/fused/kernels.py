"""What a GPU does in one launch each: dropout's masks, attention, and AdamW over stacked rows, written in Triton.

Every kernel here has a plain PyTorch version beside its only caller, which the tests compare it with and which runs
where Triton or CUDA is not there. Kernels are compiled at their first use, about a second each, and kept on disk.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

log = logging.getLogger(__name__)


def usable(tensor: torch.Tensor) -> bool:
    """Whether kernels run on the device of ``tensor``."""
    return tensor.device.type == "cuda" and works("cuda")


@cache
def works(device: str) -> bool:
    """Try every kernel once; where one fails, say so, and leave the work to the plain versions."""
    if importlib.util.find_spec("triton") is None:
        log.warning("Triton is not installed: a step takes thousands of launches instead of hundreds")
        return False
    try:
        _try_all(device)
    except Exception as error:  # a compiler's errors have no common class
        log.warning("Triton's kernels are left out: %s: %s", type(error).__name__, str(error).partition("\n")[0])
        return False
    return True


@torch.enable_grad()
def _try_all(device: str) -> None:
    number = torch.ones(1, 1, dtype=torch.int64, device=device)
    philox_mask(number[0], 1, 6554, (8, 8), 512, torch.float32)
    rows, one = torch.zeros(4, 1, 8, device=device), torch.ones(1, 6, device=device)
    adamw(rows[0], rows[1], None, [rows[2], rows[3]], None, one, one, one[0], 8, slice(0, 0))
    joined = torch.ones(1, 2, 48, device=device, requires_grad=True)
    attend(joined, None, number * 0, number, (number[0], 1, 6554), 1, 8, 512).sum().backward()
    joined.grad.isfinite().all().item()  # type: ignore[union-attr]  # waits for the device


def philox_mask(
    keys: torch.Tensor, site: int, dropped: int, whole: Sequence[int], extent: int, dtype: torch.dtype
) -> torch.Tensor:
    """The same masks as :func:`distilbench.engines.fused.dropout.philox_mask`, bit for bit."""
    *outer, rows, columns = whole
    blocks = -(-columns // 8)
    numbered = (extent, extent // 8) if outer else (rows, blocks)
    kept = torch.empty(len(keys), *whole, dtype=dtype, device=keys.device)
    count = math.prod(outer) * rows * blocks
    size = 256
    _compiled().keep[(-(-count // size), len(keys))](
        keys, kept, site, dropped, count, rows, blocks, columns, numbered[0], numbered[1], math.prod(whole), SIZE=size
    )
    return kept


def adamw(
    rows: torch.Tensor, gradient: torch.Tensor, compute_grad: torch.Tensor | None, moments: Sequence[torch.Tensor],
    copy: torch.Tensor | None, numbers: torch.Tensor, constants: torch.Tensor, factors: torch.Tensor,
    decayed: int, low: slice,
) -> None:  # fmt: skip
    """Do what ``cuda.optimizer.adamw`` does, and write ``copy`` of columns ``low`` along the way.

    With a ``copy`` goes a ``compute_grad``, both (trials, columns of low), which is read there for ``gradient``.
    """
    trials, size = rows.shape
    block = 1024
    _compiled().adamw[(-(-size // block), trials)](
        rows, gradient, gradient if compute_grad is None else compute_grad, *moments, rows if copy is None else copy,
        numbers, constants, factors, size, decayed, low.start, low.stop,
        numbers.stride(0), constants.stride(0), COPIES=copy is not None, BLOCK=block,
    )  # fmt: skip


def attends(low: torch.dtype, x: torch.Tensor) -> bool:
    """Whether :func:`attend` takes products of precision ``low`` on the device of ``x``."""
    return low in (torch.float32, torch.bfloat16) and usable(x)


DropoutMasks = tuple[torch.Tensor, int, int]
"""Keys (orders,), site, and below which of 65,536 values a draw drops."""


def attend(
    rows: torch.Tensor, asked: torch.Tensor | None, first: torch.Tensor, lengths: torch.Tensor,
    draws: DropoutMasks | None, heads: int, width: int, extent: int,
) -> torch.Tensor:  # fmt: skip
    """Attention within sentences straight from the rows of tokens, ``(trials, rows asked for, heads * size)``.

    ``rows`` (trials, tokens, pieces * heads * size) holds query, key and value side by side; where ``asked`` (trials,
    sentences, heads * size) brings the only query of each sentence, key and value. Sentences start at ``first`` and are
    ``lengths`` long (orders, sentences), ``width`` at most. Draws are those of
    :func:`distilbench.engines.fused.dropout.philox_mask` for one sentence a bin. Rows of no sentence become zeros.
    """
    context: torch.Tensor = _Attend.apply(rows, asked, first, lengths, draws, (heads, width, extent))
    return context


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, asked, first, lengths, draws, shape):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows, asked, first, lengths, None if draws is None else draws[0])
        ctx.draws, ctx.shape = None if draws is None else draws[1:], shape
        pieces = 3 if asked is None else 2
        like = rows[..., : rows.shape[2] // pieces] if asked is None else asked
        context = torch.zeros(like.shape, dtype=rows.dtype, device=rows.device)
        _launch((rows, asked, first, lengths, None if draws is None else draws[0]), ctx, context, None, None, None)
        return context

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        given = rows, asked, *_ = ctx.saved_tensors
        to_rows = torch.zeros_like(rows)
        to_asked = None if asked is None else torch.empty_like(asked)
        _launch(given, ctx, None, gradient.contiguous(), to_rows, to_asked)
        return to_rows, to_asked, None, None, None, None


def _launch(given, ctx, context, gradient, to_rows, to_asked):  # type: ignore[no-untyped-def]
    """Start a program for each sentence and head of each trial: forward where there is a ``context`` to write."""
    rows, asked, first, lengths, keys = given
    (heads, width, extent), trials = ctx.shape, len(rows)
    apart = asked is not None
    size = rows.shape[2] // ((2 if apart else 3) * heads)
    site, dropped = ctx.draws or (0, 0)
    kept = context if context is not None else gradient
    arguments = (
        rows, asked if apart else rows, kept, to_rows if to_rows is not None else rows,
        to_asked if to_asked is not None else rows, first, lengths, keys if keys is not None else first,
        first.stride(0) if len(first) > 1 else 0, lengths.stride(0) if len(lengths) > 1 else 0,
        int(len(first) > 1), rows.shape[1], kept.shape[1], heads, size, size**-0.5,
        site, dropped, 65536 / (65536 - dropped), extent,
    )  # fmt: skip
    _compiled().attend[(first.shape[1] * heads, trials)](
        *arguments, FORWARD=context is not None, APART=apart, DROPS=keys is not None,
        QUERIES=16 if apart else _power(width), WIDTH=_power(width), SIZE=_power(size),
        num_warps=4 if width <= 64 else 8,
    )  # fmt: skip


def _power(size: int) -> int:
    """The power of two that holds ``size``, 16 at least: what Triton's products take."""
    return max(16, 1 << (size - 1).bit_length())


@cache
def _compiled() -> Any:
    """Import the kernels, which needs Triton."""
    from distilbench.engines.fused import _triton

    return _triton
