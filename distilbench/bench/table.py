"""The benchmark's table: its rows, ratios, caption and file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from distilbench.settings import BENCH_WINDOW, BenchmarkSettings

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


def lines_of(done: Benchmark) -> list[dict[str, Any]]:
    """Return each row's figures: medians over the repeats, per trial, in seconds and bytes.

    ``speed`` and ``cpu_speed`` are the tuned Trainer's seconds a step to this row's, repeat by repeat: their median,
    least and greatest. ``sweep_seconds`` is what the benchmark's number of trials takes, ``times_limit`` how many times
    as long as the machine needs at least.
    """
    from distilbench.bench.cases import TUNED

    tuned = next(row for row in done.rows if row.case.kind == TUNED and row.case.trials == 1)
    return [_line(done, row, tuned) for row in done.rows]


def _line(done: Benchmark, row: Row, tuned: Row) -> dict[str, Any]:
    from distilbench.bench.cases import ENGINE

    steps, trials = done.settings.bench.steps, row.case.trials
    step_seconds = median(run.steps_seconds for run in row.runs) / trials / steps
    whole = median(run.steps_seconds + run.evaluation_seconds + run.rest_seconds for run in row.runs)
    pairs = list(zip(tuned.runs, row.runs, strict=True))
    limit = done.work.seconds(done.machine, row.precision, trials if row.case.kind == ENGINE else 1)
    return {
        "name": row.name,
        "precision": row.precision,
        "step_seconds": step_seconds,
        "step_cpu_seconds": median(run.steps_cpu_seconds for run in row.runs) / trials / steps,
        "speed": _spread([t.steps_seconds * trials / r.steps_seconds for t, r in pairs]),
        "cpu_speed": _spread([t.steps_cpu_seconds * trials / r.steps_cpu_seconds for t, r in pairs]),
        "tokens_per_second": done.tokens / steps / step_seconds,
        "evaluation_seconds": median(run.evaluation_seconds for run in row.runs) / trials,
        "rest_seconds": median(run.rest_seconds for run in row.runs) / trials,
        "trial_seconds": whole / trials,
        "sweep_seconds": whole if trials > 1 else whole * done.settings.bench.trials,
        "peak_bytes": max(run.peak_bytes for run in row.runs),
        "times_limit": step_seconds / limit,
        "loss": median(run.loss for run in row.runs),
    }


def _spread(ratios: Sequence[float]) -> tuple[float, float, float]:
    return median(ratios), min(ratios), max(ratios)


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "": "{name} ({precision})".format_map,
    "wall ms": lambda line: f"{1000 * line['step_seconds']:.1f}",
    "CPU ms": lambda line: f"{1000 * line['step_cpu_seconds']:.1f}",
    "x tuned, wall": lambda line: "{:.2f} ({:.2f}-{:.2f})".format(*line["speed"]),
    "x tuned, CPU": lambda line: "{:.2f} ({:.2f}-{:.2f})".format(*line["cpu_speed"]),
    "tokens/s": "{tokens_per_second:,.0f}".format_map,
    "eval s": "{evaluation_seconds:.2f}".format_map,
    "set-up s": "{rest_seconds:.2f}".format_map,
    "trial s": "{trial_seconds:.1f}".format_map,
    "sweep s": "{sweep_seconds:.1f}".format_map,
    "peak MB": lambda line: f"{line['peak_bytes'] / 2**20:,.0f}",
    "x limit": "{times_limit:.1f}".format_map,
    "loss": "{loss:.4f}".format_map,
}


def table_of(done: Benchmark) -> Table:
    """Return the table that is printed."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for line in lines_of(done):
        table.add_row(*(write_figure(line) for write_figure in COLUMNS.values()))
    return table


def caption_of(done: Benchmark) -> str:
    """Say what the figures mean and where they come from."""
    settings, machine, work = done.settings, done.machine, done.work
    rates = ", ".join(f"{p} {rate / 1e9:,.0f} GFLOP/s" for p, rate in machine.operations_per_second.items())
    driver = f" (driver {done.driver}, CUDA {done.versions['cuda']})" if done.driver else ""
    bench, size, layers = settings.bench, settings.train.batch_size, settings.freeze.layers
    return (
        f"Wall and CPU milliseconds a step and trial: medians of {bench.repeats} interleaved runs of {bench.steps} "
        f"steps after {BENCH_WINDOW}, batch {size}, freeze.layers={layers}, {done.tokens / bench.steps:.0f} tokens a "
        "step. HF: Hugging Face Trainer. x tuned: times faster than it is when tuned, median (range). "
        f"eval: {bench.eval_examples} examples at most. set-up: model, optimizer, compiling, recording, "
        f"warm-up. trial: all of it; sweep: {bench.trials} trials, one after another but for the batch. "
        f"x limit: times the least that {work.operations / 1e9:.1f} GFLOP ({rates}) or "
        f"{work.optimizer_bytes / 1e6:,.0f} MB of AdamW ({machine.bytes_per_second / 1e9:,.0f} GB/s) take, both rates "
        "measured here. loss: mean over all steps; dropout draws differ between engines. "
        f"{done.day}, {done.device}{driver}; torch {done.versions['torch']}, "
        f"transformers {done.versions['transformers']}; "
        f"model {done.model}; data {done.data}."
    )


def write(done: Benchmark, console: Console) -> None:
    """Print the table; write JSON with every run."""
    console.print(table_of(done))
    console.print(caption_of(done), markup=False, highlight=False)
    figures = {
        "lines": lines_of(done),
        "runs": [{"name": row.name, "precision": row.precision, "trials": row.case.trials,
                  "repeats": [asdict(run) for run in row.runs]} for row in done.rows],
        "machine": asdict(done.machine), "work": asdict(done.work), "tokens_timed": done.tokens,
        "device": done.device, "driver": done.driver, "day": done.day, "versions": done.versions,
        "model": done.model, "data": done.data,
        "bench": asdict(done.settings.bench), "freeze": asdict(done.settings.freeze),
        "train": asdict(done.settings.train), "caption": caption_of(done),
    }  # fmt: skip
    file = Path(done.settings.output.dir) / "benchmark.json"
    file.write_text(json.dumps(figures, indent=2) + "\n")
    console.print(f"written: {file}", markup=False, highlight=False, soft_wrap=True)
