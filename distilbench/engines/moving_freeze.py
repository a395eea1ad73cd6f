"""Freeze policies that change which levels are frozen at each evaluation.

A part of training lies between two evaluations. Levels are :func:`~distilbench.models.freezing.parameter_levels`: one
frozen level means the embeddings; of ``n`` encoder layers, ``n + 1`` frozen levels leave only what follows the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median

import torch
from transformers import PreTrainedModel

from distilbench.engines.batches import BatchSchedule
from distilbench.models.flops import TrainFlops
from distilbench.models.freezing import freeze_levels, parameter_counts, parameter_levels
from distilbench.results import Evaluation
from distilbench.settings import FreezeSettings, require


def require_parts(settings: FreezeSettings, schedule: BatchSchedule) -> None:
    """Raise :class:`SettingsError` if the freeze policy needs more evaluations than ``schedule`` has."""
    if settings.is_dynamic:
        every, most = schedule.eval_steps, (schedule.steps - 1) // (settings.min_parts - 1)
        allowed = f"at most {most} for {schedule.steps} steps with freeze.policy={settings.policy}, which moves "
        require(not every or every <= most, "train.eval_steps", allowed + "at evaluations", every)


def planned_levels(settings: FreezeSettings, schedule: BatchSchedule, top: int) -> dict[int, int]:
    """Return the number of frozen levels by the step from which it applies; the head is level ``top``.

    ``gradual`` first freezes all levels below the head, and one fewer in each part (Howard and Ruder, 2018, arXiv
    1801.06146). ``scheduled`` first freezes nothing and in the last part the embeddings and ``freeze.layers``, growing
    linearly in between (FreezeOut: Brock et al., 2017, arXiv 1706.04983, but changing only at evaluations). Other
    policies give ``{0: 0}``.
    """
    starts = schedule.part_start_steps
    if settings.policy == "gradual":
        return {start: max(0, top - part) for part, start in enumerate(starts)}
    if settings.policy == "scheduled":
        most, last = settings.layers + 1, max(1, len(starts) - 1)
        return {start: round(most * part / last) for part, start in enumerate(starts)}
    return {0: 0}


def planned_flops(model: PreTrainedModel, planned: Mapping[int, int]) -> dict[int, TrainFlops]:
    """Return the FLOPs by the step from which they apply; freezes in ``model`` what ``planned`` never trains."""
    flops = {}
    for step, count in planned.items():
        freeze_levels(model, count)
        flops[step] = TrainFlops.of(model)
    freeze_levels(model, min(planned.values()))
    return flops


def auto_levels(gradients: Sequence[Sequence[float]], top: int) -> int:
    """Return how many levels to freeze: the lowest ones whose gradients change less than the median level's.

    ``gradients`` holds each past part's mean gradient norm of each level, 0 for a frozen one; the median is over the
    unfrozen levels below ``top``, the head. As in AutoFreeze (Liu et al., 2021, arXiv 2102.01386) with its percentile
    of 50, but the change is that of the mean norm of the clipped gradients, instead of the norm of their sum.
    """
    frozen = 0
    for before, now in pairwise(gradients):
        changes = [abs(b - n) / b if b else 0.0 for b, n in zip(before, now, strict=True)][frozen:top]
        limit = median(changes)
        frozen += next((i for i, change in enumerate(changes) if change >= limit), 0)
    return frozen


class MovingFreeze:
    """Change what is frozen in ``model`` part by part.

    The state is the settings, the evaluations so far and ``gradients``: for each part up to the current one, the number
    of steps and the sum of each level's gradient norms. A checkpoint with this state resumes bit for bit.
    """

    def __init__(
        self, model: PreTrainedModel, settings: FreezeSettings, schedule: BatchSchedule, gradients: list[list[float]]
    ) -> None:
        self.gradients, self._model, self._by_gradients = gradients, model, settings.policy == "auto"
        named, level_of = dict(model.named_parameters()), parameter_levels(model)
        self._top = max(level_of.values())
        self._by_level = [[named[n] for n in named if level_of[n] == level] for level in range(self._top + 1)]
        self._part, self._current = 0, torch.zeros(self._top + 2, device=model.device)
        self._frozen = planned_levels(settings, schedule, self._top)
        self.flops = planned_flops(model, self._frozen)
        """The FLOPs by the step from which they apply."""
        self.parameters = parameter_counts(model)
        """The number of parameters that are trained in any part, and of all parameters."""

    def start_part(self, history: Sequence[Evaluation]) -> None:
        """Begin or resume the part that follows the evaluations in ``history``, replaying the parts before it."""
        for part, step in enumerate([0, *(evaluation.step for evaluation in history)]):
            if step not in self._frozen:
                means = [[total / steps for total in sums] for steps, *sums in self.gradients[:part] if steps]
                self._frozen[step] = auto_levels(means, self._top)
            freeze_levels(self._model, self._frozen[step])
            if step not in self.flops:
                self.flops[step] = TrainFlops.of(self._model)
        self._part = len(history)
        stored = self.gradients[self._part] if self._part < len(self.gradients) else [0.0] * (self._top + 2)
        self._current = torch.tensor(stored, device=self._model.device)

    def store_gradients(self) -> None:
        """Store the current part's steps and gradient sums in ``gradients``."""
        self.gradients[self._part :] = [self._current.tolist()]

    @torch.no_grad()
    def accumulate_gradient_norms(self) -> None:
        """Add each level's gradient norm to the sums, on the device; call before the optimizer step."""
        if self._by_gradients:
            one, nothing = self._current.new_ones(()), self._current.new_zeros(())
            grads = [[p.grad for p in own if p.grad is not None] for own in self._by_level]
            self._current += torch.stack([one, *(torch.nn.utils.get_total_norm(g) if g else nothing for g in grads)])
