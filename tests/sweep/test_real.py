"""Sweeps of real tiny trials: MLflow's parents and children, seeds, pruning, shared errors, and kills."""

from __future__ import annotations

import csv
import random
import signal
import time
from collections import Counter

import pytest
from omegaconf import OmegaConf

from tests.sweep.conftest import SweepWorkspace

pytestmark = pytest.mark.e2e
SMALL = ("data.max_train_examples=64", "output.save_model=false", "optim.lr=1e-2", "baseline.overrides=['freeze=none']")


def ended(workspace, *command, status=0):
    process = workspace.run(*SMALL, *command, real=True)
    assert process.returncode == status, process.stdout + process.stderr
    return process


def tree(workspace):
    """Runs of the sweep: its own, and each other's role by name with the name of its parent."""
    runs = workspace.runs()
    names = {run.info.run_id: run.info.run_name for run in runs}
    return {run.info.run_name: names.get(run.data.tags.get("mlflow.parentRunId")) for run in runs}


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    workspace = SweepWorkspace(tmp_path_factory.mktemp("grid"))
    return workspace, ended(workspace.with_store(), "freeze.layers=0,1", "sweep.name=grid")


def test_trials_are_children_of_the_sweeps_run_and_named_by_number_and_what_varies(grid):
    workspace, _ = grid
    assert tree(workspace) == {"grid": None, "0 baseline: layers=0": "grid", "1 layers=1": "grid"}
    parent, *children = workspace.runs()
    assert {run.info.status for run in workspace.runs()} == {"FINISHED"}
    assert {run.data.tags["distilbench.sweep"] for run in workspace.runs()} == {"grid"}
    assert [run.data.tags["distilbench.trial"] for run in children] == ["0", "1"]
    assert parent.data.metrics["trials_finished"] == 2
    assert parent.data.metrics["baseline_accuracy"] == children[0].data.metrics["accuracy"]
    assert "difference_points" in children[1].data.metrics, "the trial was not compared with the sweep's baseline"


def test_the_parents_description_is_a_table_with_links_to_its_runs(grid):
    workspace, _ = grid
    parent, *children = workspace.runs()
    note = parent.data.tags["mlflow.note.content"]
    assert note.startswith("**"), "the answer stands before the table"
    assert "baseline" in note.partition("|")[0]
    for child in children:
        assert f"runs/{child.info.run_id}?workflowType=machine_learning)" in note


def test_the_sweep_ends_with_a_report_printed_and_saved(grid):
    workspace, process = grid
    assert "Sweep grid" in process.stdout
    assert "verdict" in process.stdout
    written = {path.name for path in workspace.sweep("grid").iterdir()}
    assert {"report.html", "report.md", "report.tex", "report.csv", "multirun.yaml"} <= written
    assert OmegaConf.load(workspace.sweep("grid") / "multirun.yaml").hydra.mode == "MULTIRUN"
    assert "\x1b[" not in process.stdout, "control codes in piped output"
    with (workspace.sweep("grid") / "report.csv").open() as file:
        rows = {f"{row['trial']} {row['setting']}" for row in csv.DictReader(file)}
    assert rows == {run.info.run_name for run in workspace.runs()[1:]}, "runs and rows are called alike"
    record = workspace.record("grid", 1)
    assert record["selection"]["accuracy"] == workspace.study("grid")[1].value
    assert (workspace.sweep("grid") / "1" / ".hydra" / "overrides.yaml").is_file()
    assert (workspace.sweep("grid") / "1" / "predictions.parquet").is_file()


def test_seeds_are_children_of_their_trial_whose_objective_is_their_mean(workspace):
    ended(workspace.with_store(), "freeze.layers=1", "sweep.seeds=[1,2]", "sweep.name=seeds", "sweep.baseline=false",
          "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")  # fmt: skip
    assert tree(workspace) == {
        "seeds": None,
        "0 trial": "seeds",
        "0 trial seed=1": "0 trial",
        "0 trial seed=2": "0 trial",
    }
    each = [workspace.record("seeds", f"0/seed-{seed}")["selection"]["accuracy"] for seed in (1, 2)]
    assert workspace.study("seeds")[0].value == pytest.approx(sum(each) / 2)
    figures = workspace.record("seeds", 0)["figures"]
    assert figures["accuracy_std"] == pytest.approx(abs(each[0] - each[1]) / 2**0.5)
    assert {run.info.status for run in workspace.runs()} == {"FINISHED"}


