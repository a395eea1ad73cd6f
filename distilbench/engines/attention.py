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
    scores; ``keep`` (orders, bins, heads, queries, width) of ones and zeros, and ``scale``, are dropout's.
    """
    result: torch.Tensor = _Attend.apply(slots, asked, mask, keep, scale)
    return result


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slots, asked, mask, keep, scale):  # type: ignore[no-untyped-def]
        q, k, v = slots if asked is None else (asked, *slots)
        scores = q @ k.mT
        torch.add(mask, scores, alpha=q.shape[-1] ** -0.5, out=scores)
        probabilities = scores.softmax(-1)
        dropped = probabilities if keep is None else probabilities * keep
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
        of_probabilities = gradient @ v.mT
        if keep is not None:
            of_probabilities *= keep
        of_scores = torch.ops.aten._softmax_backward_data(of_probabilities, probabilities, -1, probabilities.dtype)
        of_scores *= q.shape[-1] ** -0.5
        _multiply(of_scores, k, to_asked)
        _multiply(of_scores.mT, q, to_slots[-2])
        _multiply(dropped.mT, gradient, to_slots[-1])
        return to_slots, None if asked is None else to_asked, None, None, None


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``a @ b`` into ``out``, which is contiguous."""
    torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=out.view(-1, *out.shape[-2:]))
