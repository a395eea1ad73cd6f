"""One trial of a fused group: its own numbers, what has become of it, and what it leaves on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from distilbench.data.tokens import EncodedSplits
from distilbench.engines import checkpoints
from distilbench.engines.checkpoints import Progress
from distilbench.engines.evaluation import best_of, is_out_of_patience
from distilbench.engines.fused.optimizer import untouched_factor
from distilbench.engines.fused.params import FlatParamLayout
from distilbench.engines.loss import Loss
from distilbench.engines.optimization import lr_factors, lr_scale
from distilbench.engines.outcome import result_of
from distilbench.engines.steps import BatchSchedule
from distilbench.models.build import build_model, export_trial, load_tokenizer
from distilbench.models.flops import TrainFlops
from distilbench.models.resolve import ResolvedModel
from distilbench.results import Evaluation, Status, TrialResult
from distilbench.settings import TrialSettings

_STATE = "state.safetensors"


@dataclass(frozen=True)
class GroupContext:
    """What all trials of a group stand on.

    ``frozen`` are the weights that stay as they are, of :meth:`FlatParamLayout.frozen_weights`; ``dtype`` is the
    precision of the others, ``compute_dtype`` that of products. ``frozen_levels`` are as many of the lowest as are
    frozen from which step on, and ``flops`` what an example costs from there.
    """

    splits: EncodedSplits
    resolved: ResolvedModel
    layout: FlatParamLayout
    frozen: dict[str, torch.Tensor]
    schedule: BatchSchedule
    parameters: tuple[int, int]
    frozen_levels: Mapping[int, int]
    flops: Mapping[int, TrainFlops]
    loss: Loss
    device: torch.device
    device_name: str
    precision: str
    dtype: torch.dtype
    compute_dtype: torch.dtype

    def trained_from(self, step: int) -> int:
        """Return the lowest level that step ``step`` trains."""
        return self.frozen_levels[max(start for start in self.frozen_levels if start <= step)]

    @cached_property
    def first_steps(self) -> list[int]:
        """The first step that trains each level; empty where that is one step for all."""
        levels = range(self.layout.top + 1)
        first = [next((step for step, count in self.frozen_levels.items() if level >= count), 0) for level in levels]
        return first if any(first) else []


@dataclass
class Member:
    """A trial in a group.

    ``best_params`` (size,) holds the weights of its best evaluation once others have followed. ``micro_batch`` and
    ``eval_batch`` are examples taken at once: what the settings say, until memory runs out.
    """

    index: int
    settings: TrialSettings
    context: GroupContext
    lrs: np.ndarray
    identity: dict[str, object]
    progress: Progress = field(default_factory=Progress)
    checkpoint: Path | None = None
    micro_batch: int = 0
    eval_batch: int = 0
    best_params: torch.Tensor | None = None
    report: Evaluation | None = None
    setup_seconds: float = 0.0

    @classmethod
    def of(cls, index: int, settings: TrialSettings, context: GroupContext, original: EncodedSplits) -> Member:
        """Prepare a trial, from its newest checkpoint where it is to resume; ``original`` are the splits as given."""
        train, lr, fingerprint = settings.train, settings.optim.lr, context.resolved.used.fingerprint
        lrs = lr * lr_factors(settings.scheduler, context.schedule.steps, lr)
        identity = checkpoints.identity_of(settings, original, fingerprint, context.precision)
        folder = Path(settings.output.dir) / checkpoints.DIRECTORY
        checkpoint, progress = checkpoints.take_up(folder, identity, train.resume, context.schedule.steps)
        return cls(index, settings, context, lrs, identity, progress, checkpoint,
                   micro_batch=train.examples_at_once, eval_batch=train.eval_batch_size)  # fmt: skip

    @property
    def folder(self) -> Path:
        """Where this trial's checkpoints are."""
        return Path(self.settings.output.dir) / checkpoints.DIRECTORY

    @property
    def best(self) -> Evaluation:
        """The best evaluation so far, the first among equals."""
        return self.progress.history[best_of(self.progress.history, self.settings.train)]

    @property
    def is_out_of_patience(self) -> bool:
        """Whether it ends here, for its evaluations have not improved for long."""
        return is_out_of_patience(self.progress.history, self.settings.train)

    def start(self, initial: torch.Tensor | None) -> list[torch.Tensor]:
        """Return the row (size,) and the moments like it to begin with: a checkpoint's, or ``initial`` and no more."""
        if self.checkpoint is None:
            assert initial is not None
            return [initial]
        state = load_file(self.checkpoint / _STATE)
        if self.progress.history:
            self.best_params = state.get("best", state["row"])
        return [state["row"], *(state[name] for name in sorted(state) if name.startswith("moment"))]

    def evaluated(self, evaluation: Evaluation, flat_params: torch.Tensor | None) -> None:
        """Note an evaluation, and keep a copy of its ``flat_params`` (size,) if it is the best; None at the end."""
        history = self.progress.history
        history.append(evaluation)
        if best_of(history, self.settings.train) == len(history) - 1:
            self.best_params = None if flat_params is None else flat_params.to("cpu", copy=True)

    def save(self, flat_params: torch.Tensor, moments: Sequence[torch.Tensor]) -> None:
        """Leave a checkpoint of the state after the newest record."""
        path = self.folder / f"checkpoint-{self.progress.step}"
        path.mkdir(parents=True, exist_ok=True)
        state = {"row": flat_params, **{f"moment{i}": moment for i, moment in enumerate(moments)}}
        if self.best_params is not None and self.best.step != self.progress.step:
            state["best"] = self.best_params
        save_file({name: values.detach().cpu().contiguous() for name, values in state.items()}, path / _STATE)
        checkpoints.seal(path, self.identity, self.progress)

    def export(self, flat_params: torch.Tensor) -> None:
        """Write the model of ``flat_params`` (size,), the best weights, as an ordinary Hugging Face checkpoint."""
        context = self.context
        model = build_model(context.resolved, context.splits.label_names, self.settings.seed)
        scale = lr_scale(0, context.layout.top, self.settings.optim.layer_decay)
        lrs = [scale * lr for step, lr in enumerate(self.lrs[: self.best.step]) if not context.trained_from(step)]
        untouched = untouched_factor(self.settings.optim, lrs)
        context.layout.write(flat_params, untouched, dict(model.named_parameters()))
        export_trial(model, load_tokenizer(context.resolved), self.settings)

    def result(self, status: Status, error: str | None = None) -> TrialResult:
        """Return what the engine returns of a trial that ended so; checkpoints stay where it may be resumed."""
        checkpoints.tidy(self.folder, status)
        context, train = self.context, self.settings.train
        return replace(
            result_of(self.progress, (status, error), self.settings, context.splits, self.report, context.flops),
            train_cpu_seconds=self.progress.train_cpu_seconds if context.device.type == "cpu" else None,
            setup_seconds=self.setup_seconds,
            micro_batch_size=self.micro_batch if self.micro_batch < train.batch_size else None,
            trainable_parameters=context.parameters[0],
            total_parameters=context.parameters[1],
            device=context.device_name,
            precision=context.precision,
        )

    def restore_logits(self, logits: np.ndarray) -> None:
        """Give the best evaluation its logits back, which a checkpoint does not keep."""
        best = best_of(self.progress.history, self.settings.train)
        self.progress.history[best] = replace(self.progress.history[best], logits=logits)
