"""Workers under a real Slurm of two nodes: none idle, stopped in every way that Slurm has, killed with their node."""

from __future__ import annotations

import re
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

from distilbench.results import read_record
from tests.commands import ROOT
from tests.sweep import slurm as real
from tests.sweep.conftest import HERE

LACKING = real.missing()
pytestmark = [pytest.mark.e2e, pytest.mark.slurm, pytest.mark.skipif(LACKING is not None, reason=LACKING or "")]
TINY = "model=tiny data=synthetic sweep.baseline=false sweep.grace_seconds=6"
GRID = "freeze.layers=0,1,2 seed=1,2,3,4"
GUIDE = re.search(
    r"^#!/bin/bash\n(#SBATCH .*\n)(#SBATCH .*\n)", (ROOT / "docs/many-machines.md").read_text(), re.MULTILINE
)
"""What ``worker.sbatch`` asks for, in the guide: resources, and how it is stopped."""


@pytest.fixture(scope="module")
def slurm():
    """Start a Slurm that all tests here share."""
    with real.slurm() as running:
        yield running


def worker(workspace, program: str, arguments: str, **variables: object) -> Path:
    """Write the batch script of a worker; its node has a name of its own as another host has."""
    known = {"PYTHONPATH": ROOT, "DISTILBENCH_ROOT": workspace.path, "MLFLOW_TRACKING_URI": workspace.uri,
             "FINISHED_LOG": workspace.log, "OMP_NUM_THREADS": 1, "COLUMNS": 160}  # fmt: skip
    lines = [f"export {name}='{value}'" for name, value in {**known, **variables}.items()]
    script = workspace.path / "worker.sbatch"
    places = f"#SBATCH --chdir={workspace.path} --output={workspace.path}/%x-%a.out"
    command = f"srun {sys.executable} {HERE / program} --multirun {TINY} {arguments}\n"
    lines = ["#!/bin/bash", GUIDE[2], places, *lines, "export TASK_HOST=$SLURMD_NODENAME", command]
    script.write_text("\n".join(lines))
    return script


def statuses(workspace, name: str) -> Counter[str]:
    return Counter(trial.user_attrs.get("status") for trial in workspace.study(name))


def test_the_resources_that_the_guides_worker_asks_for_are_such_as_slurm_knows(workspace, slurm):
    script = workspace.path / "worker.sbatch"
    script.write_text(f"#!/bin/bash\n{GUIDE[1]}{GUIDE[2]}")
    slurm.submit(script, "--test-only", "--gres=none", "--cpus-per-task=2", "--time=10")


def test_four_workers_of_an_array_are_busy_for_as_long_as_there_are_points(workspace, slurm):
    """Four trials are under way at once; trial 0 takes as long as all others together, which nobody waits for."""
    script = worker(workspace, "quick_task.py", f"{GRID} tracking=none sweep.name=array", TASK_MEET=4, TASK_LAST=11)
    slurm.wait_for_end(job := slurm.submit(script, "--array=0-3"))
    assert slurm.states(job) == {"COMPLETED"}, output(workspace)

    assert statuses(workspace, "array") == {"FINISHED": 12}
    assert len(set(workspace.finished())) == 12
    assert workspace.finished()[-1][0] == "0"
    owners = {
        (trial.user_attrs["owner"]["host"], trial.user_attrs["owner"]["pid"]) for trial in workspace.study("array")
    }
    assert Counter(host for host, _ in owners) == {"n1": 2, "n2": 2}


def test_a_node_that_is_killed_with_all_that_ran_on_it_costs_no_trial_and_repeats_none(workspace, slurm):
    script = worker(workspace, "quick_task.py", f"{GRID} tracking=none sweep.name=lost", TASK_MEET=2, TASK_SECONDS=1.5)
    job = slurm.submit(script, "--array=0-1", "--cpus-per-task=2")
    records = [workspace.sweep("lost") / str(number) for number in (0, 1)]
    slurm.wait_for(lambda: all(read_record(record) for record in records), "two trials")
    (lost,) = [number for number in (0, 1) if (r := read_record(records[number])) and r.owner.host == "n1"]
    slurm.kill_node("n1")
    slurm.wait_for(lambda: statuses(workspace, "lost")["INTERRUPTED"], "end of the trial of the dead node")
    assert workspace.study("lost")[lost].user_attrs["status"] == "INTERRUPTED"
    slurm.ask("scancel", "--full", "--signal=KILL", job)
    slurm.ask("scancel", job)
    slurm.start_node("n1")
    slurm.wait_for_end(job)
    before = workspace.finished()
    assert len(before) < 12
    slurm.wait_for_end(again := slurm.submit(script, "--array=0-1", "--cpus-per-task=2"))
    assert slurm.states(again) == {"COMPLETED"}, output(workspace)

    ended = statuses(workspace, "lost")
    assert ended.pop("INTERRUPTED") >= 1
    assert ended == {"FINISHED": 12}
    assert len({what for _, what in workspace.finished()}) == len(workspace.finished()) <= 12
    for trial in workspace.study("lost"):
        assert workspace.record("lost", trial.number)["status"] == trial.user_attrs["status"]


