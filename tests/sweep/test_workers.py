"""Several processes at work on one sweep, of which one dies on another host, one freezes, and one takes its time."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

import pytest

from distilbench.results import Status, read_record

pytestmark = pytest.mark.e2e
GRACE = 3
COMMAND = ("freeze.layers=0,1,2", "seed=1,2", "sweep.name=shared", f"sweep.grace_seconds={GRACE}")


def may_rename_hosts() -> bool:
    return os.name == "posix" and os.uname().sysname == "Linux" and os.geteuid() == 0


def begun(workspace, number: int) -> None:
    """Wait until somebody trains this trial."""
    deadline = time.monotonic() + 120
    while (record := read_record(workspace.sweep("shared") / str(number))) is None or record.status != Status.RUNNING:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not may_rename_hosts(), reason="needs root on Linux, for processes with a host name of their own")
def test_the_dead_and_the_frozen_lose_their_trials_and_the_slow_does_not(workspace):
    dead = workspace.start(*COMMAND, TASK_SECONDS="60", TASK_HOST="gone.example")
    begun(workspace, 0)
    slow = workspace.start(*COMMAND, TASK_SECONDS=str(4 * GRACE), TASK_HOST="slow.example")
    begun(workspace, 1)
    frozen = workspace.start(*COMMAND, TASK_SECONDS="1")
    begun(workspace, 2)
    frozen.send_signal(signal.SIGSTOP)
    dead.kill()
    out, _ = workspace.start(*COMMAND, TASK_SECONDS="0.1").communicate(timeout=300)
    frozen.send_signal(signal.SIGCONT)
    ended = [process.communicate(timeout=120) for process in (frozen, slow)]
    assert [frozen.returncode, slow.returncode] == [0, 0], ended
    assert "that a killed process left" in out + ended[1][0], "whichever of the living is free first"
    assert "trial 2 was taken over by another process: its result here is dropped" in ended[0][0]

    statuses = {trial.number: trial.user_attrs["status"] for trial in workspace.study("shared")}
    assert Counter(statuses.values()) == {"FINISHED": 6, "INTERRUPTED": 2}
    assert statuses[0] == statuses[2] == "INTERRUPTED"
    assert statuses[1] == "FINISHED", "its heart beat on another host, for longer than the grace"
    assert {number: workspace.record("shared", number)["status"] for number in statuses} == statuses
    assert len(set(workspace.finished())) == len(workspace.finished()) == 6
    assert workspace.record("shared", 1)["owner"]["host"] == "slow.example"


def test_a_preempted_trial_goes_on_where_it_was_in_the_run_that_it_had(workspace):
    command = ("hydra/sweeper=grid", "seed=1,2", "sweep.name=shared", "sweep.baseline=false", "engine=trainer",
               "train.epochs=12", "train.logging_steps=1", "output.save_model=false")  # fmt: skip
    process = workspace.with_store().start(*command, real=True)
    deadline = time.monotonic() + 120
    while not list(workspace.sweep("shared").glob("0/checkpoints/*/seal.json")):
        assert time.monotonic() < deadline, process.communicate(timeout=1)
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGUSR1, out + err
    assert workspace.record("shared", 0)["status"] == "INTERRUPTED"
    ended = workspace.run(*command, real=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr

    statuses = [trial.user_attrs["status"] for trial in workspace.study("shared")]
    assert Counter(statuses) == {"INTERRUPTED": 1, "FINISHED": 2}
    again = next(trial for trial in workspace.study("shared") if trial.user_attrs.get("continues") == 0)
    run_id = workspace.record("shared", 0)["run_id"]
    assert workspace.record("shared", again.number)["run_id"] == run_id
    trials = [run for run in workspace.runs() if "distilbench.trial" in run.data.tags]
    assert [run.info.status for run in trials] == ["FINISHED"] * 2
    from mlflow import MlflowClient

    steps = [point.step for point in MlflowClient(workspace.uri).get_metric_history(run_id, "train/loss")]
    assert len(set(steps)) == len(steps) == max(steps), "a step was taken twice, or none logged"
