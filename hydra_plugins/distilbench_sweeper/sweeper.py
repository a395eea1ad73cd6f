"""The sweepers that Hydra discovers: ``hydra/sweeper=grid`` (the default) and ``hydra/sweeper=optuna``.

Hydra imports this module for every command, so that heavy imports wait until a sweep begins.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(Sweeper):
    """Trains every combination of the given values."""

    def __init__(self, **options: Any) -> None:
        self._options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store what Hydra passes, and instantiate the launcher."""
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self._setup = (config, hydra_context, launcher)

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep; an invalid setting or a failure ends the process with one line and its exit status."""
        from distilbench.cli import CommandFailed, errors_in_one_line
        from distilbench.settings import require
        from distilbench.sweep.plan import SweeperOptions
        from distilbench.sweep.runner import run_sweep

        with errors_in_one_line():
            known = {field.name for field in fields(SweeperOptions)[len(self._setup) :]}
            for key, value in self._options.items():  # an unknown one was typed with a plus
                require(key in known, f"hydra.sweeper.{key}", "a key of this sweeper", value, "--cfg hydra lists them")
            failed = run_sweep(SweeperOptions(*self._setup, **self._options), arguments)
            if failed:
                raise CommandFailed(failed)


class OptunaSweeper(GridSweeper):
    """Lets Optuna choose the trials; accepts every key of hydra-optuna-sweeper."""
