"""Dropout whose draws belong to a trial: a function of its seed and the step, whoever else is in the batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

_LEVELS = 1 << 16
"""A draw is 16 bits, a quarter of what the generator yields at once: dropping 0.1 becomes dropping 0.100006."""


class Dropout:
    """The masks of one forward pass, drawn in the order in which the layers ask for them."""

    def __init__(self, seeds: Sequence[int], stage: str, step: int, device: torch.device) -> None:
        """Key one generator for each order of examples by its trial's seed, ``stage`` and ``step``."""
        self._generators = [torch.Generator(device).manual_seed(_key(seed, stage, step)) for seed in seeds]

    def keep(self, rate: float, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> torch.Tensor:
        """Return ones where a value is kept and zeros elsewhere, ``(orders, *shape)``.

        ``shapes`` are those of each order; smaller ones are filled up with zeros, after the draw, so that a trial's
        mask does not depend on the size of its neighbours.
        """
        masks = [self._draw(rate, shape, g, dtype) for shape, g in zip(shapes, self._generators, strict=True)]
        if len(masks) == 1:
            return masks[0][None]
        largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
        stacked = torch.zeros(len(masks), *largest, dtype=dtype, device=masks[0].device)
        for place, mask in zip(stacked, masks, strict=True):
            place[tuple(slice(size) for size in mask.shape)] = mask
        return stacked

    @staticmethod
    def _draw(rate: float, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
        size, device = math.prod(shape), generator.device
        words = torch.empty(-(-size // 4), dtype=torch.int64, device=device)
        words.random_(-(1 << 63), None, generator=generator)
        bits = words.view(torch.int16)[:size].view(tuple(shape))
        return torch.ge(bits, _dropped(rate) - _LEVELS // 2, out=torch.empty(tuple(shape), dtype=dtype, device=device))


def keep_scale(rate: float) -> float:
    """What kept values are multiplied by, so that the mean stays: one over the probability to be kept."""
    return _LEVELS / (_LEVELS - _dropped(rate))


def _dropped(rate: float) -> int:
    return round(rate * _LEVELS)


def _key(seed: int, stage: str, step: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {stage} {step}".encode(), digest_size=7).digest())
