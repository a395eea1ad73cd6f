"""Engines side by side with plain Hugging Face Trainer, on this machine: ``python -m distilbench.benchmark``.

Every run is short, in a process of its own, from the same initial weights over the same batches; rows take turns, and
what is stated are medians over the repeats. This is the only place where speed is claimed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from distilbench.settings import (
    BENCH_WINDOW,
    CONF,
    BenchmarkSettings,
    SettingsError,
    TrialSettings,
    register_schema,
    require,
    settings_from,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from distilbench.limits import Machine, Work
    from distilbench.peers import Case, Measured
    from distilbench.trials import Prepared

register_schema(BenchmarkSettings)

START_SECONDS = 900.0
"""How long Trainers that are to run at once may wait for each other."""
TABLE_WIDTH = 158
"""Columns that the table takes, wherever it is shown: a narrower terminal wraps it, but hides no figure."""


@hydra.main(config_path=str(CONF), config_name="benchmark", execution_whitelist=["distilbench.composition.CheckFirst"])
def main(config: DictConfig) -> None:
    """Measure, print a table, and write it with a plot and all figures into the output directory."""
    try:
        settings = settings_from(config, BenchmarkSettings)
        require(settings.optim.name == "adamw", "optim.name", "adamw in a benchmark", settings.optim.name)
        benchmark(settings)
    except SettingsError as error:
        print(f"distilbench: {error}", file=sys.stderr)
        sys.exit(2)


@dataclass(frozen=True)
class Row:
    """A line of the table: what is measured, and in the end each repeat's figures."""

    name: str
    case: Case
    runs: tuple[Measured, ...] = ()

    @property
    def precision(self) -> str:
        """What its products are computed in."""
        return self.case.settings.train.precision


@dataclass(frozen=True)
class Benchmark:
    """Everything that was measured. ``tokens`` are the real ones of the timed steps of one trial."""

    settings: BenchmarkSettings
    rows: list[Row]
    machine: Machine
    work: Work
    tokens: int
    device: str
    driver: str | None
    day: str
    versions: dict[str, str]
    model: str
    data: str


def benchmark(settings: BenchmarkSettings) -> Benchmark:
    """Measure all rows; raises :class:`SettingsError` for what the fused engine does not take."""
    from rich.console import Console

    from distilbench.device import driver_version, resolve_device
    from distilbench.engines import check_engine
    from distilbench.trials import prepare

    prepared = prepare(settings)
    check_engine(replace(settings.engine, name="fused"), prepared.model, prepared.precision)
    Path(settings.output.dir).mkdir(parents=True, exist_ok=True)  # not after minutes of measuring
    console = Console(width=TABLE_WIDTH)
    console.print(
        f"model {prepared.model.used.describe()}, data {prepared.text.used.describe()}, {prepared.device}", markup=False
    )
    cases = _cases(settings, prepared)
    rows = _measure_all(settings, cases, console)
    machine, work = _limit(settings, prepared, rows)
    done = Benchmark(
        settings, rows, machine, work, _timed_tokens(cases[0][1], settings), prepared.device,
        driver_version(resolve_device(settings.engine.device)), date.today().isoformat(), _versions(),
        prepared.model.used.describe(), prepared.text.used.describe(),
    )  # fmt: skip
    _write(done, console)
    return done


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import torch

    libraries = {library: version(library) for library in ("torch", "transformers", "accelerate", "distilbench")}
    return libraries | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _cases(settings: BenchmarkSettings, prepared: Prepared) -> list[tuple[str, Case]]:
    """What is measured; the tuned Trainer comes in each way that may be the fastest (:func:`_tuned`)."""
    from distilbench.device import resolve_device
    from distilbench.peers import ENGINE, REPORTED, Case

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
    """The tuned Trainer in one precision: alone, on a GPU compiled as well, and several at once where asked for."""
    from distilbench.peers import TUNED, Case

    alone = Case(TUNED, trial, splits)
    compiled = [("HF tuned, compiled", replace(alone, compiled=True))] if on_gpu else []
    at_once = [(f"HF tuned, {processes} at once", replace(alone, trials=processes))] if processes else []
    return [("HF tuned", alone), *compiled, *at_once]


def _precisions(settings: BenchmarkSettings, prepared: Prepared) -> list[str]:
    """Those that the tuned Trainer is tried in: bf16 helps on some devices only."""
    from distilbench.device import resolve_device, resolve_precision

    if settings.train.precision != "auto":
        return [prepared.precision]
    try:
        return ["fp32", resolve_precision("bf16", resolve_device(settings.engine.device))]
    except SettingsError:
        return ["fp32"]


