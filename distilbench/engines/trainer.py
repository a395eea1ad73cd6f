"""The reference engine: Hugging Face Trainer, one trial after another, on exactly one device."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from distilbench.data.tokens import EncodedSplit, EncodedSplits
from distilbench.engines import checkpoints
from distilbench.engines.base import TrialObserver
from distilbench.engines.batches import batches_by_length, padded_batch
from distilbench.engines.device import (
    describe_device,
    gc_frozen,
    release_memory,
    reset_peak_memory,
    resolve_device,
    resolve_precision,
    single_process,
)
from distilbench.engines.moving_freeze import MovingFreeze
from distilbench.engines.optimization import build_loss, build_optimizer, lr_factors
from distilbench.engines.running import SMALLER_BATCH_MESSAGE, RunningTrial, Stopwatch, outcome_of
from distilbench.models.adapters import adapt, merge
from distilbench.models.build import build_model, export_model, export_trial, load_tokenizer, silence_transformers
from distilbench.models.flops import TrainFlops
from distilbench.models.freezing import freeze, parameter_counts
from distilbench.models.padding import set_padding
from distilbench.models.resolve import check_trial, resolve_model
from distilbench.results import ADAPTER, Status, TrialResult
from distilbench.settings import TrialSettings

log = logging.getLogger(__name__)

_BEST_WEIGHTS = "best.safetensors"


class TrainerEngine:
    """Train each trial with ``transformers.Trainer``: the report's protocol, and the reference for other engines."""

    def train(
        self, trials: Sequence[TrialSettings], splits: EncodedSplits, observer: TrialObserver
    ) -> list[TrialResult]:
        """Train the trials one after another; see :class:`distilbench.engines.base.Engine`."""
        results = []
        with single_process(), gc_frozen():
            for index, settings in enumerate(trials):
                results.append(_train_one(index, settings, splits, observer))
                release_memory()  # only here: until it returns, _train_one's frame refers to model and optimizer
        return results


