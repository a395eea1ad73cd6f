"""``hydra/launcher=fused``: trains a sweeper's batch of trials in one call, with one Hydra job per trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class FusedLauncherConf:
    """Jobs of a batch are trained together; then Hydra runs each job, which returns its stored result."""

    _target_: str = "hydra_plugins.distilbench_launcher.launcher.FusedLauncher"
    max_trials: int = 32
    """Maximum number of trials trained at once, 1 or more; memory may allow fewer. Also limits what a kill can cost."""


ConfigStore.instance().store(group="hydra/launcher", name="fused", node=FusedLauncherConf, provider="distilbench")


class FusedLauncher(Launcher):
    """Launches jobs together if the task function supports it, otherwise like Hydra's basic launcher.

    Such a function has an attribute ``batch_trainer``: a callable that takes the maximum number of jobs to train at
    once and returns a ``distilbench.sweep.executors.BatchTrainer``, which is used for the whole sweep.
    """

    def __init__(self, max_trials: int) -> None:
        self._max_trials = max_trials
        self._basic = BasicLauncher()
        self._trainer: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store what Hydra passes."""
        self._context, self._task, self._config = hydra_context, task_function, config
        self._basic.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; the returns keep their order."""
        factory = getattr(self._task, "batch_trainer", None)
        if factory is None:
            return self._basic.launch(job_overrides, initial_job_idx)
        from distilbench.sweep.executors import launch_batch

        if self._trainer is None:
            self._trainer = factory(self._max_trials)
        return launch_batch(self._trainer, self._config, self._context, job_overrides, initial_job_idx)
