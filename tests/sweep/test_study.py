"""The study, trial by trial: what becomes of one whose process is gone, of one still at work, and of one told twice."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from distilbench.results import Owner, Record, Status, read_record
from distilbench.settings import SettingsError
from distilbench.sweep.space import Cell, Point, Space
from distilbench.sweep.study import REUSED, Study

SPACE = Space({"freeze.layers": IntDistribution(0, 3), "scheduler": CategoricalDistribution(["linear", "cosine"])}, [])
IDENTITY = {"protocol": "p", "treatment": "t", "seed": 1}
ME = Owner.of_this_process()


def gone() -> Owner:
    """A process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return Owner(socket.gethostname(), child.pid, ME.started)


def compose(cell: Cell) -> Point:
    return Point(cell, SimpleNamespace(seed=1), str(sorted(cell.params.items())))


@pytest.fixture
def make(tmp_path):
    """``make(owner) -> Study``: the same study as another process would open it."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))

    def open_as(owner: Owner, **options) -> Study:
        return Study(study, tmp_path, ("accuracy",), owner, options.pop("take_over", False), **options)

    return open_as


def finish(study: Study, number: int, status: Status = Status.FINISHED, accuracy: float = 0.5, **changes) -> None:
    scores = {"accuracy": accuracy} if status is Status.FINISHED else {}
    record = Record(IDENTITY, status, changes.pop("owner", ME), None, changes.pop("error", None), scores, scores)
    record.write(study.directory / str(number))


def test_a_finished_trial_of_a_dead_process_is_not_lost(make):
    dead = make(gone())
    task = dead.take(SPACE, compose, None)
    finish(dead, task.number, accuracy=0.75, owner=gone())
    mine = make(ME)
    assert mine.close_dead() == [0]
    assert mine.standings()[0].trial.values == [0.75]
    assert mine.standings()[0].status == "FINISHED"


def test_a_trial_cut_short_is_interrupted_and_its_point_queued_again(make):
    dead = make(gone())
    task = dead.take(SPACE, compose, None)
    finish(dead, task.number, Status.RUNNING, owner=gone())
    mine = make(ME)
    assert mine.close_dead() == [0]
    assert read_record(mine.directory / "0").status is Status.INTERRUPTED
    mine.queue([], SPACE)
    again = mine.take(SPACE, compose, None)
    assert (again.number, again.point.cell.params) == (1, task.point.cell.params)
    assert len(mine.counted()) == 1


def test_a_trial_whose_worker_outlived_its_sweep_is_left_until_it_ends(make):
    dead = make(gone())
    dead.take(SPACE, compose, None)
    finish(dead, 0, Status.RUNNING, owner=ME)
    mine = make(Owner(ME.host, os.getppid(), 0.0))
    assert mine.close_dead() == []
    finish(dead, 0, accuracy=0.9, owner=ME)
    assert mine.close_dead() == [0]
    assert mine.standings()[0].trial.values == [0.9]


def test_a_living_process_and_another_host_are_left_alone_unless_taken_over(make):
    elsewhere = make(Owner("another-host", 1, 0.0))
    elsewhere.take(SPACE, compose, None)
    finish(elsewhere, 0, Status.RUNNING, owner=Owner("another-host", 1, 0.0))
    assert make(ME).close_dead() == []
    assert make(ME, take_over=True).close_dead() == [0]


def test_a_process_with_a_reused_pid_is_dead(make):
    assert not ME.is_dead()
    assert Owner(ME.host, ME.pid, ME.started - 3600).is_dead()


def test_a_trial_that_was_asked_for_but_never_signed_is_closed(make):
    study = make(ME)
    study.study.ask()
    assert study.close_dead() == [0]
    assert study.standings()[0].status == "INTERRUPTED"


def test_a_point_evaluated_before_is_reused_with_its_value_and_does_not_count(make):
    study = make(ME)
    cell = Cell({"freeze.layers": 1, "scheduler": "cosine"})
    study.queue([cell], SPACE)
    finish(study, study.take(SPACE, compose, None).number, accuracy=0.8)
    study.settle(0)
    study.study.enqueue_trial(cell.params)
    other = study.take(SPACE, compose, None)
    reused = study.standings()[1]
    assert (reused.status, reused.trial.values, reused.attribute("reused_from")) == (REUSED, [0.8], 0)
    assert other.point.cell.params != cell.params
    assert [s.number for s in study.counted()] == [0, other.number]


def test_a_discrete_space_is_tried_to_its_last_point_whatever_the_sampler_draws(make):
    study = make(ME)
    small = Space({"freeze.layers": IntDistribution(0, 4)}, [])
    study.study.sampler = optuna.samplers.PartialFixedSampler({"freeze.layers": 2}, optuna.samplers.RandomSampler())
    numbers = []
    while not study.is_exhausted(small):
        task = study.take(small, compose, None)
        numbers.append(task.point.cell.params["freeze.layers"])
        finish(study, task.number)
        study.settle(task.number)
    assert sorted(numbers) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_objective_that_is_not_finite_is_a_failure(make, value):
    study = make(ME)
    finish(study, study.take(SPACE, compose, None).number, accuracy=value)
    status, error = study.settle(0)
    assert status is Status.FAILED
    assert "not finite" in error
    assert study.standings()[0].trial.state.name == "FAIL"


@pytest.mark.parametrize(("status", "state"), [(Status.PRUNED, "PRUNED"), (Status.DIVERGED, "FAIL"),
                                               (Status.OUT_OF_MEMORY, "FAIL"), (Status.FAILED, "FAIL")])  # fmt: skip
def test_each_end_is_told_by_its_own_name(make, status, state):
    study = make(ME)
    finish(study, study.take(SPACE, compose, None).number, status, error="why")
    assert study.settle(0) == (status, "why")
    standing = study.standings()[0]
    assert (standing.trial.state.name, standing.status, standing.attribute("error")) == (state, status.value, "why")


def test_a_job_that_left_no_end_has_failed_with_what_the_launcher_said(make):
    study = make(ME)
    study.take(SPACE, compose, None)
    assert study.settle(0, error="TerminatedWorkerError: killed") == (Status.FAILED, "TerminatedWorkerError: killed")


def test_a_point_that_is_no_trial_fails_and_the_next_is_taken(make):
    study = make(ME)

    def picky(cell: Cell) -> Point:
        if cell.params["scheduler"] == "linear":
            raise SettingsError("scheduler must be cosine")
        return compose(cell)

    study.queue([Cell({"freeze.layers": 0, "scheduler": "linear"})], SPACE)
    task = study.take(SPACE, picky, None)
    assert task.point.cell.params["scheduler"] == "cosine"
    assert study.standings()[0].attribute("error") == "scheduler must be cosine"


def test_failed_trials_are_retried_when_asked_for(make):
    study = make(ME)
    finish(study, study.take(SPACE, compose, None).number, Status.FAILED, error="disk full")
    study.settle(0)
    retrying = make(ME, retry=[0])
    retrying.queue([], SPACE)
    assert retrying.take(SPACE, compose, None).point.cell.params == study.standings()[0].trial.params


def test_the_size_of_a_space_is_known_where_it_can_be_counted():
    assert SPACE.size == 8
    assert Space({"optim.lr": FloatDistribution(0, 1)}, []).size is None
    assert Space({"optim.lr": FloatDistribution(0, 1, step=0.25)}, []).size == 5
    assert [c["optim.lr"] for c in Space({"optim.lr": FloatDistribution(0, 1, step=0.5)}, []).cells()] == [0, 0.5, 1]
