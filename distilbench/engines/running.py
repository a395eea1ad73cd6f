"""A trial while it trains, alike in every engine: what it tells, what its clock says, and what its result will say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distilbench.data.tokens import EncodedSplits
from distilbench.engines import checkpoints
from distilbench.engines.base import TrialObserver
from distilbench.engines.checkpoints import Progress
from distilbench.engines.device import peak_memory
from distilbench.engines.evaluation import best_of, evaluate_logits, is_out_of_patience, selection_name
from distilbench.engines.outcome import TrialEnded, require_finite
from distilbench.engines.steps import BatchSchedule
from distilbench.engines.stopwatch import Lap
from distilbench.models.flops import TrainFlops
from distilbench.results import Evaluation, Status, StepRecord, TrialResult
from distilbench.settings import TrialSettings


@dataclass
class RunningTrial:
    """A trial in training, but for its weights.

    ``about`` says, in the words of :class:`TrialResult`, what device and precision it has and how much is trained;
    ``flops`` is what an example costs from which step on, nothing before its model is there. ``report`` is the best
    weights' evaluation on a report split of its own.
    """

    index: int
    settings: TrialSettings
    splits: EncodedSplits
    observer: TrialObserver
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    about: dict[str, Any] = field(default_factory=dict)
    flops: Mapping[int, TrainFlops] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    identity: dict[str, object] = field(default_factory=dict)
    report: Evaluation | None = None
    setup_seconds: float = 0.0

    @cached_property
    def schedule(self) -> BatchSchedule:
        """How its examples are spread over steps."""
        return BatchSchedule(len(self.splits.train), self.settings.train.batch_size, self.settings.train.epochs)

    @property
    def folder(self) -> Path:
        """Where its checkpoints are."""
        return Path(self.settings.output.dir) / checkpoints.DIRECTORY

    @property
    def best(self) -> Evaluation:
        """The best evaluation so far, the first among equals."""
        return self.progress.history[best_of(self.progress.history, self.settings.train)]

    @property
    def is_out_of_patience(self) -> bool:
        """Whether it ends here, for its evaluations have not improved for long."""
        return is_out_of_patience(self.progress.history, self.settings.train)

    def take_up(self, weights: str, given: EncodedSplits) -> Path | None:
        """Return the checkpoint to continue from; ``weights`` is a fingerprint, ``given`` the splits as given."""
        self.identity = checkpoints.identity_of(self.settings, given, weights, self.about["precision"])
        resume, steps = self.settings.train.resume, self.schedule.steps
        path, self.progress = checkpoints.take_up(self.folder, self.identity, resume, steps)
        return path

    def record(self, step: int, lap: Lap, loss: float, learning_rate: float, gradient_norm: float) -> None:
        """Tell of the steps since the last record, up to ``step``; raises :class:`TrialEnded` where it diverged."""
        before, schedule = self.progress.step, self.schedule
        self.progress.advance(step, lap, peak_memory(self.device))
        require_finite(loss, "training", step, schedule.steps, self.settings)
        rate = (schedule.seen(step) - schedule.seen(before)) / lap.seconds
        epoch = step / schedule.steps_per_epoch
        told = StepRecord(step, schedule.steps, epoch, loss, learning_rate, gradient_norm, rate)
        self.observer.on_step(self.index, told)

    def evaluate(self, logits: np.ndarray, lap: Lap) -> bool:
        """Note what the selection split's ``logits`` amount to; return whether no evaluation before was as good."""
        progress, labels = self.progress, self.splits.selection.labels
        progress.spend(lap)
        self.sample_memory()
        epoch = progress.step / self.schedule.steps_per_epoch
        evaluation = evaluate_logits(selection_name(self.splits), logits, labels, progress.step, epoch)
        require_finite(evaluation.loss, "validation", progress.step, self.schedule.steps, self.settings)
        progress.history.append(evaluation)
        return self.best is evaluation

    def ask_to_go_on(self) -> None:
        """Tell of the newest evaluation; raises :class:`TrialEnded` where the observer prunes the trial."""
        if self.observer.on_evaluation(self.index, self.progress.history[-1]):
            raise TrialEnded(Status.PRUNED, f"pruned after step {self.progress.step} of {self.schedule.steps}")

    def note_best(self, selection: np.ndarray | None, report: np.ndarray | None) -> None:
        """Note the best weights' logits: on the selection split, which a checkpoint lacks, and on a report split."""
        if selection is not None:
            best = best_of(self.progress.history, self.settings.train)
            self.progress.history[best] = replace(self.best, logits=selection)
        if report is not None:
            labels, at = self.splits.report.labels, self.best
            self.report = evaluate_logits("validation", report, labels, at.step, at.epoch)

    def sample_memory(self) -> None:
        """Look how much is held now."""
        self.progress.peak_memory_bytes = max(self.progress.peak_memory_bytes, peak_memory(self.device))

    def result(self, status: Status, error: str | None, micro_batch: int) -> TrialResult:
        """Return what the trial has come to; ``micro_batch`` examples were taken at once."""
        progress, train, lengths = self.progress, self.settings.train, np.diff(self.splits.train.offsets)
        best = self.best if progress.history else None
        ends = sorted({progress.step, *(step for step in self.flops if step < progress.step)})
        seen = {step: self.schedule.times_seen(self.settings.seed, step) for step in ends}
        flops = sum(self.flops[start].total(lengths, seen[stop] - seen[start]) for start, stop in pairwise(ends))
        trained = max((self.flops[start].trained for start in ends[:-1]), default=0)
        about = self.about | ({"trainable_parameters": trained} if trained else {})
        times, seconds = seen[progress.step], progress.step_seconds
        return TrialResult(
            status,
            error,
            selection=best,
            report=best if self.splits.selection is self.splits.report else self.report,
            history=tuple(progress.history),
            steps=progress.step,
            train_seconds=progress.train_seconds,
            train_cpu_seconds=progress.train_cpu_seconds if self.device.type == "cpu" else None,
            train_flops=flops,
            setup_seconds=self.setup_seconds,
            examples_per_second=float(times.sum()) / seconds if seconds else 0.0,
            tokens_per_second=float(times @ lengths) / seconds if seconds else 0.0,
            peak_memory_bytes=progress.peak_memory_bytes,
            micro_batch_size=micro_batch if micro_batch < train.batch_size else None,
            **about,
        )
