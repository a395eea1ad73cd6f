"""Whose a sweep's report is, of several workers that find it at its end."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace

import optuna
import pytest

from distilbench.results import Owner
from distilbench.sweep import reporting
from distilbench.sweep.reporting import ReportClaim

ELSEWHERE = Owner("another.example", 1, 0.0)


@pytest.fixture
def study(monkeypatch):
    monkeypatch.setattr(reporting.time, "sleep", lambda seconds: None)
    return optuna.create_study()


def worker(study, grace_seconds: float = 60) -> ReportClaim:
    return ReportClaim(study, SimpleNamespace(lock=nullcontext), grace_seconds)


def claimed(study, owner: Owner, ends: int = 3) -> None:
    """Have another process begin to write the report."""
    study.set_user_attr(reporting.CLAIM, {"ends": ends, "owner": asdict(owner), "at": 0.0})


def test_one_writes_the_report_and_the_others_go_once_it_is_written(study):
    first, second = worker(study), worker(study)
    assert first.take(3)
    with first.writing():
        pass
    assert not second.take(3)
    assert second.take(4), "of one more trial"
    with second.writing():
        pass
    assert not first.take(4)
    assert worker(study).take(4), "the same command again writes it again"


def test_another_waits_for_as_long_as_the_heart_of_the_report_beats(study, monkeypatch):
    waiting, pauses = worker(study, grace_seconds=0.2), []
    claimed(study, ELSEWHERE)

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        study.set_user_attr(reporting.BEAT, len(pauses))
        if len(pauses) == 5:
            study.set_user_attr(reporting.WRITTEN, study.user_attrs[reporting.CLAIM])

    monkeypatch.setattr(reporting.time, "sleep", pause)
    assert not waiting.take(3)
    assert pauses == sorted(pauses)
    assert len(pauses) == 5


def test_whoever_waits_takes_over_from_one_whose_heart_stands_still(study):
    claimed(study, ELSEWHERE)
    assert worker(study, grace_seconds=0.05).take(3)


def test_whoever_waits_takes_over_at_once_from_a_process_of_this_host_that_is_gone(study):
    me = Owner.of_this_process()
    claimed(study, Owner(me.host, me.pid, me.started - 3600))
    assert worker(study).take(3)


def test_a_report_that_was_cut_short_is_not_written(study):
    first = worker(study)
    assert first.take(3)
    with pytest.raises(KeyboardInterrupt), first.writing():
        raise KeyboardInterrupt
    assert reporting.WRITTEN not in study.user_attrs
