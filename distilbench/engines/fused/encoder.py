"""Encoders of DistilBERT's and BERT's shape whose trainable weights have one more leading dimension: the trial.

Every weight that is trained lies in one *row* a trial, so that the optimizer, a snapshot or the departure of a trial
handles a single vector; the forward pass sees views ``(trials, ...)`` of the rows. Frozen weights are held once.
Matrices are stored as ``(inputs, outputs)``, with query, key and value side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers.activations import get_activation

from distilbench.engines.fused import kernels
from distilbench.engines.fused.autograd import attend, cls_attention, dropout_add_layer_norm, linear
from distilbench.engines.fused.dropout import CounterDropout, DropoutMasks, dropout_scale
from distilbench.engines.fused.packing import Batch, Exchange, Placement
from distilbench.engines.fused.params import StackedWeights
from distilbench.engines.loss import Loss


class Forward:
    """One pass of ``batch`` through the stack; ``dropout`` None is evaluation.

    Shapes: hidden states ``(trials, tokens, width)``, after the last layer ``(trials, sentences, width)``; the leading
    size is 1 as long as nothing that was trained has been met and all trials share one order.
    """

    def __init__(
        self, weights: StackedWeights, batch: Batch, dropout: DropoutMasks | None, deterministic_layers: int = 0
    ) -> None:
        """Layers below ``deterministic_layers`` go without dropout, whatever ``dropout`` says."""
        self.weights, self.batch, self.dropout = weights, batch, dropout
        self._deterministic_layers = deterministic_layers
        self.architecture = weights.layout.architecture
        self._activation = get_activation(self.architecture.activation)
        self._exchanges: dict[tuple[int, int, int, int], Exchange] = {}

    def embedded(self) -> torch.Tensor:
        """Return the sum of the embeddings of every token, a leaf of the graph where the tables train."""
        weights, batch = self.weights, self.batch
        rows_of = _gathered if batch.fixed else _rows_of
        total = rows_of(weights["word"], batch.ids) + rows_of(weights["position"], batch.positions)
        if "type" in self.architecture.names:
            types = weights["type"]  # (trials, 1 for single texts or 2 for pairs, width)
            total += types if types.shape[1] == 1 else rows_of(types, batch.types)
        return total.requires_grad_("word" not in weights.layout.frozen)

    def embed(self, embedded: torch.Tensor) -> torch.Tensor:
        """Normalise the summed embeddings."""
        normal = self._dropout_add_layer_norm(embedded, None, 0, "embedding_norm", last=False)
        return self._dropped(normal, self.architecture.embedding_rate, last=False)

    def losses(self, loss: Loss, hidden: torch.Tensor | None, start: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return losses ``(trials, sentences)`` from the states under layer ``start``, and the summed embeddings.

        Without ``hidden`` states, which the embeddings then train for, the pass begins with the embeddings.
        """
        embedded = None
        if hidden is None:
            embedded = self.embedded()
            hidden = self.embed(embedded)
        logits = self.logits(self.layers(hidden, start, self.architecture.depth))
        labels = self.batch.labels.expand(len(logits), -1)
        return loss.of_each(logits.flatten(0, 1), labels.flatten()).view(labels.shape), embedded

    def layers(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Run layers ``start`` to ``stop - 1``."""
        for i in range(start, stop):
            x = self._layer(x, i)
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Classify the last hidden states of [CLS]: ``(trials, sentences, labels)`` in the rows' precision."""
        x = get_activation(self.architecture.head_activation)(self._linear(x, "dense"))
        x = self._dropped(x, self.architecture.head_rate, last=True)
        return self._linear(x, "classifier").to(self.weights.flat_params.dtype)

    def _layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        last = i == self.architecture.depth - 1
        attended = self._attention(x, i, last)
        x = _sentence_rows(x, self.batch.first) if last else x
        x = self._dropout_add_layer_norm(
            x, attended, self._rate(i, self.architecture.attention_output_rate), f"{i}.attention_norm", last
        )
        expanded = self._linear(self._activation(self._linear(x, f"{i}.up")), f"{i}.down")
        rate = self._rate(i, self.architecture.output_rate)
        return self._dropout_add_layer_norm(x, expanded, rate, f"{i}.output_norm", last)

    def _rate(self, i: int, rate: float) -> float:
        """Return the dropout rate of layer ``i``: none in a deterministic one."""
        return rate if i >= self._deterministic_layers else 0.0

    def _attention(self, x: torch.Tensor, i: int, last: bool) -> torch.Tensor:
        """Attend within sentences; in the last layer, from [CLS] alone."""
        batch = self.batch
        details = self.weights.compute_dtype, self.architecture.heads, self.architecture.head_size
        if batch.lengths is not None and kernels.runs("attention", x.device, *details):
            return self._linear(self._attended(x, i, last), f"{i}.out")
        return self._linear(self._from_first(x, i) if last else self._from_all(x, i), f"{i}.out")

    def _from_all(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """Return the context of every token, ``(trials, tokens, width)``."""
        batch, heads = self.batch, self.architecture.heads
        rows = self._linear(x, f"{i}.qkv")
        trials, width = len(rows), rows.shape[2] // 3
        moved = self._exchange(batch.shared, trials, heads, 3)(rows.view(-1, width // heads))
        slots = moved.view(3, trials, -1, heads, batch.shared.row.shape[2], width // heads)
        dropout_mask, scale = self._attention_dropout_mask(
            i, [(p.bins, heads, p.width, p.width) for p in batch.packs], batch.token_mask, slots.dtype
        )
        context = attend(slots, batch.token_mask, dropout_mask, scale)
        back = self._exchange(batch.shared, trials, heads, 0)
        return back(context.view(-1, width // heads)).view(trials, -1, width)

    def _from_first(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """Return the context of [CLS], ``(trials, sentences, width)``."""
        batch, heads, width = self.batch, self.architecture.heads, x.shape[2]
        query = self._linear(_sentence_rows(x, batch.first), f"{i}.q")
        moved = self._exchange(batch.alone, len(x), 1, 1)(x.to(query.dtype).view(-1, width))
        slots = moved.view(len(x), *batch.alone.row.shape[1:], width)
        dropout_mask, scale = self._attention_dropout_mask(
            i, [(len(p.first), heads, 1, p.width) for p in batch.packs], batch.first_mask, slots.dtype
        )
        grad_buffers = self.weights.grad_buffers(f"{i}.kv")
        return cls_attention(
            slots, query, *self._layer_weights(f"{i}.kv"), grad_buffers, heads, batch.first_mask, dropout_mask, scale
        )

    def _attended(self, x: torch.Tensor, i: int, last: bool) -> torch.Tensor:
        """Return the context of every token, or of [CLS] alone, by one kernel; ``(trials, rows, width)``."""
        batch, rate = self.batch, self._rate(i, self.architecture.attention_rate)
        assert batch.lengths is not None
        asked = self._linear(_sentence_rows(x, batch.first), f"{i}.q") if last else None
        rows = self._linear(x, f"{i}.kv" if last else f"{i}.qkv")
        draws = self.dropout.site(rate) if isinstance(self.dropout, CounterDropout) and rate else None
        sentences = kernels.Sentences(batch.first, batch.lengths, batch.alone.row.shape[2])
        return kernels.attention(rows, asked, sentences, draws, self.architecture.heads)

    def _attention_dropout_mask(
        self, i: int, shapes: Sequence[Sequence[int]], mask: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor | None, float]:
        """Return what layer ``i`` keeps of probabilities like ``mask`` (orders, bins, 1, queries, width), times what.

        ``shapes`` (bins, heads, queries, width) is what is real of each order.
        """
        rate = self._rate(i, self.architecture.attention_rate)
        if self.dropout is None or rate == 0:
            return None, 1
        _, bins, _, *rest = mask.shape
        return self.dropout.draw(rate, shapes, (bins, self.architecture.heads, *rest), dtype), dropout_scale(rate)

    def _dropped(self, x: torch.Tensor, rate: float, last: bool) -> torch.Tensor:
        """Drop hidden states ``(trials, rows, width)``, of [CLS] alone from the ``last`` layer on."""
        dropout_mask = self._dropout_mask(x, rate, last)
        return x if dropout_mask is None else x * dropout_mask

    def _dropout_mask(self, x: torch.Tensor, rate: float, last: bool) -> torch.Tensor | None:
        """Return the mask of hidden states like ``x``, scaled so that their mean stays; None where nothing drops."""
        if self.dropout is None or rate == 0:
            return None
        shapes = [(len(p.first if last else p.ids), x.shape[2]) for p in self.batch.packs]
        return self.dropout.draw(rate, shapes, x.shape[1:], self.weights.flat_params.dtype).mul_(dropout_scale(rate))

    def _linear(self, x: torch.Tensor, layer: str) -> torch.Tensor:
        return linear(x, *self._layer_weights(layer), self.weights.grad_buffers(layer))

    def _dropout_add_layer_norm(
        self, x: torch.Tensor, branch: torch.Tensor | None, rate: float, layer: str, last: bool
    ) -> torch.Tensor:
        """Normalise the residual stream ``x`` and what dropout leaves of ``branch``."""
        dropout_mask = None if branch is None else self._dropout_mask(branch, rate, last)
        eps, grad_buffers = self.architecture.eps, self.weights.grad_buffers(layer)
        return dropout_add_layer_norm(x, branch, dropout_mask, *self._layer_weights(layer), eps, grad_buffers)

    def _layer_weights(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"]

    def _exchange(self, placement: Placement, trials: int, heads: int, pieces: int) -> Exchange:
        """Return the move into slots, or with no ``pieces`` the one back; built once for all layers."""
        key = id(placement), trials, heads, pieces
        if key not in self._exchanges:
            self._exchanges[key] = (
                placement.to_slots(trials, heads, pieces) if pieces else placement.to_rows(trials, heads)
            )
        return self._exchanges[key]


def _rows_of(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Look up ``index`` (orders, tokens) in ``table`` (trials, rows, width): ``(trials or orders, tokens, width)``."""
    if len(table) == 1:
        return F.embedding(index, table[0])
    return torch.stack([F.embedding(i, t) for t, i in zip(table, index.expand(len(table), -1), strict=True)])


def _gathered(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the same as :func:`_rows_of` with one operation for all trials."""
    if len(table) == 1:
        return F.embedding(index, table[0])
    return table.gather(1, index[:, :, None].expand(len(table), -1, table.shape[2]))


def _sentence_rows(x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Return the hidden states of [CLS], ``(trials, sentences, width)``."""
    if len(first) == 1:
        return x.index_select(1, first[0])
    return x.take_along_dim(first[:, :, None], dim=1)
