"""What a sweep silences in its process, which from Python goes on afterwards."""

from __future__ import annotations

import logging
import warnings

import pytest

from distilbench.sweep.executors import quiet

HEARTBEAT = "Heartbeat of storage is supposed to be used with Study.optimize"


def levels():
    return [logging.getLogger(name).level for name in ("optuna", "hydra_plugins", "hydra._internal.core_plugins")]


def test_a_sweep_silences_optuna_and_launchers_only_while_it_runs_however_it_ends():
    before = levels()

    @quiet()
    def run():
        warnings.warn(HEARTBEAT, stacklevel=1)
        assert levels() == [logging.ERROR, logging.WARNING, logging.WARNING]
        raise KeyboardInterrupt

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(KeyboardInterrupt):
            run()
        assert levels() == before
        assert told == []
        warnings.warn(HEARTBEAT, stacklevel=1)
        assert len(told) == 1


def test_with_verbose_logging_they_speak(caplog):
    with caplog.at_level(logging.DEBUG, "optuna"), quiet():
        assert levels()[0] == logging.DEBUG
