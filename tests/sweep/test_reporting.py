"""Which of several workers, that find a sweep at its end, writes the report; what a dry run says beside its points."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import optuna
import pytest
from optuna.distributions import IntDistribution

from distilbench.results import Status
from distilbench.sweep.reporting import REPORT_ATTRIBUTE, Leaderboard, _warning, claim_report
from distilbench.sweep.space import Point
from distilbench.sweep.storage import storage_at


@pytest.fixture
def worker(tmp_path):
    """``worker(ends) -> bool``: whether a worker that begins now writes the report of so many ended trials."""
    study, storage = optuna.create_study(), storage_at(None, None, tmp_path)

    class Worker:
        def __init__(self, grace_seconds: float = 60) -> None:
            self.study, self.storage, self._grace = study, storage, grace_seconds
            self._before = study.user_attrs.get(REPORT_ATTRIBUTE)

        def at_the_end(self, ends: int = 3):
            return claim_report(study, storage, ends, self._before, self._grace)

        def writes(self, ends: int = 3) -> bool:
            with self.at_the_end(ends) as is_due:
                return is_due

    return Worker


def test_one_worker_writes_the_report_and_the_same_command_again_does(worker):
    first, second = worker(), worker()
    assert first.writes()
    assert not second.writes()
    assert second.writes(4), "of one more trial"
    assert not first.writes(4)
    assert worker().writes(4)


def test_other_workers_wait_until_the_report_is_written(worker):
    first, second = worker(), worker()
    with ThreadPoolExecutor() as threads:
        with first.at_the_end() as is_due:
            waiting = threads.submit(second.writes)
            assert is_due
        assert not waiting.result(60)


def test_the_next_worker_writes_the_report_if_the_first_is_killed_or_hangs(worker):
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        with worker().at_the_end():
            os.write(write, b"1")
            signal.pause()
    os.read(ready, 1)
    assert worker(grace_seconds=0.05).writes()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert worker().writes()


def test_a_report_that_is_cut_short_counts_for_nothing(worker):
    first = worker()
    with pytest.raises(KeyboardInterrupt), first.at_the_end():
        raise KeyboardInterrupt
    assert REPORT_ATTRIBUTE not in first.study.user_attrs


def plan(points, total, seeds=None, dimensions=("freeze.layers",), margin=1.0):
    space = SimpleNamespace(dimensions=dict.fromkeys(dimensions, IntDistribution(0, 3)))
    settings = SimpleNamespace(sweep=SimpleNamespace(seeds=seeds), margin=margin)
    return SimpleNamespace(points=points, total=total, space=space, settings=settings)


@pytest.mark.parametrize(
    ("made", "examples", "said"),
    [
        (plan([Point({}, (), True)], 12), 872, "1 seed on 872 examples would .* 1 point with .* (of 11 settings, 6 %"),
        (plan([Point({"freeze.layers": k, "seed": s}, (), k == 0) for s in (1, 2, 3) for k in (0, 1, 2)], 9,
              dimensions=("freeze.layers", "seed")), 872, "3 seeds on 872 .* (of 2 settings, .*with 5 seeds would"),
        (plan([Point({"freeze.layers": 3})], 1, seeds=[1, 2]), 3_500, "2 seeds on 3,500 .* (of 1 setting, .*; 5 seeds"),
        (plan([Point({"freeze.layers": 3})], 1, seeds=[1, 2, 3, 4, 5]), 3_500, None),
        (plan([Point({}, (), True)], 12, margin=5.0), 872, None),
    ],
)  # fmt: skip
def test_a_dry_run_warns_where_seeds_and_examples_cannot_show_the_margin(made, examples, said):
    import re

    warning = _warning(made, examples)
    assert (warning is None) == (said is None)
    if said:
        assert re.search(said.replace("(", r"\("), warning), warning


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ((0.9, 0.5, 0.8, 0.6), "90.00 % (trial 0), the baseline"),
        ((0.6, 0.9, 0.8, 0.7), "90.00 % (trial 1), the baseline"),
        ((0.7, 0.5, 0.6, 0.8), "80.00 % (trial 3) against the baseline's 50.00 %"),
    ],
)
def test_the_best_trial_is_told_beside_its_own_baseline(scores, told):
    points = [Point({"model": model, "freeze.layers": k}, is_baseline=k == 0) for k in (0, 3) for model in "ab"]
    trials = [
        SimpleNamespace(point=point, is_baseline=point.is_baseline, values=(score,), status=Status.FINISHED,
                        path=str(number), seconds=0.0)
        for number, (point, score) in enumerate(zip(points, scores, strict=True))
    ]  # fmt: skip
    plan = SimpleNamespace(objectives=("accuracy",), directions=["maximize"], total=3, outside_baselines=())
    assert Leaderboard(trials, plan).line() == f"4 of 4 trials, best accuracy {told}", "3 were asked for"
