"""Linear layers and attention over stacked weights, with those gradients written out that autograd would move twice.

Autograd makes the gradient of a matrix anew, and adds it to what is there; here a product writes it to its place. And
it keeps what every small operation reads; here attention keeps what its own gradient needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distilbench.engines.fused.cuda.side_stream import beside


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_grad: torch.Tensor | None, add: bool
) -> torch.Tensor:
    """Return ``x @ weight + bias`` in the precision of ``weight``.

    ``x`` is ``(trials, rows, inputs)``, ``weight`` ``(trials, inputs, outputs)`` and ``bias`` (trials, outputs), the
    leading size of each 1 or that of the others; without a bias they may be larger stacks. The gradient of
    ``weight`` is written to ``weight_grad``, or ``add``-ed to what is there; None where it is frozen.
    """
    product: torch.Tensor = _Linear.apply(x, weight, bias, weight_grad, add)
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, weight_grad, add):  # type: ignore[no-untyped-def]
        x_compute = x.to(weight.dtype)
        ctx.save_for_backward(None if weight_grad is None else x_compute, weight)
        ctx.weight_grad, ctx.add, ctx.dtype = weight_grad, add, x.dtype
        if bias is not None and len(bias) == 1:
            return torch.addmm(bias[0], x_compute.flatten(0, 1), weight[0]).view(*x.shape[:2], -1)
        if len(weight) == 1 and weight.dim() == 3:
            product = (x_compute.flatten(0, 1) @ weight[0]).view(*x.shape[:2], -1)
            return product if bias is None else product + bias[:, None]
        return _products(x_compute, weight, bias)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x_compute, weight = ctx.saved_tensors
        grad_x = grad_bias = None
        with beside(x_compute, gradient):  # nothing before the optimizer waits for these
            if x_compute is not None:
                _multiply(x_compute.expand(len(weight), *x_compute.shape[1:]).mT, gradient, ctx.weight_grad, ctx.add)
            if ctx.needs_input_grad[2]:
                grad_bias = gradient.sum(1)
        if ctx.needs_input_grad[0]:
            if len(weight) == 1 and weight.dim() == 3:
                grad_x = (gradient.flatten(0, 1) @ weight[0].mT).view(*gradient.shape[:2], -1).to(ctx.dtype)
            else:
                grad_x = _products(gradient, weight.mT, None).to(ctx.dtype)
        return grad_x, None, grad_bias, None, None


def _products(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``a @ b + bias`` of stacks; on a CPU, one matrix after the other.

    In bf16 its library would copy a whole stack whose matrices lie apart or transposed: a tenth of a step of 8 trials.
    """
    on_cpu = a.device.type == "cpu"
    if bias is None and (a.dim() > 3 or not on_cpu):
        return a @ b
    a = a.expand(len(b), -1, -1)
    if bias is not None and not on_cpu:
        return torch.baddbmm(bias[:, None], a, b)
    out = a.new_empty(len(a), a.shape[1], b.shape[2])
    for trial, (x, weight, place) in enumerate(zip(a, b, out, strict=True)):
        if bias is None:
            torch.mm(x, weight, out=place)
        else:
            torch.addmm(bias[trial], x, weight, out=place)
    return out


def _multiply(a: torch.Tensor, b: torch.Tensor, place: torch.Tensor, add: bool) -> None:
    """Write ``a @ b`` (trials, ...) to its ``place``, or ``add`` it to what is there."""
    if add:
        place.add_(a @ b)
    elif place.dim() > 3:
        place.copy_(a @ b)
    elif len(a) == 1:
        torch.mm(a[0], b[0], out=place[0])
    else:
        torch.bmm(a, b, out=place)


def dropout_add_layer_norm(
    x: torch.Tensor, branch: torch.Tensor | None, dropout_mask: torch.Tensor | None, weight: torch.Tensor,
    bias: torch.Tensor, eps: float,
) -> torch.Tensor:  # fmt: skip
    """Return the layer norm of ``x + branch * dropout_mask``, ``(trials, rows, width)``, in the precision of ``x``.

    ``weight`` and ``bias`` are ``(trials, width)``; ``dropout_mask`` (orders, rows, width) is scaled.
    """
    if branch is not None:
        x = x + branch if dropout_mask is None else _AddProduct.apply(x, branch, dropout_mask)
    shape = x.shape[-1:]
    if len(weight) > 1:
        scaled: torch.Tensor = _AddProduct.apply(bias[:, None], F.layer_norm(x, shape, eps=eps), weight[:, None])
        return scaled
    if len(bias) > 1:
        return F.layer_norm(x, shape, weight.flatten(), eps=eps) + bias[:, None]
    return F.layer_norm(x, shape, weight.flatten(), bias.flatten(), eps)


