"""The cases of a benchmark, stock Hugging Face Trainer and our engines, and how each is timed in a new process."""

from __future__ import annotations

import multiprocessing
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, NamedTuple

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

from distilbench.data.tokens import EncodedSplit, EncodedSplits, random_part
from distilbench.engines import engine_for
from distilbench.engines.device import (
    has_native_bf16,
    peak_memory,
    reset_peak_memory,
    resolve_device,
    single_process,
)
from distilbench.engines.trainer import training_arguments
from distilbench.models.build import build_model, load_tokenizer
from distilbench.models.freezing import freeze
from distilbench.models.resolve import resolve_model
from distilbench.results import Evaluation, Status, StepRecord
from distilbench.settings import BENCH_WINDOW, BenchmarkSettings, BenchSettings, TrialSettings, require

REPORTED, TUNED, ENGINE = "reported", "tuned", "engine"
"""Trainer as in the course report, Trainer tuned, and the engine that the settings name."""

START_SECONDS = 900.0
"""How long concurrent Trainers may wait for each other before their timed steps."""


@dataclass(frozen=True)
class Case:
    """One row: ``trials`` trials with these settings (but different learning rates), one epoch over ``splits.train``.

    Several trials of a stock Trainer run in as many processes. ``compiled``: Trainer compiles its model.
    """

    name: str
    kind: str
    settings: TrialSettings
    splits: EncodedSplits
    trials: int = 1
    compiled: bool = False

    @property
    def precision(self) -> str:
        """The precision of its matrix products."""
        return self.settings.train.precision

    @property
    def steps(self) -> int:
        """Steps of the epoch, including the untimed ones at the start."""
        return len(self.splits.train) // self.settings.train.batch_size


def cases_of(
    settings: BenchmarkSettings, trial: TrialSettings, splits: EncodedSplits, device: torch.device
) -> list[Case]:
    """Return the cases to measure for ``trial`` on the ``splits`` of :func:`short_splits`, in the table's order.

    If Trainer can be tuned in several ways (precision; on a GPU, compilation), run each once and keep the fastest.
    """
    bench, ways = settings.bench, []
    for precision in precisions_to_try(settings.train.precision, trial, device):
        plain = Case("HF tuned", TUNED, replace(trial, train=replace(trial.train, precision=precision)), splits)
        compiled = replace(plain, name="HF tuned, compiled", compiled=True)
        ways += [plain, compiled] if device.type == "cuda" else [plain]
    tuned = ways[0] if len(ways) == 1 else min(ways, key=lambda case: run_case(case).steps_seconds)
    at_once = replace(tuned, name=f"HF tuned, {bench.processes} at once", trials=bench.processes, compiled=False)
    trainer, fused = (replace(trial, engine=replace(trial.engine, name=name)) for name in ("trainer", "fused"))
    return [
        Case("HF as reported", REPORTED, trial, splits),
        tuned,
        *([at_once] if bench.processes else []),  # not compiled: each process would compile separately
        Case("trainer", ENGINE, trainer, splits),
        Case("fused, alone", ENGINE, fused, splits),
        Case(f"fused, {bench.trials} trials", ENGINE, fused, splits, bench.trials),
    ]


def precisions_to_try(asked: str, trial: TrialSettings, device: torch.device) -> list[str]:
    """Return the precisions to try for the tuned Trainer; without native bf16, bf16 can be a hundred times slower."""
    if asked != "auto":
        return [trial.train.precision]
    if has_native_bf16(device):
        return ["fp32", "bf16"]
    return ["fp32", "fp16"] if device.type == "cuda" else ["fp32"]


def short_splits(splits: EncodedSplits, bench: BenchSettings, batch_size: int) -> EncodedSplits:
    """Return random examples for a run; ``report``, which is not evaluated, is all of train, for its vocabulary."""
    max_steps = len(splits.train) // batch_size - BENCH_WINDOW
    require(bench.steps <= max_steps, "bench.steps", f"at most {max_steps} for {len(splits.train):,} training examples",
            bench.steps, "lower it, or give more text")  # fmt: skip
    rng = np.random.default_rng(0)
    return replace(
        splits,
        train=random_part(splits.train, (bench.steps + BENCH_WINDOW) * batch_size, rng),
        selection=random_part(splits.selection, min(bench.eval_examples, len(splits.selection)), rng),
        report=splits.train,
    )


class Measured(NamedTuple):
    """What a run took for all of its trials together: wall seconds, CPU seconds (of all threads) and bytes.

    ``steps_seconds`` covers the timed steps; ``rest_seconds`` everything except these and the evaluation: model,
    optimizer, compiling, graph capture, untimed steps. ``loss`` is the first trial's mean training loss over all steps.
    """

    steps_seconds: float
    steps_cpu_seconds: float
    evaluation_seconds: float
    rest_seconds: float
    peak_bytes: int
    loss: float


