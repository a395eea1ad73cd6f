"""The study, trial by trial: what becomes of one whose process is gone, of one still at work, and of one told twice."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import InMemoryStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.study import StudyDirection

from distilbench.results import Owner, Record, Status, read_record
from distilbench.settings import SettingsError
from distilbench.sweep import study as studies
from distilbench.sweep.plan import SweepPlan
from distilbench.sweep.space import Point, Space
from distilbench.sweep.study import SweepStudy

SPACE = Space({"freeze.layers": IntDistribution(0, 3), "scheduler": CategoricalDistribution(["linear", "cosine"])}, [])
IDENTITY = {"protocol": "p", "treatment": "t", "seed": 1}
ME = Owner.of()


class Hearts(InMemoryStorage, BaseHeartbeat):
    """A storage in memory that is told whose heart stands still."""

    def __init__(self) -> None:
        super().__init__()
        self.beats: list[int] = []
        self.silent: set[int] = set()

    def record_heartbeat(self, trial_id: int) -> None:
        self.beats.append(trial_id)
        self.silent.discard(trial_id)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        return sorted(self.silent)

    def get_heartbeat_interval(self) -> None:
        return None

    def get_heartbeat_stale_trial_callback(self) -> None:
        return None


def gone() -> Owner:
    """A process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return Owner(socket.gethostname(), child.pid, ME.started)


def result_key(point: Point) -> str:
    return str(sorted(point.params.items()))


@pytest.fixture
def make(tmp_path):
    """``make(owner) -> SweepStudy``: the same study as another process would open it."""
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler, storage=Hearts())

    def open_as(owner: Owner, **changes) -> SweepStudy:
        settings = SimpleNamespace()
        plan = {"settings": settings, "space": SPACE, "points": [], "outside_baselines": [],
                "total": 100, "is_grid": False, "objectives": ("accuracy",), "directions": ["maximize"], "name": "made",
                "directory": tmp_path, "fixed": {}, "result_key": result_key,
                "name_of": partial(SPACE.name_of, baseline={}), "max_failures": 0}  # fmt: skip
        return SweepStudy(study, SweepPlan(**{**plan, **changes}), owner)

    return open_as


def end(study: SweepStudy, number: int, status=Status.INTERRUPTED, error=None) -> Record:
    """End a trial as the runner does, all but MLflow."""
    record = study.finalize_record(number, status, error)
    study.tell(number, record)
    return record


def end_dead(study: SweepStudy) -> list[int]:
    dead = study.take_over_dead_trials()
    for number in dead:
        end(study, number)
    return dead


def finish(study: SweepStudy, number: int, status: Status = Status.FINISHED, accuracy: float = 0.5, **changes) -> None:
    scores = {"accuracy": accuracy} if status is Status.FINISHED else {}
    owner, error = changes.pop("owner", ME), changes.pop("error", None)
    Record(IDENTITY, status, owner, "run", error, scores, scores, {"train_seconds": 3.0}).write(study.directory(number))


def test_where_nothing_is_to_be_queued_the_study_is_read_once_before_a_point_is_drawn(make, monkeypatch):
    """Reading took most of a claim: 136 ms of it, 35 ms once it was read no oftener than needed."""
    study = make(ME, is_grid=True, points=[Point({"freeze.layers": n, "scheduler": "linear"}) for n in range(3)])
    study.queue()
    reads, read = [], study.study.get_trials
    monkeypatch.setattr(study.study, "get_trials", lambda **given: reads.append(1) or read(**given))
    study.refresh()
    study.queue()
    assert study.has_more()
    assert len(reads) == 1
    study.take()
    assert len(reads) == 2


def test_a_finished_trial_of_a_dead_process_is_not_lost(make):
    dead = make(gone())
    taken = dead.take()
    finish(dead, taken.number, accuracy=0.75, owner=gone())
    mine = make(ME)
    assert end_dead(mine) == [0]
    assert mine.views()[0].values == (0.75,)
    assert mine.views()[0].status == "FINISHED"


