"""Batches padded to a few fixed sizes, laid out on the device for a whole window of steps at once.

A CUDA graph needs the same shapes and addresses at every replay. Every batch is therefore padded to one of a few
*buckets*. A step reads its inputs with a single copy on the device, and the host packs nothing during the step.
Attention uses one bin per sentence: at these lengths its products cost very little, and the layout needs no search.

SST-2, batch 16, 12,630 steps of 213 tokens on average, one order: 8 buckets (208, 240, 288 or 432 tokens, width 48 or
72). Padding is 11.4 % of the tokens (51 % with 1 token level, 16 % with 3, 8 % with 6) and 73 % of the attention slots.
With three orders side by side, each padded to the longest, it is 21 % of the tokens; with 32 orders, 33 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from distilbench.data.tokens import EncodedSplit
from distilbench.engines.batches import BatchSchedule, epoch_order
from distilbench.engines.device import to_device
from distilbench.engines.fused.dropout import key_of
from distilbench.engines.fused.packing import PADDING, Batch, Placement

TOKEN_MULTIPLE, TOKEN_LEVELS = 16, 4
"""The token count of a bucket is a multiple of the first; there are at most as many different counts as the second."""

WIDTH_MULTIPLE, WIDTH_LEVELS = 8, 2
"""The same for the width (the longest sentence). Dropout draws eight values at a time along the width."""

WINDOW = 512
"""Steps that are laid out and copied to the device at once: on SST-2 about 3 MB per order of examples."""

IGNORE_INDEX = -100
"""The label of an absent sentence, which :func:`torch.nn.functional.cross_entropy` ignores."""


@dataclass(frozen=True, order=True)
class Bucket:
    """The size of a padded batch: ``tokens`` end to end, and ``sentences`` attention bins of ``width`` slots."""

    tokens: int
    width: int
    sentences: int

    @property
    def fields(self) -> int:
        """How many integers describe a batch of one order, in the layout of :func:`fields_of`."""
        return 4 * self.tokens + 3 * self.sentences + 2


class BucketedBatches:
    """The padded batch of every training step, in the example orders of ``seeds``."""

    def __init__(
        self, split: EncodedSplit, schedule: BatchSchedule, seeds: Sequence[int], device: torch.device
    ) -> None:
        self.split, self.schedule, self.seeds, self.device = split, schedule, tuple(seeds), device
        steps = np.arange(schedule.steps)
        lengths = np.stack([_lengths(split, _examples_of(schedule, seed, steps)) for seed in self.seeds], axis=1)
        self.tokens, widths = lengths.sum(2), lengths.max(2)  # (steps, orders) each
        token_levels = bucket_sizes(self.tokens.max(1), TOKEN_MULTIPLE, TOKEN_LEVELS, power=1)
        width_levels = bucket_sizes(widths.max(1), WIDTH_MULTIPLE, WIDTH_LEVELS, power=2)
        self._buckets = [
            Bucket(int(t), int(w), schedule.batch_size)
            for t, w in zip(
                token_levels[np.searchsorted(token_levels, self.tokens.max(1))],
                width_levels[np.searchsorted(width_levels, widths.max(1))],
                strict=True,
            )
        ]
        self._window = -1
        self._inputs: dict[Bucket, torch.Tensor] = {}
        self._places = np.empty(0, dtype=np.int64)

    def bucket(self, step: int) -> Bucket:
        """Return the bucket that step ``step`` (from 0) is padded to."""
        return self._buckets[step]

    def inputs(self, step: int) -> torch.Tensor:
        """Return the description of a step's batch, ``(orders, fields)`` int64 on the device."""
        if step // WINDOW != self._window:
            self._load_window(step // WINDOW)
        return self._inputs[self._buckets[step]][int(self._places[step % WINDOW])]

    def _load_window(self, window: int) -> None:
        """Lay out the steps of a window and copy them to the device, one transfer per bucket."""
        steps = np.arange(window * WINDOW, min((window + 1) * WINDOW, self.schedule.steps))
        buckets = [self._buckets[step] for step in steps]
        self._places = np.empty(len(steps), dtype=np.int64)
        self._inputs = {}
        for bucket in set(buckets):
            own = np.array([i for i, other in enumerate(buckets) if other == bucket])
            self._places[own] = np.arange(len(own))
            orders = [_lay_out(self.split, self.schedule, seed, steps[own], bucket) for seed in self.seeds]
            self._inputs[bucket] = to_device(np.stack(orders, axis=1), self.device)
        self._window = window


def _examples_of(schedule: BatchSchedule, seed: int, steps: np.ndarray) -> np.ndarray:
    """Return the examples of ``steps`` in the order of ``seed``, ``(steps, batch_size)``; -1 pads a short batch."""
    epochs, numbers = np.divmod(steps, schedule.steps_per_epoch)
    places = numbers[:, None] * schedule.batch_size + np.arange(schedule.batch_size)
    chosen = np.full(places.shape, -1)
    for epoch in np.unique(epochs):
        own = (epochs == epoch)[:, None] & (places < schedule.examples)
        chosen[own] = epoch_order(schedule.examples, seed, int(epoch))[places[own]]
    return chosen


def _lengths(split: EncodedSplit, chosen: np.ndarray) -> np.ndarray:
    return np.where(chosen < 0, 0, np.diff(split.offsets)[chosen])


def bucket_sizes(sizes: np.ndarray, multiple: int, most: int, power: int) -> np.ndarray:
    """Choose at most ``most`` multiples of ``multiple`` to pad ``sizes`` to, at the lowest cost.

    The cost is the sum of the padded sizes to the ``power``. Dynamic programming over runs of sorted sizes is exact.
    """
    values, counts = np.unique(-(-sizes // multiple) * multiple, return_counts=True)
    seen = np.concatenate([[0], np.cumsum(counts)])
    # cost[k][j]: the lowest cost of the first j values with k levels; the last run then ends with value j - 1
    cost = np.full((most + 1, len(values) + 1), np.inf)
    cost[:, 0] = 0
    start = np.zeros((most + 1, len(values) + 1), dtype=int)
    for k in range(1, most + 1):
        for j in range(1, len(values) + 1):
            runs = cost[k - 1, :j] + (seen[j] - seen[:j]) * float(values[j - 1]) ** power
            start[k, j] = int(runs.argmin())
            cost[k, j] = runs[start[k, j]]
    ends, j = [], len(values)
    for k in range(most, 0, -1):
        if j:
            ends.append(values[j - 1])
            j = start[k, j]
    return np.array(sorted(ends))


def _lay_out(split: EncodedSplit, schedule: BatchSchedule, seed: int, steps: np.ndarray, bucket: Bucket) -> np.ndarray:
    """Return the description of the batches of ``steps`` in one order, ``(steps, fields)`` int64."""
    chosen = _examples_of(schedule, seed, steps)
    lengths = _lengths(split, chosen)  # (steps, sentences)
    counts = lengths.sum(1)
    first = np.cumsum(lengths, axis=1) - lengths
    flat = lengths.reshape(-1)
    sentence = np.repeat(np.tile(np.arange(bucket.sentences), len(steps)), flat)
    step = np.repeat(np.arange(len(steps)), counts)
    place = np.arange(len(step)) - np.repeat(np.cumsum(counts) - counts, counts)
    position = place - first[step, sentence]

    out = np.zeros((len(steps), bucket.fields), dtype=np.int64)
    ids, positions, types, sentences, firsts, lengths_, labels, key, count = fields_of(out, bucket)
    token = split.offsets[chosen[step, sentence]] + position
    ids[step, place] = split.tokens[token]
    types[step, place] = 0 if split.types is None else split.types[token]
    positions[step, place], sentences[step, place] = position, sentence
    firsts[:] = np.where(chosen < 0, 0, first)
    lengths_[:] = lengths
    labels[:] = np.where(chosen < 0, IGNORE_INDEX, split.labels[chosen])
    key[:] = np.array([[key_of(seed, "step", int(step))] for step in steps])
    count[:] = counts[:, None]
    return out


def fields_of(inputs, bucket: Bucket):  # type: ignore[no-untyped-def]  # arrays or tensors alike
    """Split ``inputs`` (..., fields) into views: each token's id, position, type and sentence; each sentence's first
    token, length and label; the dropout key; the number of tokens without padding.
    """
    t, s = bucket.tokens, bucket.sentences
    ends = np.cumsum([0, t, t, t, t, s, s, s, 1, 1]).tolist()
    return tuple(inputs[..., a:b] for a, b in pairwise(ends))


def batch_of(inputs: torch.Tensor, bucket: Bucket) -> tuple[Batch, torch.Tensor]:
    """Return the batch described by ``inputs`` (orders, fields), and its dropout keys (orders,).

    Everything is computed on the device, with shapes fixed by ``bucket``. An absent sentence has a bin of padding and
    the label ``IGNORE_INDEX``; padding queries attend to padding keys, so that no row of scores is masked completely.
    """
    ids, positions, types, sentence, first, length, labels, key, count = fields_of(inputs, bucket)

    def place() -> tuple[Placement, Placement]:
        orders, device = len(inputs), inputs.device
        column = torch.arange(bucket.width, device=device)
        number = torch.arange(bucket.sentences, device=device)
        owner = number[:, None].expand(orders, -1, bucket.width)
        tokens = Placement(
            slot=sentence * bucket.width + positions,
            row=(first[:, :, None] + column).clamp(max=bucket.tokens - 1),
            owner=owner.masked_fill(column >= length[:, :, None], PADDING),
            empty=torch.arange(bucket.tokens, device=device) >= count,
        )
        return tokens, tokens

    batch = Batch((), ids, positions, types, first, labels, bucket.width, place, length)
    return batch, key.flatten().contiguous()
