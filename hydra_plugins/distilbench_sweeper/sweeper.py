"""The sweepers that Hydra finds: ``hydra/sweeper=grid`` (the default) and ``hydra/sweeper=optuna``.

Hydra's scanner imports this module for every command, so that whatever is heavy waits until a sweep begins.
"""

from __future__ import annotations

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _Sweeper(Sweeper):
    """Both sweepers: they differ in what ``hydra.sweeper`` holds, not in how trials are run."""

    _options: dict[str, Any]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over, with the launcher it names."""
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self._setup = (config, hydra_context, launcher)

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep; ends the process in one line and with its status where something is to mend, or failed."""
        from distilbench.cli import CommandFailed, errors_in_one_line
        from distilbench.sweep.plan import SweeperOptions
        from distilbench.sweep.runner import run_sweep

        with errors_in_one_line():
            failed = run_sweep(SweeperOptions(*self._setup, **self._options), arguments)
            if failed:
                raise CommandFailed(failed)


class GridSweeper(_Sweeper):
    """Every combination of the values given; ``max_batch_size`` is what Hydra's own grid calls ``n_jobs``."""

    def __init__(self, n_jobs: int | None, max_batch_size: int | None, **options: Any) -> None:
        self._options = {**options, "is_grid": True, "n_jobs": n_jobs or max_batch_size}


class OptunaSweeper(_Sweeper):
    """Optuna chooses; takes every key of hydra-optuna-sweeper."""

    def __init__(self, sampler: DictConfig, **options: Any) -> None:
        is_grid = sampler._target_ == "optuna.samplers.GridSampler"
        self._options = {**options, "is_grid": is_grid, "sampler": sampler}
