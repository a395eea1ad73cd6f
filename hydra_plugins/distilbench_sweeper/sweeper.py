"""The sweepers that Hydra finds: ``hydra/sweeper=grid`` (the default) and ``hydra/sweeper=optuna``.

Hydra's scanner imports this module for every command, so that whatever is heavy waits in modules beginning with ``_``.
"""

from __future__ import annotations

import sys
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from distilbench.settings import SettingsError
from distilbench.sweep.options import Options, Place


class _Sweeper(Sweeper):
    """Both sweepers: they differ in what ``hydra.sweeper`` holds, not in how trials are run."""

    options: Options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over, with the launcher it names."""
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self.place = Place(config, hydra_context, launcher)

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep; ends the process in one line and with status 2 for what a person can mend."""
        from distilbench.sweep.runner import run_sweep

        try:
            failed = run_sweep(self.options, self.place, arguments)
        except SettingsError as error:
            print(f"distilbench: {error}", file=sys.stderr)
            sys.exit(2)
        if failed:
            print(f"distilbench: {failed}", file=sys.stderr)
            sys.exit(1)


class GridSweeper(_Sweeper):
    """Every combination of the values given."""

    def __init__(
        self, params: DictConfig | None, max_batch_size: int | None, storage: str | None, study_name: str
    ) -> None:
        self.options = Options(params, storage, study_name, is_grid=True, at_once=max_batch_size)


class OptunaSweeper(_Sweeper):
    """Optuna chooses; takes every key of hydra-optuna-sweeper."""

    def __init__(
        self,
        sampler: DictConfig,
        direction: Any,
        storage: str | None,
        study_name: str,
        n_trials: int,
        n_jobs: int,
        max_failure_rate: float | None,
        custom_search_space: str | None,
        params: DictConfig | None,
    ) -> None:
        self.options = Options(
            params,
            storage,
            study_name,
            is_grid=sampler._target_ == "optuna.samplers.GridSampler",
            at_once=n_jobs,
            n_trials=n_trials,
            direction=direction,
            max_failure_rate=max_failure_rate,
            sampler=sampler,
            custom_search_space=custom_search_space,
        )
