"""Linear layers and normalised sums over stacked weights, with their gradients written out.

Autograd makes the gradient of every weight anew, for somebody else to copy to where it is wanted; here each product
writes to its :class:`GradBuffers`. And it keeps what every small operation reads; here a layer keeps what its own
gradient needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class GradBuffers:
    """Where the gradients of a weight ``(trials, ...)`` and of its bias ``(trials, size)`` go.

    They are added to what is there with ``add``, and else replace it. ``weight`` is None where it is frozen.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor
    add: bool = False


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grad_buffers: GradBuffers | None) -> torch.Tensor:
    """Return ``x @ weight + bias``, ``(trials, rows, outputs)`` in the precision of ``weight``.

    ``x`` is ``(trials, rows, inputs)``, ``weight`` ``(trials, inputs, outputs)``, ``bias`` ``(trials, outputs)``; the
    leading size of each may be 1. A layer without ``grad_buffers`` is frozen.
    """
    product: torch.Tensor = _Linear.apply(x, weight, bias, grad_buffers)
    return product


def dropout_add_layer_norm(
    x: torch.Tensor, branch: torch.Tensor | None, dropout_mask: torch.Tensor | None, weight: torch.Tensor,
    bias: torch.Tensor, eps: float, grad_buffers: GradBuffers | None,
) -> torch.Tensor:  # fmt: skip
    """Return the layer norm of ``x + branch * dropout_mask``, ``(trials, rows, width)``, in the precision of ``x``.

    ``weight`` and ``bias`` are ``(trials, width)``; ``dropout_mask`` (orders, rows, width) is scaled.
    """
    normalised: torch.Tensor = _DropoutAddLayerNorm.apply(x, branch, dropout_mask, weight, bias, eps, grad_buffers)
    return normalised


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, grad_buffers):  # type: ignore[no-untyped-def]
        x_compute = x.to(weight.dtype)
        trains_weight = grad_buffers is not None and grad_buffers.weight is not None
        ctx.save_for_backward(x_compute if trains_weight else None, weight)
        ctx.grad_buffers, ctx.dtype = grad_buffers, x.dtype
        if len(bias) == 1:
            return torch.addmm(bias[0], x_compute.flatten(0, 1), weight[0]).view(*x.shape[:2], -1)
        if len(weight) == 1:
            return (x_compute.flatten(0, 1) @ weight[0]).view(*x.shape[:2], -1) + bias[:, None]
        return torch.baddbmm(bias[:, None], x_compute.expand(len(weight), -1, -1), weight)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x_compute, weight = ctx.saved_tensors
        if x_compute is not None:
            _multiply(x_compute.expand(len(weight), -1, -1).mT, gradient, ctx.grad_buffers.weight, ctx.grad_buffers.add)
        if ctx.grad_buffers is not None:
            put(gradient.sum(1), ctx.grad_buffers.bias, ctx.grad_buffers.add)
        grad_x = None
        if ctx.needs_input_grad[0]:
            if len(weight) == 1:
                grad_x = (gradient.flatten(0, 1) @ weight[0].mT).view(*gradient.shape[:2], -1).to(ctx.dtype)
            else:
                grad_x = (gradient @ weight.mT).to(ctx.dtype)
        return grad_x, None, None, None


class _DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, dropout_mask, weight, bias, eps, grad_buffers):  # type: ignore[no-untyped-def]
        total = x
        if branch is not None:
            total = x + branch if dropout_mask is None else torch.addcmul(x, branch, dropout_mask)
        own = len(weight) == 1
        normal, mean, deviation = torch.native_layer_norm(
            total, total.shape[-1:], weight[0] if own else None, bias[0] if len(bias) == 1 else None, eps
        )
        ctx.grad_buffers, ctx.branch = grad_buffers, None if branch is None else branch.dtype
        if own:
            ctx.save_for_backward(total, mean, deviation, dropout_mask, weight, bias)
            return normal if len(bias) == 1 else normal + bias[:, None]
        ctx.save_for_backward(normal, None, deviation, dropout_mask, weight, None)
        return torch.addcmul(bias[:, None], normal, weight[:, None])

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        grad_buffers = ctx.grad_buffers
        grad_total, grad_weight, grad_bias = _norm_backward(ctx, gradient)
        if grad_buffers is not None:
            put(grad_bias, grad_buffers.bias, grad_buffers.add)
            if grad_buffers.weight is not None:
                put(grad_weight, grad_buffers.weight, grad_buffers.add)
        dropout_mask = ctx.saved_tensors[3]
        grad_branch = None
        if ctx.branch is not None:
            grad_branch = grad_total.to(ctx.branch)
            if dropout_mask is not None:
                grad_branch = torch.mul(grad_total, dropout_mask, out=torch.empty_like(grad_total, dtype=ctx.branch))
        return grad_total, grad_branch, None, None, None, None, None


