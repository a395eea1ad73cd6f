"""Engines side by side with plain Hugging Face Trainer, on this machine: ``python -m distilbench.benchmark``.

Every run is short, in a process of its own, from the same initial weights over the same batches; rows take turns, and
what is stated are medians over the repeats. This is the only place where speed is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from distilbench.cli import errors_in_one_line, run_command
from distilbench.composition import absolute_paths
from distilbench.settings import (
    BENCH_WINDOW,
    CONF,
    BenchmarkSettings,
    TrialSettings,
    register_schema,
    require,
    settings_from,
)

if TYPE_CHECKING:
    from rich.console import Console

    from distilbench.bench.cases import Case, Measured
    from distilbench.bench.roofline import Machine, StepCost
    from distilbench.trials.prepared import Prepared
from distilbench.bench.table import Benchmark, Row, write

register_schema(BenchmarkSettings)

START_SECONDS = 900.0
"""How long Trainers that are to run at once may wait for each other."""

TABLE_WIDTH = 158
"""Columns that the table takes, wherever it is shown: a narrower terminal wraps it, but hides no figure."""


@hydra.main(config_path=str(CONF), config_name="benchmark", execution_whitelist=["distilbench.composition.CheckFirst"])
def main(config: DictConfig) -> None:
    """Measure, print a table, and write it with all figures into the output directory."""
    with errors_in_one_line():
        settings = settings_from(config, BenchmarkSettings)
        require(settings.optim.name == "adamw", "optim.name", "adamw in a benchmark", settings.optim.name)
        benchmark(settings)


def benchmark(settings: BenchmarkSettings) -> Benchmark:
    """Measure all rows; raises :class:`SettingsError` for what the fused engine does not take."""
    from rich.console import Console

    from distilbench.engines import check_engine
    from distilbench.engines.device import driver_version, resolve_device
    from distilbench.trials.prepared import prepare

    prepared = prepare(settings)
    fused = replace(settings, engine=replace(settings.engine, name="fused"))
    check_engine(fused, prepared.model, prepared.precision)
    Path(settings.output.dir).mkdir(parents=True, exist_ok=True)  # not after minutes of measuring
    console = Console(width=TABLE_WIDTH)
    console.print(
        f"model {prepared.model.used.describe()}, data {prepared.text.used.describe()}, {prepared.device}", markup=False
    )
    cases = _cases(settings, prepared)
    if settings.train.precision == "auto" and all(case.settings.train.precision != "bf16" for _, case in cases):
        console.print("bf16 is left out: this device has no instructions for it", markup=False)
    rows = _measure_all(settings, cases, console)
    machine, work = _limit(settings, prepared, rows)
    done = Benchmark(
        settings, rows, machine, work, _timed_tokens(cases[0][1], settings), prepared.device,
        driver_version(resolve_device(settings.engine.device)), date.today().isoformat(), _versions(),
        prepared.model.used.describe(), prepared.text.used.describe(),
    )  # fmt: skip
    write(done, console)
    return done


def _versions() -> dict[str, str]:
    import torch

    from distilbench.trials.prepared import version_of

    libraries = {library: version_of(library) for library in ("torch", "transformers", "accelerate", "distilbench")}
    return libraries | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _cases(settings: BenchmarkSettings, prepared: Prepared) -> list[tuple[str, Case]]:
    """Return what is measured; the tuned Trainer comes in each way that may be the fastest (:func:`_tuned`)."""
    from distilbench.bench.cases import ENGINE, REPORTED, Case
    from distilbench.engines.device import resolve_device

    splits = _short_splits(settings, prepared)
    train = replace(settings.train, precision=prepared.precision)
    trial = replace(settings.trial, model=prepared.model.settings, train=train)
    trainer, fused = (replace(trial, engine=replace(trial.engine, name=name)) for name in ("trainer", "fused"))
    on_gpu = resolve_device(settings.engine.device).type == "cuda"
    tuned = [replace(trial, train=replace(train, precision=p)) for p in _precisions(settings, prepared)]
    return [
        ("HF as reported", Case(REPORTED, trial, splits)),
        *(case for each in tuned for case in _tuned(each, splits, settings.bench.processes, on_gpu)),
        ("trainer", Case(ENGINE, trainer, splits)),
        ("fused, alone", Case(ENGINE, fused, splits)),
        (f"fused, {settings.bench.trials} trials", Case(ENGINE, fused, splits, settings.bench.trials)),
    ]


def _tuned(trial: TrialSettings, splits: Any, processes: int, on_gpu: bool) -> list[tuple[str, Case]]:
    """Return the tuned Trainer in one precision: alone, on a GPU compiled as well, several at once if asked for."""
    from distilbench.bench.cases import TUNED, Case

    alone = Case(TUNED, trial, splits)
    compiled = [("HF tuned, compiled", replace(alone, compiled=True))] if on_gpu else []
    at_once = [(f"HF tuned, {processes} at once", replace(alone, trials=processes))] if processes else []
    return [("HF tuned", alone), *compiled, *at_once]


def _precisions(settings: BenchmarkSettings, prepared: Prepared) -> list[str]:
    """Return those that the tuned Trainer is tried in: what is fast differs, and bf16 costs some CPUs a hundredfold."""
    from distilbench.engines.device import has_native_bf16, resolve_device

    if settings.train.precision != "auto":
        return [prepared.precision]
    device = resolve_device(settings.engine.device)
    if has_native_bf16(device):
        return ["fp32", "bf16"]
    return ["fp32", "fp16"] if device.type == "cuda" else ["fp32"]


def _short_splits(settings: BenchmarkSettings, prepared: Prepared) -> Any:
    """Random examples for the steps of a run, and the whole text's vocabulary where nothing is evaluated."""
    import numpy as np

    from distilbench.data.tokens import random_part

    splits, bench = prepared.splits, settings.bench
    most = len(splits.train) // settings.train.batch_size - BENCH_WINDOW
    require(bench.steps <= most, "bench.steps", f"at most {most} for {len(splits.train):,} training examples",
            bench.steps, "lower it, or give more text")  # fmt: skip
    rng = np.random.default_rng(0)
    return replace(
        splits,
        train=random_part(splits.train, (bench.steps + BENCH_WINDOW) * settings.train.batch_size, rng),
        selection=random_part(splits.selection, min(bench.eval_examples, len(splits.selection)), rng),
        report=splits.train,
    )