def _train_one(index: int, settings: TrialSettings, splits: EncodedSplits, observer: TrialObserver) -> TrialResult:
    """Train one trial; when out of memory, resume from its newest checkpoint with about half the micro-batch."""
    began, train = time.perf_counter(), settings.train
    while True:
        result = _TrainerTrial(index, replace(settings, train=train), splits, observer, began).attempt()
        if result.status is not Status.OUT_OF_MEMORY or (train.examples_per_pass, train.eval_batch_size) == (1, 1):
            return result
        micro, evaluated = train.smaller_micro_batch(train.examples_per_pass) or 1, max(1, train.eval_batch_size // 2)
        train = replace(train, micro_batch_size=micro, eval_batch_size=evaluated, resume=True)
        log.warning(SMALLER_BATCH_MESSAGE, micro)
        release_memory()


class _TrainerTrial(TrainerCallback):
    """One trial: Trainer's callbacks and the trial's state.

    It evaluates by itself instead of through Trainer, without a second data loader or draws from the training's RNG.
    """

    def __init__(
        self, index: int, settings: TrialSettings, splits: EncodedSplits, observer: TrialObserver, began: float
    ) -> None:
        """Measure the set-up time from ``began``, a value of ``time.perf_counter``."""
        self.trial = RunningTrial(index, settings, splits, observer)
        self.settings, self.splits, self.observer = settings, splits, observer
        self.schedule, self.steps = self.trial.schedule, self.trial.schedule.steps
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.moving: MovingFreeze | None = None
        self.evaluation_due = self.is_stopping = False
        self.stopwatch = Stopwatch(began)

    def attempt(self) -> TrialResult:
        """Train until the end or an error, which becomes the result's status and message.

        Leaves no incomplete checkpoint, and none at all of a trial that can't be resumed.
        """
        outcome: tuple[Status, str | None] = Status.FINISHED, None
        try:
            self._set_up()
            with silence_transformers():
                self.trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
            self._finish()
        except Exception as error:  # the trial's boundary: other trials go on
            outcome = outcome_of(error, self.settings)
        except BaseException:
            checkpoints.remove_stale(self.trial.folder, Status.INTERRUPTED)
            raise
        self.trial.sample_memory()
        self.trial.setup_seconds = self.trial.setup_seconds or self.stopwatch.lap().seconds
        return self.trial.end(*outcome, self.settings.train.examples_per_pass)

    def _set_up(self) -> None:
        """Build model, optimizer, schedule and Trainer, and find the checkpoint to resume from."""
        settings, trial = self.settings, self.trial
        self.device = trial.device = resolve_device(settings.engine.device)
        precision = resolve_precision(settings.train.precision, self.device)
        trial.about = {"device": describe_device(self.device), "precision": precision}
        reset_peak_memory(self.device)
        self.resolved = resolve_model(settings.model)
        check_trial(self.resolved, settings)
        self.model = build_model(self.resolved, self.splits.label_names, settings.seed)
        set_padding(self.model, self.splits.pad_token_id, self.resolved.used)
        freeze(self.model, settings.freeze)
        self.adapted = adapt(self.model, settings.adapter, self.resolved, settings.seed)
        counts, trial.flops = parameter_counts(self.model), {0: TrainFlops.of(self.model)}
        self.model.to(self.device)  # type: ignore[arg-type]  # the stub of the decorated method lacks self
        self.checkpoint = trial.resume_or_start(self.resolved.used.fingerprint)
        if settings.freeze.is_dynamic:
            self.moving = MovingFreeze(self.model, settings.freeze, self.schedule, trial.progress.gradients)
            counts, trial.flops = self.moving.parameters, self.moving.flops
        trial.about |= {"trainable_parameters": counts[0], "total_parameters": counts[1]}
        self.trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.trainer = self._trainer(precision)

    def _trainer(self, precision: str) -> Trainer:
        optimizer = build_optimizer(self.model, self.settings.optim)
        factors = lr_factors(self.settings.scheduler, self.steps, self.settings.optim.lr).tolist()
        last = self.steps - 1  # the scheduler asks for one step more
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[min(step, last)])
        train, splits = self.settings.train, self.splits
        loss = build_loss(train, splits.train.labels, len(splits.label_names), self.device, torch.float32)
        is_plain = loss.weight is None and not loss.label_smoothing  # as the model computes it

        def share_of_batch(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
            losses: torch.Tensor = loss(outputs.logits, labels)
            return losses.sum() / num_items_in_batch  # no mean of micro-batch means

        trainer = Trainer(
            model=self.model,
            args=training_arguments(self.settings, self.device, precision, self.trial.folder),
            train_dataset=range(len(splits.train)),
            data_collator=lambda rows: padded_batch(splits.train, np.asarray(rows), splits.pad_token_id, True),
            optimizers=(optimizer, schedule),
            compute_loss_func=None if is_plain and train.examples_per_pass == train.batch_size else share_of_batch,
            callbacks=[self],
        )
        trainer.remove_callback(PrinterCallback)
        # it would walk over all modules in every step for an unused result
        trainer.floating_point_ops = lambda inputs: 0  # type: ignore[method-assign]
        return trainer

    def _finish(self) -> None:
        """Restore the best weights, evaluate them on the report split, and export them."""
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights, strict=False)
        selection = self._predict(self.splits.selection) if self.trial.best.logits is None else None
        has_own = self.splits.selection is not self.splits.report
        self.trial.store_best(selection, self._predict(self.splits.report) if has_own else None)
        if self.settings.output.save_model:
            tokenizer = load_tokenizer(self.resolved)
            if self.adapted is not None:
                export_model(self.adapted, tokenizer, Path(self.settings.output.dir) / ADAPTER)
            if self.adapted is None or self.settings.adapter.merge:
                model = self.model if self.adapted is None else merge(self.adapted)
                export_trial(model, tokenizer, self.settings)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore what the checkpoint holds besides Trainer's state, and start timing."""
        if self.checkpoint is not None:
            stored = self.checkpoint / _BEST_WEIGHTS
            if stored.is_file():
                self.best_weights = load_file(stored)
            elif self.trial.progress.history:
                self.best_weights = self._copied_weights()
        if self.moving is not None:
            self.moving.start_part(self.trial.progress.history)
        self.trial.setup_seconds = self.stopwatch.lap().seconds

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass the gradients to the freeze policy."""
        if self.moving is not None:
            self.moving.accumulate_gradient_norms()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Determine what is due after this step."""
        step, train = state.global_step, self.settings.train
        self.evaluation_due = self.schedule.evaluates_after(step)
        control.should_log = self.schedule.records_after(step)
        if not self.evaluation_due and self.observer.wants_checkpoint():  # else the evaluation saves
            if not train.checkpoints:
                self.observer.on_checkpoint()
            else:
                self.is_stopping = control.should_log = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the steps since the last record; only here does training synchronize with the device."""
        logs = kwargs["logs"]
        if "loss" not in logs:  # Trainer's own summary at the end
            return
        told = logs["loss"], logs["learning_rate"], logs["grad_norm"]
        self.trial.record(state.global_step, self.stopwatch.lap(), *told)
        self.stopwatch.lap()
        if self.evaluation_due:
            self._evaluate(control)

    def _evaluate(self, control: Any) -> None:
        """Evaluate on the selection split, keep the best weights, and let the observer prune the trial."""
        last = self.trial.progress.step == self.steps
        logits = self._predict(self.splits.selection)
        if self.trial.evaluate(logits, self.stopwatch.lap()):
            self.best_weights = None if last else self._copied_weights()
        control.should_training_stop = self.trial.is_over
        control.should_save = self.settings.train.checkpoints and not control.should_training_stop
        if self.moving is not None and not control.should_training_stop:
            self.moving.store_gradients()
            self.moving.start_part(self.trial.progress.history)
        self.stopwatch.lap()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the best weights and the seal to the checkpoint that Trainer has just written."""
        path = self.trial.folder / f"checkpoint-{state.global_step}"
        if self.best_weights is not None and self.trial.best.step != state.global_step:
            save_file(self.best_weights, path / _BEST_WEIGHTS)
        if self.moving is not None:
            self.moving.store_gradients()
        checkpoints.write_seal(path, self.trial.identity, self.trial.progress)
        if self.is_stopping:
            self.is_stopping = False
            self.observer.on_checkpoint()
        self.stopwatch.lap()

    def _copied_weights(self) -> dict[str, torch.Tensor]:
        """Return a copy of the trained parameters on the CPU."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach().to("cpu", copy=True) for name in self.trained}

    def _predict(self, split: EncodedSplit) -> np.ndarray:
        """Return the logits (examples, labels) float32 of ``split``, in its order, without drawing from any RNG."""
        logits = np.empty((len(split), len(self.splits.label_names)), dtype=np.float32)
        self.model.eval()
        with torch.no_grad():
            for indices in batches_by_length(split, self.settings.train.eval_batch_size):
                inputs = padded_batch(split, indices, self.splits.pad_token_id)
                outputs = self.model(**{name: values.to(self.device) for name, values in inputs.items()})
                logits[indices] = outputs.logits.float().cpu().numpy()
        return logits


def training_arguments(
    settings: TrialSettings, device: torch.device, precision: str, directory: Path, **stock: Any
) -> TrainingArguments:
    """Return Trainer's arguments: the protocol's values, with Trainer's own logging, evaluation and saving disabled.

    ``stock`` overrides the disabled ones, to measure an unmodified Trainer.
    """
    train = settings.train
    ours: dict[str, Any] = {
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,  # it would synchronize to read the loss in every step
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=train.epochs,
        per_device_train_batch_size=train.examples_per_pass,
        gradient_accumulation_steps=train.batch_size // train.examples_per_pass,
        max_grad_norm=settings.optim.max_grad_norm,
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        dataloader_pin_memory=device.type == "cuda",
        **ours | stock,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # with several visible GPUs, Trainer would use DataParallel
    return arguments
