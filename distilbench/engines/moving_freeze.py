"""Moves what is frozen at each evaluation, for the reference engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from distilbench.engines.steps import BatchSchedule
from distilbench.models.flops import TrainFlops
from distilbench.models.freezing import parameter_counts
from distilbench.models.layers import levels
from distilbench.models.moving import Part, frozen_levels
from distilbench.results import Evaluation
from distilbench.settings import TrialSettings


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
        means = [[total / steps for total in sums] for steps, *sums in self.gradients[:part] if steps]
        return frozen_levels(self._settings, Part(part, self._parts, self._top, means))

    def _freeze(self, below: int) -> None:
        for level, parameters in enumerate(self._by_level):
            for parameter in parameters:
                parameter.requires_grad_(level >= below)
