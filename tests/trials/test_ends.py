"""The ends that a shell, a terminal or a disk brings about, on the real command line."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.test_train import TINY_TRACKED

pytestmark = pytest.mark.e2e
SHORT = (*TINY_TRACKED[:2], "train.epochs=1", "hydra.run.dir=out")


def ends_of(workspace, directory="out"):
    """Status in the record, in the run's tag, and in MLflow's own terms."""
    record = json.loads((workspace.path / directory / "trial.json").read_text())
    (run,) = workspace.runs()
    return record["status"], run.data.tags["distilbench.status"], run.info.status


FINISHED = ("FINISHED", "FINISHED", "FINISHED")


@pytest.mark.parametrize(
    ("number", "statuses"),
    [(signal.SIGINT, {130}), (signal.SIGTERM, {143}), (signal.SIGHUP, {129, -signal.SIGHUP})],
    ids=["ctrl-c", "sigterm", "closed terminal"],
)
def test_a_signal_as_soon_as_there_is_a_record_closes_the_trial(workspace, number, statuses):
    process = workspace.with_store().start(*TINY_TRACKED, "train.epochs=500", "hydra.run.dir=out")
    deadline = time.monotonic() + 120
    while not (workspace.path / "out" / "trial.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(number)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode in statuses, err
    assert ends_of(workspace) == ("INTERRUPTED", "INTERRUPTED", "KILLED")
    assert "Traceback" not in err


def test_a_killed_trial_is_closed_by_the_next_command(workspace):
    process = workspace.with_store().start(*TINY_TRACKED, "train.epochs=500", "hydra.run.dir=killed")
    deadline = time.monotonic() + 120
    while not (workspace.path / "killed" / "trial.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.wait(60)
    assert workspace.runs()[0].info.status == "RUNNING"
    done = workspace.run(*SHORT)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "closed 1 run whose" in line]
    killed, _ = workspace.runs()
    assert f"{killed.info.run_name} INTERRUPTED" in line
    assert (killed.info.status, killed.data.tags["distilbench.status"]) == ("KILLED", "INTERRUPTED")
    record = json.loads((workspace.path / "killed" / "trial.json").read_text())
    assert (record["status"], record["error"]) == ("INTERRUPTED", "its process was killed")


def test_a_reader_that_goes_away_ends_nothing(workspace):
    reader, writer = os.pipe()
    process = workspace.with_store().start(*SHORT, output=writer)
    os.close(writer)
    os.close(reader)  # as | head -1 does
    assert process.wait(timeout=600) == 0
    assert ends_of(workspace) == FINISHED


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_onto_a_full_disk_ends_nothing(workspace):
    with open("/dev/full", "w") as full:
        assert workspace.with_store().run(*SHORT, output=full.fileno()).returncode == 0
    assert ends_of(workspace) == FINISHED


def test_what_the_terminal_cannot_show_is_replaced(workspace):
    done = workspace.with_store().run(*SHORT[:-1], "hydra.run.dir='größe'", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert ends_of(workspace, "größe") == FINISHED
    assert "gr??e" in done.stdout or "gr????e" in done.stdout
    done = workspace.run("hydra.run.dir='größe'", "train.epochs=0", PYTHONIOENCODING="ascii:strict")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


LAUNCHERS = {
    "torchrun": {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"},
    "OpenMPI": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3"},
    "Slurm": {"PMI_SIZE": "2", "PMI_RANK": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
    "MVAPICH": {"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"},
}


def test_a_trial_is_one_process_whatever_launchers_left_their_variables(workspace):
    """Of all of them at once: accelerate takes the first that it finds, so any that were left would count."""
    environment = {name: value for variables in LAUNCHERS.values() for name, value in variables.items()}
    done = workspace.with_store().run(*SHORT, "engine=trainer", "tracking=none", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((workspace.path / "out" / "trial.json").read_text())["status"] == "FINISHED"
