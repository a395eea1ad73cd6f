"""The parameters of stacked trials, one flat vector per trial, and their layout in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from copy import copy
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from distilbench.engines.fused import kernels
from distilbench.engines.fused.cuda.side_stream import on_side_stream, wait_for_side_stream
from distilbench.engines.fused.packing import Batch
from distilbench.engines.optimization import decay_parameter_names
from distilbench.models.architecture import TABLES, Architecture
from distilbench.models.freezing import parameter_levels

CHUNK_ELEMENTS = 1 << 20
"""Elements that a CPU's optimizer updates at once, to stay in the cache: several passes over all parameters would take
8 % more time for 5.5 million on two threads.
"""


ALIGNMENT = 16
"""Each weight, and each trial, begins at a multiple of this number of elements: a GPU then loads 16 bytes at once, and
its matrix library can use its fastest kernels. The gaps are always zero.
"""


@dataclass(frozen=True)
class Vocabulary:
    """The rows of the embedding tables that are used: ``words`` (kept,) sorted, and the first ``positions``.

    ``padding`` is the index in ``words`` of the model's padding token, if that occurs in the text: it has no gradient.
    ``types`` is 2 for pairs; single texts only have token type 0.
    """

    words: np.ndarray
    positions: int
    padding: int | None = None
    types: int = 1

    def kept_rows(self, table: str) -> torch.Tensor:
        """Return the rows of a table that are kept, ``(kept,)``."""
        if table == "word":
            return torch.from_numpy(self.words)
        return torch.arange(self.positions if table == "position" else self.types)


@dataclass(frozen=True)
class ParamSlice:
    """The position of a weight in a trial's flat vector."""

    name: str
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past its last element."""
        return self.start + int(np.prod(self.shape))


class FlatParamLayout:
    """The order of the trainable weights in a trial's flat vector: tables, matrices, biases, norms.

    Weight decay applies to ``[0, decayed_end)``: tables, which end at ``tables_end``, and matrices. The weights in
    ``[tables_end, compute_end)``, matrices and biases, are used in the compute precision.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: Vocabulary, deterministic_layers: int = 0) -> None:
        """Lay out the parameters of ``model`` with ``requires_grad``.

        Layers below ``deterministic_layers`` have no dropout in training.
        """
        self.architecture, self.deterministic_layers = Architecture.of(model.config), deterministic_layers
        self.vocabulary, self.parameter_names = vocabulary, self.architecture.parameter_names()
        parameters, level_of = dict(model.named_parameters()), parameter_levels(model)
        self.frozen = {own for own, names in self.parameter_names.items() if not parameters[names[0]].requires_grad}
        decayed = decay_parameter_names(model)
        sections = {own: _section_of(own, names[0] in decayed) for own, names in self.parameter_names.items()}

        self.param_slices: list[ParamSlice] = []
        self.gaps: list[slice] = []
        self.top = max(level_of.values())
        self.level_of = {own: level_of[names[0]] for own, names in self.parameter_names.items()}
        """The level of each weight: :func:`~distilbench.models.freezing.parameter_levels`."""
        self.level_at: dict[int, int] = {}
        """The level of the weights by the index from which it applies."""
        ends = [0, 0, 0, 0]
        start = 0
        for name in sorted((name for name in sections if name not in self.frozen), key=sections.__getitem__):
            param_slice = ParamSlice(name, start, tuple(self.read(name, parameters).shape))
            if not self.param_slices or self.level_of[name] != self.level_of[self.param_slices[-1].name]:
                self.level_at[start] = self.level_of[name]
            self.param_slices.append(param_slice)
            start = -(-param_slice.stop // ALIGNMENT) * ALIGNMENT
            self.gaps += [slice(param_slice.stop, start)] if start > param_slice.stop else []
            ends[sections[name] :] = [start] * (4 - sections[name])
        self.tables_end, self.decayed_end, self.compute_end, self.size = ends

    def frozen_below(self, level: int) -> set[str]:
        """Return the names of the weights below ``level`` and of those that are always frozen."""
        return self.frozen | {name for name, own in self.level_of.items() if own < level}

    def prefix_depth(self, frozen: Set[str]) -> int | None:
        """Return the number of fully frozen layers above frozen embeddings; None if the embeddings are trained."""
        lowest = min(own for name, own in self.level_of.items() if name not in frozen)
        return lowest - 1 if lowest else None

    @torch.no_grad()
    def read(self, name: str, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return a weight in the format of this module from a Hugging Face model's ``weights``."""
        parts = [weights[part] for part in self.parameter_names[name]]
        if name in TABLES:
            return parts[0][self.vocabulary.kept_rows(name)]
        return torch.cat([part.mT if part.dim() == 2 else part for part in parts], dim=-1)

    def flat_params(self, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return the flat vector of a trial that starts from ``weights``, ``(size,)``."""
        row = torch.zeros(self.size, dtype=dtype)
        for param_slice in self.param_slices:
            row[param_slice.start : param_slice.stop] = self.read(param_slice.name, weights).reshape(-1)
        return row

    def frozen_weights(
        self, weights: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype, compute_dtype: torch.dtype,
        trained_from: int = 0,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Return the weights that are frozen if levels from ``trained_from`` on are trained, ``(1, ...)`` each.

        Matrices and biases are in ``compute_dtype``.
        """
        full = {name: name in TABLES or "norm" in name for name in self.frozen_below(trained_from)}
        return {n: self.read(n, weights)[None].to(device, dtype if full[n] else compute_dtype) for n in full}

    @torch.no_grad()
    def write(self, flat_params: torch.Tensor, untouched: float, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy ``flat_params`` (size,) into the parameters ``weights`` of a Hugging Face model with initial weights.

        ``untouched`` is the factor by which the optimizer has changed embeddings that never had a gradient.
        """
        for param_slice in self.param_slices:
            value = flat_params[param_slice.start : param_slice.stop].view(param_slice.shape).cpu()
            targets = [weights[name] for name in self.parameter_names[param_slice.name]]
            if param_slice.name in TABLES:
                targets[0].mul_(untouched)
                targets[0][self.vocabulary.kept_rows(param_slice.name)] = value.to(targets[0].dtype)
                continue
            for target, part in zip(targets, value.chunk(len(targets), dim=-1), strict=True):
                target.copy_(part.mT if part.dim() == 2 else part)


def _section_of(name: str, decayed: bool) -> int:
    if name in TABLES:
        return 0
    if decayed:
        return 1
    return 3 if "norm" in name else 2


class StackedWeights:
    """The weights of stacked trials: ``flat_params`` (trials, size), which are trained, and shared frozen weights.

    If ``compute_dtype`` differs from the dtype of ``flat_params``, products use a copy, ``compute_params``; embeddings,
    norms and the residual stream keep the dtype of ``flat_params``, as under autocast.
    """

    def __init__(
        self, layout: FlatParamLayout, frozen: Mapping[str, torch.Tensor], compute_dtype: torch.dtype,
        flat_params: torch.Tensor, grad_owner: StackedWeights | None = None, trained_from: int = 0,
    ) -> None:  # fmt: skip
        """``flat_params`` are trained in place from level ``trained_from`` on; weights below it are in ``frozen``.

        ``frozen`` is the result of :meth:`FlatParamLayout.frozen_weights`. Weights with a low-precision copy have their
        gradient in ``compute_grad`` (trials, compute_end - tables_end), all others in ``grad`` (trials, size), whose
        remaining columns are used only for batches in parts. ``grad_owner``, with at least as many trials, lends its
        gradient buffers; it must not need them at the same time.
        """
        self.layout, self.compute_dtype, self.flat_params = layout, compute_dtype, flat_params
        self.trained_from, self.frozen = trained_from, layout.frozen_below(trained_from)
        self.part: int | None = None
        """The offset in its batch of the micro-batch that is processed; None for a whole batch."""
        self._chunk_size = CHUNK_ELEMENTS if flat_params.device.type == "cpu" else max(1, layout.size)
        self.compute_params: torch.Tensor | None = None  # (trials, compute_end - tables_end)
        self.grad: torch.Tensor = (
            torch.empty_like(flat_params) if grad_owner is None else grad_owner.grad[: len(flat_params)]
        )
        self.compute_grad: torch.Tensor | None = None
        if compute_dtype != flat_params.dtype:
            self.compute_params = flat_params[:, layout.tables_end : layout.compute_end].to(compute_dtype)
            lent = None if grad_owner is None else grad_owner.compute_grad
            self.compute_grad = torch.empty_like(self.compute_params) if lent is None else lent[: len(flat_params)]
            longest = min(self._chunk_size, self.compute_params.shape[1])
            self._grad_chunk: torch.Tensor = (
                flat_params.new_empty(longest) if grad_owner is None else grad_owner._grad_chunk
            )
        for gap in layout.gaps:
            self._view_columns(gap, self.grad, self.compute_grad).zero_()
        self._weights: dict[str, torch.Tensor] = {}
        for param_slice in layout.param_slices:
            weight = self._view_weight(param_slice, flat_params, self.compute_params).detach()
            if param_slice.name not in self.frozen and param_slice.name not in TABLES:
                weight.requires_grad_().grad = self._view_weight(param_slice, self.grad, self.compute_grad)
            self._weights[param_slice.name] = weight
        self._weights |= {name: weight for name, weight in frozen.items() if name in self.frozen}

    def _view_weight(self, param_slice: ParamSlice, full: torch.Tensor, compute: torch.Tensor | None) -> torch.Tensor:
        """Return a weight's view ``(trials, *shape)`` of ``full``, or of ``compute`` if products use that."""
        flat = self._view_columns(slice(param_slice.start, param_slice.stop), full, compute)
        return flat.view(len(flat), *param_slice.shape)

    def _view_columns(self, chunk: slice, full: torch.Tensor, compute: torch.Tensor | None) -> torch.Tensor:
        """Return these columns of ``full``, or of ``compute`` if products use that, ``(trials, columns)``."""
        if compute is None or not self._is_in_compute_range(chunk):
            return full[:, chunk]
        start = self.layout.tables_end
        return compute[:, chunk.start - start : chunk.stop - start]

    @property
    def prefix_depth(self) -> int | None:
        """The depth of the frozen prefix: see :meth:`FlatParamLayout.prefix_depth`."""
        return self.layout.prefix_depth(self.frozen)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a weight, ``(trials, ...)``, or ``(1, ...)`` if it is frozen and shared."""
        return self._weights[name]

    def view_trial(self, trial: int) -> StackedWeights:
        """Return a read-only view of one trial's weights."""
        one = copy(self)
        one.flat_params = self.flat_params[trial : trial + 1]
        one._weights = {name: w if len(w) == 1 else w.detach()[trial : trial + 1] for name, w in self._weights.items()}
        return one

    def chunks(self, by_level: bool = False) -> Iterator[tuple[slice, int]]:
        """Yield slices of the trained parameters, each of one precision and with or without weight decay, and a level.

        On a CPU each fits the cache. The level is meaningful only with ``by_level``, which also splits by level.
        """
        layout, level = self.layout, 0
        ends = {0, layout.tables_end, layout.decayed_end, layout.compute_end, layout.size}
        for start, stop in pairwise(sorted(ends | layout.level_at.keys() if by_level or self.trained_from else ends)):
            level = layout.level_at.get(start, level)
            for first in range(start, stop, self._chunk_size) if level >= self.trained_from else ():
                yield slice(first, min(first + self._chunk_size, stop)), level

    def grad_of(self, trial: int, chunk: slice) -> torch.Tensor:
        """Return one of the :meth:`chunks` of a trial's gradient, ``(elements,)`` in the dtype of ``flat_params``.

        It is valid until the next call; modifying it may modify the gradient itself.
        """
        grad = self._view_columns(chunk, self.grad, self.compute_grad if self.part is None else None)[trial]
        return grad if grad.dtype == self.grad.dtype else self._grad_chunk[: len(grad)].copy_(grad)

    def refresh_compute_params(self, trial: int | slice = slice(None), chunk: slice | None = None) -> None:
        """Update ``compute_params`` after an optimizer step, for one trial or all, one of the :meth:`chunks` or all."""
        tables, compute = self.layout.tables_end, self.layout.compute_end
        chunk = slice(tables, compute) if chunk is None else chunk
        if self.compute_params is not None and self._is_in_compute_range(chunk):
            self.compute_params[trial, chunk.start - tables : chunk.stop - tables] = self.flat_params[trial, chunk]

    def _is_in_compute_range(self, chunk: slice) -> bool:
        return bool(self.layout.tables_end <= chunk.start < self.layout.compute_end)

    def backward(self, loss: torch.Tensor, embedded: torch.Tensor | None, batch: Batch) -> None:
        """Compute the gradient of ``loss``; ``embedded`` are the summed embeddings, used if the tables are trained.

        Gradients of the parts of a batch accumulate in ``grad``, in full precision. Those of matrices are written by
        :func:`~distilbench.engines.fused.autograd.linear`.
        """
        layout = self.layout
        vectors = [w for w in self._weights.values() if w.requires_grad and w.dim() == 2]  # biases, norms
        trained = [] if embedded is None or "word" in self.frozen else [embedded]
        if trained and not self.part:
            with on_side_stream(None, self.grad):
                self.grad[:, : layout.tables_end].zero_()
        gradients = torch.autograd.grad(loss, [*vectors, *trained])
        wait_for_side_stream(loss.device)
        self._copy_vector_grads(gradients[: len(vectors)])
        if self.compute_grad is not None and self.part is not None:
            total = self.grad[:, layout.tables_end : layout.compute_end]
            (total.add_ if self.part else total.copy_)(self.compute_grad)
        if trained:
            self._add_table_grads(gradients[-1], batch)

    def accumulates(self, weight: torch.Tensor) -> bool:
        """Return whether to add the gradient of ``weight`` to that of earlier parts; low precision adds later."""
        return bool(self.part) and weight.dtype == self.flat_params.dtype

    def _copy_vector_grads(self, gradients: Sequence[torch.Tensor]) -> None:
        """Copy or add the ``gradients`` of biases and norms, ``(trials, size)`` each, to their columns."""
        layout, left = self.layout, iter(gradients)
        for start, stop in pairwise((layout.decayed_end, layout.compute_end, layout.size)):  # biases, then norms
            own = [p for p in layout.param_slices if start <= p.start < stop and p.name not in self.frozen]
            if own:  # frozen ones come before the first
                place = self._view_columns(slice(own[0].start, stop), self.grad, self.compute_grad)
                row = torch.cat([_pad_to_alignment(gradient) for gradient in islice(left, len(own))], dim=1)
                (place.add_ if self.accumulates(place) else place.copy_)(row)

    def _add_table_grads(self, grad: torch.Tensor, batch: Batch) -> None:
        """Add ``grad`` of the tokens' embeddings, ``(trials, tokens, width)``, to the tables' gradients."""
        index_of = {"word": batch.ids, "position": batch.positions, "type": batch.types}
        for param_slice in (p for p in self.layout.param_slices if p.name in TABLES):
            table, index = self._view_weight(param_slice, self.grad, None), index_of[param_slice.name]
            if batch.lengths is not None:
                _scatter_add_rows(table, index, grad)
            else:
                for trial, rows in enumerate(index.expand(len(table), -1)):
                    table[trial].index_add_(0, rows, grad[trial])
            if param_slice.name == "word" and self.layout.vocabulary.padding is not None:
                table[:, self.layout.vocabulary.padding].zero_()


def _pad_to_alignment(vectors: torch.Tensor) -> torch.Tensor:
    """Pad ``vectors`` (trials, size) to the start of the next weight."""
    missing = -vectors.shape[1] % ALIGNMENT
    return F.pad(vectors, (0, missing)) if missing else vectors


def _scatter_add_rows(table: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """Add ``values`` (trials, tokens, width) to the rows ``index`` (orders, tokens) of ``table`` (trials, rows, width).

    The result does not depend on the order of a GPU's threads: without a kernel, a product sums all values of a row at
    its first occurrence, and later occurrences add zeros.
    """
    if kernels.can_run("rows", values.device, values.dtype):
        kernels.add_rows(table, index, values.contiguous())
        return
    same = index[:, :, None] == index[:, None, :]
    comes_first = ~same.tril(-1).any(2, keepdim=True)
    sums = (same & comes_first).to(values.dtype) @ values
    table.scatter_add_(1, index[:, :, None].expand_as(sums), sums)
