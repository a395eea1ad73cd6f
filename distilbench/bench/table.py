"""The benchmark's table: its lines, ratios, caption and file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distilbench.bench.roofline import Machine, StepCost
from distilbench.bench.run import ENGINE, TUNED, Case, Measured
from distilbench.settings import BENCH_WINDOW, BenchmarkSettings


@dataclass(frozen=True)
class Row:
    """A line of the table: what is measured, and in the end each repeat's figures."""

    case: Case
    runs: list[Measured] = field(default_factory=list)

    def median(self, figure: Callable[[Measured], float]) -> float:
        """Return the median over the repeats."""
        return median(map(figure, self.runs))


@dataclass(frozen=True)
class Benchmark:
    """Everything that was measured.

    ``tokens`` are the real ones of a step of one trial; ``about`` says where: ``device``, ``driver``, ``day``,
    ``versions``, ``model`` and ``data``.
    """

    settings: BenchmarkSettings
    rows: list[Row]
    machine: Machine
    step_cost: StepCost
    tokens: float
    about: dict[str, Any]


def lines_of(done: Benchmark) -> list[dict[str, Any]]:
    """Return each row's figures: medians over the repeats, per trial, in seconds and bytes.

    ``speed`` and ``cpu_speed`` are the tuned Trainer's seconds a step to this row's, repeat by repeat: their median,
    least and greatest. ``sweep_seconds`` is what the benchmark's number of trials takes, ``times_limit`` how many times
    as long as the machine needs at least.
    """
    tuned = next(row for row in done.rows if row.case.kind == TUNED)
    return [_line(done, row, tuned) for row in done.rows]


def _line(done: Benchmark, row: Row, tuned: Row) -> dict[str, Any]:
    bench, case = done.settings.bench, row.case
    trials, pairs = case.trials, list(zip(tuned.runs, row.runs, strict=True))
    step_seconds = row.median(lambda run: run.steps_seconds) / trials / bench.steps
    whole = row.median(lambda run: run.steps_seconds + run.evaluation_seconds + run.rest_seconds)
    limit = done.step_cost.seconds(done.machine, case.precision, trials if case.kind == ENGINE else 1)
    return {
        "name": case.name,
        "precision": case.precision,
        "step_seconds": step_seconds,
        "step_cpu_seconds": row.median(lambda run: run.steps_cpu_seconds) / trials / bench.steps,
        "speed": _spread([t.steps_seconds * trials / r.steps_seconds for t, r in pairs]),
        "cpu_speed": _spread([t.steps_cpu_seconds * trials / r.steps_cpu_seconds for t, r in pairs]),
        "tokens_per_second": done.tokens / step_seconds,
        "evaluation_seconds": row.median(lambda run: run.evaluation_seconds) / trials,
        "rest_seconds": row.median(lambda run: run.rest_seconds) / trials,
        "trial_seconds": whole / trials,
        "sweep_seconds": whole if trials > 1 else whole * bench.trials,
        "peak_bytes": max(run.peak_bytes for run in row.runs),
        "times_limit": step_seconds / limit,
        "loss": row.median(lambda run: run.loss),
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


def caption_of(done: Benchmark) -> str:
    """Say what the figures mean and where they come from."""
    settings, machine, cost, about = done.settings, done.machine, done.step_cost, done.about
    rates = ", ".join(f"{p} {rate / 1e9:,.0f} GFLOP/s" for p, rate in machine.operations_per_second.items())
    driver = f" (driver {about['driver']}, CUDA {about['versions']['cuda']})" if about["driver"] else ""
    bench, size, layers = settings.bench, settings.train.batch_size, settings.freeze.layers
    return (
        f"Wall and CPU milliseconds a step and trial: medians of {bench.repeats} interleaved runs of {bench.steps} "
        f"steps after {BENCH_WINDOW}, batch {size}, freeze.layers={layers}, {done.tokens:.0f} tokens a "
        "step. HF: Hugging Face Trainer. x tuned: times faster than it is when tuned, median (range). "
        f"eval: {bench.eval_examples} examples at most. set-up: model, optimizer, compiling, recording, "
        f"warm-up. trial: all of it; sweep: {bench.trials} trials, one after another but for the batch. "
        f"x limit: times the least that {cost.operations / 1e9:.1f} GFLOP ({rates}) or "
        f"{cost.optimizer_bytes / 1e6:,.0f} MB of AdamW ({machine.bytes_per_second / 1e9:,.0f} GB/s) take, both rates "
        "measured here. loss: mean over all steps; dropout draws differ between engines. "
        f"{about['day']}, {about['device']}{driver}; torch {about['versions']['torch']}, "
        f"transformers {about['versions']['transformers']}; model {about['model']}; data {about['data']}."
    )


def write(done: Benchmark, console: Console) -> None:
    """Print the table; write JSON with every run."""
    table, lines = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)), lines_of(done)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for line in lines:
        table.add_row(*(write_figure(line) for write_figure in COLUMNS.values()))
    console.print(table)
    console.print(caption_of(done), markup=False, highlight=False)
    settings = done.settings
    figures = done.about | {
        "lines": lines,
        "runs": [{"name": row.case.name, "precision": row.case.precision, "trials": row.case.trials,
                  "repeats": [asdict(run) for run in row.runs]} for row in done.rows],
        "machine": asdict(done.machine), "work": asdict(done.step_cost), "caption": caption_of(done),
        "bench": asdict(settings.bench), "freeze": asdict(settings.freeze), "train": asdict(settings.train),
    }  # fmt: skip
    file = Path(settings.output.dir) / "benchmark.json"
    file.write_text(json.dumps(figures, indent=2) + "\n")
    console.print(f"written: {file}", markup=False, highlight=False, soft_wrap=True)
