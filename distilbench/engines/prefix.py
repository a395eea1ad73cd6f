"""The frozen lower part, run ahead of the steps that need it and once for all trials that share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from distilbench.data import EncodedSplit
from distilbench.engines.batches import batches_by_length
from distilbench.engines.dropout import Dropout
from distilbench.engines.packing import Batch, Course, pack, stack
from distilbench.engines.stacked import Forward, StackedWeights

WINDOW = 8
"""Steps whose prefix is run at once. On two cores 8 batches of 16 fill the products and still fit the cache."""


def prefix_depth(weights: StackedWeights) -> int | None:
    """Return how many layers follow frozen embeddings without a trained one between; None where embeddings train."""
    frozen, depth = weights.rowmap.frozen, weights.rowmap.architecture.depth
    if "word" not in frozen:
        return None
    return next((i for i in range(depth) if f"{i}.out.weight" not in frozen), depth)


@torch.no_grad()
def run_prefix(weights: StackedWeights, batch: Batch, depth: int, dropout: Dropout | None) -> torch.Tensor:
    """Hidden states of ``batch`` under layer ``depth``: ``(orders, tokens, width)``, of [CLS] where that is the top."""
    forward = Forward(weights, batch, dropout)
    return forward.layers(forward.embed(forward.embedded()), 0, depth)


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
        self, weights: StackedWeights, split: EncodedSplit, course: Course, dropout: bool, budget: Budget, depth: int
    ) -> None:
        self.depth = depth
        self._weights, self._split, self._course, self._dropout = weights, split, course, dropout
        self._sentences_only = depth == weights.rowmap.architecture.depth
        self._windows: dict[int, tuple[int, list[torch.Tensor]]] = {}
        self._all: list[torch.Tensor] = []
        rows = len(split) if self._sentences_only else len(split.tokens)
        self._once = not dropout and budget.take(rows * weights["word"].shape[2] * weights.rows.element_size())

    @classmethod
    def of(
        cls, weights: StackedWeights, split: EncodedSplit, course: Course, dropout: bool, budget: Budget
    ) -> TrainingPrefix | None:
        """Make one for the depth that ``weights`` freezes; None where the embeddings train."""
        depth = prefix_depth(weights)
        return None if depth is None else cls(weights, split, course, dropout, budget, depth)

    def hidden(self, orders: Sequence[int], step: int, batch: Batch) -> torch.Tensor:
        """The hidden states of step ``step`` in the orders of these seeds, ``(orders, rows, width)``."""
        rows = (batch.first if self._sentences_only else batch.ids).shape[1]
        own = [self._of_order(seed, step) for seed in orders]
        return torch.stack([F.pad(states, (0, 0, 0, rows - len(states))) for states in own])

    def _of_order(self, seed: int, step: int) -> torch.Tensor:
        if self._once:
            self._all = self._all or self._run_all()
            return torch.cat([self._all[i] for i in self._course.batch(seed, step)])
        number, kept = self._windows.get(seed, (-1, []))
        if step // WINDOW != number:
            number = step // WINDOW
            kept = self._run_window(seed, number)
            self._windows[seed] = number, kept
        return kept[step % WINDOW]

    def _run_window(self, seed: int, number: int) -> list[torch.Tensor]:
        """Run the prefix for the steps of a window, whole even where a run is resumed within it."""
        steps = range(number * WINDOW, min((number + 1) * WINDOW, self._course.steps))
        parts = [self._course.batch(seed, step) for step in steps]
        dropout = Dropout([seed], "prefix", number, self._weights.rows.device) if self._dropout else None
        states, rows = self._run(np.concatenate(parts), dropout)
        ends = np.cumsum([len(part) for part in parts])[:-1]
        return list(states.split([int(part.sum()) for part in np.split(rows, ends)]))

    def _run_all(self) -> list[torch.Tensor]:
        """Run the prefix over the whole split without dropout, rows of like length together."""
        hidden: list[torch.Tensor] = [torch.empty(0)] * len(self._split)
        for chosen in batches_by_length(self._split, 128):
            states, rows = self._run(chosen, None)
            for i, own in zip(chosen, states.split(rows.tolist()), strict=True):
                hidden[i] = own
        return hidden

    def _run(self, examples: np.ndarray, dropout: Dropout | None) -> tuple[torch.Tensor, np.ndarray]:
        """Hidden states (rows, width), and how many rows of them each of ``examples`` has."""
        packed = pack(self._split, examples)
        batch = stack([packed], self._weights.rows.device)
        states = run_prefix(self._weights, batch, self.depth, dropout)[0]
        rows = np.ones(len(examples), dtype=int) if self._sentences_only else np.bincount(packed.sentence)
        return states[: rows.sum()], rows
