"""What a benchmark puts side by side: stock Hugging Face Trainer in two ways, and our engines; one run of each."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np
import torch
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from distilbench.bench.roofline import synchronise
from distilbench.data.tokens import EncodedSplit, EncodedSplits
from distilbench.engines import engine_for
from distilbench.engines.device import peak_memory, reset_peak_memory, resolve_device, single_process
from distilbench.models.build import build_model, load_tokenizer
from distilbench.models.freezing import freeze
from distilbench.models.resolve import ResolvedModel, resolve_model
from distilbench.results import Evaluation, Status, StepRecord
from distilbench.settings import BENCH_WINDOW, TrialSettings

WARM_UP = BENCH_WINDOW
"""Steps before those that are timed."""

REPORTED, TUNED, ENGINE = "reported", "tuned", "engine"
"""Trainer as the report ran it, Trainer tuned, the engine that the settings name."""


@dataclass(frozen=True)
class Case:
    """One run: ``trials`` of these settings (with learning rates of their own), one epoch of ``splits.train``.

    Trials of a stock Trainer are as many processes at once. ``compiled`` is whether Trainer compiles its model.
    """

    kind: str
    settings: TrialSettings
    splits: EncodedSplits
    trials: int = 1
    compiled: bool = False


@dataclass(frozen=True)
class Measured:
    """What a run took, for all of its trials: wall and CPU seconds (of all threads) and bytes.

    ``steps`` are those after the warm-up. ``rest_seconds`` is what the run took besides them and the evaluation: model,
    optimizer, compiling, recording, warm-up. ``loss`` is the mean training loss of all steps of the first trial.
    ``began`` is when the steps did, by a clock that all processes of the machine share.
    """

    steps_seconds: float
    steps_cpu_seconds: float
    evaluation_seconds: float
    evaluation_cpu_seconds: float
    rest_seconds: float
    peak_bytes: int
    loss: float
    began: float


def now() -> np.ndarray:
    """Read both clocks, ``(2,)``: wall and CPU seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def measure(case: Case) -> Measured:
    """Run a case; its process should be new, for the peak of memory to be its own."""
    device = resolve_device(case.settings.engine.device)
    reset_peak_memory(device)
    began = now()
    marks, loss = (_engine_run if case.kind == ENGINE else _stock_run)(case, device)
    total = now()[0] - began[0]
    (steps, steps_cpu), (evaluation, evaluation_cpu) = (_covered(marks[:, mark : mark + 2]) for mark in (0, 1))
    rest, start = float(total - steps - evaluation), float(marks[:, 0, 0].min())
    return Measured(steps, steps_cpu, evaluation, evaluation_cpu, rest, _peak_bytes(device), loss, start)


def together(runs: Sequence[Measured]) -> Measured:
    """Sum up processes that ran at once: from the first one's first timed step to the last one's last, and so on."""
    steps = max(r.began + r.steps_seconds for r in runs) - min(r.began for r in runs)
    all_done = max(r.began + r.steps_seconds + r.evaluation_seconds for r in runs) - min(r.began for r in runs)
    return Measured(
        steps_seconds=steps,
        steps_cpu_seconds=sum(r.steps_cpu_seconds for r in runs),
        evaluation_seconds=all_done - steps,
        evaluation_cpu_seconds=sum(r.evaluation_cpu_seconds for r in runs),
        rest_seconds=max(r.rest_seconds for r in runs),
        peak_bytes=sum(r.peak_bytes for r in runs),
        loss=runs[0].loss,
        began=min(r.began for r in runs),
    )


_START: list[Barrier] = []
"""Where processes that run at once wait for each other, after their warm-up."""


def start_with(barrier: Barrier) -> None:
    """Make this process wait at ``barrier`` before its timed steps."""
    _START.append(barrier)


def _covered(spans: np.ndarray) -> list[float]:
    """Count the seconds, by each clock, that lie in one of the ``spans`` (trials, 2, clocks) from start to end.

    Trials of one batch share theirs, those that memory kept apart do not.
    """
    covered, reached = np.zeros(spans.shape[2]), np.full(spans.shape[2], -np.inf)
    for start, end in spans[spans[:, 0, 0].argsort()]:
        covered += np.maximum(0.0, end - np.maximum(start, reached))
        reached = np.maximum(reached, end)
    return [float(seconds) for seconds in covered]


def _peak_bytes(device: torch.device) -> int:
    """Return the device's peak; of a CPU's process the resident set's, where Linux tells it."""
    if device.type == "cpu":
        try:
            with open("/proc/self/status", encoding="ascii") as file:
                return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
        except OSError:
            pass
    return peak_memory(device)


class _Clock:
    """Reads the clocks where an engine says that steps or the evaluation are done, and ends the trial there."""

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step
        self.marks: dict[tuple[int, str], np.ndarray] = {}
        self.losses: list[float] = []

    def on_step(self, trial: int, record: StepRecord) -> None:
        """Note the end of the warm-up and of the last step."""
        if record.step in (WARM_UP, self.last_step):
            self.marks[trial, "warm" if record.step == WARM_UP else "trained"] = now()
        if trial == 0:
            self.losses.append(record.loss)

    def on_evaluation(self, trial: int, evaluation: Evaluation) -> bool:
        """Note the end of the evaluation; the rest of a trial is the same whatever trained it."""
        self.marks[trial, "evaluated"] = now()
        return True

    def wants_checkpoint(self) -> bool:
        """Never."""
        return False

    def on_checkpoint(self) -> None:
        """Do nothing."""


