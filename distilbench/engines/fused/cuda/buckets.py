"""Batches of few fixed sizes, laid out for a whole window of steps at once and kept on the device.

A GPU that replays a recorded step wants the same shapes and the same addresses each time. So every batch is filled up
to one of a few *buckets*; a step reads its numbers with a single copy on the device, and the host packs nothing in it.
Attention gets one sentence a bin: at these lengths its products are next to nothing, and the layout needs no search.

SST-2, batch 16, 12,630 steps of 213 tokens in the mean, one order: 8 buckets (208, 240, 288 or 432 tokens, 48 or 72
wide). 11.4 % of their tokens are filler, where 1 level would make it 51 %, 3 16 % and 6 8 %; and 73 % of the slots of
their attention. Three orders side by side, each filled up to the longest: 21 % of the tokens; 32 orders: 33 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from distilbench.data.tokens import EncodedSplit
from distilbench.engines.batches import BatchSchedule, epoch_order
from distilbench.engines.fused.dropout import key_of
from distilbench.engines.fused.packing import FILLER, Batch, Placement

TOKEN_MULTIPLE, TOKEN_LEVELS = 16, 4
"""Buckets hold a multiple of so many tokens, and there are so many different numbers of them at most."""

WIDTH_MULTIPLE, WIDTH_LEVELS = 8, 2
"""The same for the longest sentence. Draws of dropout come eight at a time, along the width."""

WINDOW = 512
"""Steps that are laid out and shipped at once: on SST-2 about 3 MB an order of examples."""

IGNORED = -100
"""The label of a sentence that is not there, which :func:`torch.nn.functional.cross_entropy` leaves out."""


@dataclass(frozen=True, order=True)
class Bucket:
    """The size of a batch: ``tokens`` in a row, and ``sentences`` bins of ``width`` slots."""

    tokens: int
    width: int
    sentences: int

    @property
    def fields(self) -> int:
        """How many numbers describe a batch of one order; :func:`batch_of` and :func:`_lay_out` share the layout."""
        return 4 * self.tokens + 3 * self.sentences + 2


class BucketedBatches:
    """Where every step of a course finds its batch, in the orders of ``seeds``."""

    def __init__(
        self, split: EncodedSplit, schedule: BatchSchedule, seeds: Sequence[int], device: torch.device
    ) -> None:
        self.split, self.schedule, self.seeds, self.device = split, schedule, tuple(seeds), device
        self.tokens, widths = _sizes(split, schedule, self.seeds)  # (steps, orders) each
        token_levels = levels(self.tokens.max(1), TOKEN_MULTIPLE, TOKEN_LEVELS, power=1)
        width_levels = levels(widths.max(1), WIDTH_MULTIPLE, WIDTH_LEVELS, power=2)
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
        """Return the size that step ``step`` (from 0) is filled up to."""
        return self._buckets[step]

    def inputs(self, step: int) -> torch.Tensor:
        """Return what describes the batch of a step, ``(orders, fields)`` int64 on the device."""
        if step // WINDOW != self._window:
            self._ship(step // WINDOW)
        return self._inputs[self._buckets[step]][int(self._places[step % WINDOW])]

    def _ship(self, window: int) -> None:
        """Lay out the steps of a window and move them to the device, one transfer for each size."""
        steps = np.arange(window * WINDOW, min((window + 1) * WINDOW, self.schedule.steps))
        buckets = [self._buckets[step] for step in steps]
        self._places = np.empty(len(steps), dtype=np.int64)
        self._inputs = {}
        for bucket in set(buckets):
            own = np.array([i for i, other in enumerate(buckets) if other == bucket])
            self._places[own] = np.arange(len(own))
            orders = [_lay_out(self.split, self.schedule, seed, steps[own], bucket) for seed in self.seeds]
            self._inputs[bucket] = _shipped(np.stack(orders, axis=1), self.device)
        self._window = window


def _shipped(values: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _chosen(schedule: BatchSchedule, seed: int, steps: np.ndarray) -> np.ndarray:
    """Return the examples of ``steps`` in the order of ``seed``, ``(steps, batch_size)``; -1 fills a short batch."""
    epochs, numbers = np.divmod(steps, schedule.steps_per_epoch)
    places = numbers[:, None] * schedule.batch_size + np.arange(schedule.batch_size)
    chosen = np.full(places.shape, -1)
    for epoch in np.unique(epochs):
        own = (epochs == epoch)[:, None] & (places < schedule.examples)
        chosen[own] = epoch_order(schedule.examples, seed, int(epoch))[places[own]]
    return chosen


def _lengths(split: EncodedSplit, chosen: np.ndarray) -> np.ndarray:
    return np.where(chosen < 0, 0, np.diff(split.offsets)[chosen])


def _sizes(split: EncodedSplit, schedule: BatchSchedule, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and the longest sentence of every step, ``(steps, orders)`` each."""
    each = [_lengths(split, _chosen(schedule, seed, np.arange(schedule.steps))) for seed in seeds]
    return np.stack([e.sum(1) for e in each], axis=1), np.stack([e.max(1) for e in each], axis=1)


def levels(sizes: np.ndarray, multiple: int, most: int, power: int) -> np.ndarray:
    """Choose at most ``most`` multiples of ``multiple`` that ``sizes`` are filled up to, so that little is added.

    What counts is the sum of sizes to the ``power``. Found exactly, by the best split of the sorted sizes into runs.
    """
    values, counts = np.unique(-(-sizes // multiple) * multiple, return_counts=True)
    seen = np.concatenate([[0], np.cumsum(counts)])
    # cost[k][j]: the least that the first j values cost at k levels; the last run then ends with value j - 1
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
    """Describe the batches of ``steps`` in one order, ``(steps, fields)`` int64."""
    chosen = _chosen(schedule, seed, steps)
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
    labels[:] = np.where(chosen < 0, IGNORED, split.labels[chosen])
    key[:] = np.array([[key_of(seed, "step", int(step))] for step in steps])
    count[:] = counts[:, None]
    return out


def fields_of(inputs, bucket: Bucket):  # type: ignore[no-untyped-def]  # arrays or tensors alike
    """Cut ``inputs`` (..., fields) into views: ids, positions, types and sentences of tokens; first tokens, lengths and
    labels of sentences; dropout's key; how many tokens are real.
    """
    t, s = bucket.tokens, bucket.sentences
    ends = np.cumsum([0, t, t, t, t, s, s, s, 1, 1]).tolist()
    return tuple(inputs[..., a:b] for a, b in pairwise(ends))


def batch_of(inputs: torch.Tensor, bucket: Bucket) -> tuple[Batch, torch.Tensor]:
    """Make a batch of ``inputs`` (orders, fields), and dropout's keys (orders,).

    Everything is computed on the device with shapes that ``bucket`` knows. A sentence that is not there has a bin of
    filler and no label; filler queries see filler keys, so that no row of scores is masked throughout.
    """
    ids, positions, types, sentence, first, length, labels, key, count = fields_of(inputs, bucket)
    orders, device = len(inputs), inputs.device
    column = torch.arange(bucket.width, device=device)
    number = torch.arange(bucket.sentences, device=device)
    owner = number[:, None].expand(orders, -1, bucket.width)
    tokens = Placement(
        slot=sentence * bucket.width + positions,
        row=(first[:, :, None] + column).clamp(max=bucket.tokens - 1),
        owner=owner.masked_fill(column >= length[:, :, None], FILLER),
        empty=torch.arange(bucket.tokens, device=device) >= count,
    )
    return Batch((), ids, positions, types, first, labels, tokens, tokens, length), key.flatten().contiguous()