def _measure_all(settings: BenchmarkSettings, cases: Sequence[tuple[str, Case]], console: Console) -> list[Row]:
    """Measure every row once a round; the slower ways to tune Trainer drop out after the first."""
    from distilbench.engines.device import resolve_device

    rows = [Row(name, case) for name, case in cases]
    for repeat in range(settings.bench.repeats):
        for place, row in enumerate(rows):
            run = _in_own_process(row.case)
            rows[place] = replace(row, runs=(*row.runs, run))
            milliseconds = 1000 * run.steps_seconds / settings.bench.steps / row.case.trials
            console.print(
                f"round {repeat + 1}/{settings.bench.repeats}: {row.name} ({row.precision}) "
                f"{milliseconds:.1f} ms a step and trial", markup=False, highlight=False,
            )  # fmt: skip
        if repeat == 0:
            rows = _without_slower_tuning(rows, resolve_device(settings.engine.device).type == "cuda")
    return rows


def _without_slower_tuning(rows: Sequence[Row], on_gpu: bool) -> list[Row]:
    """Keep the tuned Trainer in its fastest way, by wall time on a GPU, by CPU time elsewhere; and its several at once.

    Those run in the precision of the fastest, never compiled: each process would have to compile for itself.
    """
    from distilbench.bench.cases import TUNED

    def seconds(row: Row) -> float:
        return row.runs[0].steps_seconds if on_gpu else row.runs[0].steps_cpu_seconds

    tuned = min((row for row in rows if row.case.kind == TUNED and row.case.trials == 1), key=seconds)
    return [row for row in rows if row.case.kind != TUNED or row is tuned
            or (row.case.trials > 1 and row.precision == tuned.precision)]  # fmt: skip


def _in_own_process(case: Case) -> Measured:
    """Measure in a new process: no cache warmed by another row, and a peak of memory of its own.

    Trials of a stock Trainer run at once, each in a process, and begin their timed steps together.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from distilbench.bench.cases import ENGINE, measure, start_with, together

    context = multiprocessing.get_context("spawn")
    if case.kind == ENGINE or case.trials == 1:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(measure, case).result()
    barrier = context.Barrier(case.trials, timeout=START_SECONDS)
    with ProcessPoolExecutor(case.trials, mp_context=context, initializer=start_with, initargs=(barrier,)) as pool:
        runs = [pool.submit(measure, replace(case, trials=1)) for _ in range(case.trials)]
        return together([run.result() for run in runs])


def _limit(settings: BenchmarkSettings, prepared: Prepared, rows: Sequence[Row]) -> tuple[Machine, StepCost]:
    """Return the machine's rates, and what a step asks of them."""
    import numpy as np

    from distilbench.bench.roofline import measure_machine, step_cost_of
    from distilbench.engines.device import resolve_device
    from distilbench.models.build import build_model
    from distilbench.models.freezing import freeze

    device = resolve_device(settings.engine.device)
    machine = measure_machine(device, tuple(sorted({row.precision for row in rows})))
    model = build_model(prepared.model, prepared.splits.label_names, settings.seed)
    freeze(model, settings.freeze)
    timed = settings.bench.steps
    words = len(np.unique(prepared.splits.train.tokens))
    tokens = _timed_tokens(rows[0].case, settings) / timed
    return machine, step_cost_of(model, tokens, settings.train.batch_size, words)


def _timed_tokens(case: Case, settings: BenchmarkSettings) -> int:
    """Real tokens of the timed steps, taking the warm-up's share to be like theirs."""
    steps = settings.bench.steps
    return round(len(case.splits.train.tokens) * steps / (steps + BENCH_WINDOW))


def cli() -> None:
    """Run :func:`main` as the command line does."""
    run_command(main, absolute_paths)


if __name__ == "__main__":
    cli()
