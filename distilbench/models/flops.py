"""Training FLOPs: what a trial's products cost, on whatever machine and with whatever engine.

A multiply-add counts as two operations, and products alone are counted, as Kaplan et al. (2020, arXiv 2001.08361,
section 2.1) and Hoffmann et al. (2022, arXiv 2203.15556, appendix F) do and as ``torch.utils.flop_counter`` does.
Those papers take a backward pass for twice the forward; here each of its two products is counted where training
needs it, for what is left out below is the very thing that trials differ in.

For a matrix ``W`` (outputs, inputs) and ``n`` rows:

    forward                                2 n inputs outputs
    gradient of the rows                   as much again, if a parameter below is trained
    gradient of W                          as much again, if W is trained (a bias's gradient is a sum, no product)

A row is a token in the encoder and an example in the head, which reads [CLS]. Attention multiplies each token of a
sentence of ``l`` tokens with each: queries by keys and probabilities by values, ``2 l^2 width`` each in the forward
pass, and as much again for each of the four factors whose gradient is needed. So one example of ``l`` tokens costs

    per_example + per_token * l + per_token_pair * l^2

Padding is not counted, nor is an engine's economy: the last layer counts for all of its tokens, though [CLS] would do,
and a frozen prefix counts in each epoch, though one pass may serve them all. Evaluations on the way are left out: how
often a trial is looked at is not what it costs to train.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from distilbench.models.layers import embedding_modules, layer_list

_BERT_LAYER = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
               "intermediate.dense", "output.dense")  # fmt: skip
_MATRICES = {
    "distilbert": ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1",
                   "ffn.lin2"),
    **dict.fromkeys(("bert", "electra", "roberta", "xlm-roberta", "camembert"), _BERT_LAYER),
}  # fmt: skip
"""The matrices of a layer by model type: queries, keys and values first, then the others from the input up."""
_COUNTED_LENGTHS = (8, 16, 24)
"""Tokens of the sentences on which another model's operations are counted: as many as a parabola has coefficients."""


@dataclass(frozen=True)
class TrainFlops:
    """FLOPs of one forward and backward pass over one example of ``l`` tokens, as a polynomial in ``l``.

    ``counted`` tells that the formula does not know the model's shape, so that torch's counter was asked.
    """

    per_example: int
    per_token: int
    per_token_pair: int
    counted: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel) -> TrainFlops:
        """Return those of ``model`` with the parameters trained that ask for a gradient now."""
        return _formula(model) if _is_known(model) else _counted(model)

    def total(self, lengths: np.ndarray, times: np.ndarray) -> float:
        """Return the FLOPs of examples of ``lengths`` (examples,) tokens, each trained on so many ``times``."""
        lengths, times = lengths.astype(np.int64), times.astype(np.int64)
        tokens, pairs = int(times @ lengths), int(times @ lengths**2)
        return float(self.per_example * int(times.sum()) + self.per_token * tokens + self.per_token_pair * pairs)


def _is_known(model: PreTrainedModel) -> bool:
    """Whether each layer has just the matrices that its model type is known for: an adapter's are not among them."""
    matrices = _MATRICES.get(model.config.model_type)
    if matrices is None:
        return False
    _, layers = layer_list(model)
    norms_and_biases = {name for name, p in layers.named_parameters() if p.dim() < 2}
    expected = {f"{i}.{name}.weight" for i in range(len(layers)) for name in matrices}
    return {name for name, _ in layers.named_parameters()} - norms_and_biases == expected


def _formula(model: PreTrainedModel) -> TrainFlops:
    """Follow the forward pass, noting at each product whether a gradient has to come back to it."""
    _, layers = layer_list(model)
    embeddings = [part for module in embedding_modules(model) for part in module.modules()]
    per_token, needed = _chain(embeddings, False)
    per_token_pair = 0
    for layer in layers:
        tokens, pairs, needed = _layer(layer, _MATRICES[model.config.model_type], needed)
        per_token, per_token_pair = per_token + tokens, per_token_pair + pairs
    encoder = {id(part) for part in [*embeddings, *layers.modules()]}
    per_example, _ = _chain((part for part in model.modules() if id(part) not in encoder), needed)
    return TrainFlops(per_example, per_token, per_token_pair)


def _layer(layer: nn.Module, matrices: tuple[str, ...], needed: bool) -> tuple[int, int, bool]:
    """Return FLOPs a token and a pair of tokens, and whether the output needs a gradient if the input does."""
    first = [cast(nn.Linear, layer.get_submodule(name)) for name in matrices[:3]]
    (query_flops, query), (key_flops, key), (value_flops, value) = (_chain([part], needed) for part in first)
    probabilities = query or key
    products = (1 + query + key) + (1 + probabilities + value)
    width = first[0].out_features  # of all heads together
    rest = (part for part in layer.modules() if part not in first)
    rest_flops, needed = _chain(rest, probabilities or value)
    return query_flops + key_flops + value_flops + rest_flops, 2 * width * products, needed


def _chain(parts: Iterable[nn.Module], needed: bool) -> tuple[int, bool]:
    """Return FLOPs a row of modules that run one after another, and whether their output needs a gradient.

    ``needed`` says whether the input does. Only the modules themselves count, not what they contain.
    """
    flops = 0
    for part in parts:
        if isinstance(part, nn.Linear):
            flops += 2 * part.weight.numel() * (1 + needed + part.weight.requires_grad)
        needed = needed or any(p.requires_grad for p in part.parameters(recurse=False))
    return flops, needed


def _counted(model: PreTrainedModel) -> TrainFlops:
    """Fit the polynomial to what torch counts on single sentences of three lengths: exact where it is one."""
    step = _COUNTED_LENGTHS[0]
    one, two, three = (count_train_flops(model, length) for length in _COUNTED_LENGTHS)
    per_token_pair = (one - 2 * two + three) // (2 * step**2)
    per_token = (two - one) // step - 3 * step * per_token_pair
    return TrainFlops(one - per_token * step - per_token_pair * step**2, per_token, per_token_pair, counted=True)


def count_train_flops(model: PreTrainedModel, length: int) -> int:
    """Count the operations of a forward and backward pass over one sentence of ``length`` tokens.

    Nothing is drawn and no gradient stays. Attention runs as the products that it is made of: the counter does not
    know the CPU's fused kernel, and that of a GPU computes a product twice.
    """
    other_than_padding = 1 if model.config.pad_token_id == 0 else 0
    tokens = torch.full((1, length), other_than_padding, device=model.device)
    was_training = model.training
    model.eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=torch.zeros_like(tokens[:, 0])).loss.backward()
    model.zero_grad()
    model.train(was_training)
    return int(counter.get_total_flops())