def test_a_trial_cut_short_is_interrupted_and_its_point_queued_again(make):
    dead = make(gone())
    taken = dead.take()
    finish(dead, taken.number, Status.RUNNING, owner=gone())
    mine = make(ME)
    assert end_dead(mine) == [0]
    assert read_record(mine.directory(0)).status is Status.INTERRUPTED
    mine.queue()
    again = mine.take()
    assert (again.number, again.point.params) == (1, taken.point.params)
    assert len(mine.counted()) == 1


def test_a_trial_that_an_earlier_sweep_of_this_process_left_is_closed(make):
    make(ME).take()
    assert end_dead(make(ME)) == [0]


def test_a_trial_whose_worker_outlived_its_sweep_is_left_until_it_ends(make):
    dead = make(gone())
    dead.take()
    finish(dead, 0, Status.RUNNING, owner=ME)
    mine = make(Owner(ME.host, os.getppid(), 0.0))
    assert end_dead(mine) == []
    finish(dead, 0, accuracy=0.9, owner=ME)
    assert end_dead(mine) == [0]
    assert mine.views()[0].values == (0.9,)


def test_what_a_process_told_before_it_went_is_seen_by_one_that_had_read_the_study_earlier(make):
    other, mine = make(gone()), make(ME)
    taken = other.take()
    assert mine.views()[0].status is Status.RUNNING
    finish(other, taken.number)
    end(other, taken.number)
    assert not mine.take_over_dead_trials()
    assert mine.views()[0].status is Status.FINISHED


def test_a_living_process_and_another_host_are_left_alone(make):
    elsewhere = make(Owner("another-host", 1, 0.0))
    elsewhere.take()
    finish(elsewhere, 0, Status.RUNNING, owner=Owner("another-host", 1, 0.0))
    assert end_dead(make(ME)) == []


def test_a_trial_whose_heart_stood_still_is_taken_from_a_process_on_any_host_which_finds_out(make):
    alive = Owner.of(os.getppid())
    for owner in (Owner("another-host", 1, 0.0), alive):
        frozen, mine, worker = make(owner), make(ME), Owner("of-its-job", 2, 0.0)
        taken = frozen.take()
        number, trial_id = taken.number, taken.trial._trial_id
        assert frozen.study._storage.beats[-1] == trial_id, "its heart beats before it is signed"
        finish(frozen, number, Status.RUNNING, owner=worker)
        assert not mine.take_over_dead_trials()
        frozen.study._storage.silent.add(trial_id)
        assert (mine.take_over_dead_trials(), mine.lost_owners) == ([number], {owner, worker})
        assert not make(ME).take_over_dead_trials(), "the heart beats for whoever closes the trial"
        assert not frozen.holds(number)
        finish(frozen, number, accuracy=0.9, owner=owner)
        frozen.tell(number, read_record(frozen.directory(number)))
        assert mine.views()[number].status is Status.RUNNING, "what woke up has nothing to say any more"
        finish(mine, number, Status.RUNNING)
        assert end(mine, number).status is Status.INTERRUPTED


def test_an_end_whose_answer_was_lost_is_not_told_again(make, monkeypatch):
    study = make(ME)
    number = study.take().number
    finish(study, number)
    assert not study.take_over_dead_trials(), "its end is about to be told"
    tell = study.study.tell

    def tell_and_lose_the_answer(*args, **kwargs):
        tell(*args, **kwargs)
        raise StorageInternalError("the connection broke")

    monkeypatch.setattr(study.study, "tell", tell_and_lose_the_answer)
    with pytest.raises(StorageInternalError):
        study.tell(number, read_record(study.directory(number)))
    monkeypatch.undo()
    assert not study.holds(number)
    study.tell(number, read_record(study.directory(number)))
    assert (study.views()[number].status, study.owned_trials) == (Status.FINISHED, {})


