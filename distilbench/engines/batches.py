"""Rows of tokens -> batches padded to their longest row, never to the maximum length."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from distilbench.data.tokens import EncodedSplit


def batches_by_length(split: EncodedSplit, size: int) -> Iterator[np.ndarray]:
    """Yield the examples' numbers, ``(at most size,)`` at a time, the longest rows first.

    Rows of like length share a batch, so that little is padded; a batch too large for the memory fails at once.
    """
    order = np.argsort(-np.diff(split.offsets), kind="stable")
    yield from (order[start : start + size] for start in range(0, len(order), size))


class TrainingBatches:
    """Trainer's collator over the numbers of examples: padded batches, and how many tokens each really has."""

    def __init__(self, split: EncodedSplit, pad_token_id: int) -> None:
        self._split, self._pad = split, pad_token_id
        self._tokens: deque[int] = deque()

    def __call__(self, examples: list[int]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask`` (rows, longest) and ``labels`` (rows,), all int64."""
        indices = np.asarray(examples)
        self._tokens.append(int(np.diff(self._split.offsets)[indices].sum()))
        return padded_batch(self._split, indices, self._pad) | {"labels": torch.from_numpy(self._split.labels[indices])}

    def tokens_of(self, steps: int) -> int:
        """Count the tokens of the next ``steps`` batches, in the order they were made.

        Asked for step by step, since the data loader makes batches ahead of the step that uses them.
        """
        return sum(self._tokens.popleft() for _ in range(steps))


def padded_batch(split: EncodedSplit, indices: np.ndarray, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return rows ``indices`` as ``input_ids`` and ``attention_mask``, (rows, longest of them) int64."""
    starts, lengths = split.offsets[indices], split.offsets[indices + 1] - split.offsets[indices]
    columns = np.arange(lengths.max())
    real = columns < lengths[:, None]  # (rows, columns)
    positions = np.where(real, starts[:, None] + columns, 0)
    tokens = np.where(real, split.tokens[positions], pad_token_id).astype(np.int64)
    return {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(real.astype(np.int64))}
