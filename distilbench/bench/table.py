"""The benchmark's table: its rows, ratios, caption and files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from distilbench.settings import (
    BENCH_WINDOW,
    BenchmarkSettings,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from distilbench.bench.cases import Case, Measured
    from distilbench.bench.roofline import Machine, StepCost


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
    work: StepCost
    tokens: int
    device: str
    driver: str | None
    day: str
    versions: dict[str, str]
    model: str
    data: str


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
    from distilbench.bench.cases import TUNED

    tuned = next(row for row in done.rows if row.case.kind == TUNED and row.case.trials == 1)
    return [_line(done, row, tuned) for row in done.rows]


def _line(done: Benchmark, row: Row, tuned: Row) -> Line:
    from distilbench.bench.cases import ENGINE

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


def write(done: Benchmark, console: Console) -> None:
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
