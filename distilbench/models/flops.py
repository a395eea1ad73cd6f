"""Training FLOPs: the matrix products of a trial, independent of machine and engine.

A multiply-add counts as two operations, and only matrix products are counted, as in Kaplan et al. (2020, arXiv
2001.08361, section 2.1), Hoffmann et al. (2022, arXiv 2203.15556, appendix F) and ``torch.utils.flop_counter``, which
does the counting here. Those papers assume twice the forward pass for the backward pass; here each of its two products
counts only if training needs it, because that is what trials with frozen parts differ in:

    forward                                2 n inputs outputs   (a matrix on n rows)
    gradient of the rows                   as much again, if a parameter below is trained
    gradient of the matrix                 as much again, if it is trained (a bias's gradient is a sum, no product)

A row is a token in the encoder and an example in the head, which reads [CLS]. Attention multiplies each pair of tokens
in a sentence of ``l`` tokens. One example therefore costs

    per_example + per_token * l + per_token_pair * l^2

Padding does not count, and an engine's savings are ignored: the last layer counts for all tokens, though only [CLS] is
needed, and a frozen prefix counts in each epoch, though one pass may serve all. Evaluations don't count as training.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from distilbench.models.freezing import parameter_counts

_COUNTED_LENGTHS = (8, 16, 24)
"""Sentence lengths for which operations are counted: three, to determine a parabola."""

_known: dict[object, TrainFlops] = {}
"""Cache of the counts in this process: counting takes 0.3 s."""

_META_FROM = 10_000_000
"""Number of parameters from which counting on the meta device, whose operations take 0.1 ms each, is faster."""


@dataclass(frozen=True)
class TrainFlops:
    """FLOPs of one forward and backward pass over one example of ``l`` tokens, as a polynomial in ``l``.

    ``trained`` is the number of trained parameters.
    """

    per_example: int
    per_token: int
    per_token_pair: int
    trained: int = field(default=0, compare=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> TrainFlops:
        """Return the FLOPs of ``model`` with its current ``requires_grad``."""
        parameters = ((name, p.shape, p.requires_grad) for name, p in model.named_parameters())
        key = model.config.to_json_string(), *parameters
        if key not in _known:
            _known[key] = cls._counted(model)
        return _known[key]

    @classmethod
    def _counted(cls, model: PreTrainedModel) -> TrainFlops:
        """Fit the polynomial to the counts on single sentences of three lengths."""
        step = _COUNTED_LENGTHS[0]
        one, two, three = (count_flops_by_module(model, length)["Global"] for length in _COUNTED_LENGTHS)
        per_token_pair = (one - 2 * two + three) // (2 * step**2)
        per_token = (two - one) // step - 3 * step * per_token_pair
        trained, _ = parameter_counts(model)
        return cls(one - per_token * step - per_token_pair * step**2, per_token, per_token_pair, trained)

    def total(self, lengths: np.ndarray, times: np.ndarray) -> float:
        """Return the FLOPs of examples of ``lengths`` (examples,) tokens, each seen ``times`` (examples,) times."""
        lengths, times = lengths.astype(np.int64), times.astype(np.int64)
        tokens, pairs = int(times @ lengths), int(times @ lengths**2)
        return float(self.per_example * int(times.sum()) + self.per_token * tokens + self.per_token_pair * pairs)


def count_flops_by_module(model: PreTrainedModel, length: int) -> dict[str, int]:
    """Count the FLOPs of a forward and backward pass over one sentence of ``length`` tokens, by module.

    Keys are module names below the name of the model's class, and ``Global`` for the total. Tensors of all but small
    models are on the meta device, so nothing is computed, unless the model reads their values, as DeBERTa does.
    Attention uses the unfused implementation: the counter does not know the CPU's fused kernel, and counts a product of
    the GPU's twice, since that recomputes it.
    """
    was_training = model.training
    model.eval()
    try:
        is_small = model.device.type == "cpu" and sum(parameter_counts(model)) < _META_FROM
        return _count_flops_on("cpu" if is_small else "meta", model, length)
    except RuntimeError:
        return _count_flops_on(model.device, model, length)
    finally:
        model.train(was_training)


def _count_flops_on(device: torch.device | str, model: PreTrainedModel, length: int) -> dict[str, int]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    weights = {name: tensor.detach().to(device).requires_grad_(tensor.requires_grad) for name, tensor in tensors}
    tokens = torch.ones(1, length, dtype=torch.long, device=device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        functional_call(model, weights, kwargs={"input_ids": tokens, "labels": tokens[:, 0]}).loss.backward()
    return {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
