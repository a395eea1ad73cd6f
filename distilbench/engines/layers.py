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