class _AddProduct(torch.autograd.Function):
    """``torch.addcmul``, whose own gradient multiplies by one on its way, which took 2 % of a step of four trials."""

    @staticmethod
    def forward(ctx, x, a, b):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(a if ctx.needs_input_grad[2] else None, b)
        ctx.shapes, ctx.dtype = (x.shape, b.shape), a.dtype
        return torch.addcmul(x, a, b)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        a, b = ctx.saved_tensors
        grad_a = torch.mul(gradient, b, out=torch.empty_like(gradient, dtype=ctx.dtype))
        grad_b = None if a is None else (gradient * a).sum_to_size(ctx.shapes[1])
        return gradient.sum_to_size(ctx.shapes[0]), grad_a, grad_b


def attend(slots: torch.Tensor, mask: torch.Tensor, dropout_mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Return ``softmax(q k' / sqrt(size) + mask) * dropout_mask * scale`` times v.

    That is ``(trials, bins, heads, width, size)``. ``slots`` (3, trials, bins, heads, width, size) holds query, key and
    value. ``mask`` (orders, bins, 1, width, width) is added to the scores; ``dropout_mask`` (orders, bins, heads,
    width, width) of ones and zeros, and ``scale``, are dropout's. The softmax has the precision of ``mask`` if that is
    higher: on a CPU, in bf16, it would take 2.7 times as long.
    """
    result: torch.Tensor = _Attend.apply(slots, mask, dropout_mask, scale)
    return result


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
        if dropout_mask is not None:
            grad_dropped *= dropout_mask
        grad_scores = torch.ops.aten._softmax_backward_data(
            grad_dropped.to(probabilities.dtype), probabilities, -1, probabilities.dtype
        ).to(q.dtype)
        for place, (a, b) in zip(
            grad_slots, ((grad_scores, k), (grad_scores.mT, q), (dropped.mT, gradient)), strict=True
        ):
            torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=place.view(-1, *place.shape[-2:]))
        return grad_slots, None, None, None


def cls_attention(
    slots: torch.Tensor, query: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, add: bool, heads: int,
    mask: torch.Tensor, dropout_mask: torch.Tensor | None, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Return what one ``query`` (trials, sentences, width) a sentence sees in its hidden states, of the same shape.

    ``slots`` (trials, sentences, length, width) holds the hidden states. ``weight`` (trials, width, 2 * width) and
    ``bias`` would make keys and values of them; the query goes through the key's weights instead, and what it has seen
    through the value's. ``mask`` (orders, sentences, 1, length) and ``dropout_mask`` (orders, sentences, heads, length)
    are as for :func:`attend`.
    """
    key, value = _pieces(weight, heads)
    key_grad, value_grad = (None, None) if weight.grad is None else _pieces(weight.grad, heads)
    by_head = query.unflatten(2, (heads, -1)).transpose(1, 2)  # (trials, heads, sentences, size)
    asked = linear(by_head, key.mT, None, None if key_grad is None else key_grad.mT, add).transpose(1, 2)
    scores = torch.add(mask, asked @ slots.mT, alpha=by_head.shape[-1] ** -0.5)  # (trials, sentences, heads, length)
    dropped = _dropped(scores.softmax(-1), dropout_mask, slots.dtype) * scale
    seen = (dropped @ slots).transpose(1, 2)  # (trials, heads, sentences, width)
    context = linear(seen, value, None, value_grad, add)
    share = dropped.sum(-1).mT[..., None]  # of what a sentence has: not 1 where dropout takes some of it
    return (context + share * _pieces(bias, heads)[1]).transpose(1, 2).flatten(2)


def _dropped(probabilities: torch.Tensor, dropout_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return what dropout leaves of ``probabilities``, in the precision of products."""
    if dropout_mask is None:
        return probabilities.to(dtype)
    return probabilities.to(dtype) * dropout_mask


def _pieces(layer: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a weight (trials, width, 2 * width) or bias of key and value into ``(trials, heads, width or 1, size)``."""
    key, value = layer.view(len(layer), -1, 2, heads, layer.shape[-1] // (2 * heads)).permute(2, 0, 3, 1, 4)
    return key, value
