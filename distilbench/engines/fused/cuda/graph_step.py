"""The training step of a group as a function over static buffers, captured and replayed as a CUDA graph.

Forward, backward, clipping, learning rates, the optimizer and the sum of losses read and write fixed tensors whose
shapes a :class:`~distilbench.engines.fused.cuda.buckets.Bucket` determines; nothing synchronizes with the device.
Before a step, its inputs and the hidden states that enter the trained part are copied into the buffers on the device.

A step is reproducible to the bit on one device and library version: gradients of embeddings are summed by a matrix
product in a fixed order, norms by a fixed tree, and atomics never add two different values.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import CrossEntropyLoss

from distilbench.engines.fused.cuda.buckets import IGNORE_INDEX, Bucket, BucketedBatches, batch_of
from distilbench.engines.fused.cuda.optimizer import CapturableOptimizer
from distilbench.engines.fused.cuda.side_stream import release_held_tensors
from distilbench.engines.fused.dropout import CounterDropout
from distilbench.engines.fused.encoder import Forward
from distilbench.engines.fused.prefix import Prefix

log = logging.getLogger(__name__)

MIN_REPLAYS = 8
"""A bucket is captured only if at least this many steps remain in it: the warm-up costs time that replays must save."""


class Buffers(NamedTuple):
    """Static inputs of one bucket. ``hidden`` is None if embeddings train."""

    inputs: torch.Tensor
    hidden: torch.Tensor | None


class GraphSteps:
    """The training steps of a stack of trials; rebuilt whenever the stack changes.

    Each step adds to ``losses`` (trials,) in place and writes its gradient norms into ``norms`` (trials,).
    """

    def __init__(
        self, optimizer: CapturableOptimizer, prefix: Prefix | None, bucketed_batches: BucketedBatches,
        loss: CrossEntropyLoss, losses: torch.Tensor, norms: torch.Tensor,
    ) -> None:  # fmt: skip
        """``prefix`` is None if embeddings train; ``loss`` is that of each example."""
        self.weights, self.prefix, self.bucketed_batches = optimizer.weights, prefix, bucketed_batches
        self.losses, self.norms = losses, norms
        self._optimizer, self._loss, self._runner = optimizer, loss, runner_for(losses.device)
        self._step_scalars = torch.zeros_like(optimizer.table[0])
        self._buffers: dict[Bucket, Buffers] = {}
        self._recorded = False

    def take_steps(self, step: int, stop: int) -> float:
        """Take step ``step`` (from 0); return the seconds spent on capturing graphs, which happens once.

        Graphs are valid for the steps before ``stop``, where what is trained changes. The first step runs eagerly: it
        compiles kernels and allocates library workspaces, which can't happen during capture.
        """
        bucket = self.bucketed_batches.bucket(step)
        self._fill(step, self._buffers_of(bucket))
        if self._runner is None:
            self._step(bucket)
            return 0.0
        self._runner.run(bucket, partial(self._step, bucket))
        if self._recorded:
            return 0.0
        self._recorded = True
        ahead = Counter(self.bucketed_batches.bucket(number) for number in range(step + 1, stop))
        worth = sorted((b for b, steps in ahead.items() if steps >= MIN_REPLAYS), reverse=True)
        for bucket in worth:
            self._buffers_of(bucket)  # before they are captured
        return sum(
            self._runner.record(bucket, partial(self._forward_backward, bucket), partial(self._step, bucket))
            for bucket in worth
        )

    def _buffers_of(self, bucket: Bucket) -> Buffers:
        if bucket not in self._buffers:
            orders, device = len(self.bucketed_batches.seeds), self.losses.device
            inputs = torch.zeros(orders, bucket.fields, dtype=torch.int64, device=device)
            hidden = None if self.prefix is None else self.prefix.zeros_for(batch_of(inputs, bucket)[0])
            self._buffers[bucket] = Buffers(inputs, hidden)
        return self._buffers[bucket]

    def _fill(self, step: int, buffers: Buffers) -> None:
        """Copy the inputs of ``step`` into the static buffers."""
        buffers.inputs.copy_(self.bucketed_batches.inputs(step))
        self._step_scalars.copy_(self._optimizer.table[step])
        if self.prefix is not None and buffers.hidden is not None:
            orders, examples = self.bucketed_batches.seeds, self.bucketed_batches.schedule.batch_size
            self.prefix.hidden(orders, step, slice(None), examples, out=buffers.hidden.zero_())

    def _step(self, bucket: Bucket) -> None:
        losses = self._forward_backward(bucket)
        self._optimizer.step(self._step_scalars, self.norms)
        self.losses += losses

    def _forward_backward(self, bucket: Bucket) -> torch.Tensor:
        """Compute the gradient in place, and return the mean loss of each trial, ``(trials,)``."""
        buffers = self._buffers[bucket]
        batch, keys = batch_of(buffers.inputs, bucket)
        forward = Forward(self.weights, batch, CounterDropout(keys))
        losses = forward.losses(self._loss, buffers.hidden)
        mean = losses.sum(1) / (batch.labels != IGNORE_INDEX).sum(1).clamp(min=1)
        forward.backward(mean.sum())
        return mean.detach()


class GraphRunner:
    """CUDA graphs that share one memory pool: they never run at once, and nothing in the pool outlives a replay.

    The first error during capture is logged; after it nothing more is captured, and steps without a graph run eagerly.
    ``torch.OutOfMemoryError`` is raised instead, since the group handles it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._broken = False

    def record(self, key: Hashable, rehearsal: Callable[[], object], step: Callable[[], None]) -> float:
        """Warm up with ``rehearsal`` and capture ``step`` on a side stream; return the seconds; synchronizes."""
        if self._broken:
            return 0.0
        torch.cuda.synchronize(self._device)
        began = time.perf_counter()
        try:
            with torch.cuda.stream(self._stream):
                rehearsal()
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                step()
            self._graphs[key] = graph
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._broken = True
            log.warning("steps are not recorded as CUDA graphs: %s", str(error).partition("\n")[0])
        finally:
            release_held_tensors()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - began

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Replay the graph of ``key``, or call ``step`` if there is none."""
        graph = self._graphs.get(key)
        if graph is None:
            step()
        else:
            graph.replay()


def runner_for(device: torch.device) -> GraphRunner | None:
    """Return a runner on a CUDA device, None elsewhere."""
    return GraphRunner(device) if device.type == "cuda" else None
