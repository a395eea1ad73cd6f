"""The members of a fused group: a trial's learning rates, state, checkpoints and exported model; stacks of members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import CrossEntropyLoss

from distilbench.data.tokens import EncodedSplits
from distilbench.engines import checkpoints
from distilbench.engines.batches import BatchSchedule
from distilbench.engines.fused.optimizer import StackedOptimizer, untouched_factor
from distilbench.engines.fused.params import FlatParamLayout, StackedWeights
from distilbench.engines.fused.prefix import Prefix
from distilbench.engines.optimization import lr_factors, lr_scale
from distilbench.engines.running import RunningTrial
from distilbench.models.build import build_model, export_trial, load_tokenizer
from distilbench.models.flops import TrainFlops
from distilbench.models.resolve import ResolvedModel
from distilbench.results import Status, TrialResult
from distilbench.settings import require

_STATE = "state.safetensors"


@dataclass
class Stack:
    """Members that take a step together: their slice of the group, weights, optimizer and prefix.

    Stacks of one ``thread`` share gradient buffers. ``orders`` are the seeds of the members' orders of examples, or the
    one seed that all share.
    """

    trial_slice: slice
    thread: int
    weights: StackedWeights
    optimizer: StackedOptimizer
    orders: list[int]
    prefix: Prefix | None


@dataclass(frozen=True)
class GroupContext:
    """What all trials of a group share.

    ``frozen`` are the frozen weights of :meth:`FlatParamLayout.frozen_weights`; ``dtype`` is that of the trained
    weights, ``compute_dtype`` that of matrix products. ``frozen_levels`` is the number of frozen levels, and ``flops``
    the FLOPs, by the step from which they apply. ``initial`` has flat parameters (size,) by seed, until trials start.
    """

    splits: EncodedSplits
    resolved: ResolvedModel
    layout: FlatParamLayout
    frozen: dict[str, torch.Tensor]
    schedule: BatchSchedule
    frozen_levels: Mapping[int, int]
    flops: Mapping[int, TrainFlops]
    loss: CrossEntropyLoss
    device: torch.device
    about: Mapping[str, Any]
    dtype: torch.dtype
    compute_dtype: torch.dtype
    initial: dict[int, torch.Tensor]

    def trained_from(self, step: int) -> int:
        """Return the lowest level that is trained in step ``step``."""
        return self.frozen_levels[max(start for start in self.frozen_levels if start <= step)]

    def trained_until(self, step: int) -> int:
        """Return the next step from which other levels are trained, or the number of steps."""
        return min((start for start in self.frozen_levels if start > step), default=self.schedule.steps)

    @cached_property
    def first_steps(self) -> list[int]:
        """The first step that trains each level; empty if that is step 0 for all."""
        levels = range(self.layout.top + 1)
        first = [next((step for step, count in self.frozen_levels.items() if level >= count), 0) for level in levels]
        return first if any(first) else []


@dataclass
class Member:
    """A trial of a group.

    ``best_params`` (size,) are the weights of the best evaluation, None before the first and if the last one is best.
    ``micro_batch`` and ``eval_batch`` are examples per forward pass: those of the settings, until memory runs out.
    """

    trial: RunningTrial
    context: GroupContext
    lrs: np.ndarray
    checkpoint: Path | None
    micro_batch: int
    eval_batch: int
    best_params: torch.Tensor | None = None
    result: TrialResult | None = None

    @classmethod
    def of(cls, trial: RunningTrial, context: GroupContext) -> Member:
        """Prepare a trial, with ``train.resume`` from its newest checkpoint."""
        train, lr = trial.settings.train, trial.settings.optim.lr
        lrs = lr * lr_factors(trial.settings.scheduler, context.schedule.steps, lr)
        checkpoint = trial.resume_or_start(context.resolved.used.fingerprint)
        if checkpoint is not None:
            with safe_open(checkpoint / _STATE, "pt") as state:
                alike = state.get_slice("row").get_shape() == [context.layout.size]
            require(alike, "train.resume", "false where another version of distilbench left the checkpoint", checkpoint,
                    "use train.resume=false, or another output.dir")  # fmt: skip
        return cls(trial, context, lrs, checkpoint, train.examples_per_pass, train.eval_batch_size)

    def start(self, initial: torch.Tensor | None) -> list[torch.Tensor]:
        """Return parameters and moments (size,) of the checkpoint or, without one, only ``initial``."""
        if self.checkpoint is None:
            assert initial is not None
            return [initial]
        state = load_file(self.checkpoint / _STATE)
        if self.trial.progress.history:
            self.best_params = state.get("best", state["row"])
        return [state["row"], *(state[name] for name in sorted(state) if name.startswith("moment"))]

    def save(self, flat_params: torch.Tensor, moments: Sequence[torch.Tensor]) -> None:
        """Write a checkpoint of the state after the newest record."""
        path = self.trial.folder / f"checkpoint-{self.trial.progress.step}"
        if checkpoints.read_seal(path) is not None:
            return  # the evaluation after this step has written it; overwriting it could be interrupted by a kill
        path.mkdir(parents=True, exist_ok=True)
        state = {"row": flat_params, **{f"moment{i}": moment for i, moment in enumerate(moments)}}
        if self.best_params is not None and self.trial.best.step != self.trial.progress.step:
            state["best"] = self.best_params
        save_file({name: values.detach().cpu().contiguous() for name, values in state.items()}, path / _STATE)
        checkpoints.write_seal(path, self.trial.identity, self.trial.progress)

    def end(self, status: Status, error: str | None) -> None:
        """Store the result with how the trial ended."""
        self.result = self.trial.end(status, error, self.micro_batch)

    def export(self, flat_params: torch.Tensor) -> None:
        """Write ``flat_params`` (size,), the best weights, as an ordinary Hugging Face checkpoint."""
        context = self.context
        model = build_model(context.resolved, context.splits.label_names, self.trial.settings.seed)
        scale = lr_scale(0, context.layout.top, self.trial.settings.optim.layer_decay)
        lrs = [scale * lr for step, lr in enumerate(self.lrs[: self.trial.best.step]) if not context.trained_from(step)]
        untouched = untouched_factor(self.trial.settings.optim, lrs)
        context.layout.write(flat_params, untouched, dict(model.named_parameters()))
        export_trial(model, load_tokenizer(context.resolved), self.trial.settings)
