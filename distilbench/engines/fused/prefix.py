"""The frozen prefix, computed ahead of the steps that need it and once for all trials that share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from distilbench.data.tokens import EncodedSplit
from distilbench.engines.batches import BatchSchedule, batches_by_length
from distilbench.engines.device import to_device
from distilbench.engines.fused.dropout import DropoutMasks, dropout_masks_for
from distilbench.engines.fused.encoder import Forward
from distilbench.engines.fused.packing import Batch, pack, stack_batches
from distilbench.engines.fused.params import StackedWeights

WINDOW = 8
"""Steps whose prefix is computed at once. On two cores, 8 batches of 16 make products efficient and fit the cache."""

GPU_WINDOW = 64
"""The same on a GPU, where kernel launches would dominate a pass of 8 batches; 40 MB of states at width 768."""


CACHE_BYTES = 2 << 30
"""Bytes of hidden states without dropout that a group may cache, for evaluation and training together."""


class Prefix:
    """The hidden states that enter the trained part.

    In training with dropout, an example's hidden states differ in every epoch and are used once: a *window* of steps is
    computed at once and kept until the next window. Without dropout, and in evaluations, one pass over a split serves
    all epochs, if its states fit into :data:`CACHE_BYTES`.
    """

    def __init__(
        self, weights: Sequence[StackedWeights], split: EncodedSplit, schedule: BatchSchedule, dropout: bool
    ) -> None:
        """``weights``, whose embeddings are frozen, are one per trial, or one shared by all.

        ``split`` is the training split; ``dropout`` tells whether the prefix has dropout in training.
        """
        self._weights, self._split, self._schedule, self._dropout = weights, split, schedule, dropout
        self._no_rows = weights[0].flat_params.new_empty(0, weights[0]["word"].shape[2])
        self._depth = weights[0].prefix_depth or 0
        self._window_steps = WINDOW if self._no_rows.device.type == "cpu" else GPU_WINDOW
        self._cls_only = self._depth == weights[0].layout.architecture.depth
        self._windows: dict[tuple[int, int], tuple[int, list[list[torch.Tensor]]]] = {}
        self._cache: dict[int, list[torch.Tensor]] = {}
        self._cache_bytes_left = CACHE_BYTES

    def hidden(
        self, orders: Sequence[int], step: int, part: slice, micro_batch: int, out: torch.Tensor
    ) -> torch.Tensor:
        """Return ``out``, zeros of :meth:`zeros_for`, with the hidden states of a ``part`` of a step in ``orders``.

        Those are seeds. For a window of steps, ``micro_batch`` examples of each are processed at a time.
        """
        seeds = orders if len(orders) == len(out) else [orders[0]] * len(out)
        for trial, (row, seed) in enumerate(zip(out, seeds, strict=True)):
            states = torch.cat(self._states_of_step(trial % len(self._weights), seed, step, micro_batch)[part])
            row[: len(states)] = states
        return out

    def prepare(self, orders: Sequence[int], step: int, micro_batch: int) -> None:
        """Compute what :meth:`hidden` needs for a step; afterwards several threads may call that at the same time."""
        for trial in range(max(len(orders), len(self._weights))):
            self._states_of_step(trial % len(self._weights), orders[trial % len(orders)], step, micro_batch)

    def hidden_without_dropout(self, split: EncodedSplit, examples: np.ndarray, batch: Batch) -> torch.Tensor:
        """Return the hidden states of ``batch``, the ``examples`` of ``split``, ``(1, rows, width)``."""
        hidden = self.zeros_for(batch)
        states = self._cached_states(split, examples, len(examples)) or self._compute(
            self._weights[0], split, examples, None
        )
        torch.cat(states, out=hidden[0, : sum(map(len, states))])
        return hidden

    def zeros_for(self, batch: Batch) -> torch.Tensor:
        """Return zeros for the hidden states of ``batch``, ``(orders, rows, width)``; per trial if the weights are."""
        orders, rows = (batch.first if self._cls_only else batch.ids).shape
        return self._no_rows.new_zeros(max(orders, len(self._weights)), rows, self._no_rows.shape[1])

    def clear_cache(self) -> None:
        """Clear the cached hidden states; they are computed again when needed."""
        self._cache_bytes_left += sum(states.nbytes for kept in self._cache.values() for states in kept)
        self._cache.clear()

    def _states_of_step(self, trial: int, seed: int, step: int, micro_batch: int) -> list[torch.Tensor]:
        """Return the hidden states of each example of a step, ``(rows, width)``."""
        at_once = self._window_steps * micro_batch
        if not self._dropout and (kept := self._cached_states(self._split, self._schedule.batch(seed, step), at_once)):
            return kept
        number, window = self._windows.get((trial, seed), (-1, []))
        if step // self._window_steps != number:
            number = step // self._window_steps
            window = self._compute_window(self._weights[trial], seed, number, at_once)
            self._windows[trial, seed] = number, window
        return window[step % self._window_steps]

    def _cached_states(self, split: EncodedSplit, examples: np.ndarray, at_once: int) -> list[torch.Tensor]:
        """Return hidden states without dropout, ``(rows, width)`` each; an empty list if the split does not fit."""
        key, rows = id(split), len(split) if self._cls_only else len(split.tokens)
        size = rows * self._no_rows.shape[1] * self._no_rows.element_size()
        if key not in self._cache and size <= self._cache_bytes_left:
            kept = [self._no_rows] * len(split)
            for chosen in batches_by_length(split, at_once):
                for i, states in zip(chosen, self._compute(self._weights[0], split, chosen, None), strict=True):
                    kept[i] = states
            self._cache[key], self._cache_bytes_left = kept, self._cache_bytes_left - size
        return [self._cache[key][i] for i in examples] if key in self._cache else []

    def _compute_window(
        self, weights: StackedWeights, seed: int, number: int, at_once: int
    ) -> list[list[torch.Tensor]]:
        """Compute the prefix for all steps of a window, even if training resumes in the middle of it."""
        steps = range(number * self._window_steps, min((number + 1) * self._window_steps, self._schedule.steps))
        batches = [self._schedule.batch(seed, step) for step in steps]
        examples = np.concatenate(batches)
        states: list[torch.Tensor] = []
        for start in range(0, len(examples), at_once):
            stage = f"prefix+{start}" if start else "prefix"
            dropout = dropout_masks_for([seed], stage, number, self._no_rows.device) if self._dropout else None
            states += self._compute(weights, self._split, examples[start : start + at_once], dropout)
        own = iter(states)
        return [list(islice(own, len(batch))) for batch in batches]

    @torch.no_grad()
    def _compute(
        self, weights: StackedWeights, split: EncodedSplit, examples: np.ndarray, dropout: DropoutMasks | None
    ) -> list[torch.Tensor]:
        """Return the hidden states of each of ``examples``, ``(rows, width)``; only [CLS] if all layers are frozen."""
        device = self._no_rows.device
        packed = pack(split, examples, share=device.type == "cpu")  # with a GPU, the host's search would be too slow
        batch = stack_batches([packed], device, weights.compute_dtype)
        if device.type != "cpu":
            lengths = to_device(np.diff(split.offsets)[None, examples], device)
            batch = replace(batch, lengths=lengths)  # lets the attention kernel read token rows directly
        forward = Forward(weights, batch, dropout)
        states = forward.layers(forward.embed(), 0, self._depth)[0]
        rows = np.ones(len(examples), dtype=int) if self._cls_only else np.bincount(packed.sentence)
        return list(states[: rows.sum()].split(rows.tolist()))
