"""Attention over rows without padding, with its gradient written out.

Autograd would get the gradients of query, key and value one by one and copy them together; here each product writes
into the place where the gradient of all three is needed.
"""

from __future__ import annotations

import torch


def attend(
    slots: torch.Tensor, asked: torch.Tensor | None, mask: torch.Tensor, keep: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Return ``softmax(q k' / sqrt(size) + mask) * keep * scale`` times v, ``(trials, bins, heads, queries, size)``.

    ``slots`` (pieces, trials, bins, heads, width, size) holds query, key and value, or without the query where
    ``asked`` (trials, bins, heads, queries, size) brings it. ``mask`` (orders, bins, 1, queries, width) is added to the
    scores; ``keep`` (orders, bins, heads, queries, width) of ones and zeros, and ``scale``, are dropout's. The softmax
    has the precision of ``mask`` where that is higher: on a CPU, in bf16, it would take 2.7 times as long.
    """
    result: torch.Tensor = _Attend.apply(slots, asked, mask, keep, scale)
    return result


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slots, asked, mask, keep, scale):  # type: ignore[no-untyped-def]
        q, k, v = slots if asked is None else (asked, *slots)
        probabilities = torch.add(mask, q @ k.mT, alpha=q.shape[-1] ** -0.5).softmax(-1)
        dropped = probabilities.to(q.dtype, copy=keep is not None)
        if keep is not None:
            dropped *= keep
        context = dropped @ v
        ctx.save_for_backward(slots, asked, probabilities, dropped, keep)
        ctx.scale = scale
        return context if scale == 1 else context.mul_(scale)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        slots, asked, probabilities, dropped, keep = ctx.saved_tensors
        q, k, v = slots if asked is None else (asked, *slots)
        gradient = gradient if ctx.scale == 1 else gradient * ctx.scale
        to_slots = torch.empty_like(slots)
        to_asked = to_slots[0] if asked is None else torch.empty_like(asked)
        of_dropped = gradient * q.shape[-1] ** -0.5 @ v.mT  # the scores' factor goes through all that follows
        if keep is not None:
            of_dropped *= keep
        of_scores = torch.ops.aten._softmax_backward_data(
            of_dropped.to(probabilities.dtype), probabilities, -1, probabilities.dtype
        ).to(q.dtype)
        _multiply(of_scores, k, to_asked)
        _multiply(of_scores.mT, q, to_slots[-2])
        _multiply(dropped.mT, gradient, to_slots[-1])
        return to_slots, None if asked is None else to_asked, None, None, None


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``a @ b`` into ``out``, which is contiguous."""
    torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=out.view(-1, *out.shape[-2:]))
