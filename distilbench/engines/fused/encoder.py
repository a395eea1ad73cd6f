"""DistilBERT and BERT encoders whose trainable weights have an additional leading dimension, the trial.

All trained weights of a trial lie in one flat vector, which the optimizer, checkpoints and the removal of a trial
handle as a whole; the forward pass uses views ``(trials, ...)`` of these vectors. Frozen weights are stored once.
Matrices are stored as ``(inputs, outputs)``, with query, key and value side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn import CrossEntropyLoss
from transformers.activations import get_activation

from distilbench.engines.fused import kernels
from distilbench.engines.fused.autograd import attend, cls_attention, dropout_add_layer_norm, linear
from distilbench.engines.fused.dropout import CounterDropout, DropoutMasks, dropout_scale
from distilbench.engines.fused.packing import Batch
from distilbench.engines.fused.params import StackedWeights


class Forward:
    """One forward pass of ``batch`` through stacked weights; ``dropout`` None means evaluation.

    Shapes: hidden states ``(trials, tokens, width)``, after the last layer ``(trials, sentences, width)``; the leading
    size is 1 as long as only frozen weights have been used and all trials share one order.
    """

    def __init__(self, weights: StackedWeights, batch: Batch, dropout: DropoutMasks | None) -> None:
        self.weights, self.batch, self.dropout = weights, batch, dropout
        self.architecture = weights.layout.architecture
        self._activation = get_activation(self.architecture.activation)
        self._embedded: torch.Tensor | None = None

    def embed(self) -> torch.Tensor:
        """Return the embeddings of every token, with layer norm and dropout."""
        weights, batch = self.weights, self.batch
        total = _rows(weights["word"], batch.ids) + _rows(weights["position"], batch.positions)
        if "type" in self.architecture.names:
            types = weights["type"]  # (trials, 1 for single texts or 2 for pairs, width)
            total += types if types.shape[1] == 1 else _rows(types, batch.types)
        self._embedded = total.requires_grad_("word" not in weights.frozen)  # a leaf: tables have no gradient
        norm = self._layer_weights("embedding_norm")
        normal = dropout_add_layer_norm(total, None, None, *norm, self.architecture.eps)
        dropout_mask = self._dropout_mask(normal, self.architecture.hidden_rate, last=False)
        return normal if dropout_mask is None else normal * dropout_mask

    def losses(self, loss: CrossEntropyLoss, hidden: torch.Tensor | None) -> torch.Tensor:
        """Return the ``loss`` of each example, ``(trials, sentences)``; see :meth:`logits`."""
        logits = self.logits(hidden)
        labels = self.batch.labels.expand(len(logits), -1)
        losses: torch.Tensor = loss(logits.flatten(0, 1), labels.flatten())
        return losses.view(labels.shape)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients of the weights from ``loss``, a sum of what :meth:`losses` returns."""
        self.weights.backward(loss, self._embedded, self.batch)

    def layers(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Run layers ``start`` to ``stop - 1``."""
        multiplied = x
        for i in range(start, stop):
            x, multiplied = self._layer(x, multiplied, i)
        return x

    def logits(self, hidden: torch.Tensor | None) -> torch.Tensor:
        """Return the logits ``(trials, sentences, labels)``, in the dtype of ``flat_params``.

        ``hidden`` is what the frozen prefix returns; None begins with the embeddings.
        """
        x, start = (self.embed(), 0) if hidden is None else (hidden, self.weights.prefix_depth or 0)
        x = self.layers(x, start, self.architecture.depth)  # [CLS] only
        x = get_activation(self.architecture.head_activation)(self._linear(x, "dense"))
        dropout_mask = self._dropout_mask(x, self.architecture.head_rate, last=True)
        x = x if dropout_mask is None else x * dropout_mask
        return self._linear(x, "classifier").to(self.weights.flat_params.dtype)

    def _layer(self, x: torch.Tensor, multiplied: torch.Tensor, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a layer on ``x``; ``multiplied``, the input of products, is a copy in their precision or ``x`` itself."""
        last, model = i == self.architecture.depth - 1, self.architecture
        first = _sentence_rows(multiplied, self.batch.first) if last else None
        attended = self._attention(multiplied, i, first)
        if first is not None:
            x = first if multiplied is x else _sentence_rows(x, self.batch.first)
        rate = self._rate(i, model.attention_output_rate)
        x, multiplied = self._add_norm(x, attended, f"{i}.out", rate, f"{i}.attention_norm", last)
        expanded = self._activation(self._linear(multiplied, f"{i}.up"))
        return self._add_norm(x, expanded, f"{i}.down", self._rate(i, model.hidden_rate), f"{i}.output_norm", last)

    def _add_norm(
        self, x: torch.Tensor, branch: torch.Tensor, layer: str, rate: float, norm: str, last: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the layer norm of ``x`` plus the dropout of the linear ``layer`` of ``branch``, and its copy."""
        weights, width = self.weights, self.architecture.heads * self.architecture.head_size
        by_kernel = self.dropout is None or isinstance(self.dropout, CounterDropout)
        if by_kernel and kernels.can_run("norm", x.device, weights.compute_dtype, width):
            weight, bias = self._layer_weights(layer)
            product = linear(branch, weight, None, weight.grad, weights.accumulates(weight))
            vectors = bias, *self._layer_weights(norm)
            if _is_simple(x, product, *vectors):
                return kernels.add_norm(x, product, bias, vectors[1:], self._site(rate), self.architecture.eps)
            product = product + bias[:, None]
        else:
            product = self._linear(branch, layer)
        dropout_mask = self._dropout_mask(product, rate, last)
        x = dropout_add_layer_norm(x, product, dropout_mask, *self._layer_weights(norm), self.architecture.eps)
        return x, x

    def _rate(self, i: int, rate: float) -> float:
        """Return the dropout rate of layer ``i``: 0 in a deterministic one."""
        return rate if i >= self.weights.layout.deterministic_layers else 0.0

    def _attention(self, x: torch.Tensor, i: int, first: torch.Tensor | None) -> torch.Tensor:
        """Return the attention output ``(trials, rows, width)`` of all tokens, or only of ``first``, the [CLS] rows."""
        batch, rate = self.batch, self._rate(i, self.architecture.attention_rate)
        heads, size = self.architecture.heads, self.architecture.head_size
        query = None if first is None else self._linear(first, f"{i}.q")
        if batch.lengths is not None and kernels.can_run(
            "attention", x.device, self.weights.compute_dtype, heads, size
        ):
            rows = self._linear(x, f"{i}.qkv" if query is None else f"{i}.kv")
            sentences = kernels.Sentences(batch.first, batch.lengths, batch.width)
            return kernels.attention(rows, query, sentences, self._site(rate), heads)
        scale = 1.0 if self.dropout is None else dropout_scale(rate)
        if query is not None:
            slots = batch.unpacked.to_slots(x.to(query.dtype), 1, 1)[0, :, :, 0]  # (trials, sentences, length, width)
            shapes = [(len(p.first), heads, 1, p.width) for p in batch.packs]
            dropout_mask = self._drawn(rate, shapes, (slots.shape[1], heads, 1, slots.shape[2]), slots.dtype)
            dropout_mask = None if dropout_mask is None else dropout_mask[:, :, :, 0]
            weight, bias = self._layer_weights(f"{i}.kv")
            add = self.weights.accumulates(weight)
            return cls_attention(slots, query, weight, bias, add, heads, batch.first_mask, dropout_mask, scale)
        slots = batch.packed.to_slots(self._linear(x, f"{i}.qkv"), 3, heads)
        shapes = [(p.bins, heads, p.width, p.width) for p in batch.packs]
        dropout_mask = self._drawn(rate, shapes, (slots.shape[2], heads, *slots.shape[4:5] * 2), slots.dtype)
        return batch.packed.to_rows(attend(slots, batch.token_mask, dropout_mask, scale))

    def _site(self, rate: float) -> kernels.DropoutSite | None:
        """Return the next site at which a kernel draws; None without dropout."""
        return self.dropout.site(rate) if isinstance(self.dropout, CounterDropout) and rate else None

    def _drawn(
        self, rate: float, shapes: Sequence[Sequence[int]], whole: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor | None:
        """Return a mask ``(orders, *whole)`` of ones and zeros, see :meth:`Dropout.draw`; None without dropout."""
        return None if self.dropout is None or rate == 0 else self.dropout.draw(rate, shapes, whole, dtype)

    def _dropout_mask(self, x: torch.Tensor, rate: float, last: bool) -> torch.Tensor | None:
        """Return the scaled mask of hidden states shaped like ``x`` (trials, rows, width).

        From the ``last`` layer on, these are the states of [CLS] only.
        """
        shapes = [(len(p.first if last else p.ids), x.shape[2]) for p in self.batch.packs]
        drawn = self._drawn(rate, shapes, x.shape[1:], self.weights.flat_params.dtype)
        return None if drawn is None else drawn.mul_(dropout_scale(rate))

    def _linear(self, x: torch.Tensor, layer: str) -> torch.Tensor:
        weight, bias = self._layer_weights(layer)
        return linear(x, weight, bias, weight.grad, self.weights.accumulates(weight))

    def _layer_weights(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"]


def _is_simple(*tensors: torch.Tensor) -> bool:
    """Return whether shared ``tensors`` need no gradient, and the last two, a norm's, are both shared or both not."""
    trials = max(map(len, tensors))
    return len(tensors[-2]) == len(tensors[-1]) and not any(len(t) < trials and t.requires_grad for t in tensors)


def _rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Look up ``index`` (orders, tokens) in ``table`` (trials, rows, width): (trials or orders, tokens, width)."""
    if len(table) == 1:
        return F.embedding(index, table[0])
    return table.gather(1, index[:, :, None].expand(len(table), -1, table.shape[2]))


def _sentence_rows(x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Return the hidden states of [CLS], ``(trials, sentences, width)``."""
    if len(x) == 1:
        return F.embedding(first, x[0])  # on a GPU, its gradient is several times as fast as that of index_select
    if len(first) == 1:
        return x.index_select(1, first[0])
    return x.take_along_dim(first[:, :, None], dim=1)
