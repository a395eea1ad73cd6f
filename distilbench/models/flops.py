"""Training FLOPs: what a trial's products cost, on whatever machine and with whatever engine.

A multiply-add counts as two operations, and products alone are counted, as Kaplan et al. (2020, arXiv 2001.08361,
section 2.1) and Hoffmann et al. (2022, arXiv 2203.15556, appendix F) do and as ``torch.utils.flop_counter`` does,
which counts them here. Those papers take a backward pass for twice the forward; here each of its two products is
counted where training needs it, for what is left out below is the very thing that trials differ in:

    forward                                2 n inputs outputs   (a matrix on n rows)
    gradient of the rows                   as much again, if a parameter below is trained
    gradient of the matrix                 as much again, if it is trained (a bias's gradient is a sum, no product)

A row is a token in the encoder and an example in the head, which reads [CLS]. Attention multiplies each token of a
sentence of ``l`` tokens with each. So one example costs

    per_example + per_token * l + per_token_pair * l^2

Padding is not counted, nor is an engine's economy: the last layer counts for all of its tokens, though [CLS] would do,
and a frozen prefix counts in each epoch, though one pass may serve them all. Evaluations on the way are left out: how
often a trial is looked at is not what it costs to train.
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
"""Tokens of the sentences on which operations are counted: as many as a parabola has coefficients."""

_known: dict[object, TrainFlops] = {}
"""What was counted in this process, by all that it depends on: counting takes 0.3 s."""


@dataclass(frozen=True)
class TrainFlops:
    """FLOPs of one forward and backward pass over one example of ``l`` tokens, as a polynomial in ``l``.

    ``trained`` is how many parameters it trains.
    """

    per_example: int
    per_token: int
    per_token_pair: int
    trained: int = field(default=0, compare=False)

    @classmethod
    def of(cls, model: PreTrainedModel) -> TrainFlops:
        """Return those of ``model`` with the parameters trained that ask for a gradient now."""
        parameters = ((name, p.shape, p.requires_grad) for name, p in model.named_parameters())
        key = model.config.to_json_string(), *parameters
        if key not in _known:
            _known[key] = cls._counted(model)
        return _known[key]

    @classmethod
    def _counted(cls, model: PreTrainedModel) -> TrainFlops:
        """Fit the polynomial to what is counted on single sentences of three lengths: exact where it is one."""
        step = _COUNTED_LENGTHS[0]
        one, two, three = (count_flops_by_module(model, length)["Global"] for length in _COUNTED_LENGTHS)
        per_token_pair = (one - 2 * two + three) // (2 * step**2)
        per_token = (two - one) // step - 3 * step * per_token_pair
        trained, _ = parameter_counts(model)
        return cls(one - per_token * step - per_token_pair * step**2, per_token, per_token_pair, trained)

    def total(self, lengths: np.ndarray, times: np.ndarray) -> float:
        """Return the FLOPs of examples of ``lengths`` (examples,) tokens, each trained on so many ``times``."""
        lengths, times = lengths.astype(np.int64), times.astype(np.int64)
        tokens, pairs = int(times @ lengths), int(times @ lengths**2)
        return float(self.per_example * int(times.sum()) + self.per_token * tokens + self.per_token_pair * pairs)


def count_flops_by_module(model: PreTrainedModel, length: int) -> dict[str, int]:
    """Count the operations of a forward and backward pass over one sentence of ``length`` tokens.

    They are those of each module, by its name under the model's class, and in all, under ``Global``. Nothing is
    computed, drawn or kept: tensors have no contents. Attention runs as the products that it is made of: the counter
    does not know the CPU's fused kernel, and that of a GPU computes a product twice.
    """

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)

    weights = {name: empty(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    tokens = torch.empty(1, length, dtype=torch.long, device="meta")
    was_training = model.training
    model.eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        functional_call(model, weights, kwargs={"input_ids": tokens, "labels": tokens[:, 0]}).loss.backward()
    model.train(was_training)
    return {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