def _norm_backward(ctx, gradient):  # type: ignore[no-untyped-def]
    """Return the gradients of the sum, of the weight and of the bias, where they are trained."""
    values, mean, deviation, _, weight, bias = ctx.saved_tensors
    shape, trained = values.shape[-1:], ctx.grad_buffers is not None
    if mean is not None:
        trains_weight = trained and ctx.grad_buffers.weight is not None
        has_own_bias = trained and len(bias) == 1
        wanted = [any(ctx.needs_input_grad[:2]), trains_weight, has_own_bias]
        grad_total, grad_weight, grad_bias = None, None, gradient.sum(1) if trained and not has_own_bias else None
        if any(wanted):  # not of embeddings that trials share, whose biases alone they train
            grad_total, *own = torch.ops.aten.native_layer_norm_backward(
                gradient, values, shape, mean, deviation, weight[0], bias[0], wanted
            )
            grad_weight = own[0][None] if trains_weight else None
            grad_bias = own[1][None] if has_own_bias else grad_bias
        return grad_total, grad_weight, grad_bias
    # of values that are normal already: mean 0, deviation 1, and what they were divided by comes last
    zero, one = torch.zeros_like(deviation), torch.ones_like(deviation)
    grad_total, *_ = torch.ops.aten.native_layer_norm_backward(
        gradient * weight[:, None], values, shape, zero, one, None, None, [True, False, False]
    )
    return grad_total.mul_(deviation), (gradient * values).sum(1), gradient.sum(1)


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


