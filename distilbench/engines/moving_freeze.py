"""Moves what is frozen at each evaluation, for the reference engine.

A part of training lies between two evaluations. Levels are those of :func:`distilbench.models.layers.levels`: one
frozen level is the embeddings, and of ``n`` encoder layers, ``n + 1`` frozen levels leave what stands above the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

import torch
from transformers import PreTrainedModel

from distilbench.engines.steps import BatchSchedule
from distilbench.models.flops import TrainFlops
from distilbench.models.freezing import parameter_counts
from distilbench.models.layers import levels
from distilbench.results import Evaluation
from distilbench.settings import TrialSettings


def gradual_levels(part: int, top: int) -> int:
    """Freeze all below the head, level ``top``, at first, and one level less in each part.

    As Howard and Ruder (2018, arXiv 1801.06146).
    """
    return max(0, top - part)


def scheduled_levels(part: int, parts: int, layers: int) -> int:
    """Freeze nothing at first, ``layers`` with the embeddings in the last part, as many more in each between.

    As in FreezeOut (Brock et al., 2017, arXiv 1706.04983) with a linear schedule, but at evaluations alone.
    """
    return round((layers + 1) * part / max(1, parts - 1))


def auto_levels(gradients: Sequence[Sequence[float]], top: int) -> int:
    """Freeze, from the bottom up, levels whose gradients change less than those of the median level below the head.

    ``gradients`` holds, for each part before, the mean norm of each level's gradient; 0 where it was frozen. As in
    AutoFreeze (Liu et al., 2021, arXiv 2102.01386) with its percentile of 50; the change from part to part is that of
    the mean norm of the gradients, as clipped, instead of the norm of their sum.
    """
    frozen = 0
    for before, now in pairwise(gradients):
        changes = [abs(b - n) / b if b else 0.0 for b, n in zip(before, now, strict=True)][frozen:top]
        limit = median(changes)
        frozen += next((i for i, change in enumerate(changes) if change >= limit), 0)
    return frozen


class MovingFreeze:
    """Freezes ``model`` part by part.

    What it does follows from the settings, the evaluations so far and ``gradients``: of each part, and of the running
    one as far as it was noted, its steps and the sums of each level's gradient norms. A checkpoint that keeps those
    continues to the same bits.
    """

    def __init__(
        self, model: PreTrainedModel, settings: TrialSettings, schedule: BatchSchedule, gradients: list[list[float]]
    ) -> None:
        self.gradients, self._settings, self._model = gradients, settings.freeze, model
        self._parts = math.ceil(schedule.steps / (settings.train.eval_steps or schedule.steps_per_epoch))
        named = dict(model.named_parameters())
        level_of = levels(model)
        self._top = max(level_of.values())
        self._by_level = [[named[n] for n in named if level_of[n] == level] for level in range(self._top + 1)]
        self._part, self._steps = 0, 0
        self._sums = torch.zeros(self._top + 1, device=model.device)
        self.flops: dict[int, TrainFlops] = {}
        """What an example costs from this step on."""

    def count(self) -> tuple[int, int]:
        """Return how many parameters are trained in one part or another, and how many there are."""
        given = [] if self._settings.policy == "auto" else range(self._parts)
        self._freeze(min((self._levels_in(part) for part in given), default=0))
        return parameter_counts(self._model)

    def begin(self, history: Sequence[Evaluation]) -> None:
        """Begin the part that follows ``history``, going through those before it, or continue it."""
        for part, step in enumerate([0, *(evaluation.step for evaluation in history)]):
            if step not in self.flops:
                self._freeze(self._levels_in(part))
                self.flops[step] = TrainFlops.of(self._model)
        self._part = len(history)
        noted = self.gradients[self._part] if self._part < len(self.gradients) else [0.0] * (self._top + 2)
        self._steps, self._sums = int(noted[0]), torch.tensor(noted[1:], device=self._model.device)

    def note(self) -> None:
        """Note what the gradients of the running part have come to."""
        self.gradients[self._part :] = [[self._steps, *self._sums.tolist()]]

    @torch.no_grad()
    def look_at_gradients(self) -> None:
        """Add up the norms of each level's gradient, on the device, before a step is taken."""
        if self._settings.policy == "auto":
            nothing = self._sums.new_zeros(())
            grads = [[p.grad for p in own if p.grad is not None] for own in self._by_level]
            self._sums += torch.stack([torch.nn.utils.get_total_norm(own) if own else nothing for own in grads])
            self._steps += 1

    def _levels_in(self, part: int) -> int:
        if self._settings.policy == "gradual":
            return gradual_levels(part, self._top)
        if self._settings.policy == "scheduled":
            return scheduled_levels(part, self._parts, self._settings.layers)
        means = [[total / steps for total in sums] for steps, *sums in self.gradients[:part] if steps]
        return auto_levels(means, self._top)

    def _freeze(self, below: int) -> None:
        for level, parameters in enumerate(self._by_level):
            for parameter in parameters:
                parameter.requires_grad_(level >= below)
