"""Fixtures for every test: settings composed as on the command line, and folders in which commands run."""

from __future__ import annotations

import gc

gc.disable()  # until everything is imported: collections take a third of the import time and free nothing

import atexit
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face import: no test may wait for the hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more, and spinning threads are costly
os.environ.setdefault("GOMP_SPINCOUNT", "0")  # where a test asks for more: its workers wait for those of other tests
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, the processes of tests would inherit an ignored SIGHUP
signal.signal(signal.SIGINT, signal.default_int_handler)  # likewise SIGINT, in a shell's background job

import hypothesis
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from distilbench.settings import AppSettings, register_schema, settings_from
from tests.commands import Workspace, merge_configs_once, read_yaml_once, wait_for_no_disk

ROOT = Path(__file__).resolve().parents[1]
TINY = ("model=tiny", "data=synthetic", "tracking=none")
hypothesis.settings.register_profile(
    "whatever-the-clock-says", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("whatever-the-clock-says")
wait_for_no_disk()
read_yaml_once()
merge_configs_once()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the slowest files first, those with end-to-end tests, and those with the fewest tests last.

    A worker takes whole files, so short ones at the end let all workers finish at about the same time.
    """
    asked = str(config.getoption("markexpr"))
    for item in items:
        for mark in ("scale", "slurm"):
            if item.get_closest_marker(mark) and mark not in asked:
                item.add_marker(pytest.mark.skip(reason=f"takes minutes: asked for by -m {mark}"))
    long = {item.path for item in items if item.get_closest_marker("e2e")}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name != "test_stopped.py", item.path not in long, -tests[item.path]))


def pytest_collection_finish() -> None:
    """Exclude imported objects from all later collections: here, in forked processes, and at exit.

    The one at exit takes seconds; without it, C libraries complain, so standard error then goes to ``/dev/null``.
    """
    gc.freeze()
    gc.enable()
    atexit.register(os.dup2, os.open(os.devnull, os.O_WRONLY), 2)


def compose_settings(*overrides: str) -> AppSettings:
    """Compose settings with Hydra."""
    register_schema()
    with initialize_config_dir(str(ROOT / "conf")):
        return settings_from(compose("config", list(overrides)))


@pytest.fixture
def settings(tmp_path):
    """Return ``settings(*overrides) -> AppSettings``: a tiny trial, composed by Hydra, that writes to ``tmp_path``."""

    def composed(*overrides: str) -> AppSettings:
        given = [override.removeprefix("output.dir=") for override in overrides if override.startswith("output.dir=")]
        values = tuple(override for override in overrides if not override.startswith("output.dir="))
        environment = frozenset(item for item in os.environ.items() if item[0] != "PYTEST_CURRENT_TEST")
        made = _composed(values, os.getcwd(), environment)
        return replace(made, output=replace(made.output, dir=(given or [str(tmp_path)])[-1]))

    return composed


@cache
def _composed(overrides: tuple[str, ...], cwd: str, environment: frozenset[tuple[str, str]]) -> AppSettings:
    """Compose settings once for all tests that ask for the same; they depend on ``cwd`` and ``environment`` too."""
    values = [o for o in overrides if re.match(r"(\w+\.[\w.]+|seed)=", o)]
    config = _choices(*(o for o in overrides if o not in values)).copy()
    for value in OverridesParser.create().parse_overrides(values):
        OmegaConf.update(config, value.get_key_element(), value.value(), force_add=False)
    return settings_from(config)


@cache
def _choices(*groups: str) -> DictConfig:
    """Compose config groups alone, cached since it takes 0.1 s; the caller then sets single values."""
    register_schema()
    with initialize_config_dir(str(ROOT / "conf")):
        return compose("config", [*TINY, "output.dir=.", *groups])


@pytest.fixture
def workspace(tmp_path) -> Iterator[Workspace]:
    """Yield a folder in which commands run; those still running are killed after the test."""
    workspace = Workspace(tmp_path)
    yield workspace
    workspace.end()
