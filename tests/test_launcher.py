"""``hydra/launcher=fused``: Hydra's own suite for launchers, and batches of trials end to end."""

from __future__ import annotations

import pytest
from hydra.core.plugins import Plugins
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite, LauncherTestSuite

Plugins.instance()  # once before Hydra's fixture saves and restores what plugins registered


@pytest.mark.parametrize(("launcher_name", "overrides"), [("fused", [])])
class TestTasksThatAreNoTrials(LauncherTestSuite):
    """Hydra's suite for every launcher."""


@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [({"defaults": [{"override hydra/launcher": "fused"}]}, ["-m"])],
)
class TestAnApplicationOfSomeoneElse(IntegrationTestSuite):
    """Hydra's suite for launchers in a process of their own."""
