"""A second stream for what a recorded backward pass does not wait for: gradients of matrices and biases.

A step of one trial leaves most of a GPU idle, for its products are small and each waits for the one before. Of several
trials in a stack the products fill it, and one stream does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

MOST_TRIALS = 1
"""Trials of a stack that leave room for a second stream."""

_held: list[torch.Tensor] = []
"""What the second stream reads: kept until :func:`join`, so that the first does not use its memory again."""


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def beside(x: torch.Tensor | None, gradient: torch.Tensor) -> Iterator[None]:
    """Have what is launched within, which reads these, recorded on the second stream; outside a recording, do nothing.

    Nothing may read its results before :func:`join`.
    """
    alone = len(gradient) <= MOST_TRIALS and gradient.is_cuda
    if not alone or not torch.cuda.is_current_stream_capturing():
        yield
        return
    stream = _stream(gradient.device)
    stream.wait_stream(torch.cuda.current_stream(gradient.device))
    _held.extend(tensor for tensor in (x, gradient) if tensor is not None)
    with torch.cuda.stream(stream):
        yield


def join(device: torch.device) -> None:
    """Have the current stream wait for the second one."""
    if _held:
        torch.cuda.current_stream(device).wait_stream(_stream(device))
        let_go()


def let_go() -> None:
    """Keep nothing for the second stream: there is no more recording that reads it, however it ended."""
    _held.clear()
