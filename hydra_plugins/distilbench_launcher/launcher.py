"""``hydra/launcher=fused``: trains a sweeper's batch of trials in one call, with one Hydra job per trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn


@dataclass
class FusedLauncherConf:
    """Jobs of a batch are trained together; then Hydra runs each job, which returns its stored result."""

    _target_: str = "hydra_plugins.distilbench_launcher.launcher.FusedLauncher"
    max_trials: int = 32
    """Maximum number of trials trained at once, 1 or more; memory may allow fewer. Also limits what a kill can cost."""


ConfigStore.instance().store(group="hydra/launcher", name="fused", node=FusedLauncherConf, provider="distilbench")


class FusedLauncher(BasicLauncher):
    """Launches jobs together if the task function supports it, otherwise like Hydra's basic launcher.

    Such a function has an attribute ``batch_trainer``: a callable that takes the maximum number of jobs to train at
    once and returns a trainer for ``distilbench.sweep.executors.launch_batch``, which is used for the whole sweep.
    """

    def __init__(self, max_trials: int) -> None:
        super().__init__()
        self._max_trials = max_trials
        self._trainer: Any = None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; the returns keep their order."""
        factory = getattr(self.task_function, "batch_trainer", None)
        if factory is None:
            return super().launch(job_overrides, initial_job_idx)
        from distilbench.sweep.executors import launch_batch

        self._trainer = self._trainer or factory(self._max_trials)
        assert self.config is not None  # set by setup
        assert self.hydra_context is not None
        return launch_batch(self._trainer, self.config, self.hydra_context, job_overrides, initial_job_idx)
