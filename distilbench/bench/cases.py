"""What a benchmark puts side by side: Trainer as the report ran it, Trainer tuned, and our engines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from distilbench.bench.run import ENGINE, REPORTED, TUNED, Case, run_case
from distilbench.data.tokens import EncodedSplits, random_part
from distilbench.engines.device import has_native_bf16
from distilbench.settings import BENCH_WINDOW, BenchmarkSettings, BenchSettings, TrialSettings, require


def cases_of(
    settings: BenchmarkSettings, trial: TrialSettings, splits: EncodedSplits, device: torch.device
) -> list[Case]:
    """Return what is measured of ``trial`` on the ``splits`` of :func:`short_splits`, in the table's order.

    Where Trainer may be tuned in several ways, each is run once here, and the fastest is taken.
    """
    bench, tried = settings.bench, precisions_to_try(settings.train.precision, trial, device)
    trainer, fused = (replace(trial, engine=replace(trial.engine, name=name)) for name in ("trainer", "fused"))
    tuned = fastest(ways_to_tune(trial, splits, tried, device))
    at_once = replace(tuned, name=f"HF tuned, {bench.processes} at once", trials=bench.processes, compiled=False)
    return [
        Case("HF as reported", REPORTED, trial, splits),
        tuned,
        *([at_once] if bench.processes else []),  # never compiled: each process would have to compile for itself
        Case("trainer", ENGINE, trainer, splits),
        Case("fused, alone", ENGINE, fused, splits),
        Case(f"fused, {bench.trials} trials", ENGINE, fused, splits, bench.trials),
    ]


def ways_to_tune(
    trial: TrialSettings, splits: EncodedSplits, precisions: list[str], device: torch.device
) -> list[Case]:
    """Return the tuned Trainer in each precision, and on a GPU compiled as well."""
    ways = []
    for precision in precisions:
        plain = Case("HF tuned", TUNED, replace(trial, train=replace(trial.train, precision=precision)), splits)
        compiled = replace(plain, name="HF tuned, compiled", compiled=True)
        ways += [plain, compiled] if device.type == "cuda" else [plain]
    return ways


def fastest(ways: list[Case]) -> Case:
    """Return the case that takes the least wall time a step."""
    return ways[0] if len(ways) == 1 else min(ways, key=lambda case: run_case(case).steps_seconds)


def precisions_to_try(asked: str, trial: TrialSettings, device: torch.device) -> list[str]:
    """Return those that the tuned Trainer is tried in: what is fast differs, and bf16 costs some CPUs a hundredfold."""
    if asked != "auto":
        return [trial.train.precision]
    if has_native_bf16(device):
        return ["fp32", "bf16"]
    return ["fp32", "fp16"] if device.type == "cuda" else ["fp32"]


def short_splits(splits: EncodedSplits, bench: BenchSettings, batch_size: int) -> EncodedSplits:
    """Return random examples for the steps of a run, and the whole text's vocabulary where nothing is evaluated."""
    most = len(splits.train) // batch_size - BENCH_WINDOW
    require(bench.steps <= most, "bench.steps", f"at most {most} for {len(splits.train):,} training examples",
            bench.steps, "lower it, or give more text")  # fmt: skip
    rng = np.random.default_rng(0)
    return replace(
        splits,
        train=random_part(splits.train, (bench.steps + BENCH_WINDOW) * batch_size, rng),
        selection=random_part(splits.selection, min(bench.eval_examples, len(splits.selection)), rng),
        report=splits.train,
    )
