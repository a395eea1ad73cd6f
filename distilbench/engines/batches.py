"""The examples of each step, the evaluations and records due after it, and batches padded to their longest row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from distilbench.data.tokens import EncodedSplit
from distilbench.settings import TrainSettings


@lru_cache(maxsize=64)
def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of ``examples`` in an epoch, ``(examples,)`` int64, as in Hugging Face Trainer.

    Mirrors ``accelerate.data_loader.SeedableRandomSampler``, which seeds a new permutation with ``seed + epoch``.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(examples, generator=generator).numpy()


@dataclass(frozen=True)
class BatchSchedule:
    """How the examples of a training split are divided into steps, and what is due after each step.

    Evaluations are due every ``eval_steps`` (None: after each epoch) and after the last step; they divide training into
    parts. Records are due every ``logging_steps`` and before each evaluation, so that no record spans an evaluation.
    """

    examples: int
    batch_size: int
    epochs: int
    eval_steps: int | None = None
    logging_steps: int = 1

    @classmethod
    def of(cls, train: TrainSettings, examples: int) -> BatchSchedule:
        """Return the schedule of a trial with ``examples`` training examples."""
        return cls(examples, train.batch_size, train.epochs, train.eval_steps, train.logging_steps)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; the last one may be smaller."""
        return math.ceil(self.examples / self.batch_size)

    @property
    def steps(self) -> int:
        """Batches of all epochs."""
        return self.epochs * self.steps_per_epoch

    @property
    def part_start_steps(self) -> range:
        """The step after which each part begins; freeze policies may change what is frozen there."""
        return range(0, self.steps, self.eval_steps or self.steps_per_epoch)

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation is due after the first ``step`` steps."""
        return step in self.part_start_steps or step == self.steps

    def records_after(self, step: int) -> bool:
        """Whether a record is due after the first ``step`` steps."""
        return self.evaluates_after(step) or step % self.logging_steps == 0

    def batch(self, seed: int, step: int) -> np.ndarray:
        """Return the examples of step ``step`` (from 0) in the order of ``seed``, ``(at most batch_size,)``."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return epoch_order(self.examples, seed, epoch)[number * self.batch_size : (number + 1) * self.batch_size]

    def example_counts(self, seed: int, step: int) -> np.ndarray:
        """Count how often the first ``step`` steps train on each example in the order of ``seed``, ``(examples,)``."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        times = np.full(self.examples, epochs)
        times[epoch_order(self.examples, seed, epochs)[: steps * self.batch_size]] += 1
        return times

    def num_examples_seen(self, step: int) -> int:
        """Examples trained on in the first ``step`` steps."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.examples + min(steps * self.batch_size, self.examples)


def batches_by_length(split: EncodedSplit, size: int) -> Iterator[np.ndarray]:
    """Yield indices of the examples, ``(at most size,)`` at a time, the longest rows first.

    Rows of similar length share a batch, to limit padding; a batch that does not fit into memory fails at once.
    """
    order = np.argsort(-np.diff(split.offsets), kind="stable")
    yield from (order[start : start + size] for start in range(0, len(order), size))


def padded_batch(
    split: EncodedSplit, indices: np.ndarray, pad_token_id: int, with_labels: bool = False
) -> dict[str, torch.Tensor]:
    """Return rows ``indices`` as ``input_ids`` and ``attention_mask``, (rows, longest row) int64.

    A split with token types adds ``token_type_ids``, 0 for padding; ``with_labels`` adds ``labels`` (rows,).
    """
    starts, lengths = split.offsets[indices], split.offsets[indices + 1] - split.offsets[indices]
    columns = np.arange(lengths.max())
    real = columns < lengths[:, None]  # (rows, columns)
    positions = np.where(real, starts[:, None] + columns, 0)
    tokens = np.where(real, split.tokens[positions], pad_token_id).astype(np.int64)
    batch = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(real.astype(np.int64))}
    if split.types is not None:
        batch["token_type_ids"] = torch.from_numpy(np.where(real, split.types[positions], 0).astype(np.int64))
    if with_labels:
        batch["labels"] = torch.from_numpy(split.labels[indices])
    return batch
