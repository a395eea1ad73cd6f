"""What Hydra hands to a sweeper, and what ``hydra.sweeper`` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf


@dataclass(frozen=True)
class SweeperOptions:
    """What ``hydra.sweeper`` says, in the words of Hydra's own sweepers; see ``conf/hydra/sweeper``."""

    params: DictConfig | None
    storage: str | None
    study_name: str
    is_grid: bool
    n_jobs: int | None
    """Trials handed to the launcher together; None leaves it to the kind of launcher."""
    n_trials: int | None = None
    direction: Any = None
    max_failure_rate: float | None = None
    sampler: DictConfig | None = None
    custom_search_space: str | None = None


@dataclass(frozen=True)
class HydraSetup:
    """What Hydra hands to a sweeper."""

    config: DictConfig
    context: HydraContext
    launcher: Launcher

    def unresolved(self, key: str) -> str | None:
        """Return a key of ``hydra.sweeper`` as it was written, interpolations left as they are."""
        values: Any = OmegaConf.to_container(self.config.hydra.sweeper, resolve=False)
        found: str | None = values[key]
        return found
