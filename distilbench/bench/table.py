"""The benchmark's table: rows, ratios, caption and JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pandas import DataFrame
from rich import box
from rich.console import Console
from rich.table import Table

from distilbench.bench.roofline import Machine, StepCost
from distilbench.bench.run import ENGINE, TUNED, Case, Measured
from distilbench.settings import BENCH_WINDOW, BenchmarkSettings


@dataclass(frozen=True)
class Benchmark:
    """All measurements: every repeat of each case.

    ``tokens`` is the number of real tokens per step and trial; ``about`` has ``device``, ``driver``, ``day``,
    ``versions``, ``model`` and ``data``.
    """

    settings: BenchmarkSettings
    runs: list[tuple[Case, list[Measured]]]
    machine: Machine
    step_cost: StepCost
    tokens: float
    about: dict[str, Any]


def summarize_cases(benchmark: Benchmark) -> list[dict[str, Any]]:
    """Return each case's figures: medians over the repeats, per trial, in seconds; the peak in bytes.

    ``speed`` and ``cpu_speed`` are ratios of the tuned Trainer's seconds to this case's, repeat by repeat: median,
    minimum and maximum. ``sweep_seconds`` is the time for the benchmark's number of trials, ``times_limit`` the ratio
    of the step time to the least time that this machine could need.
    """
    bench = benchmark.settings.bench
    tuned = DataFrame(next(runs for case, runs in benchmark.runs if case.kind == TUNED))
    lines = []
    for case, runs in benchmark.runs:
        all_of, trials = DataFrame(runs), case.trials
        per_trial, medians = all_of / trials, (all_of / trials).median()
        trial_seconds = float(per_trial[["steps_seconds", "evaluation_seconds", "rest_seconds"]].sum(axis=1).median())
        step_seconds = float(medians["steps_seconds"]) / bench.steps
        limit = benchmark.step_cost.seconds(benchmark.machine, case.precision, trials if case.kind == ENGINE else 1)
        ratios = (tuned / per_trial)[["steps_seconds", "steps_cpu_seconds"]].agg(["median", "min", "max"])
        lines.append({
            "name": case.name,
            "precision": case.precision,
            "step_seconds": step_seconds,
            "step_cpu_seconds": float(medians["steps_cpu_seconds"]) / bench.steps,
            "speed": ratios["steps_seconds"].tolist(),
            "cpu_speed": ratios["steps_cpu_seconds"].tolist(),
            "tokens_per_second": benchmark.tokens / step_seconds,
            "evaluation_seconds": float(medians["evaluation_seconds"]),
            "rest_seconds": float(medians["rest_seconds"]),
            "trial_seconds": trial_seconds,
            "sweep_seconds": trial_seconds * (trials if trials > 1 else bench.trials),
            "peak_bytes": int(all_of["peak_bytes"].max()),
            "times_limit": step_seconds / limit,
            "loss": float(all_of["loss"].median()),
        })  # fmt: skip
    return lines


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


def caption_of(benchmark: Benchmark) -> str:
    """Return the caption, which says what the figures mean and how they were measured."""
    settings, machine, cost, about = benchmark.settings, benchmark.machine, benchmark.step_cost, benchmark.about
    rates = ", ".join(f"{p} {rate / 1e9:,.0f} GFLOP/s" for p, rate in machine.operations_per_second.items())
    driver = f" (driver {about['driver']}, CUDA {about['versions']['cuda']})" if about["driver"] else ""
    bench, size, layers = settings.bench, settings.train.batch_size, settings.freeze.layers
    return (
        f"Wall and CPU milliseconds a step and trial: medians of {bench.repeats} interleaved runs of {bench.steps} "
        f"steps after {BENCH_WINDOW}, batch {size}, freeze.layers={layers}, {benchmark.tokens:.0f} tokens a "
        "step. HF: Hugging Face Trainer. x tuned: times faster than it is when tuned, median (range). "
        f"eval: {bench.eval_examples} examples at most. set-up: model, optimizer, compiling, recording, "
        f"warm-up. trial: all of it; sweep: {bench.trials} trials, one after another but for the batch. "
        f"x limit: times the least that {cost.operations / 1e9:.1f} GFLOP ({rates}) or "
        f"{cost.optimizer_bytes / 1e6:,.0f} MB of AdamW ({machine.bytes_per_second / 1e9:,.0f} GB/s) take, both rates "
        "measured here. loss: mean over all steps; dropout draws differ between engines. "
        f"{about['day']}, {about['device']}{driver}; torch {about['versions']['torch']}, "
        f"transformers {about['versions']['transformers']}; model {about['model']}; data {about['data']}."
    )


def write(benchmark: Benchmark, console: Console) -> None:
    """Print the table and write every run to ``benchmark.json``."""
    table, lines = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)), summarize_cases(benchmark)
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for line in lines:
        table.add_row(*(write_figure(line) for write_figure in COLUMNS.values()))
    console.print(table)
    console.print(caption_of(benchmark), markup=False, highlight=False)
    settings = benchmark.settings
    figures = benchmark.about | {
        "lines": lines,
        "runs": [{"name": case.name, "precision": case.precision, "trials": case.trials,
                  "repeats": [run._asdict() for run in runs]} for case, runs in benchmark.runs],
        "machine": asdict(benchmark.machine), "work": asdict(benchmark.step_cost), "caption": caption_of(benchmark),
        "bench": asdict(settings.bench), "freeze": asdict(settings.freeze), "train": asdict(settings.train),
    }  # fmt: skip
    file = Path(settings.output.dir) / "benchmark.json"
    file.write_text(json.dumps(figures, indent=2) + "\n")
    console.print(f"written: {file}", markup=False, highlight=False, soft_wrap=True)