def test_a_pruned_trial_is_pruned_in_study_record_and_mlflow_and_the_baseline_never_is(workspace):
    ended(workspace.with_store(), "hydra/sweeper=optuna", "freeze.layers=0,1,2", "sweep.name=pruned", "sweep.trials=3",
          "sweep.pruner=threshold", "sweep.pruner_options.lower=1.1", "train.epochs=2")  # fmt: skip
    trials = [t for t in workspace.study("pruned") if t.user_attrs["status"] != "REUSED"]
    assert [t.state.name for t in trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert [list(t.intermediate_values) for t in trials] == [[1, 2], [1], [1]]
    number = trials[1].number
    assert "at evaluation 1 (threshold)" in workspace.record("pruned", number)["error"]
    run = next(r for r in workspace.runs() if r.data.tags.get("distilbench.trial") == str(number))
    assert (run.info.status, run.data.tags["distilbench.status"]) == ("KILLED", "PRUNED")


def test_text_that_no_trial_could_read_is_refused_before_anything_is_written(workspace):
    file = workspace.path / "train.csv"
    file.write_text("text,label\n" + "\n".join(f"word {i},{i % 2}" for i in range(40)) + "\n")
    process = ended(workspace, "data=files", f"data.train={file}", "data.text_column=words", "data.label_column=label",
                    "data.max_train_examples=null", "freeze.layers=0,1,2", "sweep.name=broken", status=2)  # fmt: skip
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("distilbench: ")]
    assert "words" in line
    assert "Traceback" not in process.stderr
    assert list(workspace.path.iterdir()) == [file]


def sentences(path, start: int) -> str:
    path.write_text("text,label\n" + "\n".join(f"word {i},{i % 2}" for i in range(start, start + 60)) + "\n")
    return f"data.train={path}"


TEXT = ("data=files", "data.text_column=text", "data.label_column=label", "data.max_train_examples=null")


@pytest.mark.parametrize("launcher", ["basic", "fused"])
def test_a_text_that_changed_under_its_name_stops_the_continued_sweep_in_one_line(workspace, launcher):
    launch = (f"hydra/launcher={launcher}",) + (("engine=fused",) if launcher == "fused" else ())
    train = sentences(workspace.path / "train.csv", start=0)
    first = (*TEXT, train, *launch, "sweep.name=text", "hydra/sweeper=optuna",
             "optim.weight_decay=interval(0,0.1)", "sweep.baseline=false")  # fmt: skip
    ended(workspace.with_store(), *first, "sweep.trials=1")
    sentences(workspace.path / "train.csv", start=1000)
    refused = ended(workspace, *first, "sweep.trials=4", status=2)
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("distilbench: ")]
    assert "data must be what the sweep 'text' began with" in line
    assert "other contents under that name" in line
    assert "another sweep.name" in line
    assert "Traceback" not in refused.stderr
    assert Counter(t.user_attrs["status"] for t in workspace.study("text")) == {"FINISHED": 1, "INTERRUPTED": 1}
    sentences(workspace.path / "train.csv", start=0)
    ended(workspace, *first, "sweep.trials=2")
    assert workspace.states("text")["COMPLETE"] == 2


def test_killed_real_trials_leave_nothing_running_and_nothing_lost(workspace):
    rng = random.Random(3)
    command = ("freeze.layers=0,1,2", "seed=1,2", "sweep.name=killed")
    for kind in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = workspace.with_store().start(*SMALL, *command, real=True)
        wait_for_trial(workspace, process)
        time.sleep(rng.uniform(0, 3))
        process.send_signal(kind)
        process.communicate(timeout=60)
    ended(workspace, *command)
    statuses = Counter(t.user_attrs["status"] for t in workspace.study("killed"))
    assert statuses["FINISHED"] == 6
    assert set(statuses) <= {"FINISHED", "INTERRUPTED"}
    runs = [run for run in workspace.runs() if run.info.run_name != "killed"]
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    finished = [run for run in runs if run.info.status == "FINISHED"]
    assert len(finished) == 6, "a finished trial was lost, or trained twice"
    assert {run.data.tags["distilbench.status"] for run in runs if run.info.status == "KILLED"} <= {"INTERRUPTED"}
    assert len([run for run in workspace.runs() if run.info.run_name == "killed"]) == 1, "the parent was not taken up"
    numbers = [run.data.tags["distilbench.trial"] for run in finished]
    assert all(workspace.study("killed")[int(n)].state.name == "COMPLETE" for n in numbers)


def wait_for_trial(workspace, process) -> None:
    """Until the sweep has launched a further trial, or has ended."""
    before = len(list(workspace.sweep("killed").glob("*/trial.json")))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(workspace.sweep("killed").glob("*/trial.json"))) > before:
            return
        time.sleep(0.05)


def test_trials_whose_runs_are_gone_are_trained_again_by_one_flag(tmp_path):
    workspace = SweepWorkspace(tmp_path)
    command = ("freeze.layers=0,1", "sweep.name=lost")
    ended(workspace.with_store(), *command)
    store = next(tmp_path.rglob("mlflow.db"))
    for file in store.parent.glob("mlflow.db*"):
        file.unlink()
    told = ended(workspace, *command)
    assert "sweep.retry_lost=true" in told.stdout + told.stderr
    ended(workspace, *command, "sweep.retry_lost=true")
    runs = Counter(
        run.data.tags["distilbench.status"] for run in workspace.runs() if "distilbench.trial" in run.data.tags
    )
    assert runs == {"FINISHED": 2}
    assert "lost: 2 of 2 trials" in ended(workspace, *command).stdout
    assert len(workspace.runs()) == 3, "what was trained again is not trained a third time"
