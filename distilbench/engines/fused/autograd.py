"""Linear layers and normalised sums over stacked weights, with their gradients written out.

Autograd makes the gradient of every weight anew, for somebody else to copy to where it is wanted; here each product
writes to its :class:`Places`. And it keeps what every small operation reads; here a layer keeps what its own gradient
needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Places:
    """Where the gradients of a weight ``(trials, ...)`` and of its bias ``(trials, size)`` go.

    They are added to what is there with ``add``, and else replace it.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    add: bool = False


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, places: Places | None) -> torch.Tensor:
    """Return ``x @ weight + bias``, ``(trials, rows, outputs)`` in the precision of ``weight``.

    ``x`` is ``(trials, rows, inputs)``, ``weight`` ``(trials, inputs, outputs)``; the leading size of either may be 1.
    A weight without ``places`` is frozen.
    """
    product: torch.Tensor = _Linear.apply(x, weight, bias, places)
    return product


def norm_of_sum(
    x: torch.Tensor, branch: torch.Tensor | None, keep: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor,
    eps: float, places: Places | None,
) -> torch.Tensor:  # fmt: skip
    """Return the layer norm of ``x + branch * keep``, ``(trials, rows, width)``, in the precision of ``x``.

    ``weight`` and ``bias`` are ``(trials, width)``; ``keep`` (orders, rows, width) is a mask of dropout, scaled.
    """
    normalised: torch.Tensor = _NormOfSum.apply(x, branch, keep, weight, bias, eps, places)
    return normalised


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, places):  # type: ignore[no-untyped-def]
        low = x.to(weight.dtype)
        ctx.save_for_backward(low, weight)
        ctx.places, ctx.dtype = places, x.dtype
        if len(weight) == 1:
            return torch.addmm(bias[0], low.flatten(0, 1), weight[0]).view(*x.shape[:2], -1)
        return torch.baddbmm(bias[:, None], low.expand(len(weight), -1, -1), weight)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        low, weight = ctx.saved_tensors
        if ctx.places is not None:
            _multiply(low.expand(len(weight), -1, -1).mT, gradient, ctx.places.weight, ctx.places.add)
            put(gradient.sum(1), ctx.places.bias, ctx.places.add)
        to_x = None
        if ctx.needs_input_grad[0]:
            if len(weight) == 1:
                to_x = (gradient.flatten(0, 1) @ weight[0].mT).view(*gradient.shape[:2], -1).to(ctx.dtype)
            else:
                to_x = (gradient @ weight.mT).to(ctx.dtype)
        return to_x, None, None, None


class _NormOfSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, keep, weight, bias, eps, places):  # type: ignore[no-untyped-def]
        total = x
        if branch is not None:
            total = x + branch if keep is None else torch.addcmul(x, branch, keep)
        own = len(weight) == 1
        normal, mean, deviation = torch.native_layer_norm(
            total, total.shape[-1:], weight[0] if own else None, bias[0] if own else None, eps
        )
        ctx.places, ctx.branch = places, None if branch is None else branch.dtype
        if own:
            ctx.save_for_backward(total, mean, deviation, keep, weight, bias)
            return normal
        ctx.save_for_backward(normal, None, deviation, keep, weight, None)
        return torch.addcmul(bias[:, None], normal, weight[:, None])

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        places = ctx.places
        to_total, *own = _norm_backward(ctx, gradient)
        if places is not None:
            put(own[0], places.weight, places.add)
            put(own[1], places.bias, places.add)
        keep = ctx.saved_tensors[3]
        to_branch = None
        if ctx.branch is not None:
            to_branch = to_total.to(ctx.branch)
            if keep is not None:
                to_branch = torch.mul(to_total, keep, out=torch.empty_like(to_total, dtype=ctx.branch))
        return to_total, to_branch, None, None, None, None, None


def _norm_backward(ctx, gradient):  # type: ignore[no-untyped-def]
    """The gradients of the sum, of the weight and of the bias."""
    values, mean, deviation, _, weight, bias = ctx.saved_tensors
    trained = ctx.places is not None
    shape = values.shape[-1:]
    if mean is not None:
        to_total, *own = torch.ops.aten.native_layer_norm_backward(
            gradient, values, shape, mean, deviation, weight[0], bias[0], [True, trained, trained]
        )
        return to_total, *(part[None] for part in own if trained)
    # of values that are normal already: mean 0, deviation 1, and what they were divided by comes last
    zero, one = torch.zeros_like(deviation), torch.ones_like(deviation)
    to_total, *_ = torch.ops.aten.native_layer_norm_backward(
        gradient * weight[:, None], values, shape, zero, one, None, None, [True, False, False]
    )
    return to_total.mul_(deviation), (gradient * values).sum(1), gradient.sum(1)


def _multiply(a: torch.Tensor, b: torch.Tensor, place: torch.Tensor, add: bool) -> None:
    """Put ``a @ b`` (trials, ...) in its place."""
    if add or place.dtype != a.dtype:
        put(a @ b, place, add)
    elif len(a) == 1:
        torch.mm(a[0], b[0], out=place[0])
    else:
        torch.bmm(a, b, out=place)


def put(value: torch.Tensor, place: torch.Tensor, add: bool) -> None:
    """Write ``value`` to its ``place``, or ``add`` it to what is there."""
    if add:
        place.add_(value)
    else:
        place.copy_(value)


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
        _multiply_into(of_scores, k, to_slots[0])
        _multiply_into(of_scores.mT, q, to_slots[1])
        _multiply_into(dropped.mT, gradient, to_slots[2])
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


def _multiply_into(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``a @ b`` into ``out``, which is contiguous."""
    torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=out.view(-1, *out.shape[-2:]))
