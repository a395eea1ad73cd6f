"""Which of several workers, that find a sweep at its end, writes the report."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest

from distilbench.sweep.reporting import REPORTED, reporting
from distilbench.sweep.storage import storage_at


@pytest.fixture
def worker(tmp_path):
    """``worker(ends) -> bool``: whether a worker that begins now writes the report of so many ended trials."""
    study, storage = optuna.create_study(), storage_at(None, None, tmp_path)

    class Worker:
        def __init__(self, grace_seconds: float = 60) -> None:
            self.study, self.storage, self._grace = study, storage, grace_seconds
            self._before = study.user_attrs.get(REPORTED)

        def at_the_end(self, ends: int = 3):
            return reporting(study, storage, ends, self._before, self._grace)

        def writes(self, ends: int = 3) -> bool:
            with self.at_the_end(ends) as is_due:
                return is_due

    return Worker


def test_one_writes_it_the_others_do_not_and_the_same_command_again_does(worker):
    first, second = worker(), worker()
    assert first.writes()
    assert not second.writes()
    assert second.writes(4), "of one more trial"
    assert not first.writes(4)
    assert worker().writes(4)


def test_the_others_wait_until_it_is_written(worker):
    first, second = worker(), worker()
    with ThreadPoolExecutor() as threads:
        with first.at_the_end() as is_due:
            waiting = threads.submit(second.writes)
            assert is_due
        assert not waiting.result(60)


def test_the_next_writes_it_where_the_first_is_killed_or_stands_still(worker):
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
    assert REPORTED not in first.study.user_attrs