def test_each_way_to_stop_a_job_leaves_a_trial_that_goes_on_at_its_step_in_its_run(workspace, slurm):
    arguments = "seed=1 sweep.name=stops engine=trainer train.epochs=40 train.logging_steps=1 output.save_model=false"
    script = worker(workspace.with_store(), "slow_train.py", arguments)
    (workspace.path / "slow").touch()
    job = slurm.submit(script)
    takes_steps(workspace, slurm)
    slurm.ask("scontrol", "requeue", job, check=True)
    slurm.wait_for(lambda: statuses(workspace, "stops")["INTERRUPTED"] == 1, "end of the requeued job")
    slurm.wait_for(lambda: slurm.states(job) == {"PENDING"}, "requeued job")
    slurm.ask("scontrol", "update", f"JobId={job}", "StartTime=now", check=True)  # else it waits for two minutes
    takes_steps(workspace, slurm)
    slurm.ask("scancel", "--signal=USR2", job, check=True)
    slurm.wait_for_end(job)
    assert statuses(workspace, "stops") == {"INTERRUPTED": 2}

    job = slurm.submit(script)
    takes_steps(workspace, slurm)
    slurm.ask("scancel", job, check=True)
    slurm.wait_for_end(job)
    script.write_text(script.read_text().replace("--signal=USR1@60", ""))  # of a minute it would leave nothing
    job = slurm.submit(script, "--time=1")
    slurm.wait_for_end(job)
    assert slurm.states(job) == {"TIMEOUT"}
    assert statuses(workspace, "stops") == {"INTERRUPTED": 4}
    (workspace.path / "slow").unlink()
    slurm.wait_for_end(job := slurm.submit(script))
    assert slurm.states(job) == {"COMPLETED"}, output(workspace)

    assert statuses(workspace, "stops") == {"INTERRUPTED": 4, "FINISHED": 1}
    (run,) = [run for run in workspace.runs() if "distilbench.trial" in run.data.tags]
    assert run.info.status == "FINISHED"
    taken = steps(workspace)
    assert [step for _, step in taken] == list(range(1, len(taken) + 1)), "a step was taken twice, or left out"
    assert len({pid for pid, _ in taken}) == 5


def test_ctrl_c_of_a_command_that_trains_through_submitit_leaves_no_job(workspace, slurm):
    arguments = f"{GRID} sweep.baseline=false sweep.name=batch hydra/launcher=submitit_slurm hydra.sweeper.n_jobs=6"
    process = workspace.start(
        *arguments.split(), "hydra.launcher.cpus_per_task=1", TASK_SECONDS="600", **slurm.environment
    )
    slurm.wait_for(lambda: len(records(workspace, "batch", "RUNNING")) == 4, "trials on all four processors")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, out + err
    assert statuses(workspace, "batch") == {"INTERRUPTED": 6, None: 6}, "six more wait"
    slurm.wait_for(lambda: not slurm.ask("squeue", "-h"), "empty queue")
    assert len(records(workspace, "batch", "INTERRUPTED")) == 6


def records(workspace, name: str, status: str) -> list[Path]:
    """Directories of the sweep's trials that stand so."""
    return [file.parent for file in workspace.sweep(name).glob("*/trial.json")
            if (record := read_record(file.parent)) and record.status == status]  # fmt: skip


def steps(workspace) -> list[tuple[str, int]]:
    """(process, step) of every step that was taken, in order."""
    lines = workspace.log.read_text().splitlines() if workspace.log.exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


def takes_steps(workspace, slurm) -> None:
    """Wait until a new process has taken three steps of the trial."""
    known = {pid for pid, _ in steps(workspace)}
    slurm.wait_for(lambda: sum(pid not in known for pid, _ in steps(workspace)) > 2, "steps")


def output(workspace) -> str:
    return "\n".join(path.read_text() for path in sorted(workspace.path.glob("*.out")))