def run_case(case: Case) -> Measured:
    """Measure a case in a new process, with cold caches and its own peak memory.

    Trials of a stock Trainer run concurrently, each in its own process, and start their timed steps together.
    """
    context = multiprocessing.get_context("spawn")
    processes = 1 if case.kind == ENGINE else case.trials
    barrier = context.Barrier(processes, timeout=START_SECONDS)
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_START.append, initargs=(barrier,)) as pool:
        each = replace(case, trials=case.trials // processes)
        runs = [pool.submit(_measure, each) for _ in range(processes)]
        return combine_runs([run.result() for run in runs])


_START: list[Barrier] = []
"""In a measuring process: the barrier at which concurrent processes wait after their untimed steps."""


def combine_runs(runs: list[Measured]) -> Measured:
    """Combine processes that started together: the longest wall times, sums of CPU time and memory."""
    steps, steps_cpu, evaluation, rest, peak, loss = zip(*runs, strict=True)
    return Measured(max(steps), sum(steps_cpu), max(evaluation), max(rest), sum(peak), loss[0])


def _measure(case: Case) -> Measured:
    device = resolve_device(case.settings.engine.device)
    reset_peak_memory(device)
    began, clock = time.perf_counter(), _Clock(case.steps)
    loss = (_train_engine if case.kind == ENGINE else _train_stock)(case, device, clock)
    seconds, peak, status = time.perf_counter() - began, peak_memory(device), Path("/proc/self/status")
    if device.type == "cpu" and status.exists():  # Linux records the peak of a process
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        peak = int(found[1]) * 1024 if found else peak
    marks = np.array([clock.marks[name] for name in ("warm", "trained", "evaluated")])  # (3, wall and CPU seconds)
    (steps, steps_cpu), (evaluation, _) = np.diff(marks, axis=0).tolist()
    return Measured(steps, steps_cpu, evaluation, seconds - steps - evaluation, peak, loss)


class _Clock(TrainerCallback):
    """Observer and callback: reads both clocks when the untimed steps, all steps and the evaluation have ended.

    It stops an engine's trials after their evaluation. Of several trials, the first to end its untimed steps counts,
    and the last to end its steps and its evaluation.
    """

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step
        self.marks: dict[str, tuple[float, float]] = {}
        self.losses: list[float] = []

    def note(self, name: str) -> None:
        """Read wall and CPU seconds."""
        self.marks[name] = time.perf_counter(), time.process_time()

    def on_step(self, trial: int, record: StepRecord) -> None:
        """Note the end of an engine's untimed steps and of its last step."""
        if record.step == self.last_step:
            self.note("trained")
        elif record.step == BENCH_WINDOW and "warm" not in self.marks:
            self.note("warm")
        if trial == 0:
            self.losses.append(record.loss)

    def on_evaluation(self, trial: int, evaluation: Evaluation) -> bool:
        """Note the end of the evaluation and stop the trial: what follows does not depend on the engine."""
        self.note("evaluated")
        return True

    def wants_checkpoint(self) -> bool:
        """Return False: no checkpoint is timed."""
        return False

    def on_checkpoint(self) -> None:
        """Do nothing."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the end of a Trainer's untimed steps and of its last step."""
        if state.global_step in (BENCH_WINDOW, self.last_step):
            if args.device.type != "cpu":
                torch.accelerator.synchronize()
            if state.global_step == BENCH_WINDOW:
                for barrier in _START:
                    barrier.wait()
            self.note("warm" if state.global_step == BENCH_WINDOW else "trained")


def _train_engine(case: Case, device: torch.device, clock: _Clock) -> float:
    """Train with our engine and return the mean loss; the trials are a small grid over the learning rate."""
    settings = case.settings
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
    return float(np.mean(clock.losses))


def _train_stock(case: Case, device: torch.device, clock: _Clock) -> float:
    """Train like :func:`_train_engine`, but with stock Trainer: from the same weights, on the same batches."""
    settings, splits, tuned = case.settings, case.splits, case.kind == TUNED
    resolved = resolve_model(settings.model)
    model = build_model(resolved, splits.label_names, settings.seed)
    freeze(model, settings.freeze)
    length = None if tuned else settings.train.max_length
    pad_multiple = 8 if device.type == "cuda" else None  # multiples of 8 suit a GPU's tensor cores
    tokenizer = load_tokenizer(resolved)
    padding = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=pad_multiple)
    with single_process(), tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model=model,
            args=_stock_arguments(case, device, directory),
            train_dataset=_rows(splits.train, tokenizer, length),
            eval_dataset=_rows(splits.selection, tokenizer, length),
            data_collator=padding if tuned else default_data_collator,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
        tidied = time.perf_counter() - clock.marks["trained"][0]
        trainer.evaluate()
        clock.note("evaluated")
    wall, cpu = clock.marks["evaluated"]  # Trainer's clean-up before the evaluation is not counted
    clock.marks["evaluated"] = wall - tidied, cpu
    return loss


def _stock_arguments(case: Case, device: torch.device, directory: str) -> TrainingArguments:
    """Return Trainer's defaults with the report's values; if tuned, with what is faster at the same result."""
    settings = case.settings
    stock: dict[str, Any] = {"remove_unused_columns": True, "logging_strategy": "steps"}
    if case.kind == TUNED:
        stock |= {"optim": "adamw_torch_fused", "torch_compile": case.compiled}
        if device.type == "cuda":  # on a CPU, loader workers would compete with the training for cores
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


def _rows(split: EncodedSplit, tokenizer: Any, length: int | None) -> list[dict[str, Any]]:
    """Return a split as a dataset for Trainer, each row padded to ``length`` tokens, if given."""
    padding = "max_length" if length else False
    rows = ({"input_ids": split.row(i).tolist()} for i in range(len(split)))
    return [
        tokenizer.pad(row, padding, length) | {"labels": label}
        for row, label in zip(rows, split.labels.tolist(), strict=True)
    ]
