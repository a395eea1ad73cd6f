"""Run stacks of trials in parallel on a CPU, each with its share of the threads.

A step has many small operations, during which all threads but one would be idle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

MAX_STACKS = 4
"""Maximum number of parallel stacks: each holds Python's GIL for about a tenth of its step."""

_POOL = ThreadPoolExecutor(MAX_STACKS, thread_name_prefix="stack")

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(act: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Call ``act`` with all items in parallel, at most ``MAX_STACKS``; returns or raises when all calls have ended."""
    if len(items) < 2:
        return list(map(act, items))
    threads = torch.get_num_threads()
    share = max(1, threads // len(items))

    def run(item: Item) -> Result:
        torch.set_num_threads(share)  # OpenMP's setting is per calling thread
        return act(item)

    futures = [_POOL.submit(run, item) for item in items]
    try:
        return [future.result() for future in futures]
    finally:
        wait(futures)
        torch.set_num_threads(threads)
