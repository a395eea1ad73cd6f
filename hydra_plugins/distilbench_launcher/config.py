"""The schema of ``hydra/launcher=fused``; Hydra's scanner imports it."""

from __future__ import annotations

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore


@dataclass
class FusedLauncherConf:
    """Jobs of a batch are trained together, then each is run through Hydra with its stored result."""

    _target_: str = "hydra_plugins.distilbench_launcher.launcher.FusedLauncher"
    max_trials: int = 32
    """Trials trained at once at most, 1 or more; memory may allow fewer. Also bounds what a kill can cost."""


ConfigStore.instance().store(group="hydra/launcher", name="fused", node=FusedLauncherConf, provider="distilbench")