def _engine_run(case: Case, device: torch.device) -> tuple[np.ndarray, float]:
    """Train with our engine; returns the ends of warm-up, steps and evaluation, (trials, 3, clocks), and the loss."""
    steps = len(case.splits.train) // case.settings.train.batch_size
    clock = _Clock(steps)
    with tempfile.TemporaryDirectory() as directory:
        trials = list(_variants(case, directory))
        results = engine_for(case.settings.engine).train(trials, case.splits, clock)
    failed = [result.error for result in results if result.status is not Status.PRUNED]
    if failed:
        raise RuntimeError(failed[0])
    names = ("warm", "trained", "evaluated")
    marks = np.array([[clock.marks[trial, name] for name in names] for trial in range(case.trials)])
    return marks, float(np.mean(clock.losses))


def _variants(case: Case, directory: str) -> Iterator[TrialSettings]:
    """Return the trials of a case: a small grid over the learning rate, as a sweep would have it."""
    settings = case.settings
    train = replace(settings.train, epochs=1, eval_steps=None, logging_steps=WARM_UP, checkpoints=False, resume=False)
    output = replace(settings.output, dir=directory, save_model=False)
    for trial in range(case.trials):
        optim = replace(settings.optim, lr=settings.optim.lr * (1 + trial / 8))
        yield replace(settings, train=train, output=output, optim=optim)


class _StepClock(TrainerCallback):
    """Reads the clocks after the warm-up and after the last step of a Trainer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[np.ndarray] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the steps that count."""
        if state.global_step in (WARM_UP, state.max_steps):
            synchronise(self.device)
            if state.global_step == WARM_UP:
                for barrier in _START:
                    barrier.wait()
            self.marks.append(now())


def _stock_run(case: Case, device: torch.device) -> tuple[np.ndarray, float]:
    """Train as :func:`_engine_run` does, with transformers' own Trainer, from the same weights on the same batches."""
    settings, splits, tuned = case.settings, case.splits, case.kind == TUNED
    resolved = resolve_model(settings.model)
    model = build_model(resolved, splits.label_names, settings.seed)
    freeze(model, settings.freeze)
    clock = _StepClock(device)
    length = None if tuned else settings.train.max_length
    with single_process(), tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model=model,
            args=_stock_arguments(case, device, directory),
            train_dataset=_rows(splits.train, splits.pad_token_id, length),
            eval_dataset=_rows(splits.selection, splits.pad_token_id, length),
            data_collator=_padding(resolved, device) if tuned else default_data_collator,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
        before = now()
        trainer.evaluate()
        evaluation = now() - before
    warm, trained = clock.marks  # what Trainer tidies up before the evaluation belongs to neither
    return np.array([[warm, trained, trained + evaluation]]), loss


def _padding(resolved: ResolvedModel, device: torch.device) -> DataCollatorWithPadding:
    """Pad to the longest row; on a GPU to a multiple of 8, which its matrix units like."""
    return DataCollatorWithPadding(load_tokenizer(resolved), pad_to_multiple_of=8 if device.type == "cuda" else None)


def _stock_arguments(case: Case, device: torch.device, directory: str) -> TrainingArguments:
    """Trainer's defaults with the report's numbers; tuned, what makes it faster without changing the result."""
    settings, tuned = case.settings, case.kind == TUNED
    steps = len(case.splits.train) // settings.train.batch_size
    precision, optim, train = settings.train.precision, settings.optim, settings.train
    faster: dict[str, Any] = {"optim": "adamw_torch"}
    if tuned:
        on_gpu = device.type == "cuda"
        # on a CPU, workers of the loader would take cores from the training
        workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True} if on_gpu else {}
        faster = {"optim": "adamw_torch_fused", "logging_nan_inf_filter": False, **workers}
        if case.compiled:
            faster["torch_compile"] = True
    arguments = TrainingArguments(
        output_dir=directory,
        num_train_epochs=1,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.eval_batch_size,
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        lr_scheduler_type=settings.scheduler.name,
        warmup_steps=settings.scheduler.warmup(steps),
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        dataloader_pin_memory=device.type == "cuda",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **faster,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several visible GPUs would mean DataParallel
    return arguments


def _rows(split: EncodedSplit, pad_token_id: int, length: int | None) -> list[dict[str, Any]]:
    """Return a split as Trainer takes it, each row padded to ``length`` tokens where that is given."""
    rows = []
    for index in range(len(split)):
        ids = split.row(index).tolist()
        padding = [0] * ((length or len(ids)) - len(ids))
        mask = [1] * len(ids) + padding
        rows.append({
            "input_ids": ids + [pad_token_id] * len(padding), "attention_mask": mask, "labels": int(split.labels[index])
        })  # fmt: skip
    return rows
