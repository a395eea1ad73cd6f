"""Laps of wall and CPU time."""

from __future__ import annotations

import time

from distilbench.engines.running import Lap, Stopwatch


def test_laps_follow_each_other_and_leave_out_what_they_are_told(monkeypatch):
    wall, cpu = iter([12.0, 20.0, 31.0]), iter([100.0, 101.0, 103.0, 106.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(time, "process_time", lambda: next(cpu))
    stopwatch = Stopwatch(began=10.0)
    assert stopwatch.lap() == Lap(2.0, 1.0)
    assert stopwatch.lap() == Lap(8.0, 2.0)
    stopwatch.leave_out(5.0)
    assert stopwatch.lap() == Lap(6.0, 3.0)
