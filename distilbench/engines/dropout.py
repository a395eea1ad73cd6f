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

    def keep(
        self, rate: float, shapes: Sequence[Sequence[int]], whole: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return ones where a value is kept and zeros elsewhere, ``(orders, *whole)``.

        ``shapes`` are what is real of each order. Only that is drawn, so that a trial's mask does not depend on its
        neighbours' sizes; the rest is zero.
        """
        masks = torch.zeros(len(shapes), *whole, dtype=dtype, device=self._generators[0].device)
        for mask, shape, generator in zip(masks, shapes, self._generators, strict=True):
            bits = _bits(shape, generator)
            torch.ge(bits, _dropped(rate) - _LEVELS // 2, out=mask[tuple(slice(size) for size in shape)])
        return masks


def _bits(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Draw 16 bits for each place of ``shape``, as int16."""
    size = math.prod(shape)
    words = torch.empty(-(-size // 4), dtype=torch.int64, device=generator.device)
    words.random_(-(1 << 63), None, generator=generator)
    return words.view(torch.int16)[:size].view(tuple(shape))


def keep_scale(rate: float) -> float:
    """What kept values are multiplied by, so that the mean stays: one over the probability to be kept."""
    return _LEVELS / (_LEVELS - _dropped(rate))


def _dropped(rate: float) -> int:
    return round(rate * _LEVELS)


def _key(seed: int, stage: str, step: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {stage} {step}".encode(), digest_size=7).digest())