def _short_splits(settings: BenchmarkSettings, prepared: Prepared) -> Any:
    """Random examples for the steps of a run, and the whole text's vocabulary where nothing is evaluated."""
    import numpy as np

    from distilbench.probe import random_part

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
    from distilbench.device import resolve_device

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
    from distilbench.peers import TUNED

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

    from distilbench.peers import ENGINE, measure, start_with, together

    context = multiprocessing.get_context("spawn")
    if case.kind == ENGINE or case.trials == 1:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(measure, case).result()
    barrier = context.Barrier(case.trials, timeout=START_SECONDS)
    with ProcessPoolExecutor(case.trials, mp_context=context, initializer=start_with, initargs=(barrier,)) as pool:
        runs = [pool.submit(measure, replace(case, trials=1)) for _ in range(case.trials)]
        return together([run.result() for run in runs])


def _limit(settings: BenchmarkSettings, prepared: Prepared, rows: Sequence[Row]) -> tuple[Machine, Work]:
    """The machine's rates, and what a step asks of them."""
    import numpy as np

    from distilbench.device import resolve_device
    from distilbench.freezing import freeze
    from distilbench.limits import measure_machine, work_of
    from distilbench.model import build_model

    device = resolve_device(settings.engine.device)
    machine = measure_machine(device, tuple(sorted({row.precision for row in rows})))
    model = build_model(prepared.model, prepared.splits.label_names, settings.seed)
    freeze(model, settings.freeze)
    timed = settings.bench.steps
    words = len(np.unique(prepared.splits.train.tokens))
    tokens = _timed_tokens(rows[0].case, settings) / timed
    return machine, work_of(model, tokens, settings.train.batch_size, words)


def _timed_tokens(case: Case, settings: BenchmarkSettings) -> int:
    """Real tokens of the timed steps, taking the warm-up's share to be like theirs."""
    steps = settings.bench.steps
    return round(len(case.splits.train.tokens) * steps / (steps + BENCH_WINDOW))


@dataclass(frozen=True)
class Line:
    """A row's figures: medians over the repeats, per trial, in seconds; ratios are (median, least, greatest)."""

    name: str
    precision: str
    step_seconds: float
    step_cpu_seconds: float
    speed: tuple[float, float, float]
    """Of the tuned Trainer's wall seconds a step to this row's, repeat by repeat."""
    cpu_speed: tuple[float, float, float]
    tokens_per_second: float
    evaluation_seconds: float
    rest_seconds: float
    trial_seconds: float
    sweep_seconds: float
    peak_bytes: int
    times_limit: float
    loss: float


def lines_of(done: Benchmark) -> list[Line]:
    """The table's figures."""
    from distilbench.peers import TUNED

    tuned = next(row for row in done.rows if row.case.kind == TUNED and row.case.trials == 1)
    return [_line(done, row, tuned) for row in done.rows]


def _line(done: Benchmark, row: Row, tuned: Row) -> Line:
    from distilbench.peers import ENGINE

    bench, trials = done.settings.bench, row.case.trials
    steps = median(run.steps_seconds for run in row.runs) / trials
    whole = median(run.steps_seconds + run.evaluation_seconds + run.rest_seconds for run in row.runs)
    pairs = list(zip(tuned.runs, row.runs, strict=True))
    limit = done.work.seconds(done.machine, row.precision, trials if row.case.kind == ENGINE else 1)
    return Line(
        name=row.name,
        precision=row.precision,
        step_seconds=steps / bench.steps,
        step_cpu_seconds=median(run.steps_cpu_seconds for run in row.runs) / trials / bench.steps,
        speed=_spread([t.steps_seconds * trials / r.steps_seconds for t, r in pairs]),
        cpu_speed=_spread([t.steps_cpu_seconds * trials / r.steps_cpu_seconds for t, r in pairs]),
        tokens_per_second=done.tokens / steps,
        evaluation_seconds=median(run.evaluation_seconds for run in row.runs) / trials,
        rest_seconds=median(run.rest_seconds for run in row.runs) / trials,
        trial_seconds=whole / trials,
        sweep_seconds=whole if trials > 1 else whole * bench.trials,
        peak_bytes=max(run.peak_bytes for run in row.runs),
        times_limit=steps / bench.steps / limit,
        loss=median(run.loss for run in row.runs),
    )


def _spread(ratios: Sequence[float]) -> tuple[float, float, float]:
    return median(ratios), min(ratios), max(ratios)


