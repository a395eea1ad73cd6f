"""What a sweep silences in its process, which from Python goes on afterwards."""

from __future__ import annotations

import logging
import os
import warnings

import pytest
from hydra.core.utils import JobReturn, JobStatus
from submitit import AutoExecutor

from distilbench.sweep import executors
from distilbench.sweep.executors import silence_launchers

HEARTBEAT = "Heartbeat of storage is supposed to be used with Study.optimize"


def levels():
    return [logging.getLogger(name).level for name in ("optuna", "hydra_plugins", "hydra._internal.core_plugins")]


def test_a_sweep_silences_optuna_and_launchers_only_while_it_runs_however_it_ends():
    before = levels()

    @silence_launchers()
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


class Submitted:
    """A job of submitit: its result, or the error of a job that was killed."""

    def __init__(self, end):
        self.end = end

    def results(self):
        if isinstance(self.end, Exception):
            raise self.end
        return [self.end]


def test_a_job_of_submitit_that_was_killed_says_nothing_of_the_others(monkeypatch):
    killed, mistake = RuntimeError("killed"), ValueError("a mistake")
    ends = [killed, JobReturn(status=JobStatus.COMPLETED), JobReturn(status=JobStatus.FAILED, _return_value=mistake)]
    monkeypatch.setattr(AutoExecutor, "map_array", lambda *_: [Submitted(end) for end in ends])
    monkeypatch.setattr(executors, "_launch_through", lambda *_: [j.results()[0] for j in AutoExecutor.map_array(None)])
    assert executors._launch_by_submitit(None, [], ["a job"] * 3) == [killed, None, mistake]
    monkeypatch.setattr(executors, "_launch_through", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        executors._launch_by_submitit(None, [], ["a job"] * 3)


def test_a_trial_on_ray_has_the_sweeps_variables_for_mlflow_and_none_of_the_clusters(monkeypatch):
    monkeypatch.setattr(os, "environ", {"MLFLOW_EXPERIMENT_NAME": "the cluster's", "HOME": "/root"})
    seen = executors._run_with_variables({"MLFLOW_TRACKING_URI": "ours"}, lambda _: dict(os.environ), None)
    assert seen == {"MLFLOW_TRACKING_URI": "ours", "HOME": "/root"}


def test_with_verbose_logging_they_speak(caplog):
    with caplog.at_level(logging.DEBUG, "optuna"), silence_launchers():
        assert levels()[0] == logging.DEBUG
