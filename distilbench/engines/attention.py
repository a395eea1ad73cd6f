"""Attention over rows without padding, with its gradient written out.

Autograd would get the gradients of query, key and value one by one and copy them together; here each product writes
into the place where the gradient of all three is needed.

In the last layer [CLS] alone asks, and no key or value is ever made: with one query a sentence it is cheaper to carry
the query through the key's weights, ``q (x W)' = (q W') x'``, and the attended hidden states through the value's. What
the key's bias adds is the same for all that a query sees, and softmax takes it out: its gradient is zero.
"""

from __future__ import annotations

import torch

from distilbench.engines.layers import Places, put


def attend(slots: torch.Tensor, mask: torch.Tensor, keep: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Return ``softmax(q k' / sqrt(size) + mask) * keep * scale`` times v, ``(trials, bins, heads, width, size)``.

    ``slots`` (3, trials, bins, heads, width, size) holds query, key and value. ``mask`` (orders, bins, 1, width, width)
    is added to the scores; ``keep`` (orders, bins, heads, width, width) of ones and zeros, and ``scale``, are
    dropout's. The softmax has the precision of ``mask`` where that is higher: on a CPU, in bf16, it would take 2.7
    times as long.
    """
    result: torch.Tensor = _Attend.apply(slots, mask, keep, scale)
    return result


def attend_from_first(
    slots: torch.Tensor, query: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, places: Places | None,
    heads: int, mask: torch.Tensor, keep: torch.Tensor | None, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Return what one ``query`` (trials, sentences, width) a sentence sees in its hidden states, of the same shape.

    ``slots`` (trials, sentences, length, width) holds the hidden states; ``weight`` (trials, width, 2 * width) and
    ``bias`` would make keys and values of them. ``mask`` (orders, sentences, 1, 1, length) and ``keep`` (orders,
    sentences, heads, 1, length) are as for :func:`attend`.
    """
    keep = None if keep is None else keep[:, :, :, 0]
    asked = _Ask.apply(query, weight, places, heads)
    seen, share = _See.apply(slots, asked, mask[:, :, :, 0], keep, scale, (query.shape[2] / heads) ** -0.5)
    context: torch.Tensor = _Answer.apply(seen, share, weight, bias, places, heads)
    return context


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slots, mask, keep, scale):  # type: ignore[no-untyped-def]
        q, k, v = slots
        probabilities = torch.add(mask, q @ k.mT, alpha=q.shape[-1] ** -0.5).softmax(-1)
        dropped = _dropped(probabilities, keep, q.dtype)
        context = dropped @ v
        ctx.save_for_backward(slots, probabilities, dropped, keep)
        ctx.scale = scale
        return context if scale == 1 else context.mul_(scale)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        slots, probabilities, dropped, keep = ctx.saved_tensors
        q, k, v = slots
        gradient = gradient if ctx.scale == 1 else gradient * ctx.scale
        to_slots = torch.empty_like(slots)
        of_dropped = gradient * q.shape[-1] ** -0.5 @ v.mT  # the scores' factor goes through all that follows
        of_scores = _of_scores(of_dropped, probabilities, keep)
        _multiply(of_scores, k, to_slots[0])
        _multiply(of_scores.mT, q, to_slots[1])
        _multiply(dropped.mT, gradient, to_slots[2])
        return to_slots, None, None, None


class _Ask(torch.autograd.Function):
    """Carry queries (trials, sentences, width) through the key's weights: ``(trials, sentences, heads, width)``."""

    @staticmethod
    def forward(ctx, query, weight, places, heads):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(query, weight)
        ctx.places, ctx.heads = places, heads
        return (_by_head(query, heads) @ _pieces(weight, heads)[0].mT).transpose(1, 2)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        query, weight = ctx.saved_tensors
        gradient = gradient.transpose(1, 2)
        if ctx.places is not None:
            keys = _pieces(ctx.places.weight, ctx.heads)[0]
            put(gradient.mT @ _by_head(query, ctx.heads), keys, ctx.places.add)
        to_query = gradient @ _pieces(weight, ctx.heads)[0]
        return to_query.transpose(1, 2).flatten(2), None, None, None


class _See(torch.autograd.Function):
    """Attend to hidden states: ``(trials, sentences, heads, width)``, and how much was seen in all of each sentence."""

    @staticmethod
    def forward(ctx, slots, asked, mask, keep, scale, factor):  # type: ignore[no-untyped-def]
        probabilities = torch.add(mask, asked @ slots.mT, alpha=factor).softmax(-1)
        dropped = _dropped(probabilities, keep, slots.dtype)
        ctx.save_for_backward(slots, asked, probabilities, dropped, keep)
        ctx.scale, ctx.factor = scale, factor
        return (dropped @ slots).mul_(scale), dropped.sum(-1).mul_(scale)

    @staticmethod
    def backward(ctx, gradient, of_share):  # type: ignore[no-untyped-def]
        slots, asked, probabilities, dropped, keep = ctx.saved_tensors
        gradient = gradient * ctx.scale
        of_dropped = (gradient @ slots.mT).add_(of_share[..., None], alpha=ctx.scale)
        of_scores = _of_scores(of_dropped, probabilities, keep).mul_(ctx.factor)
        to_slots = None
        if ctx.needs_input_grad[0]:  # what comes by the scores and by the states themselves, in one product
            to_slots = torch.cat([of_scores, dropped], 2).mT @ torch.cat([asked, gradient], 2)
        return to_slots, of_scores @ slots, None, None, None, None


class _Answer(torch.autograd.Function):
    """Carry what each head has seen through the value's weights: ``(trials, sentences, width)``."""

    @staticmethod
    def forward(ctx, seen, share, weight, bias, places, heads):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(seen, share, weight, bias)
        ctx.places, ctx.heads = places, heads
        context = seen.transpose(1, 2) @ _pieces(weight, heads)[1]
        context += share.mT[..., None] * _pieces(bias, heads)[1]
        return context.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        seen, share, weight, bias = ctx.saved_tensors
        gradient = _by_head(gradient, ctx.heads)
        if ctx.places is not None:
            keys, values = _pieces(ctx.places.bias, ctx.heads)
            put(torch.zeros_like(keys), keys, ctx.places.add)
            put((gradient * share.mT[..., None]).sum(2, keepdim=True), values, ctx.places.add)
            put(seen.transpose(1, 2).mT @ gradient, _pieces(ctx.places.weight, ctx.heads)[1], ctx.places.add)
        to_seen = (gradient @ _pieces(weight, ctx.heads)[1].mT).transpose(1, 2)
        return to_seen, (gradient * _pieces(bias, ctx.heads)[1]).sum(-1).mT, None, None, None, None


def _dropped(probabilities: torch.Tensor, keep: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """What dropout leaves of ``probabilities``, in the precision of products."""
    if keep is None:
        return probabilities.to(dtype)
    return probabilities.to(dtype, copy=True).mul_(keep)


def _of_scores(of_dropped: torch.Tensor, probabilities: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """The gradient of the scores from that of what dropout left of ``probabilities``, which it may overwrite."""
    if keep is not None:
        of_dropped *= keep
    return torch.ops.aten._softmax_backward_data(
        of_dropped.to(probabilities.dtype), probabilities, -1, probabilities.dtype
    ).to(of_dropped.dtype)


def _by_head(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Cut ``(trials, sentences, width)`` into ``(trials, heads, sentences, size)``."""
    return rows.unflatten(2, (heads, -1)).transpose(1, 2)


def _pieces(layer: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a weight (trials, width, 2 * width) or bias of key and value into ``(trials, heads, width or 1, size)``."""
    key, value = layer.view(len(layer), -1, 2, heads, layer.shape[-1] // (2 * heads)).permute(2, 0, 3, 1, 4)
    return key, value


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``a @ b`` into ``out``, which is contiguous."""
    torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=out.view(-1, *out.shape[-2:]))
