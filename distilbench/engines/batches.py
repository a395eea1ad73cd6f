"""Rows of tokens -> batches padded to their longest row, never to the maximum length."""

from __future__ import annotations

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


def padded_batch(split: EncodedSplit, indices: np.ndarray, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return rows ``indices`` as ``input_ids`` and ``attention_mask``, (rows, longest of them) int64.

    A split with token types adds ``token_type_ids``, 0 where a row is filled up.
    """
    starts, lengths = split.offsets[indices], split.offsets[indices + 1] - split.offsets[indices]
    columns = np.arange(lengths.max())
    real = columns < lengths[:, None]  # (rows, columns)
    positions = np.where(real, starts[:, None] + columns, 0)
    tokens = np.where(real, split.tokens[positions], pad_token_id).astype(np.int64)
    batch = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(real.astype(np.int64))}
    if split.types is not None:
        batch["token_type_ids"] = torch.from_numpy(np.where(real, split.types[positions], 0).astype(np.int64))
    return batch


def training_batch(examples: list[int], split: EncodedSplit, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Collate the numbers of examples for Trainer: :func:`padded_batch` and ``labels`` (rows,) int64."""
    indices = np.asarray(examples)
    return padded_batch(split, indices, pad_token_id) | {"labels": torch.from_numpy(split.labels[indices])}
