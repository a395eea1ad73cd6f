"""Linear layers and attention over stacked weights, with hand-written gradients to save memory traffic.

Autograd allocates the gradient of a matrix and adds it to the existing one; here the product is written in place.
Autograd also saves the inputs of every small operation; here attention saves only what its gradient needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distilbench.engines.fused import kernels
from distilbench.engines.fused.cuda.side_stream import on_side_stream


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_grad: torch.Tensor | None, add: bool
) -> torch.Tensor:
    """Return ``x @ weight + bias`` in the dtype of ``weight``.

    ``x`` is (trials, rows, inputs), ``weight`` (trials, inputs, outputs) and ``bias`` (trials, outputs); leading sizes
    are equal or 1. Without a bias, more leading dimensions are allowed. The gradient of ``weight`` is written to
    ``weight_grad`` or, with ``add``, added to it; None if ``weight`` is frozen.
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
        with on_side_stream(x_compute, gradient):  # only the optimizer needs these gradients
            if x_compute is not None:
                _multiply(x_compute.expand(len(weight), *x_compute.shape[1:]).mT, gradient, ctx.weight_grad, ctx.add)
            if ctx.needs_input_grad[2]:
                grad_bias = _sum_rows(gradient)
        if ctx.needs_input_grad[0]:
            if len(weight) == 1 and weight.dim() == 3:
                grad_x = (gradient.flatten(0, 1) @ weight[0].mT).view(*gradient.shape[:2], -1).to(ctx.dtype)
            else:
                grad_x = _products(gradient, weight.mT, None).to(ctx.dtype)
        return grad_x, None, grad_bias, None, None


def _sum_rows(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``x`` (trials, rows, columns) over its rows, (trials, columns)."""
    by_kernel = x.shape[2] % 16 == 0 and x.is_contiguous()  # else the kernel would be compiled once more
    if by_kernel and kernels.can_run("sums", x.device, x.dtype):
        return kernels.sum_rows(x)
    return x.sum(1)


def _products(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the batched ``a @ b + bias``; on a CPU, one matrix after the other.

    For bf16, the CPU's library would copy a stack of non-contiguous matrices: a tenth of a step of 8 trials.
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
    """Write ``a @ b`` (trials, ...) to ``place`` or, with ``add``, add it."""
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
    """Return the layer norm of ``x + branch * dropout_mask``, ``(trials, rows, width)``, in the dtype of ``x``.

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
    """``torch.addcmul`` without the multiplication by one in its own gradient, 2 % of a step of four trials."""

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

    The result is ``(trials, bins, heads, width, size)``. ``slots`` (3, trials, bins, heads, width, size) holds query,
    key and value. ``mask`` (orders, bins, 1, width, width) is added to the scores; ``dropout_mask`` (orders, bins,
    heads, width, width) holds dropout's ones and zeros, ``scale`` is its factor. The softmax uses the dtype of ``mask``
    if that is wider: in bf16 on a CPU it would take 2.7 times as long.
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
        grad_dropped = gradient * q.shape[-1] ** -0.5 @ v.mT  # the scores' factor, applied early: the rest is linear
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
    """Return the attention output of one ``query`` per sentence, (trials, sentences, width) both.

    ``slots`` (trials, sentences, length, width) holds the hidden states. ``weight`` (trials, width, 2 * width) and
    ``bias`` are those of keys and values, which are never computed: the query is multiplied by the key weights instead,
    and the weighted sum of hidden states by the value weights. ``mask`` (orders, sentences, 1, length) and
    ``dropout_mask`` (orders, sentences, heads, length) are as for :func:`attend`.
    """
    key, value = _pieces(weight, heads)
    key_grad, value_grad = (None, None) if weight.grad is None else _pieces(weight.grad, heads)
    by_head = query.unflatten(2, (heads, -1)).transpose(1, 2)  # (trials, heads, sentences, size)
    asked = linear(by_head, key.mT, None, None if key_grad is None else key_grad.mT, add).transpose(1, 2)
    scores = torch.add(mask, asked @ slots.mT, alpha=by_head.shape[-1] ** -0.5)  # (trials, sentences, heads, length)
    dropped = _dropped(scores.softmax(-1), dropout_mask, slots.dtype) * scale
    seen = (dropped @ slots).transpose(1, 2)  # (trials, heads, sentences, width)
    context = linear(seen, value, None, value_grad, add)
    share = dropped.sum(-1).mT[..., None]  # the sum of attention weights: not 1 with dropout
    return (context + share * _pieces(bias, heads)[1]).transpose(1, 2).flatten(2)


def _dropped(probabilities: torch.Tensor, dropout_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return ``probabilities`` after dropout, in ``dtype``."""
    if dropout_mask is None:
        return probabilities.to(dtype)
    return probabilities.to(dtype) * dropout_mask


def _pieces(layer: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a weight (trials, width, 2 * width) or bias of key and value into ``(trials, heads, width or 1, size)``."""
    key, value = layer.view(len(layer), -1, 2, heads, layer.shape[-1] // (2 * heads)).permute(2, 0, 3, 1, 4)
    return key, value
