"""Encoders of DistilBERT's and BERT's shape whose trainable weights have one more leading dimension: the trial.

Every weight that is trained lies in one *row* a trial, so that the optimizer, a snapshot or the departure of a trial
handles a single vector; the forward pass sees views ``(trials, ...)`` of the rows. Frozen weights are held once.
Matrices are stored as ``(inputs, outputs)``, with query, key and value side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.activations import get_activation

from distilbench.engines import kernels
from distilbench.engines.attention import attend, attend_from_first
from distilbench.engines.dropout import EXTENT, CounterDropout, Draws, keep_scale
from distilbench.engines.layers import Places, linear, norm_of_sum
from distilbench.engines.packing import Batch, Exchange, Placement
from distilbench.optimization import decay_parameter_names

_DISTILBERT = {
    "word": "distilbert.embeddings.word_embeddings",
    "position": "distilbert.embeddings.position_embeddings",
    "embedding_norm": "distilbert.embeddings.LayerNorm",
    "layer": "distilbert.transformer.layer",
    "q": "attention.q_lin",
    "k": "attention.k_lin",
    "v": "attention.v_lin",
    "out": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "output_norm": "output_layer_norm",
    "dense": "pre_classifier",
    "classifier": "classifier",
}
_BERT = {
    "word": "bert.embeddings.word_embeddings",
    "position": "bert.embeddings.position_embeddings",
    "type": "bert.embeddings.token_type_embeddings",
    "embedding_norm": "bert.embeddings.LayerNorm",
    "layer": "bert.encoder.layer",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
    "dense": "bert.pooler.dense",
    "classifier": "classifier",
}
TABLES = ("word", "position", "type")
CACHED = 1 << 20
"""Elements of a row that a CPU's optimizer takes at once: several passes over all would each wait for memory, and take
8 % more time for 5.5 million on two threads.
"""


@dataclass(frozen=True)
class Architecture:
    """What the forward pass needs to know beside the weights; rates are those of dropout."""

    names: Mapping[str, str]
    depth: int
    heads: int
    eps: float
    activation: str
    head_activation: str
    embedding_rate: float
    attention_rate: float
    attention_output_rate: float
    output_rate: float
    head_rate: float

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """Read a Hugging Face configuration of type distilbert or bert."""
        return _distilbert(config) if config.model_type == "distilbert" else _bert(config)

    def leaves(self) -> dict[str, tuple[str, ...]]:
        """Name the weights of the stacked model, with those of the Hugging Face model that lie side by side in each.

        The last layer keeps its query apart, for it is asked for [CLS] alone.
        """
        tables = [table for table in TABLES if table in self.names]
        leaves: dict[str, tuple[str, ...]] = {table: (f"{self.names[table]}.weight",) for table in tables}
        self._add(leaves, "embedding_norm", self.names["embedding_norm"])
        for i in range(self.depth):
            layer = f"{self.names['layer']}.{i}."
            for joined in ("q", "kv") if i == self.depth - 1 else ("qkv",):
                self._add(leaves, f"{i}.{joined}", *(layer + self.names[piece] for piece in joined))
            for part in ("out", "attention_norm", "up", "down", "output_norm"):
                self._add(leaves, f"{i}.{part}", layer + self.names[part])
        for part in ("dense", "classifier"):
            self._add(leaves, part, self.names[part])
        return leaves

    @staticmethod
    def _add(leaves: dict[str, tuple[str, ...]], leaf: str, *modules: str) -> None:
        for kind in ("weight", "bias"):
            leaves[f"{leaf}.{kind}"] = tuple(f"{module}.{kind}" for module in modules)


def _distilbert(config: Any) -> Architecture:
    return Architecture(
        names=_DISTILBERT,
        depth=config.n_layers,
        heads=config.n_heads,
        eps=1e-12,
        activation=config.activation,
        head_activation="relu",
        embedding_rate=config.dropout,
        attention_rate=config.attention_dropout,
        attention_output_rate=0.0,
        output_rate=config.dropout,
        head_rate=config.seq_classif_dropout,
    )


def _bert(config: Any) -> Architecture:
    head_rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    return Architecture(
        names=_BERT,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        eps=config.layer_norm_eps,
        activation=config.hidden_act,
        head_activation="tanh",
        embedding_rate=config.hidden_dropout_prob,
        attention_rate=config.attention_probs_dropout_prob,
        attention_output_rate=config.hidden_dropout_prob,
        output_rate=config.hidden_dropout_prob,
        head_rate=head_rate,
    )


@dataclass(frozen=True)
class Vocabulary:
    """The rows of the embedding tables that occur: ``words`` (kept,) sorted, and the first ``positions``.

    ``padding`` is the place in ``words`` of the padding token, where a text spells it: it never has a gradient.
    """

    words: np.ndarray
    positions: int
    padding: int | None = None

    def rows(self, leaf: str) -> np.ndarray:
        """Which rows of a table are kept, ``(kept,)``; a single text has token type 0 throughout."""
        return {"word": self.words, "position": np.arange(self.positions), "type": np.zeros(1, dtype=np.int64)}[leaf]


@dataclass(frozen=True)
class Span:
    """Where a weight lies in a trial's row."""

    leaf: str
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past its last element."""
        return self.start + int(np.prod(self.shape))


class RowMap:
    """The order of the trainable weights in a row: tables, matrices, then without decay biases and norms.

    ``tables``, ``decayed`` and ``low`` are where the tables, what weight decay applies to, and what is multiplied in
    the compute precision end; the latter is ``[tables, low)``.
    """

    def __init__(self, model: PreTrainedModel, frozen: frozenset[str], vocabulary: Vocabulary) -> None:
        self.architecture = Architecture.of(model.config)
        self.vocabulary = vocabulary
        self.leaves = self.architecture.leaves()
        self.frozen = {leaf for leaf, names in self.leaves.items() if set(names) <= frozen}
        decayed = decay_parameter_names(model)
        ranks = {leaf: _rank(leaf, names[0] in decayed) for leaf, names in self.leaves.items()}
        parameters = dict(model.named_parameters())

        self.spans: list[Span] = []
        ends = [0, 0, 0, 0]
        start = 0
        for leaf in sorted((leaf for leaf in self.leaves if leaf not in self.frozen), key=ranks.__getitem__):
            span = Span(leaf, start, tuple(self.read(leaf, parameters).shape))
            self.spans.append(span)
            start = span.stop
            ends[ranks[leaf] :] = [start] * (4 - ranks[leaf])
        self.tables, self.decayed, self.low, self.size = ends

    @torch.no_grad()
    def read(self, leaf: str, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Take a weight as it is stored here from a Hugging Face model's ``weights``."""
        parts = [weights[name] for name in self.leaves[leaf]]
        if leaf in TABLES:
            return parts[0][torch.from_numpy(self.vocabulary.rows(leaf))]
        return torch.cat([part.mT if part.dim() == 2 else part for part in parts], dim=-1)

    def row(self, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The row of a trial that starts from ``weights``, ``(size,)``."""
        if not self.spans:
            return torch.empty(0, dtype=dtype)
        return torch.cat([self.read(span.leaf, weights).to(dtype).reshape(-1) for span in self.spans])

    def frozen_weights(
        self, weights: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype, low: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Take what never changes from ``weights``, ``(1, ...)`` each: in ``low`` precision where products use that."""
        precisions = {leaf: dtype if leaf in TABLES or "norm" in leaf else low for leaf in self.frozen}
        return {leaf: self.read(leaf, weights)[None].to(device, dtype) for leaf, dtype in precisions.items()}

    @torch.no_grad()
    def write(self, row: torch.Tensor, untouched: float, weights: Mapping[str, torch.Tensor]) -> None:
        """Put a trained ``row`` (size,) into the parameters ``weights`` of a Hugging Face model with initial weights.

        ``untouched`` is what the optimizer has made of an embedding that never had a gradient, as a factor.
        """
        for span in self.spans:
            value = row[span.start : span.stop].view(span.shape).cpu()
            targets = [weights[name] for name in self.leaves[span.leaf]]
            if span.leaf in TABLES:
                targets[0].mul_(untouched)
                targets[0][torch.from_numpy(self.vocabulary.rows(span.leaf))] = value.to(targets[0].dtype)
                continue
            for target, part in zip(targets, value.chunk(len(targets), dim=-1), strict=True):
                target.copy_(part.mT if part.dim() == 2 else part)


def _rank(leaf: str, decayed: bool) -> int:
    if leaf in TABLES:
        return 0
    if decayed:
        return 1
    return 3 if "norm" in leaf else 2


class StackedWeights:
    """The weights of ``trials`` trials: ``rows`` (trials, size) to train, and what is frozen, once for all.

    Products run in ``low`` precision from a copy of the rows where that differs from the rows' own; embeddings, norms
    and the residual stream keep the rows' precision, as under autocast.
    """

    def __init__(
        self, rowmap: RowMap, frozen: Mapping[str, torch.Tensor], low: torch.dtype, rows: torch.Tensor,
        lender: StackedWeights | None = None,
    ) -> None:  # fmt: skip
        """``frozen`` weights are those of :meth:`RowMap.frozen_weights`; ``rows`` are trained in place.

        What is multiplied in low precision has its gradient in ``low_gradient`` (trials, low - tables), as it comes,
        and the rest in ``gradient`` (trials, size), whose other columns are never touched. A ``lender`` of as many
        trials or more, whose gradient is not needed meanwhile, lends the room for both.
        """
        self.rowmap, self.low, self.rows, self._frozen = rowmap, low, rows, frozen
        self._most = CACHED if rows.device.type == "cpu" else max(1, rowmap.size)
        self._leaves: dict[str, torch.Tensor] = {}
        self.copy: torch.Tensor | None = None  # (trials, low - tables)
        self.gradient: torch.Tensor = torch.empty_like(rows) if lender is None else lender.gradient[: len(rows)]
        self.low_gradient: torch.Tensor | None = None
        if low != rows.dtype:
            self.copy = rows[:, rowmap.tables : rowmap.low].to(low)
            lent = None if lender is None else lender.low_gradient
            self.low_gradient = torch.empty_like(self.copy) if lent is None else lent[: len(rows)]
            widest = min(self._most, self.copy.shape[1])
            self._wide: torch.Tensor = rows.new_empty(widest) if lender is None else lender._wide
        for span in self.rowmap.spans:
            leaf = self._cut(span, self.rows, self.copy)
            self._leaves[span.leaf] = leaf.detach().requires_grad_(span.leaf not in TABLES)
        self._find_places()

    def join_gradient(self) -> None:
        """Have all of the gradient in ``gradient``, where parts of a batch add up without rounding."""
        if self.low_gradient is not None:
            self.low_gradient = None
            self._find_places()

    def _find_places(self) -> None:
        where = {span.leaf: self._cut(span, self.gradient, self.low_gradient) for span in self.rowmap.spans}
        layers = {leaf.rpartition(".")[0] for leaf in where if leaf not in TABLES}
        self._places = {layer: Places(where[f"{layer}.weight"], where[f"{layer}.bias"]) for layer in layers}

    def _cut(self, span: Span, high: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor:
        """What belongs to a weight, ``(trials, *shape)``: a view of ``high``, or of ``low`` where products use that."""
        source, start = high, span.start
        if low is not None and self.rowmap.tables <= start < self.rowmap.low:
            source, start = low, start - self.rowmap.tables
        return source[:, start : start + span.stop - span.start].view(len(source), *span.shape)

    def __getitem__(self, leaf: str) -> torch.Tensor:
        """A weight, ``(trials, ...)`` where it is trained and ``(1, ...)`` where it is frozen."""
        return self._frozen[leaf] if leaf in self._frozen else self._leaves[leaf]

    def places(self, layer: str) -> Places | None:
        """Where the gradients of a layer's weight and bias go; None where it is frozen."""
        return self._places.get(layer)

    def parts(self) -> Iterator[slice]:
        """Cut a row into parts that decay throughout or nowhere, have one precision, and fit a CPU's cache."""
        rowmap = self.rowmap
        for start, stop in pairwise([0, rowmap.tables, rowmap.decayed, rowmap.low, rowmap.size]):
            for first in range(start, stop, self._most):
                yield slice(first, min(first + self._most, stop))

    def gradient_of(self, trial: int, part: slice) -> torch.Tensor:
        """One of the :meth:`parts` of the gradient of a trial, ``(elements,)`` in the precision of its row.

        It is good until the next call, and what is done to it may change the gradient itself.
        """
        if self.low_gradient is None or not self._is_low(part):
            return self.gradient[trial, part]
        start = self.rowmap.tables
        return self._wide[: part.stop - part.start].copy_(
            self.low_gradient[trial, part.start - start : part.stop - start]
        )

    def updated(self, trial: int | slice = slice(None), part: slice | None = None) -> None:
        """Follow the row of a trial, or all rows, after a step of the optimizer: one of the :meth:`parts`, or all."""
        tables, low = self.rowmap.tables, self.rowmap.low
        part = slice(tables, low) if part is None else part
        if self.copy is not None and self._is_low(part):
            self.copy[trial, part.start - tables : part.stop - tables] = self.rows[trial, part]

    def _is_low(self, part: slice) -> bool:
        return self.rowmap.tables <= part.start < self.rowmap.low

    def backward(self, loss: torch.Tensor, embedded: torch.Tensor | None, batch: Batch, add: bool = False) -> None:
        """Fill the gradient from ``loss``, or ``add`` to it.

        ``embedded`` is the summed embeddings, where they train.
        """
        for places in self._places.values():
            places.add = add
        loss.backward()
        if embedded is not None:
            assert embedded.grad is not None
            if not add:
                self.gradient[:, : self.rowmap.tables].zero_()
            self._add_up_tables(embedded.grad, batch)

    def _add_up_tables(self, gradient: torch.Tensor, batch: Batch) -> None:
        """Sum the gradients of tokens, ``(trials, tokens, width)``, into the rows of the tables that they came from."""
        places = {"word": batch.ids, "position": batch.positions, "type": torch.zeros_like(batch.ids)}
        for span in self.rowmap.spans:
            if span.leaf in TABLES:
                table = self.gradient[:, span.start : span.stop].view(len(self.rows), *span.shape)
                if batch.fixed:
                    _add_rows(table, places[span.leaf], gradient)
                else:
                    index = places[span.leaf].expand(len(self.rows), -1)
                    for trial in range(len(self.rows)):
                        table[trial].index_add_(0, index[trial], gradient[trial])
                if span.leaf == "word" and self.rowmap.vocabulary.padding is not None:
                    table[:, self.rowmap.vocabulary.padding].zero_()


def _add_rows(table: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """Add ``values`` (trials, tokens, width) to the rows ``index`` (orders, tokens) of ``table`` (trials, rows, width).

    What goes to one row is added up by a product where it comes first, and zeros go there from its other places: the
    result does not hang on the order in which a GPU's threads arrive.
    """
    same = index[:, :, None] == index[:, None, :]
    comes_first = ~same.tril(-1).any(2, keepdim=True)
    sums = (same & comes_first).to(values.dtype) @ values
    table.scatter_add_(1, index[:, :, None].expand_as(sums), sums)


class Forward:
    """One pass of ``batch`` through the stack; ``dropout`` None is evaluation.

    Shapes: hidden states ``(trials, tokens, width)``, after the last layer ``(trials, sentences, width)``; the leading
    size is 1 as long as nothing that was trained has been met and all trials share one order.
    """

    def __init__(self, weights: StackedWeights, batch: Batch, dropout: Draws | None, still_layers: int = 0) -> None:
        """Layers below ``still_layers`` go without dropout, whatever ``dropout`` says."""
        self.weights, self.batch, self.dropout = weights, batch, dropout
        self._still = still_layers
        self.architecture = weights.rowmap.architecture
        self._activation = get_activation(self.architecture.activation)
        self._exchanges: dict[tuple[int, int, int, int], Exchange] = {}

    def embedded(self) -> torch.Tensor:
        """Return the sum of the embeddings of every token, a leaf of the graph where the tables train."""
        weights, batch = self.weights, self.batch
        rows_of = _gathered if batch.fixed else _rows_of
        total = rows_of(weights["word"], batch.ids) + rows_of(weights["position"], batch.positions)
        if "type" in self.architecture.names:
            total += weights["type"]
        return total.requires_grad_("word" not in weights.rowmap.frozen)

    def embed(self, embedded: torch.Tensor) -> torch.Tensor:
        """Normalise the summed embeddings."""
        normal = self._norm_of_sum(embedded, None, 0, "embedding_norm", last=False)
        return self._dropped(normal, self.architecture.embedding_rate, last=False)

    def losses(self, hidden: torch.Tensor | None, start: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cross-entropies ``(trials, sentences)`` from the states under layer ``start``, and the summed embeddings.

        Without ``hidden`` states, which the embeddings then train for, the pass begins with the embeddings.
        """
        embedded = None
        if hidden is None:
            embedded = self.embedded()
            hidden = self.embed(embedded)
        logits = self.logits(self.layers(hidden, start, self.architecture.depth))
        labels = self.batch.labels.expand(len(logits), -1)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view(labels.shape), embedded

    def layers(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Run layers ``start`` to ``stop - 1``."""
        dropout = self.dropout
        for i in range(start, stop):
            self.dropout = dropout if i >= self._still else None
            x = self._layer(x, i)
        self.dropout = dropout
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Classify the last hidden states of [CLS]: ``(trials, sentences, labels)`` in the rows' precision."""
        x = get_activation(self.architecture.head_activation)(self._linear(x, "dense"))
        x = self._dropped(x, self.architecture.head_rate, last=True)
        return self._linear(x, "classifier").to(self.weights.rows.dtype)

    def _layer(self, x: torch.Tensor, i: int) -> torch.Tensor:
        last = i == self.architecture.depth - 1
        attended = self._attention(x, i, last)
        x = _sentence_rows(x, self.batch.first) if last else x
        x = self._norm_of_sum(x, attended, self.architecture.attention_output_rate, f"{i}.attention_norm", last)
        expanded = self._linear(self._activation(self._linear(x, f"{i}.up")), f"{i}.down")
        return self._norm_of_sum(x, expanded, self.architecture.output_rate, f"{i}.output_norm", last)

    def _attention(self, x: torch.Tensor, i: int, last: bool) -> torch.Tensor:
        """Attend within sentences; in the last layer, from [CLS] alone."""
        batch = self.batch
        if batch.lengths is not None and kernels.attends(self.weights.low, x):
            return self._linear(self._attended(x, i, last), f"{i}.out")
        return self._linear(self._from_first(x, i) if last else self._from_all(x, i), f"{i}.out")

    def _from_all(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """The context of every token, ``(trials, tokens, width)``."""
        batch, heads = self.batch, self.architecture.heads
        rows = self._linear(x, f"{i}.qkv")
        trials, width = len(rows), rows.shape[2] // 3
        moved = self._exchange(batch.shared, trials, heads, 3)(rows.view(-1, width // heads))
        slots = moved.view(3, trials, -1, heads, batch.shared.row.shape[2], width // heads)
        keep, scale = self._attention_keep(
            [(p.bins, heads, p.width, p.width) for p in batch.packs], batch.token_mask, slots.dtype
        )
        context = attend(slots, batch.token_mask, keep, scale)
        back = self._exchange(batch.shared, trials, heads, 0)
        return back(context.view(-1, width // heads)).view(trials, -1, width)

    def _from_first(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """The context of [CLS], ``(trials, sentences, width)``."""
        batch, heads, width = self.batch, self.architecture.heads, x.shape[2]
        query = self._linear(_sentence_rows(x, batch.first), f"{i}.q")
        moved = self._exchange(batch.alone, len(x), 1, 1)(x.to(query.dtype).view(-1, width))
        slots = moved.view(len(x), *batch.alone.row.shape[1:], width)
        keep, scale = self._attention_keep(
            [(len(p.first), heads, 1, p.width) for p in batch.packs], batch.first_mask, slots.dtype
        )
        places = self.weights.places(f"{i}.kv")
        return attend_from_first(
            slots, query, *self._layer_weights(f"{i}.kv"), places, heads, batch.first_mask, keep, scale
        )

    def _attended(self, x: torch.Tensor, i: int, last: bool) -> torch.Tensor:
        """The context of every token, or of [CLS] alone, by one kernel; ``(trials, rows, width)``."""
        batch, rate = self.batch, self.architecture.attention_rate
        assert batch.lengths is not None
        asked = self._linear(_sentence_rows(x, batch.first), f"{i}.q") if last else None
        rows = self._linear(x, f"{i}.kv" if last else f"{i}.qkv")
        draws = self.dropout.site(rate) if isinstance(self.dropout, CounterDropout) and rate else None
        width = batch.alone.row.shape[2]
        return kernels.attend(rows, asked, batch.first, batch.lengths, draws, self.architecture.heads, width, EXTENT)

    def _attention_keep(
        self, shapes: Sequence[Sequence[int]], mask: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor | None, float]:
        """What dropout keeps of probabilities that ``mask`` (orders, bins, 1, queries, width) belongs to, and times
        what; ``shapes`` (bins, heads, queries, width) is what is real of each order.
        """
        rate = self.architecture.attention_rate
        if self.dropout is None or rate == 0:
            return None, 1
        _, bins, _, *rest = mask.shape
        return self.dropout.keep(rate, shapes, (bins, self.architecture.heads, *rest), dtype), keep_scale(rate)

    def _dropped(self, x: torch.Tensor, rate: float, last: bool) -> torch.Tensor:
        """Drop hidden states ``(trials, rows, width)``, of [CLS] alone from the ``last`` layer on."""
        keep = self._keep(x, rate, last)
        return x if keep is None else x * keep

    def _keep(self, x: torch.Tensor, rate: float, last: bool) -> torch.Tensor | None:
        """The mask of hidden states like ``x``, scaled so that their mean stays; None where nothing drops."""
        if self.dropout is None or rate == 0:
            return None
        shapes = [(len(p.first if last else p.ids), x.shape[2]) for p in self.batch.packs]
        return self.dropout.keep(rate, shapes, x.shape[1:], self.weights.rows.dtype).mul_(keep_scale(rate))

    def _linear(self, x: torch.Tensor, layer: str) -> torch.Tensor:
        return linear(x, *self._layer_weights(layer), self.weights.places(layer))

    def _norm_of_sum(
        self, x: torch.Tensor, branch: torch.Tensor | None, rate: float, layer: str, last: bool
    ) -> torch.Tensor:
        """Normalise the residual stream ``x`` and what dropout leaves of ``branch``."""
        keep = None if branch is None else self._keep(branch, rate, last)
        eps, places = self.architecture.eps, self.weights.places(layer)
        return norm_of_sum(x, branch, keep, *self._layer_weights(layer), eps, places)

    def _layer_weights(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"]

    def _exchange(self, placement: Placement, trials: int, heads: int, pieces: int) -> Exchange:
        """The move into slots, or with no ``pieces`` the one back; built once for all layers."""
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
    """The same as :func:`_rows_of` with one operation for all trials."""
    if len(table) == 1:
        return F.embedding(index, table[0])
    return table.gather(1, index[:, :, None].expand(len(table), -1, table.shape[2]))


def _sentence_rows(x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """The hidden states of [CLS], ``(trials, sentences, width)``."""
    if len(first) == 1:
        return x.index_select(1, first[0])
    return x.take_along_dim(first[:, :, None], dim=1)
