"""A second CUDA stream for results that a captured backward pass need not wait for: gradients of matrices and biases.

A step of one trial leaves most of a GPU idle, because its products are small and each waits for the previous one. The
products of several stacked trials fill the GPU with one stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

MOST_TRIALS = 1
"""The second stream is used for stacks of at most this many trials."""

_held: list[torch.Tensor] = []
"""Tensors that the second stream reads: kept from reuse by the first one until :func:`wait_for_side_stream`."""


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def on_side_stream(x: torch.Tensor | None, gradient: torch.Tensor) -> Iterator[None]:
    """Capture the kernels launched in this context on the second stream; without an active capture, do nothing.

    The kernels may read ``x`` and ``gradient``. Their results must not be read before :func:`wait_for_side_stream`.
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


def wait_for_side_stream(device: torch.device) -> None:
    """Make the current stream wait for the second one."""
    if _held:
        torch.cuda.current_stream(device).wait_stream(_stream(device))
        release_held_tensors()


def release_held_tensors() -> None:
    """Release the tensors held for the second stream, after a capture has ended or failed."""
    _held.clear()
