"""The benchmark command: compares the engines with plain Hugging Face Trainer on this machine.

Every run is short and has its own process, with the same initial weights and batches; runs of different rows alternate,
and the table shows medians over the repeats. All claims about speed come from here.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from distilbench.cli import errors_in_one_line, run_command
from distilbench.settings import CONF, BenchmarkSettings, register_schema, require, settings_from

if TYPE_CHECKING:
    from distilbench.bench.run import Case, Measured

register_schema(BenchmarkSettings)

TABLE_WIDTH = 158
"""Fixed width of the table in characters: a narrower terminal wraps it, but no figure is cut off."""


@hydra.main(config_path=str(CONF), config_name="benchmark", execution_whitelist=["distilbench.composition.CheckFirst"])
def main(config: DictConfig) -> None:
    """Measure, print the table, and write all figures to the output directory."""
    with errors_in_one_line():
        settings = settings_from(config, BenchmarkSettings)
        require(settings.optim.name == "adamw", "optim.name", "adamw in a benchmark", settings.optim.name)
        benchmark(settings)


def benchmark(settings: BenchmarkSettings) -> None:
    """Measure all rows; raises :class:`SettingsError` for settings that the fused engine does not support."""
    import numpy as np
    import torch
    from rich.console import Console

    from distilbench.bench.roofline import measure_machine, step_cost_of
    from distilbench.bench.run import cases_of, precisions_to_try, run_case, short_splits
    from distilbench.bench.table import Benchmark, write
    from distilbench.engines import check_engine
    from distilbench.engines.device import driver_version, resolve_device
    from distilbench.models.build import build_model
    from distilbench.models.freezing import freeze
    from distilbench.trials.prepared import prepare, version_of

    prepared, device = prepare(settings), resolve_device(settings.engine.device)
    trial = replace(
        settings.trial,
        model=prepared.model.settings,
        train=replace(settings.train, precision=prepared.precision),
        engine=replace(settings.engine, name="fused"),
    )
    check_engine(trial, prepared.model, prepared.precision)
    splits = short_splits(prepared.splits, settings.bench, settings.train.batch_size)
    Path(settings.output.dir).mkdir(parents=True, exist_ok=True)  # fail before minutes of measuring
    about: dict[str, Any] = {
        "device": prepared.device, "driver": driver_version(device), "day": date.today().isoformat(),
        "versions": {name: version_of(name) for name in ("torch", "transformers", "accelerate", "distilbench")}
        | {"cuda": torch.version.cuda},
        "model": prepared.model.used.describe(), "data": prepared.text.used.describe(),
    }  # fmt: skip
    console = Console(width=TABLE_WIDTH)
    console.print(f"model {about['model']}, data {about['data']}, {about['device']}", markup=False)
    if settings.train.precision == "auto" and "bf16" not in precisions_to_try("auto", trial, device):
        console.print("bf16 is left out: this device has no instructions for it", markup=False)
    runs: list[tuple[Case, list[Measured]]] = [(case, []) for case in cases_of(settings, trial, splits, device)]
    for number in range(1, settings.bench.repeats + 1):
        for case, measured in runs:
            measured.append(run_case(case))
            each = 1000 * measured[-1].steps_seconds / settings.bench.steps / case.trials
            line = f"{case.name} ({case.precision}) {each:.1f} ms a step and trial"
            console.print(f"round {number}/{settings.bench.repeats}: {line}", markup=False, highlight=False)
    machine = measure_machine(device, {case.precision for case, _ in runs})
    size, words = settings.train.batch_size, len(np.unique(prepared.splits.train.tokens))
    tokens = len(splits.train.tokens) * size / len(splits.train)
    model = build_model(prepared.model, splits.label_names, settings.seed)
    freeze(model, settings.freeze)
    write(Benchmark(settings, runs, machine, step_cost_of(model, tokens, size, words), tokens, about), console)


if __name__ == "__main__":
    run_command(main)
