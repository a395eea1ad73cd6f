"""The step of a group as one function over buffers that stay where they are, for a GPU to record and replay.

Forward, backward, clipping, the look-up of learning rates, the optimizer and the sum of losses read and write fixed
tensors in shapes that a :class:`~distilbench.engines.timetable.Bucket` fixes; nothing in it waits for the device.
Before a step its numbers are copied into place, on the device, and the hidden states under the trained part likewise.

A step is repeatable to the bit on one device and library version: gradients of embeddings are added up by a product in
a fixed order, norms by a fixed tree, and no two different values are added by atomics.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from distilbench.engines.capture import Runner
from distilbench.engines.dropout import CounterDropout
from distilbench.engines.packing import Batch
from distilbench.engines.prefix import TrainingPrefix
from distilbench.engines.stacked import Forward, StackedWeights
from distilbench.engines.tabled import NUMBERS, TabledOptimizer
from distilbench.engines.timetable import IGNORED, Bucket, Timetable, batch_of
from distilbench.engines.updates import RowOptimizer

WORTH_RECORDING = 8
"""Steps that a bucket must still have ahead: recording takes a rehearsal, and each replay saves most of a step."""


@dataclass
class Buffers:
    """What a step of one bucket reads: ``hidden`` unless embeddings train. ``shape`` is a batch of that size."""

    inputs: torch.Tensor
    hidden: torch.Tensor | None
    shape: Batch


class StaticSteps:
    """Takes the steps of a stack of trials; made anew whenever the stack changes.

    ``losses`` (trials,) is added to in place; ``norms`` (trials,) takes the last step's gradient norms.
    """

    def __init__(
        self, weights: StackedWeights, optimizer: RowOptimizer, prefix: TrainingPrefix | None, timetable: Timetable,
        rates: np.ndarray, losses: torch.Tensor, norms: torch.Tensor, still_layers: int, runner: Runner,
    ) -> None:  # fmt: skip
        """``rates`` (steps, trials) are those of the whole course; see :class:`Forward` for ``still_layers``."""
        self.weights, self.prefix, self.timetable = weights, prefix, timetable
        self.losses, self.norms = losses, norms
        self._still_layers, self._runner = still_layers, runner
        self._optimizer = TabledOptimizer(optimizer, rates)
        self._numbers = losses.new_zeros(len(losses), NUMBERS)
        self._buffers: dict[Bucket, Buffers] = {}
        self._recorded = False

    def take(self, step: int) -> float:
        """Take step ``step`` (from 0), and return the seconds that recording took, which it does once.

        The first step is run as it is: it compiles kernels and makes libraries' workspaces, which no recording may.
        """
        bucket = self.timetable.bucket(step)
        self._fill(step, self._buffers_of(bucket))
        self._runner.run(bucket, lambda: self._step(bucket))
        if self._recorded:
            return 0.0
        self._recorded = True
        ahead = Counter(self.timetable.bucket(later) for later in range(step + 1, self.timetable.course.steps))
        worth = sorted((b for b, steps in ahead.items() if steps >= WORTH_RECORDING), reverse=True)
        return sum(self._record(bucket) for bucket in worth)

    def _record(self, bucket: Bucket) -> float:
        self._buffers_of(bucket)
        return self._runner.record(bucket, lambda: self._differentiate(bucket), lambda: self._step(bucket))

    def _buffers_of(self, bucket: Bucket) -> Buffers:
        if bucket not in self._buffers:
            orders, device = len(self.timetable.seeds), self.losses.device
            inputs = torch.zeros(orders, bucket.fields, dtype=torch.int64, device=device)
            batch, _ = batch_of(inputs, bucket)
            hidden = None if self.prefix is None else self.prefix.empty(batch)
            self._buffers[bucket] = Buffers(inputs, hidden, batch)
        return self._buffers[bucket]

    def _fill(self, step: int, buffers: Buffers) -> None:
        """Bring what belongs to ``step`` to where the step looks for it."""
        buffers.inputs.copy_(self.timetable.inputs(step))
        self._numbers.copy_(self._optimizer.table[step])
        if self.prefix is not None and buffers.hidden is not None:
            at_once = self.prefix.window * self.timetable.course.batch_size
            states = self.prefix.hidden(self.timetable.seeds, step, slice(None), buffers.shape, at_once)
            buffers.hidden.copy_(states)

    def _step(self, bucket: Bucket) -> None:
        losses = self._differentiate(bucket)
        self._optimizer.step(self._numbers, self.norms)
        self.losses += losses

    def _differentiate(self, bucket: Bucket) -> torch.Tensor:
        """Fill the gradient, and return the mean loss of each trial, ``(trials,)``."""
        buffers = self._buffers[bucket]
        batch, keys = batch_of(buffers.inputs, bucket)
        forward = Forward(self.weights, batch, CounterDropout(keys), self._still_layers)
        start = 0 if self.prefix is None else self.prefix.depth
        losses, embedded = forward.losses(buffers.hidden, start)
        mean = losses.sum(1) / (batch.labels != IGNORED).sum(1).clamp(min=1)
        self.weights.backward(mean.sum(), embedded, batch)
        return mean.detach()
