"""Settings as the command line would compose them, for every test."""

from __future__ import annotations

import gc

gc.disable()  # until all is imported: what imports make stays, and looking through it takes a third of their time

import atexit
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face import: no test may wait for a hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more, and threads that spin cost a lot
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, all that tests start would inherit a SIGHUP that is ignored
signal.signal(signal.SIGINT, signal.default_int_handler)  # as a shell's background jobs would

import hypothesis
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from distilbench.settings import AppSettings, register_schema, settings_from
from tests.commands import Workspace

ROOT = Path(__file__).resolve().parents[1]
TINY = ("model=tiny", "data=synthetic", "tracking=none")
hypothesis.settings.register_profile(
    "whatever-the-clock-says", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("whatever-the-clock-says")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, which run processes, and end with those of few tests.

    A worker takes whole files; short ones fill the last minute of all.
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
    """Leave what was imported out of all further collections: here, in forked processes, and at the very end.

    That last one takes seconds; without it, libraries in C complain of what they find there.
    """
    gc.freeze()
    gc.enable()
    atexit.register(os.dup2, os.open(os.devnull, os.O_WRONLY), 2)


def compose_settings(*overrides: str) -> AppSettings:
    """A trial as Hydra composes it."""
    register_schema()
    with initialize_config_dir(str(ROOT / "conf")):
        return settings_from(compose("config", list(overrides)))


@pytest.fixture
def settings(tmp_path):
    """Return ``settings(*overrides) -> AppSettings``: a tiny trial, composed by Hydra, that writes below tmp_path."""

    def composed(*overrides: str) -> AppSettings:
        values = [o for o in overrides if re.match(r"(\w+\.[\w.]+|seed)=", o)]
        config = _choices(*(o for o in overrides if o not in values)).copy()
        for value in OverridesParser.create().parse_overrides([f"output.dir={tmp_path}", *values]):
            OmegaConf.update(config, value.get_key_element(), value.value(), force_add=False)
        return settings_from(config)

    return composed


@cache
def _choices(*groups: str) -> DictConfig:
    """What Hydra makes of choices alone, 0.1 s each time; values go over them, whatever their order on a line."""
    register_schema()
    with initialize_config_dir(str(ROOT / "conf")):
        return compose("config", [*TINY, "output.dir=.", *groups])


@pytest.fixture
def workspace(tmp_path) -> Iterator[Workspace]:
    """A folder in which commands run, and end with the test."""
    workspace = Workspace(tmp_path)
    yield workspace
    workspace.end()
