"""Killed at any instant, a sweep loses no finished trial, leaves nothing RUNNING, and goes on to the same total.

Six kills at seeded instants hit the real command line, sweeper, study and records, over a task of 0.1 s that keeps a
trial's promises but trains nothing; ``test_stopped`` stops a sweep after each of its writes.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter

import pytest

pytestmark = pytest.mark.e2e
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
GRID = ("freeze.layers=0,1,2", "optim.lr=range(0.001,0.005,0.001)", "seed=1,2", "sweep.name=killed")
CELLS = 3 * 4 * 2
BASELINES = 2
"""The baseline's learning rate lies outside of the grid: one beside it for each seed."""
OPTUNA = ("hydra/sweeper=optuna", "freeze.layers=range(0,3)", "optim.lr=tag(log,interval(1e-5,1e-2))",
          "sweep.trials=30", "sweep.name=killed")  # fmt: skip


def kill(workspace, rng, command) -> None:
    """Start the command and send it a signal at a random instant, which it may have outrun."""
    process = workspace.start(*command)
    time.sleep(rng.uniform(0.1, 1.2))
    process.send_signal(rng.choice(SIGNALS))
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, -9, 130, 143, -2, -15) or "[sweep]" not in out, out + err


@pytest.mark.parametrize(("command", "total", "kills"), [(GRID, CELLS, 3), (OPTUNA, 30, 3)], ids=["grid", "optuna"])
def test_kills_lose_no_trial_and_repeat_none(workspace, command, total, kills):
    rng = random.Random(total)
    for _ in range(kills):
        kill(workspace, rng, command)
    before = workspace.finished()
    last = workspace.run(*command)
    assert last.returncode == 0, last.stdout + last.stderr

    trials = workspace.study("killed")
    by_status = Counter(trial.user_attrs["status"] for trial in trials)
    assert by_status["FINISHED"] == total
    assert set(by_status) <= {"FINISHED", "INTERRUPTED"}
    assert {trial.state.name for trial in trials} <= {"COMPLETE", "FAIL"}
    finished = [(where, what) for where, what in workspace.finished() if "/" not in where]
    lost = [where for where, _ in finished if trials[int(where)].user_attrs["status"] != "FINISHED"]
    assert not lost, "finished trials that the study does not hold"
    repeated = [what for what, times in Counter(what for _, what in workspace.finished()).items() if times > 1]
    assert not repeated, "settings that were trained to their end twice"
    assert before == workspace.finished()[: len(before)]
    for trial in trials:
        assert workspace.record("killed", trial.number)["status"] == trial.user_attrs["status"]