def test_an_interrupted_point_is_queued_as_what_continues_it(make):
    study = make(ME)
    taken = study.take()
    finish(study, taken.number, Status.RUNNING)
    end(study, taken.number)
    only = Space({key: CategoricalDistribution([value]) for key, value in taken.point.params.items()}, [])
    assert make(ME, space=only).has_more()
    study.queue()
    again = study.take()
    assert (again.attribute("continues"), again.point.params) == (taken.number, taken.point.params)
    finish(study, again.number)
    end(study, again.number)
    assert study.take().attribute("continues") is None


def test_an_interrupted_baseline_comes_before_the_points_that_wait(make, monkeypatch):
    points = [Point({"freeze.layers": layers, "scheduler": "linear"}, is_baseline=layers == 0) for layers in range(4)]
    study = make(ME, points=points, is_grid=True)
    for most in (2, 1, 2):  # a person may have enqueued more
        monkeypatch.setattr(studies, "MAX_WAITING", most)
        study.queue()
        assert len(study.views()) == 2
    baseline = study.take()
    assert baseline.is_baseline
    finish(study, baseline.number, Status.RUNNING)
    end(study, baseline.number)
    study.queue()
    again = study.take()
    assert (again.is_baseline, again.attribute("continues"), again.number) == (True, baseline.number, 2)
    assert study.take().point.params["freeze.layers"] == 1


def test_a_process_with_a_reused_pid_is_dead(make):
    assert not ME.is_dead()
    assert Owner(ME.host, ME.pid, ME.started - 3600).is_dead()


def test_a_trial_that_was_asked_for_but_never_signed_is_closed(make):
    study = make(ME)
    study.study.ask()
    assert end_dead(study) == [0]
    assert study.views()[0].status == "INTERRUPTED"
    beside = make(ME, space=Space({}, []), is_grid=True)
    beside.queue()
    assert len(beside.views()) == 1, "it has no point to try again"


def test_a_point_evaluated_before_is_reused_with_its_result_and_does_not_count(make):
    point = Point({"freeze.layers": 1, "scheduler": "cosine"})
    study = make(ME, points=[point])
    study.queue()
    finish(study, study.take().number, accuracy=0.8)
    end(study, 0)
    study.study.enqueue_trial(point.params)
    other = study.take()
    reused = study.views()[1]
    assert (reused.status, reused.values, reused.attribute("reused_from")) == (Status.REUSED, (0.8,), 0)
    assert (reused.attribute("scores"), reused.attribute("run_id")) == ({"accuracy": 0.8}, "run")
    assert (study.views()[0].seconds, reused.seconds) == (3.0, 0)
    assert other.point.params != point.params
    assert [view.number for view in study.counted()] == [0, other.number]


