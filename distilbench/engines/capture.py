"""Running a step: as it is, or recorded once as a CUDA graph and replayed from then on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from typing import Protocol

import torch

log = logging.getLogger(__name__)


class Runner(Protocol):
    """Runs functions that read and write fixed tensors alone, and may record them first."""

    def record(self, key: Hashable, rehearsal: Callable[[], object], step: Callable[[], None]) -> float:
        """Record ``step`` under ``key`` without taking it, after a ``rehearsal``; return the seconds that it took."""
        ...

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Take ``step``, from its recording where there is one."""
        ...


class Direct:
    """Records nothing: what a CPU does."""

    def record(self, key: Hashable, rehearsal: Callable[[], object], step: Callable[[], None]) -> float:
        """Do nothing."""
        return 0.0

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Take ``step``."""
        step()


class Graphs:
    """CUDA graphs that share one pool of memory, for they never run at once; nothing in it outlives a replay.

    An error while recording is logged once, and from then on every step that was not recorded is taken as it is. Being
    out of memory is no such error: the group has its own answer to that.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._broken = False

    def record(self, key: Hashable, rehearsal: Callable[[], object], step: Callable[[], None]) -> float:
        """Rehearse on a stream of its own, as CUDA graphs want it, and record there; waits for the device."""
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
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - began

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Replay, or take ``step``."""
        graph = self._graphs.get(key)
        if graph is None:
            step()
        else:
            graph.replay()


def runner_for(device: torch.device) -> Runner:
    """What suits the device."""
    return Graphs(device) if device.type == "cuda" else Direct()
