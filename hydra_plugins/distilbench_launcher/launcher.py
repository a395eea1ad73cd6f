"""``hydra/launcher=fused``: a sweeper's batch of trials in one call, each with a job of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn

from hydra_plugins.distilbench_launcher import config  # noqa: F401  registers the schema

if TYPE_CHECKING:
    from hydra_plugins.distilbench_launcher._core import Batches


class FusedLauncher(BasicLauncher):
    """Hydra's basic launcher, but for task functions that take several jobs at once.

    Those carry an attribute ``takes_batches``, a :class:`~hydra_plugins.distilbench_launcher._core.TakesBatches`.
    """

    def __init__(self, max_trials: int) -> None:
        super().__init__()
        self._max_trials = max_trials
        self._batches: Batches | None = None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; returns keep their order."""
        takes_batches = getattr(self.task_function, "takes_batches", None)
        if takes_batches is None:
            return super().launch(job_overrides, initial_job_idx)
        from hydra_plugins.distilbench_launcher import _core

        assert self.config is not None
        assert self.hydra_context is not None
        if self._batches is None:
            self._batches = takes_batches(self._max_trials)
        return _core.launch(self._batches, self.config, self.hydra_context, job_overrides, initial_job_idx)
