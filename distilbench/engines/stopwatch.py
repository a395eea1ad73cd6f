"""Time of training, cut into laps."""

from __future__ import annotations

import time
from typing import NamedTuple


class Lap(NamedTuple):
    """Wall time, and CPU time of this process with all its threads; both in seconds."""

    seconds: float
    cpu_seconds: float


class Stopwatch:
    """Tells the time from lap to lap."""

    def __init__(self, began: float) -> None:
        """Start the first lap: wall time at ``began``, as ``time.perf_counter`` has it, CPU time now."""
        self._seconds, self._cpu_seconds = began, time.process_time()

    def lap(self) -> Lap:
        """Return the time since the last call, and start the next lap."""
        seconds, cpu_seconds = time.perf_counter(), time.process_time()
        lap = Lap(seconds - self._seconds, cpu_seconds - self._cpu_seconds)
        self._seconds, self._cpu_seconds = seconds, cpu_seconds
        return lap

    def leave_out(self, seconds: float) -> None:
        """Keep ``seconds`` that have passed since the last call out of this lap."""
        self._seconds += seconds
