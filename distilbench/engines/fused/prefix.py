"""The frozen lower part, run ahead of the steps that need it and once for all trials that share it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from distilbench.data.tokens import EncodedSplit
from distilbench.engines.batches import BatchSchedule, batches_by_length
from distilbench.engines.fused.dropout import DropoutMasks, dropout_masks_for
from distilbench.engines.fused.encoder import Forward
from distilbench.engines.fused.packing import Batch, pack, stack_batches
from distilbench.engines.fused.params import FlatParamLayout, StackedWeights

WINDOW = 8
"""Steps whose prefix is run at once. On two cores 8 batches of 16 fill the products and still fit the cache."""

GPU_WINDOW = 64
"""The same on a GPU, where a pass of 8 batches would be bound by its launches; 40 MB of states at 768 wide."""


ROOM = 2 << 30
"""Bytes of hidden states without dropout that a group may keep, of the evaluation and of training."""


def prefix_depth(layout: FlatParamLayout, frozen: Set[str]) -> int | None:
    """Return how many layers follow ``frozen`` embeddings up to one that trains a weight; None where those train."""
    lowest = min(layout.level_of[leaf] for leaf in layout.leaves.keys() - frozen)
    return lowest - 1 if lowest else None


class Prefix:
    """Hidden states under the trained part.

    In training with dropout each example has other hidden states in every epoch, and is seen once in each: a *window*
    of steps is run at once and kept until the next one. Without, and in evaluations, one pass over a split serves all
    epochs, where its states fit into :data:`ROOM`.
    """

    def __init__(
        self, weights: Sequence[StackedWeights], split: EncodedSplit, schedule: BatchSchedule, dropout: bool, depth: int
    ) -> None:
        """``weights`` are those of each trial, or those that all share.

        ``depth`` is how many layers are frozen, as :func:`prefix_depth` says; ``split`` and ``dropout`` are training's.
        """
        self._weights, self._split, self._schedule, self._dropout = weights, split, schedule, dropout
        self._empty = weights[0].flat_params.new_empty(0, weights[0]["word"].shape[2])
        self.depth, self.window = depth, WINDOW if self._empty.device.type == "cpu" else GPU_WINDOW
        self._sentences_only = depth == weights[0].layout.architecture.depth
        self._windows: dict[tuple[int, int], tuple[int, list[list[torch.Tensor]]]] = {}
        self._kept: dict[int, list[torch.Tensor]] = {}
        self._room = ROOM

    def hidden(self, orders: Sequence[int], step: int, part: slice, batch: Batch, at_once: int) -> torch.Tensor:
        """Return hidden states of a ``part`` of step ``step`` in the orders of these seeds, as :meth:`empty` has them.

        ``batch`` has the size of those examples; the prefix is run over at most ``at_once``.
        """
        hidden = self.empty(batch)
        seeds = orders if len(orders) == len(hidden) else [orders[0]] * len(hidden)
        for trial, (row, seed) in enumerate(zip(hidden, seeds, strict=True)):
            states = torch.cat(self._of_order(trial % len(self._weights), seed, step, at_once)[part])
            row[: len(states)] = states
        return hidden

    def prepare(self, orders: Sequence[int], step: int, at_once: int) -> None:
        """Run what :meth:`hidden` of a step would have to: after it, threads may call that beside each other."""
        for trial in range(max(len(orders), len(self._weights))):
            self._of_order(trial % len(self._weights), orders[trial % len(orders)], step, at_once)

    def hidden_without_dropout(self, split: EncodedSplit, examples: np.ndarray, batch: Batch) -> torch.Tensor:
        """Return the hidden states of ``batch``, which are ``examples`` of ``split``, ``(1, rows, width)``."""
        hidden = self.empty(batch)
        states = self._kept_states(split, examples, len(examples)) or self._run(self._weights[0], split, examples, None)
        torch.cat(states, out=hidden[0, : sum(map(len, states))])
        return hidden

    def empty(self, batch: Batch) -> torch.Tensor:
        """Room for the hidden states of a batch of that size, ``(orders, rows, width)``, or of each trial."""
        orders, rows = (batch.first if self._sentences_only else batch.ids).shape
        return self._empty.new_zeros(max(orders, len(self._weights)), rows, self._empty.shape[1])

    def forget(self) -> None:
        """Let go of hidden states, which are run again where they are asked for."""
        self._room += sum(states.nbytes for kept in self._kept.values() for states in kept)
        self._kept.clear()

    def _of_order(self, trial: int, seed: int, step: int, at_once: int) -> list[torch.Tensor]:
        """Return the hidden states of each example of a step, ``(rows, width)``."""
        if not self._dropout and (kept := self._kept_states(self._split, self._schedule.batch(seed, step), at_once)):
            return kept
        number, window = self._windows.get((trial, seed), (-1, []))
        if step // self.window != number:
            number = step // self.window
            window = self._run_window(self._weights[trial], seed, number, at_once)
            self._windows[trial, seed] = number, window
        return window[step % self.window]

    def _kept_states(self, split: EncodedSplit, examples: np.ndarray, at_once: int) -> list[torch.Tensor]:
        """Return hidden states without dropout, each ``(rows, width)``; none where there is no room for a split's."""
        key, rows = id(split), len(split) if self._sentences_only else len(split.tokens)
        size = rows * self._empty.shape[1] * self._empty.element_size()
        if key not in self._kept and size <= self._room:
            kept = [self._empty] * len(split)
            for chosen in batches_by_length(split, at_once):  # rows of like length together
                for i, states in zip(chosen, self._run(self._weights[0], split, chosen, None), strict=True):
                    kept[i] = states
            self._kept[key], self._room = kept, self._room - size
        return [self._kept[key][i] for i in examples] if key in self._kept else []

    def _run_window(self, weights: StackedWeights, seed: int, number: int, at_once: int) -> list[list[torch.Tensor]]:
        """Run the prefix for the steps of a window, whole even where a run is resumed within it."""
        steps = range(number * self.window, min((number + 1) * self.window, self._schedule.steps))
        batches = [self._schedule.batch(seed, step) for step in steps]
        examples = np.concatenate(batches)
        states: list[torch.Tensor] = []
        for start in range(0, len(examples), at_once):
            stage = f"prefix+{start}" if start else "prefix"
            dropout = dropout_masks_for([seed], stage, number, self._empty.device) if self._dropout else None
            states += self._run(weights, self._split, examples[start : start + at_once], dropout)
        own = iter(states)
        return [list(islice(own, len(batch))) for batch in batches]

    @torch.no_grad()
    def _run(
        self, weights: StackedWeights, split: EncodedSplit, examples: np.ndarray, dropout: DropoutMasks | None
    ) -> list[torch.Tensor]:
        """Return the hidden states of each of ``examples``, ``(rows, width)``, of [CLS] where all layers are frozen."""
        device = self._empty.device
        packed = pack(split, examples, share=device.type == "cpu")  # the search for bins takes the host too long
        batch = stack_batches([packed], device, weights.compute_dtype)
        if device.type != "cpu":
            lengths = torch.from_numpy(np.diff(split.offsets)[examples])[None]
            batch = replace(batch, lengths=lengths.to(device))  # attention's kernel then reads the rows as they are
        forward = Forward(weights, batch, dropout)
        states = forward.layers(forward.embed(), 0, self.depth)[0]
        rows = np.ones(len(examples), dtype=int) if self._sentences_only else np.bincount(packed.sentence)
        return list(states[: rows.sum()].split(rows.tolist()))