def test_a_grid_goes_on_beyond_any_number_of_points_that_were_evaluated_before(make):
    space = Space({"freeze.layers": IntDistribution(0, 70)}, [])
    study = make(ME, space=space, points=space.points(), is_grid=True,
                 result_key=lambda point: str(point.params["freeze.layers"] // 70))  # fmt: skip
    study.queue()
    first = study.take()
    finish(study, first.number)
    end(study, first.number)
    assert study.take().point.params == {"freeze.layers": 70}
    assert not study.has_more()


def test_a_copy_of_a_trial_under_way_is_made_once_and_is_void_when_that_has_ended(make):
    points = Space({"seed": CategoricalDistribution([1, 2])}, []).points()
    study = make(ME, space=Space({"seed": CategoricalDistribution([1, 2])}, []), points=points, is_grid=True,
                 result_key=lambda point: "all alike")  # fmt: skip
    first = study.take()
    for _ in range(3):  # the runner asks every second
        assert study.take() is None
        study.queue()
    assert not study.has_more()
    assert [view.status for view in study.views()] == ["RUNNING", "REUSED"]
    finish(study, first.number)
    end(study, first.number)
    assert study.take() is None
    assert [study.is_void(view) for view in study.views()] == [False, True, False]
    assert study.owned_trials == {}


def test_a_search_makes_one_copy_of_a_trial_under_way_and_then_waits_for_its_end(make):
    study = make(ME, result_key=lambda point: "all alike")
    study.take()
    assert study.take() is None
    assert [view.status for view in study.views()] == ["RUNNING", "REUSED"]


def test_a_search_of_a_continuous_space_has_more_up_to_its_total(make):
    study = make(ME, space=Space({"optim.lr": FloatDistribution(0, 1)}, []), total=2)
    for has_more in (True, False):
        finish(study, study.take().number)
        end(study, len(study.views()) - 1)
        assert study.has_more() is has_more


def test_points_that_wait_outside_of_a_changed_space_are_void_and_those_under_way_go_on(make, caplog):
    before = make(ME, points=SPACE.points()[:3], is_grid=True)
    before.queue()
    taken = before.take()
    narrow = Space({**SPACE.dimensions, "freeze.layers": IntDistribution(3, 3)}, [])
    now = make(ME, space=narrow, points=narrow.points(), is_grid=True)
    now.queue()
    void, waits = Status.INTERRUPTED, Status.WAITING
    assert [view.status for view in now.views()] == [Status.RUNNING, void, void, waits, waits]
    assert now.views()[1].attribute("error") == "the sweep went on with another space"
    assert not caplog.messages
    finish(before, taken.number, Status.RUNNING)
    end(before, taken.number)
    now.refresh()
    now.queue()
    assert len(now.views()) == 5, "what was interrupted outside of the space is not tried again"
    before.queue()
    assert [view.attribute("continues") for view in before.views()[5:]] == [0, None, None], "two had never begun"


def test_a_person_enqueues_trials_in_whole_or_in_part_and_adds_ended_ones_which_count_for_nothing(make, caplog):
    study = make(ME)
    study.study.tell(study.study.ask(), 0.9)
    for params in ({"freeze.layers": 3}, {"freeze.layers": 9}, {"seed": 1}):
        study.study.enqueue_trial(params)
    with caplog.at_level("WARNING"):
        study.queue()
    outside = [message for message in caplog.messages if "lies outside of the space: it is dropped" in message]
    assert [view.status for view in study.views()] == ["REUSED", "WAITING", "INTERRUPTED", "INTERRUPTED"], outside
    assert len(outside) == 2
    taken = study.take()
    assert (taken.number, taken.point.params["freeze.layers"], [*taken.point.params]) == (1, 3, [*SPACE.dimensions])
    assert [view.number for view in study.counted()] == [1]


def test_a_trial_that_found_the_disk_full_is_to_be_tried_again(make):
    study = make(ME)
    finish(study, study.take().number, Status.FAILED, error="OSError: No space left on device: 'model'")
    assert end(study, 0).status is Status.INTERRUPTED
    assert len(study.counted()) == 0


def test_a_discrete_space_is_tried_to_its_last_point_whatever_the_sampler_draws(make):
    study = make(ME, space=Space({"freeze.layers": IntDistribution(0, 4)}, []))
    study.study.sampler = optuna.samplers.PartialFixedSampler({"freeze.layers": 2}, optuna.samplers.RandomSampler())
    tried = []
    while study.has_more():
        taken = study.take()
        tried.append(taken.point.params["freeze.layers"])
        finish(study, taken.number)
        end(study, taken.number)
    assert sorted(tried) == [0, 1, 2, 3, 4]


def test_draws_that_give_no_new_point_of_a_space_too_large_to_list_end(make, monkeypatch):
    monkeypatch.setattr(studies, "MAX_ENUMERATED_POINTS", 4)
    study = make(ME, space=Space({"freeze.layers": IntDistribution(0, 4)}, []))
    study.study.sampler = optuna.samplers.PartialFixedSampler({"freeze.layers": 2}, optuna.samplers.RandomSampler())
    finish(study, study.take().number)
    end(study, 0)
    assert study.take() is None
    assert len(study.views()) == 1 + 2 * studies.MAX_REPEATED_DRAWS


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_objective_that_is_not_finite_is_a_failure(make, value):
    study = make(ME)
    finish(study, study.take().number, accuracy=value)
    record = end(study, 0)
    assert record.status is Status.FAILED
    assert "not finite" in record.error
    assert read_record(study.directory(0)) == record
    assert study.views()[0].trial.state.name == "FAIL"


@pytest.mark.parametrize(("status", "state"), [(Status.PRUNED, "PRUNED"), (Status.DIVERGED, "FAIL"),
                                               (Status.OUT_OF_MEMORY, "FAIL"), (Status.FAILED, "FAIL")])  # fmt: skip
def test_each_status_of_a_trial_has_its_state_in_optuna(make, status, state):
    study = make(ME)
    finish(study, study.take().number, status, error="why")
    assert end(study, 0).status is status
    view = study.views()[0]
    assert (view.trial.state.name, view.status, view.attribute("error")) == (state, status, "why")
    study.study.enqueue_trial(view.point.params)
    study.take()
    assert (study.views()[1].status, study.views()[1].trial.state.name) == (Status.REUSED, state)


def test_what_was_pruned_by_one_of_several_objectives_has_failed_for_optuna_and_is_reused_as_pruned(make):
    both = make(ME, objectives=("accuracy", "train_flops"), result_key=lambda point: "all alike")
    both.study._directions = both.study._storage._studies[0].directions = [StudyDirection.MAXIMIZE] * 2
    taken = both.take()
    both.study._storage.set_trial_intermediate_value(taken.trial._trial_id, 1, 0.25)
    finish(both, taken.number, Status.PRUNED, error="behind at evaluation 1")
    end(both, taken.number)
    assert both.take() is None, "every other point would train the same trial"
    first, second = both.views()[:2]
    assert (first.trial.state.name, first.status, first.attribute("error")) == (
        "FAIL",
        "PRUNED",
        "behind at evaluation 1",
    )
    assert (second.trial.state.name, second.status, second.trial.intermediate_values) == ("FAIL", "REUSED", {1: 0.25})


def test_a_job_that_left_no_end_has_failed_with_what_the_launcher_said_or_else_with_what_it_said_itself(make):
    study = make(ME)
    study.take()
    finish(study, 0, Status.INTERRUPTED, error="interrupted")
    assert study.finalize_record(0, Status.FAILED, None).error == "interrupted"
    finish(study, 0, Status.RUNNING, error="interrupted")
    record = end(study, 0, Status.FAILED, "TerminatedWorkerError: killed")
    assert (record.status, record.error) == (Status.FAILED, "TerminatedWorkerError: killed")
    assert study.views()[0].status is Status.FAILED


def test_a_point_that_is_no_trial_fails_and_the_next_is_taken(make):
    def picky(point: Point) -> str:
        if point.params["scheduler"] == "linear":
            raise SettingsError("scheduler must be cosine")
        return result_key(point)

    study = make(ME, result_key=picky, points=[Point({"freeze.layers": 0, "scheduler": "linear"})])
    study.queue()
    assert study.take().point.params["scheduler"] == "cosine"
    assert study.views()[0].attribute("error") == "scheduler must be cosine"


def test_failed_trials_are_retried_when_asked_for(make):
    study = make(ME)
    finish(study, study.take().number, Status.FAILED, error="disk full")
    end(study, 0)
    retrying = make(ME)
    retrying.retry.add(0)
    retrying.queue()
    again = retrying.take()
    assert again.point.params == study.views()[0].trial.params
    finish(retrying, again.number)
    end(retrying, again.number)
    assert [view.number for view in make(ME).counted()] == [again.number], "without asking again, too"


def test_the_size_of_a_space_is_known_where_it_can_be_counted():
    assert SPACE.size == 8
    assert Space({"optim.lr": FloatDistribution(0, 1)}, []).size is None
    assert Space({"optim.lr": FloatDistribution(0, 1, step=0.25)}, []).size == 5
    assert [p.params["optim.lr"] for p in Space({"optim.lr": FloatDistribution(0, 1, step=0.5)}, []).points()] == [
        0,
        0.5,
        1,
    ]
