"""Stacks of trials beside each other on a CPU, each with its share of the threads.

A step has many small operations, during which all threads but one would wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

MOST = 4
"""Stacks that run beside each other at most: Python itself runs one of them at a time, for a tenth of a step or so."""

_POOL = ThreadPoolExecutor(MOST, thread_name_prefix="stack")

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(act: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Call ``act`` with each of at most ``MOST`` items at the same time; returns or raises when all have ended."""
    if len(items) == 1:
        return [act(items[0])]
    threads = torch.get_num_threads()
    share = max(1, threads // len(items))

    def run(item: Item) -> Result:
        torch.set_num_threads(share)  # OpenMP's number belongs to the thread that calls
        return act(item)

    futures = [_POOL.submit(run, item) for item in items]
    try:
        return [future.result() for future in futures]
    finally:
        wait(futures)
        torch.set_num_threads(threads)