def table_of(done: Benchmark) -> Table:
    """The table that is printed."""
    from rich import box
    from rich.table import Table

    bench = done.settings.bench
    columns = ("", "wall ms", "CPU ms", "x tuned, wall", "x tuned, CPU", "tokens/s", "eval s", "set-up s", "trial s",
               f"{bench.trials} trials s", "peak MB", "x limit", "loss")  # fmt: skip
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for line in lines_of(done):
        table.add_row(
            f"{line.name} ({line.precision})", f"{1000 * line.step_seconds:.1f}", f"{1000 * line.step_cpu_seconds:.1f}",
            _ratio(line.speed), _ratio(line.cpu_speed), f"{line.tokens_per_second:,.0f}",
            f"{line.evaluation_seconds:.2f}", f"{line.rest_seconds:.2f}", f"{line.trial_seconds:.1f}",
            f"{line.sweep_seconds:.1f}", f"{line.peak_bytes / 2**20:,.0f}", f"{line.times_limit:.1f}",
            f"{line.loss:.4f}",
        )  # fmt: skip
    return table


def _ratio(spread: tuple[float, float, float]) -> str:
    middle, low, high = spread
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def caption_of(done: Benchmark) -> str:
    """What the figures mean and where they come from."""
    settings, machine, work = done.settings, done.machine, done.work
    rates = ", ".join(f"{p} {rate / 1e9:,.0f} GFLOP/s" for p, rate in machine.operations_per_second.items())
    driver = f" (driver {done.driver}, CUDA {done.versions['cuda']})" if done.driver else ""
    bench, size, layers = settings.bench, settings.train.batch_size, settings.freeze.layers
    return (
        f"Wall and CPU milliseconds a step and trial: medians of {bench.repeats} interleaved runs of {bench.steps} "
        f"steps after {BENCH_WINDOW}, batch {size}, freeze.layers={layers}, {done.tokens / bench.steps:.0f} tokens a "
        "step. HF: Hugging Face Trainer. x tuned: times faster than it is when tuned, median (range). "
        f"eval: {bench.eval_examples} examples at most. set-up: model, optimizer, compiling, recording, "
        "warm-up. trial: all of it; its sweep runs one trial after another but for the batch. "
        f"x limit: times the least that {work.operations / 1e9:.1f} GFLOP ({rates}) or "
        f"{work.optimizer_bytes / 1e6:,.0f} MB of AdamW ({machine.bytes_per_second / 1e9:,.0f} GB/s) take, both rates "
        "measured here. loss: mean over all steps; dropout draws differ between engines. "
        f"{done.day}, {done.device}{driver}; torch {done.versions['torch']}, "
        f"transformers {done.versions['transformers']}; "
        f"model {done.model}; data {done.data}."
    )


def _write(done: Benchmark, console: Console) -> None:
    """Print the table; write JSON with every run, and a plot."""
    directory = Path(done.settings.output.dir)
    console.print(table_of(done))
    console.print(caption_of(done), markup=False, highlight=False)
    figures = {
        "lines": [asdict(line) for line in lines_of(done)],
        "runs": [{"name": row.name, "precision": row.precision, "trials": row.case.trials,
                  "repeats": [asdict(run) for run in row.runs]} for row in done.rows],
        "machine": asdict(done.machine), "work": asdict(done.work), "tokens_timed": done.tokens,
        "device": done.device, "driver": done.driver, "day": done.day, "versions": done.versions,
        "model": done.model, "data": done.data,
        "bench": asdict(done.settings.bench), "freeze": asdict(done.settings.freeze),
        "train": asdict(done.settings.train), "caption": caption_of(done),
    }  # fmt: skip
    (directory / "benchmark.json").write_text(json.dumps(figures, indent=2) + "\n")
    _plot(done).savefig(directory / "benchmark.png", dpi=150)
    console.print(f"written: {directory}/benchmark.json, benchmark.png", markup=False, highlight=False, soft_wrap=True)


def _plot(done: Benchmark) -> Any:
    """Bars of wall time a step and trial with every repeat as a dot, beside the limit, as a matplotlib Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    bench = done.settings.bench
    for place, (row, line) in enumerate(zip(done.rows, lines_of(done), strict=True)):
        axes.barh(place, 1000 * line.step_seconds, color="tab:blue", alpha=0.6)
        dots = [1000 * run.steps_seconds / bench.steps / row.case.trials for run in row.runs]
        axes.plot(dots, [place] * len(dots), ".", color="black", markersize=4)
        limit = 1000 * line.step_seconds / line.times_limit
        axes.plot([limit, limit], [place - 0.4, place + 0.4], color="tab:red", label="limit" if place == 0 else None)
    axes.set_yticks(range(len(done.rows)), [f"{row.name} ({row.precision})" for row in done.rows])
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds a step and trial (wall)", xlim=(0, None))
    axes.set_title(f"batch {done.settings.train.batch_size}, freeze.layers={done.settings.freeze.layers}", loc="left")
    axes.legend(loc="lower right")
    return figure


if __name__ == "__main__":
    main()
