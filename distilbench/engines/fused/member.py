"""One trial of a fused group: its own numbers, what has become of it, and what it leaves on disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from distilbench.data.tokens import EncodedSplits
from distilbench.engines import checkpoints
from distilbench.engines.checkpoints import Progress
from distilbench.engines.evaluation import best_of
from distilbench.engines.fused.optimizer import untouched_factor
from distilbench.engines.fused.params import RowMap
from distilbench.engines.optimization import lr_factors
from distilbench.engines.outcome import result_of
from distilbench.engines.steps import Course
from distilbench.models.build import build_model, export_model, load_tokenizer
from distilbench.models.resolve import ResolvedModel
from distilbench.results import Evaluation, Status, TrialResult
from distilbench.settings import TrialSettings

log = logging.getLogger(__name__)

_STATE = "state.safetensors"


@dataclass(frozen=True)
class Ground:
    """What all trials of a group stand on.

    ``frozen`` are the weights that stay as they are, of :meth:`RowMap.frozen_weights`; ``dtype`` is the precision of
    the others, ``low`` that of products.
    """

    splits: EncodedSplits
    resolved: ResolvedModel
    rowmap: RowMap
    frozen: dict[str, torch.Tensor]
    course: Course
    parameters: tuple[int, int]
    device: torch.device
    device_name: str
    precision: str
    dtype: torch.dtype
    low: torch.dtype


@dataclass
class Member:
    """A trial in a group.

    ``best_row`` (size,) holds the weights of its best evaluation once others have followed. ``micro_batch`` and
    ``eval_batch`` are examples taken at once: what the settings say, until memory runs out.
    """

    index: int
    settings: TrialSettings
    ground: Ground
    rates: np.ndarray
    identity: dict[str, object]
    progress: Progress = field(default_factory=Progress)
    checkpoint: Path | None = None
    micro_batch: int = 0
    eval_batch: int = 0
    best_row: torch.Tensor | None = None
    report: Evaluation | None = None
    setup_seconds: float = 0.0

    @classmethod
    def of(cls, index: int, settings: TrialSettings, ground: Ground, original: EncodedSplits) -> Member:
        """Prepare a trial, from its newest checkpoint where it is to resume; ``original`` are the splits as given."""
        factors = lr_factors(settings.scheduler, ground.course.steps, settings.optim.lr)
        identity = checkpoints.identity_of(settings, original, ground.resolved.used.fingerprint, ground.precision)
        train = settings.train
        member = cls(index, settings, ground, factors * settings.optim.lr, identity,
                     micro_batch=train.examples_at_once, eval_batch=train.eval_batch_size)  # fmt: skip
        member._find_checkpoint()
        return member

    @property
    def seed(self) -> int:
        """Seeds head, dropout and order."""
        return self.settings.seed

    @property
    def folder(self) -> Path:
        """Where this trial's checkpoints are."""
        return Path(self.settings.output.dir) / checkpoints.DIRECTORY

    @property
    def best(self) -> Evaluation:
        """The best evaluation so far, the first among equals."""
        return self.progress.history[best_of(self.progress.history, self.settings.train)]

    def _find_checkpoint(self) -> None:
        found = checkpoints.newest(self.folder, self.identity) if self.settings.train.resume else None
        if found is not None:
            self.checkpoint, self.progress = found
            log.info("continuing after step %d of %d", self.progress.step, self.ground.course.steps)
            return
        if self.settings.train.resume:
            log.info("nothing to resume in %s: starting from scratch", self.settings.output.dir)
        checkpoints.remove_all(self.folder)

    def start(self, initial: torch.Tensor | None) -> list[torch.Tensor]:
        """Return the row (size,) and the moments like it to begin with: a checkpoint's, or ``initial`` and no more."""
        if self.checkpoint is None:
            assert initial is not None
            return [initial]
        state = load_file(self.checkpoint / _STATE)
        self.best_row = state.get("best", state["row"])
        return [state["row"], *(state[name] for name in sorted(state) if name.startswith("moment"))]

    def stepped(self, step: int, seconds: float, memory: int) -> None:
        """Note that the trial has come to ``step`` in ``seconds`` more."""
        progress = self.progress
        progress.step = step
        progress.train_seconds += seconds
        progress.step_seconds += seconds
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, memory)

    def evaluated(self, evaluation: Evaluation, row: torch.Tensor | None) -> None:
        """Note an evaluation, and keep a copy of its ``row`` (size,) where it is the best; None for the last one."""
        history = self.progress.history
        history.append(evaluation)
        if best_of(history, self.settings.train) == len(history) - 1:
            self.best_row = None if row is None else row.to("cpu", copy=True)

    def save(self, row: torch.Tensor, moments: Sequence[torch.Tensor]) -> None:
        """Leave a checkpoint of the state after the newest evaluation."""
        path = self.folder / f"checkpoint-{self.progress.step}"
        path.mkdir(parents=True, exist_ok=True)
        state = {"row": row, **{f"moment{i}": moment for i, moment in enumerate(moments)}}
        if self.best_row is not None and self.best.step != self.progress.step:
            state["best"] = self.best_row
        save_file({name: values.detach().cpu().contiguous() for name, values in state.items()}, path / _STATE)
        checkpoints.seal(path, self.identity, self.progress)

    def export(self, row: torch.Tensor) -> None:
        """Write the model of ``row`` (size,), the best weights, as an ordinary Hugging Face checkpoint."""
        ground = self.ground
        model = build_model(ground.resolved, ground.splits.label_names, self.seed)
        untouched = untouched_factor(self.settings.optim, self.rates[: self.best.step].tolist())
        ground.rowmap.write(row, untouched, dict(model.named_parameters()))
        export_model(model, load_tokenizer(ground.resolved), Path(self.settings.output.dir) / "model")

    def result(self, status: Status, error: str | None = None) -> TrialResult:
        """What the engine returns of a trial that ended so; checkpoints stay where it may be resumed."""
        if status in (Status.FINISHED, Status.PRUNED, Status.DIVERGED):
            checkpoints.remove_all(self.folder)
        else:
            self.tidy()
        ground, train = self.ground, self.settings.train
        return replace(
            result_of(self.progress, (status, error), train, ground.splits, self.report),
            setup_seconds=self.setup_seconds,
            micro_batch_size=self.micro_batch if self.micro_batch < train.batch_size else None,
            trainable_parameters=ground.parameters[0],
            total_parameters=ground.parameters[1],
            device=ground.device_name,
            precision=ground.precision,
        )

    def tidy(self) -> None:
        """Remove checkpoints that were cut short."""
        checkpoints.tidy(self.folder)

    def restore_logits(self, logits: np.ndarray) -> None:
        """Give the best evaluation its logits back, which a checkpoint does not keep."""
        best = best_of(self.progress.history, self.settings.train)
        self.progress.history[best] = replace(self.progress.history[best], logits=logits)