def attend(slots: torch.Tensor, mask: torch.Tensor, dropout_mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Return ``softmax(q k' / sqrt(size) + mask) * dropout_mask * scale`` times v.

    That is ``(trials, bins, heads, width, size)``. ``slots`` (3, trials, bins, heads, width, size) holds query, key and
    value. ``mask`` (orders, bins, 1, width, width) is added to the scores; ``dropout_mask`` (orders, bins, heads,
    width, width) of ones and zeros, and ``scale``, are dropout's. The softmax has the precision of ``mask`` if that is
    higher: on a CPU, in bf16, it would take 2.7 times as long.
    """
    result: torch.Tensor = _Attend.apply(slots, mask, dropout_mask, scale)
    return result


def cls_attention(
    slots: torch.Tensor, query: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
    grad_buffers: GradBuffers | None, heads: int, mask: torch.Tensor, dropout_mask: torch.Tensor | None, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Return what one ``query`` (trials, sentences, width) a sentence sees in its hidden states, of the same shape.

    ``slots`` (trials, sentences, length, width) holds the hidden states; ``weight`` (trials, width, 2 * width) and
    ``bias`` would make keys and values of them. ``mask`` (orders, sentences, 1, 1, length) and ``dropout_mask``
    (orders, sentences, heads, 1, length) are as for :func:`attend`.
    """
    dropout_mask = None if dropout_mask is None else dropout_mask[:, :, :, 0]
    asked = _AbsorbKey.apply(query, weight, grad_buffers, heads)
    seen, share = _AttendHidden.apply(
        slots, asked, mask[:, :, :, 0], dropout_mask, scale, (query.shape[2] / heads) ** -0.5
    )
    context: torch.Tensor = _ProjectValue.apply(seen, share, weight, bias, grad_buffers, heads)
    return context


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slots, mask, dropout_mask, scale):  # type: ignore[no-untyped-def]
        q, k, v = slots
        probabilities = torch.add(mask, q @ k.mT, alpha=q.shape[-1] ** -0.5).softmax(-1)
        dropped = _dropped(probabilities, dropout_mask, q.dtype)
        context = dropped @ v
        ctx.save_for_backward(slots, probabilities, dropped, dropout_mask)
        ctx.scale = scale
        return context if scale == 1 else context.mul_(scale)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        slots, probabilities, dropped, dropout_mask = ctx.saved_tensors
        q, k, v = slots
        gradient = gradient if ctx.scale == 1 else gradient * ctx.scale
        grad_slots = torch.empty_like(slots)
        grad_dropped = gradient * q.shape[-1] ** -0.5 @ v.mT  # the scores' factor goes through all that follows
        grad_scores = _softmax_backward(grad_dropped, probabilities, dropout_mask)
        _multiply_into(grad_scores, k, grad_slots[0])
        _multiply_into(grad_scores.mT, q, grad_slots[1])
        _multiply_into(dropped.mT, gradient, grad_slots[2])
        return grad_slots, None, None, None


class _AbsorbKey(torch.autograd.Function):
    """Carry queries (trials, sentences, width) through the key's weights: ``(trials, sentences, heads, width)``."""

    @staticmethod
    def forward(ctx, query, weight, grad_buffers, heads):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(query, weight)
        ctx.grad_buffers, ctx.heads = grad_buffers, heads
        return (_by_head(query, heads) @ _pieces(weight, heads)[0].mT).transpose(1, 2)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        query, weight = ctx.saved_tensors
        gradient = gradient.transpose(1, 2)
        if ctx.grad_buffers is not None and ctx.grad_buffers.weight is not None:
            keys = _pieces(ctx.grad_buffers.weight, ctx.heads)[0]
            put(gradient.mT @ _by_head(query, ctx.heads), keys, ctx.grad_buffers.add)
        grad_query = gradient @ _pieces(weight, ctx.heads)[0]
        return grad_query.transpose(1, 2).flatten(2), None, None, None


class _AttendHidden(torch.autograd.Function):
    """Attend to hidden states: ``(trials, sentences, heads, width)``, and how much was seen in all of each sentence."""

    @staticmethod
    def forward(ctx, slots, asked, mask, dropout_mask, scale, factor):  # type: ignore[no-untyped-def]
        probabilities = torch.add(mask, asked @ slots.mT, alpha=factor).softmax(-1)
        dropped = _dropped(probabilities, dropout_mask, slots.dtype)
        ctx.save_for_backward(slots, asked, probabilities, dropped, dropout_mask)
        ctx.scale, ctx.factor = scale, factor
        return (dropped @ slots).mul_(scale), dropped.sum(-1).mul_(scale)

    @staticmethod
    def backward(ctx, gradient, grad_share):  # type: ignore[no-untyped-def]
        slots, asked, probabilities, dropped, dropout_mask = ctx.saved_tensors
        gradient = gradient * ctx.scale
        grad_dropped = (gradient @ slots.mT).add_(grad_share[..., None], alpha=ctx.scale)
        grad_scores = _softmax_backward(grad_dropped, probabilities, dropout_mask).mul_(ctx.factor)
        grad_slots = None
        if ctx.needs_input_grad[0]:  # what comes by the scores and by the states themselves, in one product
            grad_slots = torch.cat([grad_scores, dropped], 2).mT @ torch.cat([asked, gradient], 2)
        return grad_slots, grad_scores @ slots, None, None, None, None


class _ProjectValue(torch.autograd.Function):
    """Carry what each head has seen through the value's weights: ``(trials, sentences, width)``."""

    @staticmethod
    def forward(ctx, seen, share, weight, bias, grad_buffers, heads):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(seen, share, weight, bias)
        ctx.grad_buffers, ctx.heads = grad_buffers, heads
        context = seen.transpose(1, 2) @ _pieces(weight, heads)[1]
        context += share.mT[..., None] * _pieces(bias, heads)[1]
        return context.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        seen, share, weight, bias = ctx.saved_tensors
        gradient = _by_head(gradient, ctx.heads)
        if ctx.grad_buffers is not None:
            keys, values = _pieces(ctx.grad_buffers.bias, ctx.heads)
            put(torch.zeros_like(keys), keys, ctx.grad_buffers.add)
            put((gradient * share.mT[..., None]).sum(2, keepdim=True), values, ctx.grad_buffers.add)
            if ctx.grad_buffers.weight is not None:
                values = _pieces(ctx.grad_buffers.weight, ctx.heads)[1]
                put(seen.transpose(1, 2).mT @ gradient, values, ctx.grad_buffers.add)
        grad_seen = (gradient @ _pieces(weight, ctx.heads)[1].mT).transpose(1, 2)
        return grad_seen, (gradient * _pieces(bias, ctx.heads)[1]).sum(-1).mT, None, None, None, None


def _dropped(probabilities: torch.Tensor, dropout_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return what dropout leaves of ``probabilities``, in the precision of products."""
    if dropout_mask is None:
        return probabilities.to(dtype)
    return probabilities.to(dtype, copy=True).mul_(dropout_mask)


def _softmax_backward(
    grad_dropped: torch.Tensor, probabilities: torch.Tensor, dropout_mask: torch.Tensor | None
) -> torch.Tensor:
    """Return the gradient of the scores from that of what dropout left of ``probabilities``, which it may overwrite."""
    if dropout_mask is not None:
        grad_dropped *= dropout_mask
    grad_scores: torch.Tensor = torch.ops.aten._softmax_backward_data(
        grad_dropped.to(probabilities.dtype), probabilities, -1, probabilities.dtype
    )
    return grad_scores.to(grad_dropped.dtype)


def _by_head(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Cut ``(trials, sentences, width)`` into ``(trials, heads, sentences, size)``."""
    by_head: torch.Tensor = rows.unflatten(2, (heads, -1))
    return by_head.transpose(1, 2)


def _pieces(layer: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a weight (trials, width, 2 * width) or bias of key and value into ``(trials, heads, width or 1, size)``."""
    key, value = layer.view(len(layer), -1, 2, heads, layer.shape[-1] // (2 * heads)).permute(2, 0, 3, 1, 4)
    return key, value


def _multiply_into(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``a @ b`` into ``out``, which is contiguous."""
    torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=out.view(-1, *out.shape[-2:]))
