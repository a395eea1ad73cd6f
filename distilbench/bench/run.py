"""One run of a benchmark: stock Hugging Face Trainer in two ways, or an engine of ours, timed in a new process."""

from __future__ import annotations

import multiprocessing
import re
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
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

from distilbench.data.tokens import EncodedSplit, EncodedSplits
from distilbench.engines import engine_for
from distilbench.engines.device import peak_memory, reset_peak_memory, resolve_device, single_process
from distilbench.engines.trainer import training_arguments
from distilbench.models.build import build_model, load_tokenizer
from distilbench.models.freezing import freeze
from distilbench.models.resolve import resolve_model
from distilbench.results import Evaluation, Status, StepRecord
from distilbench.settings import BENCH_WINDOW, TrialSettings

REPORTED, TUNED, ENGINE = "reported", "tuned", "engine"
"""Trainer as the report ran it, Trainer tuned, the engine that the settings name."""

START_SECONDS = 900.0
"""How long Trainers that are to run at once may wait for each other."""


@dataclass(frozen=True)
class Case:
    """What is run: ``trials`` of these settings (with learning rates of their own), one epoch of ``splits.train``.

    Trials of a stock Trainer are as many processes at once. ``compiled`` is whether Trainer compiles its model.
    """

    name: str
    kind: str
    settings: TrialSettings
    splits: EncodedSplits
    trials: int = 1
    compiled: bool = False

    @property
    def precision(self) -> str:
        """What its products are computed in."""
        return self.settings.train.precision

    @property
    def steps(self) -> int:
        """Steps of the epoch, those of the warm-up included."""
        return len(self.splits.train) // self.settings.train.batch_size


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
    rest_seconds: float
    peak_bytes: int
    loss: float
    began: float


