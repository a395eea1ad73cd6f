"""The frozen lower part, run ahead of the steps that need it and once for all trials that share it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from distilbench.data.tokens import EncodedSplit
from distilbench.engines.batches import batches_by_length
from distilbench.engines.fused.dropout import DropoutMasks, dropout_masks_for
from distilbench.engines.fused.encoder import Forward
from distilbench.engines.fused.packing import Batch, pack, stack_batches
from distilbench.engines.fused.params import StackedWeights
from distilbench.engines.steps import BatchSchedule

WINDOW = 8
"""Steps whose prefix is run at once. On two cores 8 batches of 16 fill the products and still fit the cache."""

GPU_WINDOW = 64
"""The same on a GPU, where a pass of 8 batches would be bound by its launches; 40 MB of states at 768 wide."""


def prefix_depth(frozen: Set[str], depth: int) -> int | None:
    """Return how many layers of ``depth`` follow frozen embeddings up to a trained one; None where embeddings train.

    A layer's bias is the last of it to be frozen, for BitFit trains it without the weight.
    """
    if not {"word", "embedding_norm.bias"} <= frozen:
        return None
    return next((i for i in range(depth) if f"{i}.out.bias" not in frozen), depth)


@torch.no_grad()
def run_prefix(weights: StackedWeights, batch: Batch, depth: int, dropout: DropoutMasks | None) -> torch.Tensor:
    """Hidden states of ``batch`` under layer ``depth``: ``(orders, tokens, width)``, of [CLS] where that is the top."""
    forward = Forward(weights, batch, dropout)
    return forward.layers(forward.embed(), 0, depth)


@dataclass
class Budget:
    """Bytes that hidden states may take up for the whole of a training run."""

    left: int

    def take(self, size: int) -> bool:
        """Whether ``size`` bytes are granted."""
        granted = size <= self.left
        self.left -= size if granted else 0
        return granted


class TrainingPrefix:
    """Hidden states under the trained part for the steps of a run.

    With dropout each example has other hidden states in every epoch, and is seen once in each: a *window* of steps is
    run at once and kept until the next one. Without, one pass over the split serves all epochs, where the budget holds
    it; else windows do.
    """

    def __init__(
        self, weights: Sequence[StackedWeights], split: EncodedSplit, schedule: BatchSchedule, dropout: bool,
        budget: Budget, depth: int,
    ) -> None:  # fmt: skip
        """``weights`` are those of each trial, or those that all share.

        ``depth`` is how many layers are frozen, as :func:`prefix_depth` says.
        """
        self._weights, self._split, self._schedule, self._dropout = weights, split, schedule, dropout
        self._empty = weights[0].flat_params.new_empty(0, weights[0]["word"].shape[2])
        self.depth, self.window = depth, WINDOW if self._empty.device.type == "cpu" else GPU_WINDOW
        self._sentences_only = depth == weights[0].layout.architecture.depth
        self._windows: dict[tuple[int, int], tuple[int, list[list[torch.Tensor]]]] = {}
        self._all: list[torch.Tensor] = []
        rows = len(split) if self._sentences_only else len(split.tokens)
        self._once = not dropout and budget.take(rows * self._empty.shape[1] * self._empty.element_size())

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

    def of_batch(self, batch: Batch) -> torch.Tensor:
        """Return the hidden states of ``batch`` without dropout, as an evaluation has them, ``(1, rows, width)``."""
        return run_prefix(self._weights[0], batch, self.depth, None)

    def empty(self, batch: Batch) -> torch.Tensor:
        """Room for the hidden states of a batch of that size, ``(orders, rows, width)``, or of each trial."""
        orders, rows = (batch.first if self._sentences_only else batch.ids).shape
        return self._empty.new_zeros(max(orders, len(self._weights)), rows, self._empty.shape[1])

    def _of_order(self, trial: int, seed: int, step: int, at_once: int) -> list[torch.Tensor]:
        """Return the hidden states of each example of a step, ``(rows, width)``."""
        if self._once:
            self._all = self._all or self._run_all(at_once)
            return [self._all[i] for i in self._schedule.batch(seed, step)]
        number, kept = self._windows.get((trial, seed), (-1, []))
        if step // self.window != number:
            number = step // self.window
            kept = self._run_window(self._weights[trial], seed, number, at_once)
            self._windows[trial, seed] = number, kept
        return kept[step % self.window]

    def _run_window(self, weights: StackedWeights, seed: int, number: int, at_once: int) -> list[list[torch.Tensor]]:
        """Run the prefix for the steps of a window, whole even where a run is resumed within it."""
        steps = range(number * self.window, min((number + 1) * self.window, self._schedule.steps))
        batches = [self._schedule.batch(seed, step) for step in steps]
        examples = np.concatenate(batches)
        states: list[torch.Tensor] = []
        for start in range(0, len(examples), at_once):
            stage = f"prefix+{start}" if start else "prefix"
            dropout = dropout_masks_for([seed], stage, number, self._empty.device) if self._dropout else None
            states += self._run(weights, examples[start : start + at_once], dropout)
        own = iter(states)
        return [list(islice(own, len(batch))) for batch in batches]

    def _run_all(self, at_once: int) -> list[torch.Tensor]:
        """Run the prefix over the whole split without dropout, rows of like length together."""
        hidden: list[torch.Tensor] = [torch.empty(0)] * len(self._split)
        for chosen in batches_by_length(self._split, at_once):
            for i, own in zip(chosen, self._run(self._weights[0], chosen, None), strict=True):
                hidden[i] = own
        return hidden

    def _run(self, weights: StackedWeights, examples: np.ndarray, dropout: DropoutMasks | None) -> list[torch.Tensor]:
        """Return the hidden states of each of ``examples``, ``(rows, width)``."""
        device = self._empty.device
        packed = pack(self._split, examples, share=device.type == "cpu")  # the search for bins takes the host too long
        batch = stack_batches([packed], device)
        states = run_prefix(weights, batch, self.depth, dropout)[0]
        rows = np.ones(len(examples), dtype=int) if self._sentences_only else np.bincount(packed.sentence)
        return list(states[: rows.sum()].split(rows.tolist()))
