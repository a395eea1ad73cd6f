"""Lay the stacked parameters of a group in one flat row a trial, and say where each lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from transformers import PreTrainedModel

from distilbench.engines.fused.architecture import TABLES, Architecture
from distilbench.engines.fused.autograd import Places
from distilbench.engines.fused.packing import Batch
from distilbench.engines.optimization import decay_parameter_names

CACHED = 1 << 20
"""Elements of a row that a CPU's optimizer takes at once: several passes over all would each wait for memory, and take
8 % more time for 5.5 million on two threads.
"""


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