def run_case(case: Case) -> Measured:
    """Measure in a new process: no cache warmed by another row, and a peak of memory of its own.

    Trials of a stock Trainer run at once, each in a process, and begin their timed steps together.
    """
    context = multiprocessing.get_context("spawn")
    processes = 1 if case.kind == ENGINE else case.trials
    barrier = context.Barrier(processes, timeout=START_SECONDS)
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_START.append, initargs=(barrier,)) as pool:
        each = replace(case, trials=case.trials // processes)
        runs = [pool.submit(_measure, each) for _ in range(processes)]
        return together([run.result() for run in runs])


_START: list[Barrier] = []
"""In a measuring process, where those that run at once wait for each other after their warm-up."""


def together(runs: Sequence[Measured]) -> Measured:
    """Sum up processes that ran at once: from the first one's first timed step to the last one's last, and so on."""
    began = min(run.began for run in runs)
    trained = max(run.began + run.steps_seconds for run in runs)
    evaluated = max(run.began + run.steps_seconds + run.evaluation_seconds for run in runs)
    return Measured(
        steps_seconds=trained - began,
        steps_cpu_seconds=sum(run.steps_cpu_seconds for run in runs),
        evaluation_seconds=evaluated - trained,
        rest_seconds=max(run.rest_seconds for run in runs),
        peak_bytes=sum(run.peak_bytes for run in runs),
        loss=runs[0].loss,
        began=began,
    )


def _measure(case: Case) -> Measured:
    device = resolve_device(case.settings.engine.device)
    reset_peak_memory(device)
    start = time.perf_counter()
    marks, loss = (_train_engine if case.kind == ENGINE else _train_stock)(case, device)
    whole = time.perf_counter() - start
    (steps, steps_cpu), (evaluation, _) = np.diff(marks, axis=0).tolist()
    rest = whole - steps - evaluation
    return Measured(steps, steps_cpu, evaluation, rest, _peak_bytes(device), loss, float(marks[0, 0]))


def _now() -> np.ndarray:
    """Read both clocks, ``(2,)``: wall and CPU seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def _peak_bytes(device: torch.device) -> int:
    """Return the device's peak; of a CPU's process the resident set's, where Linux tells it."""
    status = Path("/proc/self/status")
    if device.type == "cpu" and status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(found[1]) * 1024 if found else 0
    return peak_memory(device)


class _Clock:
    """Reads the clocks where an engine says that steps or the evaluation are done, and ends the trials there.

    Of several trials the first one's warm-up counts, and the last one's last step and evaluation.
    """

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step
        self.marks: dict[str, np.ndarray] = {}
        self.losses: list[float] = []

    def on_step(self, trial: int, record: StepRecord) -> None:
        """Note the end of the warm-up and of the last step."""
        if record.step == self.last_step:
            self.marks["trained"] = _now()
        elif record.step == BENCH_WINDOW:
            self.marks.setdefault("warm", _now())
        if trial == 0:
            self.losses.append(record.loss)

    def on_evaluation(self, trial: int, evaluation: Evaluation) -> bool:
        """Note the end of the evaluation; the rest of a trial is the same whatever trained it."""
        self.marks["evaluated"] = _now()
        return True

    def wants_checkpoint(self) -> bool:
        """Never."""
        return False

    def on_checkpoint(self) -> None:
        """Do nothing."""


def _train_engine(case: Case, device: torch.device) -> tuple[np.ndarray, float]:
    """Train with our engine; return the ends of warm-up, steps and evaluation, ``(3, clocks)``, and the loss.

    Trials are a small grid over the learning rate, as a sweep would have it.
    """
    settings, clock = case.settings, _Clock(case.steps)
    train = replace(
        settings.train, epochs=1, eval_steps=None, logging_steps=BENCH_WINDOW, checkpoints=False, resume=False
    )
    with tempfile.TemporaryDirectory() as directory:
        output = replace(settings.output, dir=directory, save_model=False)
        rates = [settings.optim.lr * (1 + trial / 8) for trial in range(case.trials)]
        trials = [replace(settings, train=train, output=output, optim=replace(settings.optim, lr=lr)) for lr in rates]
        results = engine_for(settings.engine).train(trials, case.splits, clock)
    failed = [result.error for result in results if result.status is not Status.PRUNED]
    if failed:
        raise RuntimeError(failed[0])
    return np.array([clock.marks[name] for name in ("warm", "trained", "evaluated")]), float(np.mean(clock.losses))


class _StepClock(TrainerCallback):
    """Reads the clocks after the warm-up and after the last step of a Trainer."""

    def __init__(self) -> None:
        self.marks: list[np.ndarray] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the steps that count."""
        if state.global_step in (BENCH_WINDOW, state.max_steps):
            if args.device.type != "cpu":
                torch.accelerator.synchronize()
            if state.global_step == BENCH_WINDOW:
                for barrier in _START:
                    barrier.wait()
            self.marks.append(_now())


def _train_stock(case: Case, device: torch.device) -> tuple[np.ndarray, float]:
    """Train as :func:`_train_engine` does, with stock Trainer, from the same weights on the same batches."""
    settings, splits, tuned = case.settings, case.splits, case.kind == TUNED
    resolved = resolve_model(settings.model)
    model = build_model(resolved, splits.label_names, settings.seed)
    freeze(model, settings.freeze)
    clock = _StepClock()
    length = None if tuned else settings.train.max_length
    grain = 8 if device.type == "cuda" else None  # rows of such a length suit a GPU's matrix units
    padding = DataCollatorWithPadding(load_tokenizer(resolved), pad_to_multiple_of=grain)
    with single_process(), tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model=model,
            args=_stock_arguments(case, device, directory),
            train_dataset=_rows(splits.train, splits.pad_token_id, length),
            eval_dataset=_rows(splits.selection, splits.pad_token_id, length),
            data_collator=padding if tuned else default_data_collator,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
        before = _now()
        trainer.evaluate()
        evaluation = _now() - before
    warm, trained = clock.marks  # what Trainer tidies up before the evaluation belongs to neither
    return np.array([warm, trained, trained + evaluation]), loss


def _stock_arguments(case: Case, device: torch.device, directory: str) -> TrainingArguments:
    """Trainer's defaults with the report's numbers; tuned, what makes it faster without changing the result."""
    settings = case.settings
    stock: dict[str, Any] = {"remove_unused_columns": True, "logging_strategy": "steps"}
    if case.kind == TUNED:
        stock |= {"optim": "adamw_torch_fused", "torch_compile": case.compiled}
        if device.type == "cuda":  # on a CPU, workers of the loader would take cores from the training
            stock |= {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    else:
        stock |= {"optim": "adamw_torch", "logging_nan_inf_filter": True}
    return training_arguments(
        replace(settings, train=replace(settings.train, epochs=1, micro_batch_size=None)),
        device,
        case.precision,
        Path(directory),
        per_device_eval_batch_size=settings.train.eval_batch_size,
        learning_rate=settings.optim.lr,
        weight_decay=settings.optim.weight_decay,
        lr_scheduler_type=settings.scheduler.name,
        warmup_steps=settings.scheduler.warmup(case.steps),
        **stock,
    )


def _rows(split: EncodedSplit, pad_token_id: int, length: int | None) -> list[dict[str, Any]]:
    """Return a split as Trainer takes it, each row padded to ``length`` tokens where that is given."""
    rows = []
    for index in range(len(split)):
        ids = split.row(index).tolist()
        filler = (length or len(ids)) - len(ids)
        mask = [1] * len(ids) + [0] * filler
        rows.append({
            "input_ids": ids + [pad_token_id] * filler, "attention_mask": mask, "labels": int(split.labels[index])
        })  # fmt: skip
    return rows
