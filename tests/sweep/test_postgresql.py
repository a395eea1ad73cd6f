"""Sweeps kept by a PostgreSQL server: finished, continued, killed, shared, and cut off from it.

They need a server that this machine may not have. DISTILBENCH_TEST_POSTGRESQL holds the URL of an empty database, with
its password, for example ``postgresql://sweeper:secret@127.0.0.1:5432/sweeps``.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections import Counter

import pytest

URL = os.environ.get("DISTILBENCH_TEST_POSTGRESQL", "")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not URL, reason="needs a PostgreSQL server: its URL in DISTILBENCH_TEST_POSTGRESQL"),
]
STORAGE = "hydra.sweeper.storage=${oc.env:DISTILBENCH_TEST_POSTGRESQL}"
GRID = ("freeze.layers=0,1,2", "seed=1,2,3,4")


@pytest.fixture
def name() -> str:
    """A sweep's name that the server has not seen yet: it outlives the test's folder."""
    return f"sweep-{uuid.uuid4().hex[:12]}"


def ended(process) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "Traceback" not in err, err
    return out


def check(workspace, name) -> None:
    """Twelve trials finished, none twice, none lost."""
    statuses = Counter(trial.user_attrs["status"] for trial in workspace.study(name, url=URL))
    assert statuses["FINISHED"] == 12
    assert set(statuses) <= {"FINISHED", "INTERRUPTED"}
    assert len({what for _, what in workspace.finished()}) == len(workspace.finished()) == 12


def test_a_sweep_ends_and_answers_at_once_when_asked_again(workspace, name):
    command = (STORAGE, *GRID, f"sweep.name={name}")
    ended(workspace.start(*command))
    check(workspace, name)
    assert "12 of 12 trials" in ended(workspace.start(*command))
    check(workspace, name)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_sweep_continues_to_the_same_total(workspace, name, kind):
    command = (STORAGE, *GRID, f"sweep.name={name}")
    process = workspace.start(*command, TASK_SECONDS="0.4")
    while len(workspace.finished()) < 3:
        assert process.poll() is None, process.communicate()
    process.send_signal(kind)
    process.communicate(timeout=60)
    assert len(workspace.finished()) < 12
    ended(workspace.start(*command))
    check(workspace, name)


def test_two_processes_share_a_sweep_without_a_trial_done_twice(workspace, name):
    command = (STORAGE, *GRID, f"sweep.name={name}")
    for process in [workspace.start(*command, TASK_SECONDS="0.4") for _ in range(2)]:
        ended(process)
    check(workspace, name)
    owners = {trial.user_attrs["owner"]["pid"] for trial in workspace.study(name, url=URL)}
    assert len(owners) == 2, "one of the two did nothing"


def test_real_trials_are_pruned_through_it_and_the_password_is_written_nowhere(workspace, name):
    from sqlalchemy.engine import make_url

    ended(workspace.start(STORAGE, "hydra/sweeper=optuna", "freeze.layers=0,1,2", "data.max_train_examples=64",
                          f"sweep.name={name}", "sweep.trials=3", "sweep.pruner=threshold", "train.epochs=2",
                          "sweep.pruner_options.lower=1.1", "output.save_model=false", real=True))  # fmt: skip
    states = Counter(trial.state.name for trial in workspace.study(name, url=URL))
    assert states["PRUNED"] >= 2
    password = (make_url(URL).password or "").encode()
    files = [path for path in workspace.path.rglob("*") if path.is_file()]
    assert password
    assert [path for path in files if password in path.read_bytes()] == []


def test_a_server_that_stops_answering_ends_the_sweep_in_one_line(workspace, name):
    import sqlalchemy

    process = workspace.start(STORAGE, *GRID, f"sweep.name={name}", TASK_SECONDS="1")
    while len(workspace.finished()) < 1:
        assert process.poll() is None, process.communicate()
    with sqlalchemy.create_engine(URL).connect() as connection:
        connection.execute(sqlalchemy.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> "
                                           "pg_backend_pid() AND datname = current_database()"))  # fmt: skip
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [line for line in err.splitlines() if line.startswith("distilbench: ")]
    assert "no longer answers" in line
    assert "the same command continues" in line
    assert "Traceback" not in err
    ended(workspace.start(STORAGE, *GRID, f"sweep.name={name}"))
    check(workspace, name)
