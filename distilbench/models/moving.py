"""Policies that move: how many levels, from the embeddings up, are frozen in each part of training. Needs no torch.

A part lies between two evaluations. Levels are those of :func:`distilbench.models.layers.levels`: one frozen level is
the embeddings, and of ``n`` encoder layers, ``n + 1`` frozen levels leave what stands above the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from distilbench.settings import FreezeSettings


@dataclass(frozen=True)
class Part:
    """Part ``number`` (from 0) of ``parts``, of a model whose head is at level ``top``.

    ``gradients`` holds, for each part before it, the mean norm of each level's gradient; 0 where it was frozen.
    """

    number: int
    parts: int
    top: int
    gradients: Sequence[Sequence[float]]


def frozen_levels(settings: FreezeSettings, part: Part) -> int:
    """Return how many levels are frozen in a part; only for a policy that moves."""
    return _POLICIES[settings.policy](settings, part)


def _gradual(settings: FreezeSettings, part: Part) -> int:
    """All but the head at first, and one level less in each part (Howard and Ruder, 2018, arXiv 1801.06146)."""
    return max(0, part.top - part.number)


def _scheduled(settings: FreezeSettings, part: Part) -> int:
    """None at first, ``freeze.layers`` with the embeddings in the last part, as many more in each between.

    As in FreezeOut (Brock et al., 2017, arXiv 1706.04983) with a linear schedule, but at evaluations alone.
    """
    return round((settings.layers + 1) * part.number / max(1, part.parts - 1))


def _auto(settings: FreezeSettings, part: Part) -> int:
    """Freeze, from the bottom up, levels whose gradients change less than those of the median level.

    As in AutoFreeze (Liu et al., 2021, arXiv 2102.01386) with its percentile of 50; the change from part
    to part is that of the mean norm of the gradients, as clipped, instead of the norm of their sum.
    """
    frozen = 0
    for before, now in pairwise(part.gradients):
        changes = [abs(b - n) / b if b else 0.0 for b, n in zip(before, now, strict=True)][frozen : part.top]
        limit = median(changes)
        frozen += next((i for i, change in enumerate(changes) if change >= limit), 0)
    return frozen


_POLICIES = {"gradual": _gradual, "scheduled": _scheduled, "auto": _auto}
